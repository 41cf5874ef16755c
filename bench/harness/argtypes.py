"""Types for the options of commands, so that a value out of range is an error of argparse and exits with 2."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import torch


def count(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number, at least 1, got {text!r}")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Such numbers, separated by commas."""
    return tuple(count(x) for x in text.split(","))


def seconds(text: str) -> float:
    """A positive number; "inf" is no limit."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def file(text: str) -> Path:
    """A file that exists."""
    if not Path(text).is_file():
        raise ArgumentTypeError(f"expected a file, got {text!r}")
    return Path(text)


def output(text: str) -> Path:
    """A file to write, whose folder exists."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


def device(text: str) -> str:
    """A type of device on which this machine's torch computes."""
    if text not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise ArgumentTypeError("torch finds no CUDA device on this machine")
    return text
