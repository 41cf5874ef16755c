"""Kernel configurations: an `override` scope, else the table of the architecture, else a heuristic."""

from .config import Config, override
from .select import architecture, config, key, validated

__all__ = ["Config", "architecture", "config", "key", "override", "validated"]
