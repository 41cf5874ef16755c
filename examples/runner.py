"""Shared code of the examples: missing packages, ranges of options, output directories and Ctrl-C.

It imports only the standard library, so that it can report a missing package.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
INTERRUPTED = 130  # the exit status that shells expect after Ctrl-C


def need(*packages: str) -> None:
    """Exit with one line about the first of these packages that is not installed, and the command to install it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            extras = "triton,demo" if package == "triton" else "demo"
            name = Path(sys.argv[0]).name
            sys.exit(f"{name}: the package {package} is missing. Install it in {ROOT}: pip install -e '.[{extras}]'")


@contextlib.contextmanager
def imports(*later: str) -> Iterator[None]:
    """Report missing packages of the imports in the block; `later`: packages that are imported later."""
    try:
        need(*later)
        yield
    except ModuleNotFoundError as error:
        need(str(error.name).partition(".")[0])
        raise  # the package is installed, but one of its modules is missing
    except KeyboardInterrupt:
        _interrupted(KeyboardInterrupt())


@dataclass(frozen=True)
class Within:
    """A `type` for add_argument: numbers from low to high, both included. NaN and infinity are never accepted."""

    kind: type[int] | type[float]
    low: float
    high: float = math.inf

    def __call__(self, text: str) -> int | float:
        with contextlib.suppress(ValueError):
            value = self.kind(text)
            if self.low <= value <= self.high and value != math.inf:
                return value
        what = "a whole number" if self.kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what}, {self}, not {text!r}")

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high == math.inf else f"{self.low} to {self.high}"


SEED = Within(int, 0, 2**63 - 1)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option --out, which all examples have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("out"), help="directory for pictures (default ./%(default)s)")
    return made


def add_numbers(parser: argparse.ArgumentParser, *options: tuple[str, Within, float, str]) -> None:
    """Add options (name, range, default, meaning); their help shows range and default."""
    for name, allowed, default, meaning in options:
        text = f"{meaning}, {allowed} (default %(default)s)"
        parser.add_argument(f"--{name}", type=allowed, default=default, help=text)


def prepare(directory: Path) -> None:
    """Create the directory and write to it once, so that a read-only one is reported before a long run."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or error
        sys.exit(f"{Path(sys.argv[0]).name}: cannot write to {directory}: {reason}. Choose a directory with --out.")


@contextlib.contextmanager
def complete(path: Path) -> Iterator[Path]:
    """A temporary file that replaces path when the block succeeds and is removed otherwise."""
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def counted(progress: Any) -> Iterator[Any]:
    """Show a rich Progress in the block; Ctrl-C reports the current step."""
    try:
        with progress:
            yield progress
    except KeyboardInterrupt:
        done, total = (int(sum(getattr(x, name) for x in progress.tasks)) for name in ("completed", "total"))
        raise KeyboardInterrupt(f"Interrupted at step {done} of {total}") from None


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with main's status, or with one line after Ctrl-C (status 130) or if FUSED_ATTN_BACKEND cannot be used."""
    try:
        status = main()
    except KeyboardInterrupt as stop:
        _interrupted(stop)
    except ValueError as error:
        if "FUSED_ATTN_BACKEND" not in str(error):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    sys.exit(status)


def _interrupted(stop: KeyboardInterrupt) -> NoReturn:
    print(str(stop) or "Interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)
