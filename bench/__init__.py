"""Measurements: commands here, over harness/ (timing), compiler/ (ahead of time) and evidence/ (GPU checks)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
