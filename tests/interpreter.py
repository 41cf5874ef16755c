"""Repairs of Triton's interpreter, for tests only: the kernels keep their source untouched.

What is wrong in triton 3.6 and 3.7 (triton issue 11584 and the like): bfloat16 is held as bit patterns, and products,
arithmetic and reductions work on the patterns; float32 to bfloat16 truncates; numpy >= 2.4 refuses one-element arrays
as loop bounds (3.6); triton.language is patched anew for every call of a device function, which is half the time; and
numpy warns where hardware is silent (log 0, inf - inf). Drop each repair when its test passes without it.

One thing is stricter than those two: a mask that is no bool is refused, as the interpreter of triton 3.9 refuses it. A
scalar condition becomes an int32 tensor in the interpreter where it is broadcast.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import FunctionType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(x: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bit patterns, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _float32(handle: Any) -> Any:
    return interpreter.TensorHandle(widened(handle.data), tl.float32) if _is_bf16(handle) else handle


def _bfloat16(data: np.ndarray) -> Any:
    return interpreter.TensorHandle(narrowed(data), tl.bfloat16)


def _repair_bfloat16() -> None:
    builder = interpreter.InterpreterBuilder
    dot, cast, binary, unary = builder.create_dot, builder.cast_impl, builder.binary_op, builder.unary_op

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any, **options: Any) -> Any:
        return dot(self, _float32(a), _float32(b), d, *rest, **options)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            return _float32(source) if target.scalar == tl.float32 else cast(self, _float32(source), target)
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return _bfloat16(source.data.astype(np.float32))
        return cast(self, source, target)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (_is_bf16(left) and _is_bf16(right)):
            return binary(self, left, right, op)
        result = binary(self, _float32(left), _float32(right), op)
        return result if result.data.dtype == np.bool_ else _bfloat16(result.data)

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        return _bfloat16(op(widened(x.data))) if _is_bf16(x) else unary(self, x, op)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.binary_op, builder.unary_op = binary_op, unary_op


def _repair_loop_bounds() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any, *rest: Any) -> None:
        patch(tensor, scope, *rest)
        scope.set_attr(tensor, "__index__", lambda self: int(np.squeeze(self.handle.data)))

    interpreter._patch_lang_tensor = patch_tensor


def _patch_language_once_a_launch() -> None:
    patch = interpreter._patch_lang
    language = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda fn: patch(language)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


def _skip_overflow_checks() -> None:
    """Compiled kernels have none, and each integer operation costs four with them."""
    for builder in {
        id(b): b for b in (interpreter.interpreter_builder, interpreter.interpreter_semantic.builder)
    }.values():
        builder.options = replace(builder.options, sanitize_overflow=False)


def _silence_numpy() -> None:
    run = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
            return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call


def _refuse_wide_masks() -> None:
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked(mask: Any) -> None:
        data = mask if isinstance(mask, np.ndarray) else mask.data  # that of a descriptor is no handle
        if data.dtype != np.bool_:
            raise TypeError(f"mask: expected a bool, got {data.dtype} of shape {data.shape}")

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        checked(mask)
        return load(self, ptrs, mask, *rest, **more)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        checked(mask)
        return store(self, ptrs, value, mask, *rest, **more)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store


def install() -> None:
    """Once a process, before the first launch."""
    if getattr(interpreter, "_repaired", False):
        return
    interpreter._repaired = True
    _repair_bfloat16()
    _repair_loop_bounds()
    _patch_language_once_a_launch()
    _silence_numpy()
    _skip_overflow_checks()
    _refuse_wide_masks()
