"""Who may attend to whom: an interval of keys per row, a pattern where it is no interval, a bool tensor for the rest.

Row i counts queries, column j keys. `materialize()` is the executable meaning of a noun; what else it says of itself it
says without a whole matrix.
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
    """Who may attend to whom: an interval of keys per row, wherever it can be said so, and a bool tensor for the rest.

    Build one with `Mask.causal`, `window`, `prefix`, `segments`, `lengths`, `blocks` or `tensor`, and intersect them
    with `&`. What is no tensor costs no memory for all pairs, and lets kernels skip what nobody may see: intervals
    (causal, windows, prefixes, sorted segments, lengths) by arithmetic; unsorted segments, sinks and blocks by a table
    of the tiles to visit, which is made on the device at each call.

    One intersection falls back to a bool tensor of all M x N pairs: of two windows, where the narrower one has more
    sinks. Blocks of two sizes become blocks of a size that divides both.

    A mask is data: it pickles, copies, prints and moves (`to`), and two masks are equal if they have the same
    conditions in any order. Its tensors are kept, not copied, and what they hold is read at each call, so that a buffer
    of lengths or ids may be filled anew. Because they can change, a mask has no hash.

    A key that no row's interval holds never matters, whatever it holds, NaN included; nor does one that no row whose
    interval holds it has the id of, or shares an allowed block with in any head. What a tensor hides is computed and
    thrown away, so NaN there may come out.

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
        """Row i sees keys j <= i + offset; alignment "top_left" puts offset at 0, "bottom_right" at N - M."""
        return Mask.window(None, 0, alignment)

    @staticmethod
    def window(left: int | None, right: int | None, alignment: str | None = None, sinks: int = 0) -> Mask:
        """Row i sees `left` keys before its diagonal and `right` after it; None is unbounded.

        sinks: how many of the first keys stay in sight however far they lie to the left. Xiao et al., "Efficient
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
        """Every row of batch b sees the first lengths[b] keys, and the rest causally. lengths: int (B,), 0 to N."""
        check_integers("Mask.prefix(lengths)", lengths, 1)
        return Mask((Prefix(lengths, alignment),))

    @staticmethod
    def lengths(kv: Tensor, q: Tensor | None = None) -> Mask:
        """Batch b has kv[b] keys and, when q is given, q[b] queries; what lies beyond is padding.

        kv: int (B,) of any width, from 0 to N; q: the same, from 0 to M. What they hold is checked at each call on the
        CPU, and under `fused_attn.debug()` elsewhere, where numbers outside count as the nearest inside.
        """
        check_integers("Mask.lengths(kv)", kv, 1)
        if q is not None:
            check_integers("Mask.lengths(q)", q, 1)
        return Mask((Lengths(kv, q),))

    @staticmethod
    def segments(q_ids: Tensor, kv_ids: Tensor | None = None, *, sorted: bool | None = None) -> Mask:
        """A row sees the keys of its own segment. Ids: int (M,) or (B, M), and (N,) or (B, N); kv_ids None: q_ids.

        Ids that never decrease along a row make intervals, which cost less; others, with any number of segments in
        any order, a pattern. sorted: None looks at the ids at each call where that is free, on the CPU, and takes the
        pattern, which is right for all ids, on a GPU and under a compiler. True promises that they never decrease: a
        false promise is an error where the ids are looked at, on the CPU and under `fused_attn.debug()`, and gives a
        wrong answer elsewhere. False takes the pattern. Ids of uint64 need ids of uint64 beside them.

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
        """Whole blocks of scores, `block` rows and keys in size (or a pair of sizes), seen where allowed is True.

        allowed: bool, broadcastable to (B, Hq, ceil(M / block[0]), ceil(N / block[1])). Tiles in which no block is
        allowed are skipped, wherever they lie; blocks that are multiples of 128 suit the kernels' tiles best.

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
            if isinstance(allowed, Tensor) and allowed.is_floating_point():
                advice = "; what is added to the scores is bias="
            raise TypeError(f"mask: expected a bool tensor, got {describe(allowed)}{advice}")
        check_dense("mask", allowed)
        return Mask((Allowed(allowed),))

    def __and__(self, other: Mask | Tensor) -> Mask:
        other = other if isinstance(other, Mask) else Mask.tensor(other)
        return Mask(self.parts + other.parts)

    __rand__ = __and__

    def __eq__(self, other: object) -> bool:
        """Whether both have the same conditions, in any order."""
        if not isinstance(other, Mask):
            return NotImplemented
        return all(x in other.parts for x in self.parts) and all(x in self.parts for x in other.parts)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts)) or "Mask()"

    def to(self, device: torch.device | str | int) -> Mask:
        """The same mask with its tensors on a device."""
        device = as_device(device)
        return Mask(tuple(x.to(device) for x in self.parts))

    @property
    def kv_lengths(self) -> Tensor | None:
        """kv, of a mask that is `Mask.lengths(kv)` and nothing else."""
        (part,) = self.parts if len(self.parts) == 1 else (None,)
        return part.kv if isinstance(part, Lengths) and part.q is None else None

    @property
    def remainder(self) -> tuple[Tensor, ...]:
        """Its bool tensors."""
        return tuple(x.allowed for x in self.parts if isinstance(x, Allowed))

    def resolve(
        self, shape: Shape, device: Any = None, ragged: Ragged | None = None
    ) -> tuple[Span, Pattern | None, Tensor | None]:
        """The span, the pattern and the bool remainder, (B, Hq, M, N)-broadcastable, of this mask on such a problem.

        Of ragged sequences M and N are the longest ones', and the numbers of a span count from each one's diagonal.
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
    """`Mask.resolve` of the mask that has these conditions."""
    if len(conditions) == 1 and type(conditions[0]) is Window:
        return conditions[0].resolve(shape, ragged), None, None
    m, n = shape[2:]
    span, pattern, rest = Span(), None, []
    for part in conditions:
        found = part.resolve(shape, ragged)
        if isinstance(found, Tensor):
            rest.append(found)
            continue
        if isinstance(found, Pattern):
            pattern = found if pattern is None else pattern.meet(found, m, n)
            continue
        excess = span.excess(found)
        if excess is not None:
            excess = excess if ragged is None else excess.shifted(ragged.offsets())
            rest.append(excess.materialize(*_indices(shape, device), n))
        span = span & found
    allowed = None
    for tensor in rest:
        allowed = tensor if allowed is None else allowed & tensor
    return span, pattern, allowed


def padded_span(span: Span, ragged: Ragged) -> Span:
    """A span of ragged sequences as that of a dense batch of the longest ones, for `bounds` and `seers`."""
    lengths = Mask.lengths(ragged.k.diff(), ragged.q.diff())
    within, _, _ = lengths.resolve((ragged.batch, 1, ragged.max_q, ragged.max_k))
    return span.shifted(ragged.offsets()) & within


def _indices(shape: Shape, device: Any) -> tuple[Tensor, Tensor]:
    """Of rows and of keys."""
    return torch.arange(shape[2], device=device), torch.arange(shape[3], device=device)
