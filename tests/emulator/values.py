"""Register values: scalars, tensors and pointers, with the arithmetic of the device language.

A bfloat16 or float16 tensor is held as float32 numbers that the narrow type can represent.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl

HALF = frozenset((id(tl.bfloat16), id(tl.float16)))  # the language has one object for each; comparing them is slow
NUMPY = {
    tl.int1: np.bool_, tl.int8: np.int8, tl.uint8: np.uint8, tl.int16: np.int16, tl.int32: np.int32,
    tl.uint32: np.uint32, tl.int64: np.int64, tl.uint64: np.uint64, tl.float64: np.float64,
    tl.bfloat16: np.float32, tl.float16: np.float32, tl.float32: np.float32,
}  # fmt: skip
RANK = {
    tl.int1: 0, tl.int8: 1, tl.uint8: 2, tl.int16: 3, tl.int32: 4, tl.uint32: 5, tl.int64: 6, tl.uint64: 7,
    tl.float16: 8, tl.bfloat16: 9, tl.float32: 10, tl.float64: 11,
}  # fmt: skip


class Fault(Exception):
    """What hardware or the compiler would not do, or would do to somebody's surprise."""


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """float32 numbers as the narrow dtype holds them, to nearest, ties to even."""
    if dtype is tl.bfloat16:
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return ((bits + (0x7FFF + (bits >> 16 & 1))) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return x.astype(np.float16).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- scalars


class Scalar(int):
    """An integer in registers. Where hardware would wrap, this raises."""

    dtype: Any = None

    def to(self, dtype: Any, bitcast: bool = False) -> Any:
        if dtype.is_floating():
            return tensor(np.float32(int(self)), dtype)
        if dtype == tl.int1:
            return Bool(int(self) != 0)
        return integer(int(self), dtype == tl.int64)

    def __truediv__(self, other: Any) -> Any:
        return self.to(tl.float32) / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.to(tl.float32)

    def __neg__(self) -> Any:
        return integer(-int(self), self.dtype is tl.int64)

    def __invert__(self) -> Any:
        return integer(~int(self), self.dtype is tl.int64)


class Bool(Scalar):
    dtype = tl.int1

    def __invert__(self) -> Any:
        return Bool(not self)


class Int32(Scalar):
    dtype = tl.int32


class Int64(Scalar):
    dtype = tl.int64


def integer(x: int, wide: bool = False) -> Scalar:
    if wide:
        return Int64(x)
    if not -(2**31) <= x < 2**31:
        raise Fault(f"{x} overflows int32")
    return Int32(x)


def divided(a: int, b: int) -> int:
    """As C divides: towards zero."""
    if a >= 0 and b > 0:
        return a // b
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def _scalar_operators() -> None:
    def arithmetic(f: Callable, swapped: bool) -> Callable:
        def apply(self: Scalar, other: Any) -> Any:
            if not isinstance(other, int):
                return NotImplemented
            x, y = int(self), int(other)
            found = f(y, x) if swapped else f(x, y)
            if type(self) is not Int64 and type(other) is not Int64 and -(2**31) <= found < 2**31:
                return Int32(found)
            wide = type(self) is Int64 or type(other) is Int64 or not -(2**31) <= y < 2**32
            return integer(found, wide)

        return apply

    def logic(f: Callable, swapped: bool) -> Callable:
        both = arithmetic(f, swapped)

        def apply(self: Scalar, other: Any) -> Any:
            if self.dtype is tl.int1 and isinstance(other, (bool, Bool)):
                return Bool(f(int(self), int(other)))
            return both(self, other)

        return apply

    def comparison(name: str) -> Callable:
        own = getattr(int, name)

        def apply(self: Scalar, other: Any) -> Any:
            found = own(self, other)
            return found if found is NotImplemented else Bool(found)

        return apply

    table = {
        "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": divided,
        "mod": lambda a, b: a - divided(a, b) * b, "lshift": operator.lshift, "rshift": operator.rshift,
    }  # fmt: skip
    for name, f in table.items():
        setattr(Scalar, f"__{name}__", arithmetic(f, False))
        setattr(Scalar, f"__r{name}__", arithmetic(f, True))
    for name in ("and", "or", "xor"):
        f = getattr(operator, f"__{name}__")
        setattr(Scalar, f"__{name}__", logic(f, False))
        setattr(Scalar, f"__r{name}__", logic(f, True))
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Scalar, f"__{name}__", comparison(f"__{name}__"))
    Scalar.__hash__ = int.__hash__  # type: ignore[method-assign]


_scalar_operators()

# ---------------------------------------------------------------------------------------------------------- tensors


class Layout:
    """Layouts say which thread holds what; nothing here depends on it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Layout)

    __hash__ = None  # type: ignore[assignment]


LAYOUT = Layout()


class Tensor:
    """A register tensor. held: products in flight that own its registers."""

    __slots__ = ("_x", "dtype", "held")

    def __init__(self, x: Any, dtype: Any, held: Any = None) -> None:
        self._x, self.dtype, self.held = x, dtype, held

    @property
    def x(self) -> np.ndarray:
        if self.held is not None:
            self.held.check()
            self.held, self._x = None, self.held.value(self._x)
        return self._x

    @property
    def shape(self) -> list[int]:
        return list(self.x.shape) if self._x is not None else list(self.held.shape)

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=LAYOUT, shape=self.shape, element_ty=self.dtype, scalar=self.dtype)

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape))

    def to(self, dtype: Any, bitcast: bool = False) -> Any:
        if bitcast:
            if id(dtype) in HALF or id(self.dtype) in HALF:
                raise NotImplementedError(f"bitcast of {self.dtype} to {dtype}")
            return tensor(np.asarray(self.x).view(NUMPY[dtype]), dtype)
        if dtype is self.dtype:
            return self
        x = self.x
        x = np.trunc(x) if not dtype.is_floating() and self.dtype.is_floating() else x
        x = np.asarray(x).astype(NUMPY[dtype])
        return tensor(rounded(x, dtype) if id(dtype) in HALF else x, dtype)

    def __getitem__(self, key: Any) -> Any:
        return Tensor(np.asarray(self.x)[key], self.dtype)

    def __bool__(self) -> bool:
        if np.size(self.x) != 1:
            raise Fault("the truth of a tensor")
        return bool(self.x)

    def __neg__(self) -> Any:
        return Tensor(-self.x, self.dtype)

    def __invert__(self) -> Any:
        return Tensor(~self.x, self.dtype)

    def reshape(self, *shape: Any) -> Any:
        return Tensor(np.reshape(self.x, _dims(shape)), self.dtype)

    def permute(self, *dims: Any) -> Any:
        return Tensor(np.transpose(self.x, _dims(dims)), self.dtype)

    trans = permute

    def expand_dims(self, axis: int) -> Any:
        return Tensor(np.expand_dims(self.x, axis), self.dtype)

    def broadcast_to(self, *shape: Any) -> Any:
        return Tensor(np.broadcast_to(self.x, _dims(shape)), self.dtype)

    def split(self) -> Any:
        return tuple(Tensor(self.x[..., i], self.dtype) for i in range(2))


def _dims(given: Any) -> list[int]:
    return [int(n) for n in (given[0] if len(given) == 1 and not isinstance(given[0], int) else given)]


def tensor(x: Any, dtype: Any) -> Any:
    """A Tensor, or a Scalar where it is one integer."""
    if np.ndim(x) == 0 and not dtype.is_floating():
        if dtype is tl.int1:
            return Bool(bool(x))
        return integer(int(x), dtype in (tl.int64, tl.uint32, tl.uint64))
    return Tensor(x, dtype)


def promoted(a: Any, b: Any) -> Any:
    if a is b:
        return a
    if id(a) in HALF and id(b) in HALF:
        return tl.float32
    return a if RANK[a] >= RANK[b] else b


def operand(x: Any, beside: Any = None) -> tuple[Any, Any]:
    """(numpy value, dtype) of a Tensor or a number; a Python number takes the dtype of what stands beside it."""
    if isinstance(x, Tensor):
        return x.x, x.dtype
    if isinstance(x, (Bool, bool)):
        return np.bool_(x), tl.int1
    if isinstance(x, int):
        if isinstance(x, Scalar):
            return (np.int64(x), tl.int64) if x.dtype is tl.int64 else (np.int32(x), tl.int32)
        if beside is not None and beside is not tl.int1:
            return NUMPY[beside](x), beside
        return (np.int32(x), tl.int32) if -(2**31) <= x < 2**31 else (np.int64(x), tl.int64)
    if isinstance(x, float):
        dtype = beside if beside is not None and beside.is_floating() else tl.float32
        return np.float32(x), dtype
    raise Fault(f"{type(x).__name__} is no value of a register: {x!r}")


def binary(f: Callable, a: Any, b: Any, truth: bool = False) -> Any:
    """f of two operands in their common dtype."""
    if type(a) is Tensor and type(b) is Tensor:
        x, y, left, right = a.x, b.x, a.dtype, b.dtype
    elif isinstance(a, Tensor):
        x, left = a.x, a.dtype
        y, right = operand(b, left)
    else:
        y, right = b.x, b.dtype
        x, left = operand(a, right)
    dtype = left if left is right else promoted(left, right)
    if not (left is right is dtype):
        x, y = np.asarray(x).astype(NUMPY[dtype]), np.asarray(y).astype(NUMPY[dtype])
    found = f(x, y)
    if truth:
        return tensor(found, tl.int1)
    if id(dtype) in HALF:
        found = rounded(found, dtype)
    return tensor(found, dtype)


def floats(x: Any) -> Any:
    """An operand of a division or an elementary function."""
    if isinstance(x, Tensor):
        return x if x.dtype.is_floating() else x.to(tl.float32)
    return x.to(tl.float32) if isinstance(x, Scalar) else float(x)


def _floor(x: Any, y: Any) -> Any:
    if np.min(x) >= 0 and np.min(y) > 0:
        return x // y
    return (np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))).astype(np.result_type(x, y))


def _tensor_operators() -> None:
    def two(f: Callable, truth: bool = False) -> tuple[Callable, Callable]:
        def apply(a: Tensor, b: Any) -> Any:
            return NotImplemented if isinstance(b, Pointer) else binary(f, a, b, truth)

        return apply, lambda a, b: binary(f, b, a, truth)

    table = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor, "lshift": np.left_shift, "rshift": np.right_shift, "floordiv": _floor,
        "mod": lambda x, y: x - _floor(x, y) * y,
    }  # fmt: skip
    for name, f in table.items():
        left, right = two(f)
        setattr(Tensor, f"__{name}__", left)
        setattr(Tensor, f"__r{name}__", right)
    Tensor.__truediv__ = lambda a, b: binary(np.divide, floats(a), floats(b))  # type: ignore[attr-defined]
    Tensor.__rtruediv__ = lambda a, b: binary(np.divide, floats(b), floats(a))  # type: ignore[attr-defined]
    comparisons = {
        "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
        "ne": np.not_equal,
    }  # fmt: skip
    for name, f in comparisons.items():
        setattr(Tensor, f"__{name}__", two(f, True)[0])
    Tensor.__hash__ = None  # type: ignore[assignment]


class Pointer:
    """A place in a tensor's storage, or a tensor of places. home: a memory.Global."""

    __slots__ = ("home", "offset")

    def __init__(self, home: Any, offset: Any) -> None:
        self.home, self.offset = home, offset

    @property
    def dtype(self) -> Any:
        return tl.pointer_type(self.home.dtype)

    @property
    def type(self) -> Any:
        return SimpleNamespace(element_ty=self.home.dtype, scalar=self.dtype, layout=LAYOUT)

    def __add__(self, other: Any) -> Pointer:
        step = other.x.astype(np.int64) if isinstance(other, Tensor) else int(other)
        return Pointer(self.home, self.offset + step)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return self + -other

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.home, self.offset[key])


_tensor_operators()
