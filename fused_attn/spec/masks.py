"""Masks: an interval of keys per row, a pattern where visibility is no interval, and a bool tensor for anything else.

Row i counts queries, column j keys. `materialize()` defines the meaning of each class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import as_bool, as_device, as_int, check_dense, check_integers, check_window, describe, is_integers
from .conditions import Allowed, Blocks, Condition, Lengths, Prefix, Segments, Window
from .patterns import Pattern
from .ragged import Ragged
from .spans import Shape, Span


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Which keys each row may attend to.

    Build one with `Mask.causal`, `window`, `prefix`, `segments`, `lengths`, `blocks` or `tensor`, and intersect them
    with `&`. Only a bool tensor needs memory for all M x N pairs. With every other mask, kernels skip fully masked
    tiles: for intervals (causal, windows, prefixes, sorted segments, lengths) by arithmetic; for unsorted segments,
    sinks and blocks by a block mask that is built on the device at each call.

    One intersection becomes a bool tensor of all M x N pairs: two windows of which the narrower one has more sinks.
    Blocks of two sizes are cut to a size that divides both.

    A mask is data: it can be pickled, copied, printed and moved (`to`), and two masks are equal if they have the same
    conditions in any order. Its tensors are stored without a copy and read at each call, so a buffer of lengths or ids
    can be refilled. There is no hash, because tensors can change.

    A key outside the interval of every row has no influence, even if it holds NaN. The same holds for a key if no row
    whose interval contains it has its id, or none shares an allowed block with it in any head. Keys that a bool tensor
    masks are computed and discarded, so NaN in them may reach the output.

    >>> import torch, fused_attn
    >>> x = torch.randn(1, 2, 16, 8)
    >>> near = fused_attn.Mask.causal() & fused_attn.Mask.window(4, 0)
    >>> fused_attn.attention(x, x, x, mask=near).shape
    torch.Size([1, 2, 16, 8])
    """

    parts: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple):
            made = "Mask.tensor(...)" if isinstance(self.parts, Tensor) else "Mask.causal() and the like"
            raise TypeError(f"Mask: expected no argument, got {describe(self.parts)}; masks are made by {made}")
        for x in self.parts:
            if not isinstance(x, Condition):
                raise TypeError(f"Mask: expected conditions, which Mask.causal() and the like make, got {describe(x)}")

    @staticmethod
    def causal(alignment: str | None = None) -> Mask:
        """Row i attends to keys j <= i + offset; offset is 0 for alignment "top_left" and N - M for "bottom_right"."""
        return Mask.window(None, 0, alignment)

    @staticmethod
    def window(left: int | None, right: int | None, alignment: str | None = None, sinks: int = 0) -> Mask:
        """Row i attends to `left` keys before its diagonal and `right` keys after it; None is unbounded.

        sinks: the number of first keys that stay visible outside the window, to its left. Xiao et al., "Efficient
        streaming language models with attention sinks", 2024.

        >>> from fused_attn import Mask
        >>> Mask.window(1, 0, sinks=2).materialize((1, 1, 5, 5)).long()[0, 0]
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 0, 1, 1]])
        """
        left, right = check_window((left, right))
        sinks = as_int("sinks", sinks)
        if sinks < 0:
            raise ValueError(f"sinks: must be >= 0, got {sinks}")
        return Mask() if left is None and right is None else Mask((Window(left, right, alignment, sinks),))

    @staticmethod
    def prefix(lengths: Tensor, alignment: str | None = None) -> Mask:
        """Rows of batch b attend to the first lengths[b] keys, and causally to others. lengths: int (B,), 0 to N."""
        check_integers("Mask.prefix(lengths)", lengths, 1)
        return Mask((Prefix(lengths, alignment),))

    @staticmethod
    def lengths(kv: Tensor, q: Tensor | None = None) -> Mask:
        """Batch b has kv[b] keys and, when q is given, q[b] queries; the others are padding.

        kv: int (B,) of any width, from 0 to N; q: the same, from 0 to M. Values are checked at each call on the CPU and
        under `fused_attn.debug()`, and clamped elsewhere.
        """
        check_integers("Mask.lengths(kv)", kv, 1)
        if q is not None:
            check_integers("Mask.lengths(q)", q, 1)
        return Mask((Lengths(kv, q),))

    @staticmethod
    def segments(q_ids: Tensor, kv_ids: Tensor | None = None, *, sorted: bool | None = None) -> Mask:
        """A row attends to the keys of its own segment. Ids: int (M,) or (B, M), (N,) or (B, N); kv_ids None: q_ids.

        Ids that never decrease along a row give intervals, which cost less; ids in any other order give a pattern.
        sorted: None checks the order at each call on the CPU, and uses the pattern, which is correct for all ids, on a
        GPU and under a compiler. True promises that the ids never decrease: a false promise is an error on the CPU and
        under `fused_attn.debug()`, and gives wrong results elsewhere. False uses the pattern. If one of the id tensors
        is uint64, both must be.

        >>> import torch
        >>> from fused_attn import Mask
        >>> Mask.segments(torch.tensor([0, 1, 0, 1])).materialize((1, 1, 4, 4)).long()[0, 0]
        tensor([[1, 0, 1, 0],
                [0, 1, 0, 1],
                [1, 0, 1, 0],
                [0, 1, 0, 1]])
        """
        keys = q_ids if kv_ids is None else kv_ids
        for name, value in (("Mask.segments(q_ids)", q_ids), ("Mask.segments(kv_ids)", keys)):
            check_integers(name, value, 1, 2)
            if value.device != q_ids.device:
                raise ValueError(f"{name}: expected q_ids' device {q_ids.device}, got {value.device}")
        if torch.uint64 in (q_ids.dtype, keys.dtype) and q_ids.dtype != keys.dtype:
            raise TypeError(f"{name}: expected q_ids' {q_ids.dtype}, as torch.uint64 needs, got {keys.dtype}")
        sorted = None if sorted is None else as_bool("sorted", sorted, "None or a bool")
        return Mask((Segments(q_ids, None if kv_ids is q_ids else kv_ids, sorted),))

    @staticmethod
    def blocks(allowed: Tensor, block: int | tuple[int, int]) -> Mask:
        """Blocks of `block` rows and keys (or a pair of sizes) are visible where allowed is True.

        allowed: bool, broadcastable to (B, Hq, ceil(M / block[0]), ceil(N / block[1])). Tiles without an allowed block
        are skipped; block sizes that are multiples of 128 fit the kernels' tiles best.

        >>> import torch
        >>> from fused_attn import Mask
        >>> Mask.blocks(torch.tensor([[True, False], [False, True]]), 2).materialize((1, 1, 3, 4)).long()[0, 0]
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 1]])
        """
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            raise TypeError(f"Mask.blocks(allowed): expected a bool tensor, got {describe(allowed)}")
        check_dense("Mask.blocks(allowed)", allowed)
        sizes = block if isinstance(block, (tuple, list)) else (block, block)
        if len(sizes) != 2:
            raise TypeError(f"block: expected an int or a pair of ints, got {describe(block)}")
        height, width = (as_int("block", x, "an int or a pair of ints") for x in sizes)
        if height < 1 or width < 1:
            raise ValueError(f"block: must be >= 1, got {block}")
        return Mask((Blocks(allowed, (height, width)),))

    @staticmethod
    def tensor(allowed: Tensor) -> Mask:
        """A bool tensor broadcastable to (B, Hq, M, N), True where a row may attend."""
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            advice = "; pass mask != 0" if is_integers(allowed) else ""
            if advice and allowed.ndim == 1:
                advice = "; if it holds the number of keys of each batch, pass fused_attn.Mask.lengths(mask)"
            if isinstance(allowed, Tensor) and allowed.is_floating_point():
                advice = "; pass values added to the scores as bias="
            raise TypeError(f"mask: expected a bool tensor, got {describe(allowed)}{advice}")
        check_dense("mask", allowed)
        return Mask((Allowed(allowed),))

    def __and__(self, other: Mask | Tensor) -> Mask:
        other = other if isinstance(other, Mask) else Mask.tensor(other)
        return Mask(self.parts + other.parts)

    __rand__ = __and__

    def __eq__(self, other: object) -> bool:
        """True if both have the same conditions, in any order."""
        if not isinstance(other, Mask):
            return NotImplemented
        return all(x in other.parts for x in self.parts) and all(x in self.parts for x in other.parts)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts)) or "Mask()"

    def to(self, device: torch.device | str | int) -> Mask:
        """A copy with all tensors on a device."""
        device = as_device(device)
        return Mask(tuple(x.to(device) for x in self.parts))

    @property
    def kv_lengths(self) -> Tensor | None:
        """kv if the mask is exactly `Mask.lengths(kv)`, else None."""
        (part,) = self.parts if len(self.parts) == 1 else (None,)
        return part.kv if isinstance(part, Lengths) and part.q is None else None

    @property
    def remainder(self) -> tuple[Tensor, ...]:
        """The bool tensors of the mask."""
        return tuple(x.allowed for x in self.parts if isinstance(x, Allowed))

    def resolve(
        self, shape: Shape, device: Any = None, ragged: Ragged | None = None
    ) -> tuple[Span, Pattern | None, Tensor | None]:
        """(span, pattern, bool tensor broadcastable to (B, Hq, M, N)) of this mask for a problem of a given shape.

        For ragged sequences M and N are the longest lengths, and the span's numbers count from each sequence's
        diagonal.
        """
        return resolve(self.parts, shape, device, ragged)

    def materialize(self, shape: Shape, device: Any = None) -> Tensor:
        """bool (B, Hq, M, N), True where the row may attend."""
        span, pattern, allowed = self.resolve(shape, device)
        rows, cols = _indices(shape, device)
        grid = span.materialize(rows, cols, shape[3])
        for other in (None if pattern is None else pattern.materialize(rows, cols), allowed):
            grid = grid if other is None else grid & other
        return grid.expand(shape)


def resolve(
    conditions: tuple[Condition, ...], shape: Shape, device: Any, ragged: Ragged | None
) -> tuple[Span, Pattern | None, Tensor | None]:
    """`Mask.resolve` of a mask with these conditions."""
    if len(conditions) == 1 and type(conditions[0]) is Window:
        return conditions[0].resolve(shape, ragged), None, None
    m, n = shape[2:]
    span, pattern, rest = Span(), None, []
    for condition in conditions:
        resolved = condition.resolve(shape, ragged)
        if isinstance(resolved, Tensor):
            rest.append(resolved)
            continue
        if isinstance(resolved, Pattern):
            pattern = resolved if pattern is None else pattern.meet(resolved, m, n)
            continue
        excess = span.excess(resolved)
        if excess is not None:
            excess = excess if ragged is None else excess.shifted(ragged.offsets())
            rest.append(excess.materialize(*_indices(shape, device), n))
        span = span & resolved
    allowed = None
    for tensor in rest:
        allowed = tensor if allowed is None else allowed & tensor
    return span, pattern, allowed


def padded_span(span: Span, ragged: Ragged) -> Span:
    """The span of ragged sequences as that of the padded batch, for `bounds` and `row_bounds`."""
    lengths = Mask.lengths(ragged.k.diff(), ragged.q.diff())
    within, _, _ = lengths.resolve((ragged.batch, 1, ragged.max_q, ragged.max_k))
    return span.shifted(ragged.offsets()) & within


def _indices(shape: Shape, device: Any) -> tuple[Tensor, Tensor]:
    """Row and key indices."""
    return torch.arange(shape[2], device=device), torch.arange(shape[3], device=device)
