"""What is wrong with an argument: every error names it, what it was, and what is allowed."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


def describe(x: Any) -> str:
    return f"{x.dtype} tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"{type(x).__name__} {x!r}"


def _is_bool(x: Any) -> bool:
    """bool, numpy.bool_, and 0-d arrays and tensors of either."""
    if isinstance(x, Tensor):
        return x.ndim == 0 and x.dtype == torch.bool
    return isinstance(x, bool) or (getattr(x, "ndim", None) == 0 and str(getattr(x, "dtype", "")) == "bool")


def as_int(name: str, x: Any) -> int:
    """x as an int, from anything with `__index__`: Python's and numpy's integers, 0-d tensors. A SymInt stays one."""
    if type(x) is int or isinstance(x, torch.SymInt):
        return x  # type: ignore[return-value]
    if hasattr(x, "__index__") and not _is_bool(x) and not getattr(x, "ndim", 0):
        with contextlib.suppress(TypeError):
            return operator.index(x)
    raise TypeError(f"{name}: expected an int, got {describe(x)}")


def as_float(name: str, x: Any) -> float:
    """x as a float, from anything with `__float__` or `__index__`. SymFloat and SymInt stay what they are."""
    if type(x) is float or isinstance(x, (torch.SymFloat, torch.SymInt)):
        return x  # type: ignore[return-value]
    if isinstance(x, Tensor) and x.requires_grad:
        raise TypeError(f"{name}: expected a number, which has no gradient, got {describe(x)} that requires grad")
    if not isinstance(x, str) and not _is_bool(x) and not getattr(x, "ndim", 0):
        with contextlib.suppress(TypeError, RuntimeError):  # torch raises the second for complex numbers
            return float(x if hasattr(x, "__float__") else operator.index(x))
    raise TypeError(f"{name}: expected a float, got {describe(x)}")


def as_bool(name: str, x: Any) -> bool:
    """x as a bool, from Python's, numpy's and 0-d tensors of bools. Other objects have a truth value that misleads."""
    if not _is_bool(x):
        raise TypeError(f"{name}: expected a bool, got {describe(x)}")
    return bool(x)


def check_parameter(name: str, x: Tensor, q: Tensor, *shapes: tuple[int, ...]) -> Tensor:
    """A tensor parameter of an allowed shape, dtype and device."""
    if shapes and tuple(x.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, q.dtype):
        raise TypeError(f"{name}: expected float32 or q's {q.dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
    return x


def check_integers(name: str, x: Any, *ranks: int) -> None:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {describe(x)}")
    if x.ndim not in ranks:
        raise ValueError(f"{name}: expected rank {' or '.join(map(str, ranks))}, got shape {tuple(x.shape)}")


def check_batch(name: str, x: Tensor, b: int) -> None:
    if x.shape[0] not in (1, b):
        raise ValueError(f"{name}: expected one length for each of the {b} batches, got shape {tuple(x.shape)}")


def check_broadcastable(name: str, x: Tensor, shape: tuple[int, ...], what: str = "(B, Hq, M, N)") -> Tensor:
    """x as a 4-d view, still broadcast, or an error that names both shapes."""
    if x.ndim > 4 or any(have not in (1, want) for have, want in zip(x.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name}: shape {tuple(x.shape)} does not broadcast to {what} = {shape}")
    return x if x.ndim == 4 else x[(None,) * (4 - x.ndim)]


def check_window(window: Any) -> tuple[int | None, int | None]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected a pair (left, right), got {window!r}")
    for side, x in zip(("left", "right"), window, strict=True):
        if x is not None and (isinstance(x, bool) or not isinstance(x, int)):
            raise TypeError(f"window: {side} must be None or an int, got {x!r}")
        if x is not None and x < 0:
            raise ValueError(f"window: {side} must be None or >= 0, got {x}")
    return tuple(window)


_debugging: ContextVar[bool] = ContextVar("fused_attn_debugging", default=False)


@contextlib.contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Inside, what index tensors on a device hold is checked too: sequence starts, lengths and page tables.

    On the CPU it always is. On a device a check waits for what has been launched, so it is only done when asked for;
    without it, what such tensors say is believed. Ends with the `with` block, and is seen by its thread alone.

    >>> import fused_attn
    >>> with fused_attn.debug():
    ...     pass
    """
    token = _debugging.set(enabled)
    try:
        yield
    finally:
        _debugging.reset(token)


def readable(x: Tensor) -> bool:
    """Whether the contents of an index tensor are to be checked: for free on the CPU, under `debug` elsewhere."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or x.device.type == "meta":
        return False
    return x.device.type == "cpu" or _debugging.get()


def check_starts(name: str, x: Any, total: int, device: torch.device) -> Tensor:
    """int32 (B + 1,): from 0 to total, never descending."""
    if not isinstance(x, Tensor) or x.dtype != torch.int32:
        raise TypeError(f"{name}: expected an int32 tensor, got {describe(x)}")
    if x.ndim != 1 or not len(x):
        raise ValueError(f"{name}: expected shape (B + 1,), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected q's device {device}, got {x.device}")
    if readable(x):
        first, last, falls = int(x[0]), int(x[-1]), bool((x.diff() < 0).any())
        if first != 0 or last != total or falls:
            what = "one that descends" if falls else f"{first} to {last}"
            raise ValueError(f"{name}: expected starts that ascend from 0 to the {total} packed rows, got {what}")
    return x
