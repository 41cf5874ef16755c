"""Which tile sizes a kernel runs with: override scope -> the architecture's table -> heuristic."""

from .config import Config, override
from .select import architecture, config, key, validated

__all__ = ["Config", "architecture", "config", "key", "override", "validated"]
