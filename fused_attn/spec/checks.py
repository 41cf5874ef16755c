"""Checks of arguments. Every error names the argument, its value and what is allowed."""

from __future__ import annotations

import contextlib
import itertools
import operator
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .torch_internals import dispatch_mode_count, is_batched, is_functorch_wrapped, unwrap_functorch

LONGEST = 80  # characters of a value in an error message


def describe(x: Any) -> str:
    """The type and value of an argument, for an error message; for a tensor or an array, its dtype and shape."""
    if isinstance(x, Tensor):
        return f"{x.dtype} tensor of shape {tuple(x.shape)}"
    kind = type(x).__name__
    if hasattr(x, "__array__") and getattr(x, "shape", None):
        return f"{kind} of shape {tuple(x.shape)}"
    value = repr(x)
    return f"{kind} {value if len(value) <= LONGEST else value[: LONGEST - 3] + '...'}"


def check_dense(name: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {x.layout}; pass {name}.to_dense()")


def as_int(name: str, x: Any, allowed: str = "an int") -> int:
    """An int from a Python or numpy integer, a 0-d integer tensor, or any object with `__index__` except bools.

    allowed: the expected value, for the error message.
    """
    if type(x) is int or isinstance(x, torch.SymInt):
        return x  # type: ignore[return-value]
    x = _traceable(x)
    if isinstance(x, Tensor):
        if x.ndim == 0 and x.dtype != torch.bool and not x.is_floating_point() and not x.is_complex():
            return int(x)
    elif not isinstance(x, bool) and hasattr(x, "__index__"):
        with contextlib.suppress(TypeError):  # numpy's bools and arrays have __index__, which raises
            return operator.index(x)
    raise TypeError(f"{name}: expected {allowed}, got {describe(x)}")


LARGEST = sys.float_info.max


def as_float(name: str, x: Any, allowed: str = "a float") -> float:
    """A real number as a float: from Python, numpy, a 0-d tensor without gradient, `__float__` or `__index__`.

    Bools, strings and complex numbers are refused. allowed: the expected value, for the error message.
    """
    if type(x) is float or isinstance(x, (torch.SymFloat, torch.SymInt)):
        return x  # type: ignore[return-value]
    if type(x) is int:
        if abs(x) > LARGEST:
            raise ValueError(f"{name}: must fit a float, got an int of {x.bit_length()} bits")
        return float(x)
    x = _traceable(x)
    if isinstance(x, Tensor):
        if x.requires_grad:
            raise TypeError(f"{name}: expected a number, which has no gradient, got {describe(x)} that requires grad")
        if x.ndim == 0 and x.dtype != torch.bool and not x.is_complex():
            return float(x)
    elif (hasattr(x, "__float__") or hasattr(x, "__index__")) and not isinstance(x, bool) and _real(x):
        return float(x)
    raise TypeError(f"{name}: expected {allowed}, got {describe(x)}")


def as_bool(name: str, x: Any, allowed: str = "a bool") -> bool:
    """A bool from a Python or numpy bool or a 0-d bool tensor. Strings and numbers, including 0 and 1, are refused."""
    if type(x) is bool or isinstance(x, torch.SymBool):
        return x  # type: ignore[return-value]
    x = _traceable(x)
    if isinstance(x, Tensor):
        if x.ndim == 0 and x.dtype == torch.bool:
            return bool(x)
    elif getattr(getattr(x, "dtype", None), "kind", "") == "b" and x.shape == ():
        return bool(x)
    raise TypeError(f"{name}: expected {allowed}, got {describe(x)}")


def _traceable(x: Any) -> Any:
    """A numpy number as a tensor while torch.compile traces, where it appears as an array without a dtype."""
    return torch.as_tensor(x) if torch.compiler.is_compiling() and hasattr(x, "__array__") else x


def _real(x: Any) -> bool:
    """False for numpy's bools, complex numbers, times, strings, objects and arrays, which float() may accept."""
    return getattr(getattr(x, "dtype", None), "kind", "f") not in "bcmMOSU" and not getattr(x, "shape", None)


def one_of(x: Any, choices: Iterable[Any]) -> bool:
    """`x in choices` for sizes and shapes; while tracing, `in` treats a symbolic size as unequal."""
    return any(x == choice for choice in choices)


def check_choice(name: str, x: Any, allowed: tuple[str, ...], what: str = "one of") -> None:
    if not isinstance(x, str) or x not in allowed:
        raise ValueError(f"{name}: expected {what} {allowed}, got {describe(x)}")


def check_parameter(name: str, x: Tensor, q: Tensor, *shapes: tuple[int, ...]) -> Tensor:
    """A tensor parameter of an allowed shape, dtype and device."""
    check_dense(name, x)
    if shapes and not one_of(tuple(x.shape), shapes):
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, q.dtype):
        expected = "float32" if q.dtype == torch.float32 else f"float32 or q's {q.dtype}"
        hint = "; pass it as mask=" if name == "bias" and x.dtype == torch.bool else ""
        raise TypeError(f"{name}: expected {expected}, got {x.dtype}{hint}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
    return x


def check_shape(name: str, x: Tensor, dims: str, sizes: tuple[int | None, ...]) -> None:
    """Check a shape (..., length, heads, dim) against sizes; None allows any size. dims: their names, for the error."""
    if _fits(x, sizes):
        return
    shown = ", ".join(dim if n is None else str(n) for dim, n in zip(dims.split(", "), sizes, strict=True))
    at = len(sizes) - 3
    swapped = (*sizes[:at], sizes[at + 1], sizes[at], sizes[-1])
    hint = f"; it looks heads-first: transpose({at}, {at + 1}) it" if _fits(x, swapped) else ""
    raise ValueError(f"{name}: expected shape ({dims}) = ({shown}), got {tuple(x.shape)}{hint}")


def _fits(x: Tensor, sizes: tuple[int | None, ...]) -> bool:
    return x.ndim == len(sizes) and all(n is None or n == have for n, have in zip(sizes, x.shape, strict=True))


def as_device(x: Any) -> torch.device:
    """A torch.device from a device or its name or index."""
    if isinstance(x, torch.device):
        return x
    if not isinstance(x, (str, int)) or isinstance(x, bool):
        raise TypeError(f"device: expected a torch.device, a str or an int, got {describe(x)}")
    try:
        return torch.device(x)
    except RuntimeError as error:
        raise ValueError(f"device: expected the name or index of a device, got {describe(x)}") from error


def is_integers(x: Any) -> bool:
    """True if x is an integer tensor of any width."""
    return isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def as_int32(name: str, x: Any) -> Tensor:
    """An integer tensor of any width, clamped to int32: a length or index that does not fit stays out of range."""
    if not is_integers(x):
        raise TypeError(f"{name}: expected an integer tensor, got {describe(x)}")
    check_dense(name, x)
    return x if x.dtype == torch.int32 else x.long().clamp(-(2**31), 2**31 - 1).int()


def as_starts(q: Any, k: Any) -> tuple[Tensor, Tensor]:
    """cu_seqlens_q and cu_seqlens_k of any integer width as int32; one tensor passed as both stays one tensor."""
    starts = as_int32("cu_seqlens_q", q)
    return starts, starts if k is q else as_int32("cu_seqlens_k", k)


def check_integers(name: str, x: Any, *ranks: int) -> None:
    if not is_integers(x):
        raise TypeError(f"{name}: expected an integer tensor, got {describe(x)}")
    check_dense(name, x)
    if x.ndim not in ranks:
        raise ValueError(f"{name}: expected rank {' or '.join(map(str, ranks))}, got shape {tuple(x.shape)}")


def check_batch(name: str, x: Tensor, b: int) -> None:
    if not one_of(x.shape[0], (1, b)):
        raise ValueError(f"{name}: expected one length for each of the {b} batches, got shape {tuple(x.shape)}")


def check_lengths(name: str, x: Tensor, longest: int, what: str) -> Tensor:
    """Lengths of any integer dtype as int64 in [0, longest]: checked if `readable`, clamped otherwise."""
    if not readable(x):
        return x.long().clamp(0, longest)
    held = x.tolist()
    if held and (min(held) < 0 or max(held) > longest):
        raise ValueError(f"{name}: expected lengths from 0 to {what} = {longest}, got {min(held)} to {max(held)}")
    return x.long()


def check_broadcastable(name: str, x: Tensor, shape: tuple[int, ...], what: str = "(B, Hq, M, N)") -> Tensor:
    """x as a 4-d view, not expanded. An error names both shapes."""
    if x.ndim > 4 or any(not one_of(have, (1, want)) for have, want in zip(x.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(
            f"{name}: shape {tuple(x.shape)} does not broadcast to {what} = {shape}{axes_advice(name, x, shape)}"
        )
    return x if x.ndim == 4 else x[(None,) * (4 - x.ndim)]


def axes_advice(name: str, x: Tensor, shape: tuple[int, ...]) -> str:
    """A hint for the error message: the axes that a tensor (B, N) or (B, M, N) lacks to broadcast."""
    if len(shape) != 4:
        return ""
    b, _, m, n = shape
    if tuple(x.shape) == (b, n):
        return f"; if it is (B, N), pass {name}[:, None, None]"
    if tuple(x.shape) in ((b, m, n), (b, 1, n), (b, m, 1)):
        return f"; if it is (B, M, N), pass {name}[:, None]"
    return ""


def check_window(window: Any) -> tuple[int | None, int | None]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected a pair (left, right), got {describe(window)}")
    left, right = (
        None if x is None else as_int(f"window: {side}", x, "None or an int")
        for side, x in zip(("left", "right"), window, strict=True)
    )
    for side, x in (("left", left), ("right", right)):
        if x is not None and x < 0:
            raise ValueError(f"window: {side} must be None (unbounded) or >= 0, got {x}")
    return left, right


_debugging: ContextVar[bool] = ContextVar("fused_attn_debugging", default=False)


@contextlib.contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Within the block, check index tensors on a GPU too: sequence starts, lengths, ids and page tables.

    On the CPU they are always checked. On a GPU a check synchronizes with the device, so it is off by default and wrong
    values are not detected. The setting applies to the current thread only.

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
    """True if the values of an index tensor are checked: always on the CPU, elsewhere inside `debug`."""
    if torch.compiler.is_compiling() or dispatch_mode_count() > 0 or x.device.type == "meta":
        return False
    while is_functorch_wrapped(x):  # vmap and grad nest in either order
        if is_batched(x):
            return False
        x = unwrap_functorch(x)
    return x.device.type == "cpu" or _debugging.get()


def check_starts(side: str, x: Any, total: int | None, device: torch.device, most: int | None = None) -> int | None:
    """Check starts: int32 (B + 1,), ascending from 0 to total (None: any end), no sequence longer than most.

    side: "q" or "k", for messages. Returns the longest length, or None where the values are not read.
    """
    name = f"cu_seqlens_{side}"
    if not isinstance(x, Tensor) or x.dtype != torch.int32:
        raise TypeError(f"{name}: expected an int32 tensor, got {describe(x)}")
    if x.ndim != 1 or not len(x):
        raise ValueError(f"{name}: expected shape (B + 1,), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected q's device {device}, got {x.device}")
    if not readable(x):
        return None
    starts = x.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    falls = min(lengths, default=0) < 0
    if starts[0] != 0 or total not in (None, starts[-1]) or falls:
        end = "any number of rows" if total is None else f"the {total} packed rows"
        got = "one that descends" if falls else f"{starts[0]} to {starts[-1]}"
        hint = "; if these are lengths, pass [0, *their cumulative sums]" if sum(starts) == total else ""
        raise ValueError(f"{name}: expected starts that ascend from 0 to {end}, got {got}{hint}")
    longest = max(lengths, default=0)
    if most is not None and longest > most:
        raise ValueError(f"max_seqlen_{side}: a sequence is {longest} long, got {most}")
    return longest
