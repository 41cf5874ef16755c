"""The vocabulary: what an attention problem is, in words that every backend shares.

Shapes are heads-first: q (B, Hq, M, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv). Row i counts queries, column j keys,
and query head h reads key-value head h // (Hq // Hkv). The score of (i, j) is, in this order:

    softcap(score(q_i, k_j) * scale)  + bias  - slope * |i + offset - j|,   -inf where the mask forbids it

`materialize()` is the executable meaning of a noun; the reference is built from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

ALIGNMENTS = ("top_left", "bottom_right")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
NORMALIZERS = ("softmax", "softmax1", "sigmoid")
# What a backend may be asked for a gradient of. "parameter", of a score that is not lowered yet, is none of them.
DIFFERENTIABLE = ("q", "k", "v", "scale", "softcap", "bias", "slopes", "sink", "w", "row_terms", "key_terms")


class BackendError(ValueError):
    """The backend that was asked for cannot run this problem; the message lists every reason."""


class TransformError(BackendError, NotImplementedError):
    """A transform of torch (forward AD, torch.func, double backward) that this backend does not have yet."""


def diagonal_offset(alignment: str | None, m: int, n: int, what: str) -> int:
    """The offset of the diagonal j = i + offset: 0 for "top_left", N - M for "bottom_right"."""
    if alignment is None:
        if m != n:
            raise ValueError(f'alignment: {what} with M = {m} and N = {n} needs "top_left" or "bottom_right", got None')
        return 0
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment: expected one of {ALIGNMENTS}, got {alignment!r}")
    return 0 if alignment == "top_left" else n - m


def _tighter(a: Any, b: Any, pick: Callable) -> Any:
    """Intersection of two bounds of which None is no bound."""
    if a is None or b is None:
        return b if a is None else a
    return pick(a, b)


@dataclass(frozen=True)
class Span:
    """An interval of keys per row: row i may see j where

        i + left <= j <= i + right   and   lo[b, i] <= j < hi[b, i].

    None is no bound. lo and hi are int32 (B or 1, M), and neither decreases with i; that is what lets a tile of keys
    find its rows. A row whose bounds cross sees nothing.
    """

    left: int | None = None
    right: int | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None

    def __and__(self, other: Span) -> Span:
        return Span(
            _tighter(self.left, other.left, max),
            _tighter(self.right, other.right, min),
            _tighter(self.lo, other.lo, torch.maximum),
            _tighter(self.hi, other.hi, torch.minimum),
        )

    @property
    def unbounded(self) -> bool:
        return self.left is None and self.right is None and self.lo is None and self.hi is None

    def bounds(self, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """lo, hi (B or 1, len(rows)) int64: row i may see lo <= j < hi, with every bound of this span joined."""
        lo, hi = torch.zeros_like(rows)[None], torch.full_like(rows, n)[None]
        if self.left is not None:
            lo = torch.maximum(lo, rows + self.left)
        if self.right is not None:
            hi = torch.minimum(hi, rows + self.right + 1)
        if self.lo is not None:
            lo = torch.maximum(lo, self.lo[:, rows])
        if self.hi is not None:
            hi = torch.minimum(hi, self.hi[:, rows])
        return lo, hi

    def materialize(self, rows: Tensor, cols: Tensor, n: int) -> Tensor:
        """bool (B or 1, 1, rows, cols), True where row may see column."""
        lo, hi = self.bounds(rows, n)
        return ((cols >= lo[..., None]) & (cols < hi[..., None]))[:, None]

    def columns(self, n: int) -> tuple[Tensor | None, Tensor | None]:
        """The transpose of lo and hi: int32 (B or 1, N), key j is seen by rows start <= i < stop as far as they say."""
        keys = None
        start = stop = None
        if self.hi is not None:
            keys = torch.arange(n, device=self.hi.device, dtype=torch.int32).expand(self.hi.shape[0], n).contiguous()
            start = torch.searchsorted(self.hi.contiguous(), keys, right=True, out_int32=True)
        if self.lo is not None:
            keys = torch.arange(n, device=self.lo.device, dtype=torch.int32).expand(self.lo.shape[0], n).contiguous()
            stop = torch.searchsorted(self.lo.contiguous(), keys, right=True, out_int32=True)
        return start, stop


@dataclass(frozen=True, eq=False)
class Mask:
    """Who may attend to whom: an interval of keys per row, wherever it can be said so, and a bool tensor for the rest.

    Build one with `Mask.causal`, `Mask.window`, `Mask.prefix`, `Mask.segments`, `Mask.lengths` or `Mask.tensor`, and
    intersect them with `&`. The intervals cost no memory and let kernels skip what nobody may see.

    >>> import torch, fused_attn
    >>> x = torch.randn(1, 2, 16, 8)
    >>> near = fused_attn.Mask.causal() & fused_attn.Mask.window(4, 0)
    >>> fused_attn.attention(x, x, x, mask=near).shape
    torch.Size([1, 2, 16, 8])
    """

    parts: tuple[Callable[[int, int, int], Span], ...] = ()
    remainder: tuple[Tensor, ...] = ()

    @staticmethod
    def causal(alignment: str | None = None) -> Mask:
        """Row i sees keys j <= i + offset; alignment "top_left" puts offset at 0, "bottom_right" at N - M."""
        return Mask.window(None, 0, alignment)

    @staticmethod
    def window(left: int | None, right: int | None, alignment: str | None = None) -> Mask:
        """Row i sees `left` keys before its diagonal and `right` after it; None is unbounded."""
        left, right = check_window((left, right))

        def part(b: int, m: int, n: int) -> Span:
            if left is None and right is None:
                return Span()
            offset = diagonal_offset(alignment, m, n, "a causal mask or window")
            return Span(None if left is None else offset - left, None if right is None else offset + right)

        return Mask((part,))

    @staticmethod
    def prefix(lengths: Tensor, alignment: str | None = None) -> Mask:
        """Every row of batch b sees the first lengths[b] keys, and the rest causally. lengths: int (B,)."""
        check_integers("lengths", lengths, 1)

        def part(b: int, m: int, n: int) -> Span:
            check_batch("lengths", lengths, b)
            offset = diagonal_offset(alignment, m, n, "a prefix mask")
            rows = torch.arange(m, device=lengths.device)
            hi = torch.maximum(lengths[:, None].long(), rows + offset + 1).clamp(0, n)
            return Span(hi=hi.int())

        return Mask((part,))

    @staticmethod
    def lengths(kv: Tensor, q: Tensor | None = None) -> Mask:
        """Batch b has kv[b] keys and, when q is given, q[b] queries; what lies beyond is padding. int (B,)."""
        check_integers("kv", kv, 1)
        if q is not None:
            check_integers("q", q, 1)

        def part(b: int, m: int, n: int) -> Span:
            check_batch("kv", kv, b)
            hi = kv[:, None].clamp(0, n).expand(-1, m)
            if q is None:
                return Span(hi=hi.int().contiguous())
            check_batch("q", q, b)
            tail = torch.arange(m, device=kv.device) >= q[:, None]
            # A padded row is empty at the far end, so that neither bound decreases.
            return Span(lo=(tail * n).int(), hi=torch.where(tail, n, hi).int())

        return Mask((part,))

    @staticmethod
    def segments(q_ids: Tensor, kv_ids: Tensor | None = None) -> Mask:
        """A row sees the keys of its own segment. Ids: int (M,) or (B, M) and (N,) or (B, N), non-decreasing."""
        kv_ids = q_ids if kv_ids is None else kv_ids
        ids = {"q_ids": q_ids, "kv_ids": kv_ids}
        for name, value in ids.items():
            check_integers(name, value, 1, 2)
            if value.shape[-1] > 1 and bool((value[..., 1:] < value[..., :-1]).any()):
                raise ValueError(f"{name}: segment ids must not decrease along a row")

        def part(b: int, m: int, n: int) -> Span:
            for (name, value), length in zip(ids.items(), (m, n), strict=True):
                if value.shape[-1] != length or (value.ndim == 2 and value.shape[0] not in (1, b)):
                    raise ValueError(f"{name}: expected shape ({length},) or ({b}, {length}), got {tuple(value.shape)}")
            batch = max(x.shape[0] if x.ndim == 2 else 1 for x in ids.values())
            wanted = q_ids.expand(batch, m).contiguous()
            sorted_keys = kv_ids.expand(batch, n).to(wanted.dtype).contiguous()
            lo = torch.searchsorted(sorted_keys, wanted, out_int32=True)
            hi = torch.searchsorted(sorted_keys, wanted, right=True, out_int32=True)
            return Span(lo=lo, hi=hi)

        return Mask((part,))

    @staticmethod
    def tensor(allowed: Tensor) -> Mask:
        """A bool tensor broadcastable to (B, Hq, M, N), True where a row may attend."""
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {describe(allowed)}")
        return Mask(remainder=(allowed,))

    def __and__(self, other: Mask | Tensor) -> Mask:
        other = other if isinstance(other, Mask) else Mask.tensor(other)
        return Mask(self.parts + other.parts, self.remainder + other.remainder)

    __rand__ = __and__

    def resolve(self, shape: tuple[int, int, int, int]) -> tuple[Span, Tensor | None]:
        """The span and the bool remainder, (B, Hq, M, N)-broadcastable, of this mask on a problem of that shape."""
        b, _, m, n = shape
        span = Span()
        for part in self.parts:
            span = span & part(b, m, n)
        allowed = None
        for tensor in self.remainder:
            tensor = check_broadcastable("mask", tensor, shape)
            allowed = tensor if allowed is None else allowed & tensor
        return span, allowed

    def materialize(self, shape: tuple[int, int, int, int], device: Any = None) -> Tensor:
        """bool (B, Hq, M, N), True where the row may attend."""
        span, allowed = self.resolve(shape)
        grid = span.materialize(torch.arange(shape[2], device=device), torch.arange(shape[3], device=device), shape[3])
        return (grid if allowed is None else grid & allowed).expand(shape)


@dataclass(frozen=True, eq=False)
class Dropout:
    """Counter-based dropout: the fate of (b, h, i, j) is a function of the seed and of nothing else.

    rng is int64 (2,), seed and offset, on the device. Philox 4x32 with 7 rounds is called on the counter
    (j with bit 3 cleared, i with bit 3 cleared, b * Hq + h, offset); (i, j) takes word 2 * bit3(i) + bit3(j) and lives
    where word >= round(p * 2**32). Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """

    p: float
    rng: Tensor

    @property
    def threshold(self) -> int:
        """Words below it are dropped. Clipped to 32 bits; `rescale` is zero where that would let a word through."""
        return min(round(self.p * 2**32), 2**32 - 1)

    @property
    def rescale(self) -> float:
        """What a surviving weight is multiplied by."""
        return 0.0 if round(self.p * 2**32) >= 2**32 else 1.0 / (1.0 - self.p)

    def materialize(self, heads: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """bool (*heads.shape, rows, cols), True where the weight lives; heads holds b * Hq + h."""
        i, j = rows.long()[:, None], cols.long()
        words = philox(self.rng, j & ~8, i & ~8, heads.long()[..., None, None])
        lower, upper = (torch.where((j >> 3 & 1).bool(), words[a + 1], words[a]) for a in (0, 2))
        word = torch.where((i >> 3 & 1).bool(), upper, lower)
        return word >= self.threshold


def philox(rng: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, rounds: int = 7) -> tuple[Tensor, ...]:
    """Four uint32 words, held in int64.

    Memory is overwritten wherever shapes no longer grow (after four rounds each word depends on every counter): fresh
    memory costs a CPU several times what the arithmetic does.
    """
    low = 0xFFFFFFFF
    seed, c3 = rng[0], rng[1] & low
    steps = torch.arange(rounds, device=rng.device)
    keys = (seed + 0x9E3779B9 * steps & low).unbind(), ((seed >> 32) + 0xBB67AE85 * steps & low).unbind()
    c0, c1, c2 = c0 & low, c1 & low, c2 & low
    for n, (k0, k1) in enumerate(zip(*keys, strict=True)):
        mul = Tensor.mul_ if n else Tensor.mul
        xor = Tensor.bitwise_xor_ if n >= 4 else Tensor.bitwise_xor
        # The products wrap around int64 and their 64 bits are right; what a shift drags in above 32 is masked.
        a, b = mul(c0, 0xD2511F53), mul(c2, 0xCD9E8D57)
        c0, c2 = (xor(xor(c, k), x >> 32).bitwise_and_(low) for c, k, x in ((c1, k0, b), (c3, k1, a)))
        c1, c3 = b, a
    return tuple(torch.broadcast_tensors(c0, c1.bitwise_and_(low), c2, c3.bitwise_and_(low)))


@dataclass(frozen=True, eq=False)
class Problem:
    """One call, bound and checked. Tensors are heads-first views; nothing here has been copied or expanded.

    scale, softcap: floats, or tensors () or (Hq,) for scale and () for softcap. mask (bool) and bias are 4-d and
    broadcastable to (B, Hq, M, N); slopes (Hq,) or (B, Hq); sink (Hq,). offset places the diagonal that ALiBi sees.

    score: one of `fused_attn.scores`, None for the dot product. `lower` turns it into what backends take: other q and
    k; w (D,) or (Hq, D), the weights of an additive score; row_terms (B, Hq, M) and key_terms (B, Hq, N), added to the
    product times the scale. The normalizer softmax1 becomes a sink of zeros.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | Tensor
    softcap: float | Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    sink: Tensor | None = None
    w: Tensor | None = None
    row_terms: Tensor | None = None
    key_terms: Tensor | None = None
    mask: Tensor | None = None
    span: Span = Span()
    offset: int = 0
    dropout: Dropout | None = None
    return_lse: bool = False
    deterministic: bool = True
    normalizer: str = "softmax"
    score: Any = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, M, N)."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.q.shape[1] // self.k.shape[1] if self.k.shape[1] else 1

    @property
    def empty(self) -> bool:
        """There is no score to compute."""
        return 0 in self.shape

    @property
    def plain(self) -> bool:
        """A scaled dot product under a span: no modifier, tensor mask, sink, dropout, LSE or other normalizer."""
        absent = (self.softcap, self.bias, self.slopes, self.sink, self.mask, self.dropout, self.score)
        lowered = (self.w, self.row_terms, self.key_terms)
        return (
            isinstance(self.scale, float)
            and not self.return_lse
            and self.normalizer == "softmax"
            and all(x is None for x in (*absent, *lowered))
        )

    @property
    def sigmoid(self) -> bool:
        """Each weight is of its score alone; there is no denominator and no LSE."""
        return self.normalizer == "sigmoid"

    @property
    def parameter(self) -> Any:
        """The score's own, before it is lowered."""
        return None if self.score is None else self.score.parameter

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a gradient can flow to, by name."""
        found = {name: getattr(self, name) for name in (*DIFFERENTIABLE, "parameter")}
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def replace(self, **changes: Any) -> Problem:
        return Problem(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)

    def lower(self) -> Problem:
        """The same problem without a score object and softmax1, which only the reference takes as they are."""
        p = self if self.score is None else self.score.lower(self)
        if p.normalizer != "softmax1":
            return p
        return p.replace(normalizer="softmax", sink=p.q.new_zeros(p.q.shape[1], dtype=p.lse_dtype))

    def empty_lse(self) -> Tensor:
        """An uninitialised (B, Hq, M); a sigmoid has none, which is (0,) to the operators."""
        return self.q.new_empty((0,) if self.sigmoid else self.q.shape[:3], dtype=self.lse_dtype)

    def empty_out(self) -> Tensor:
        """An uninitialised (B, Hq, M, Dv) whose memory order follows q's."""
        order, inverse = memory_order(self.q)
        shape = (*self.q.shape[:3], self.v.shape[3])
        return self.q.new_empty([shape[d] for d in order]).permute(inverse)

    def in_order(self, out: Tensor) -> Tensor:
        """out (B, Hq, M, Dv) in q's dtype and memory order."""
        order, inverse = memory_order(self.q)
        return out.to(self.q.dtype).permute(order).contiguous().permute(inverse)


def memory_order(q: Tensor) -> tuple[list[int], list[int]]:
    """The dims of a 4-d q from the slowest in memory to the fastest, the last one kept last; and the inverse."""
    strides, order = q.stride(), [0, 1, 2, 3]
    for a in (0, 1, 0):  # a stable sort of three, in comparisons that a compiler can guard
        if strides[order[a]] < strides[order[a + 1]]:
            order[a], order[a + 1] = order[a + 1], order[a]
    return order, [order.index(d) for d in range(4)]


def describe(x: Any) -> str:
    return f"{x.dtype} tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"{type(x).__name__} {x!r}"


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


def check_broadcastable(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x as a 4-d view, still broadcast, or an error that names both shapes."""
    if x.ndim > 4 or any(have not in (1, want) for have, want in zip(x.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name}: shape {tuple(x.shape)} does not broadcast to (B, Hq, M, N) = {shape}")
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
