"""Tests for shared memory between tensor elements, from strides and addresses alone."""

from __future__ import annotations

import functools

from torch import Tensor

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # (shape, strides)


def overlaps_itself(x: Tensor) -> bool:
    """True if two elements of x share an address, as in an expanded tensor."""
    return _overlaps_itself((tuple(x.shape), x.stride()))


def overlap(x: Tensor, y: Tensor) -> bool:
    """True if an element of x shares an address with one of y; both have one dtype."""
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() or 0 in (x.numel(), y.numel()):
        return False
    apart = y.storage_offset() - x.storage_offset()
    return _overlap((tuple(x.shape), x.stride()), (tuple(y.shape), y.stride()), apart)


@functools.lru_cache(256)
def _overlaps_itself(x: Layout) -> bool:
    dims = sorted(((step, size) for size, step in zip(*x, strict=True) if size > 1), reverse=True)
    # Two indices share an address if their difference, positive in the first dim where they differ, is 0 in memory.
    for at, (step, size) in enumerate(dims):
        others = [(other, 1 - count, count - 1) for other, count in dims[at + 1 :]]
        if _is_sum(0, [(step, 1, size - 1), *others]):
            return True
    return False


@functools.lru_cache(256)
def _overlap(x: Layout, y: Layout, apart: int) -> bool:
    ranges: dict[int, list[int]] = {}  # of index differences, by stride: dims of equal stride are one unknown
    for layout, side in ((x, 1), (y, 0)):
        for size, step in zip(*layout, strict=True):
            ranges.setdefault(step, [0, 0])[side] += size - 1 if side else 1 - size
    return _is_sum(apart, sorted(((step, low, high) for step, (low, high) in ranges.items() if step), reverse=True))


def _is_sum(target: int, steps: list[tuple[int, int, int]]) -> bool:
    """True if sum(step * n) = target for some low <= n <= high; steps: (step, low, high), the largest step first."""
    if not steps:
        return target == 0
    (step, low, high), *others = steps
    if not step:
        return _is_sum(target, others)
    least, most = (sum(other * bounds[side] for other, *bounds in others) for side in (0, 1))
    first, last = max(low, -((most - target) // step)), min(high, (target - least) // step)
    return any(_is_sum(target - step * n, others) for n in range(first, last + 1))
