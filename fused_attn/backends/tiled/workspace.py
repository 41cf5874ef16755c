"""What the tiles of a share work on: its inputs, the memory that they overwrite in turn, and their scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...spec.dropout import philox
from ...spec.problem import HALF, Problem
from . import additive
from .tiles import EVERYTHING, Share, Tile, part

LOG2E = 1 / math.log(2)
CALLS = 2**16  # of Philox at once


def work_dtype(p: Problem) -> torch.dtype:
    return torch.float32 if p.q.dtype in HALF else p.q.dtype


def number(x: float | Tensor, dtype: torch.dtype, heads: slice = EVERYTHING) -> float | Tensor:
    """A float as it is; a tensor () or (Hq,) shaped to multiply (B, Hq, M, N)."""
    if not isinstance(x, Tensor):
        return x
    return x.to(dtype) if x.ndim == 0 else x[heads].to(dtype)[:, None, None]


def indices(x: slice, device: torch.device) -> Tensor:
    return torch.arange(x.start, x.stop, device=device)


def distance_to_diagonal(p: Problem, rows: slice, keys: slice, dtype: torch.dtype) -> Tensor:
    """(M, N): how far a key lies from the row's diagonal, which is what ALiBi multiplies."""
    i = torch.arange(rows.start + p.offset, rows.stop + p.offset, device=p.q.device).to(dtype)
    return (i[:, None] - indices(keys, p.q.device).to(dtype)).abs_()


def finite_peak(m: Tensor) -> Tensor:
    """The maximum to subtract: 0 while a row has seen nothing, since -inf - -inf would be NaN."""
    return m.masked_fill(m == -torch.inf, 0)


def exp_minus(s: Tensor, peak: Tensor) -> Tensor:
    """exp(s - peak), in place. On a CPU exp2 is three times as fast as exp, and thirty times where that underflows."""
    return s.sub_(peak).mul_(LOG2E).exp2_()


def softmax_weights(s: Tensor, peak: Tensor, log_sum: Tensor) -> Tensor:
    """exp(s - peak - log_sum), in place, in as many passes: their sum would round log_sum away where peak is large."""
    return torch.add(log_sum * -LOG2E, s.sub_(peak), alpha=LOG2E, out=s).exp2_()


def _forbid(s: Tensor, allowed: Tensor) -> None:
    """s = -inf where not allowed, whatever it held. On a CPU masked_fill branches at every element; bits do not."""
    ints, minus_inf = (torch.int64, -(1 << 52)) if s.dtype == torch.float64 else (torch.int32, -(1 << 23))
    keep = allowed.to(ints).neg_()
    s.view(ints).bitwise_and_(keep).bitwise_or_(keep.bitwise_not_().bitwise_and_(minus_inf))


class Work:
    """A share of a problem: its inputs in the working dtype, and the memory that its tiles overwrite in turn.

    A tile of scores is (B, Hq, rows, keys); for products it is seen as (B * Hkv, group * rows, keys).
    """

    def __init__(self, p: Problem, share: Share, visible: tuple[Tensor, Tensor] | None) -> None:
        self.p, self.share, self.dtype = p, share, work_dtype(p)
        q, k, v = p.q[share.batch, share.heads], p.k[share.batch, share.kv_heads], p.v[share.batch, share.kv_heads]
        if visible is not None:
            rows, keys = (part(x, share.batch, *[EVERYTHING] * 3) for x in visible)
            q, k, v = torch.where(rows, q, 0), torch.where(keys, k, 0), torch.where(keys, v, 0)
        self.q = q
        k, v = (x.to(self.dtype) for x in (k, v))
        if len(share.tiles) > 1:  # else each key is read once, from where it lies
            k, v = k.contiguous(), v.contiguous()
        self.k, self.v = k.flatten(0, 1), v.flatten(0, 1)
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, tile: Tile, keys: slice) -> Tensor:
        """(B, Hq, rows, keys), holding whatever the last tile left."""
        shape = torch.Size((*self.q.shape[:2], tile.stop - tile.start, keys.stop - keys.start))
        memory = self._buffers.get(name)
        if memory is None or memory.numel() < shape.numel():
            memory = self._buffers[name] = torch.empty(shape.numel(), dtype=self.dtype, device=self.q.device)
        return memory[: shape.numel()].view(shape)

    def fold(self, x: Tensor) -> Tensor:
        """(B, Hq, rows, D) -> (B * Hkv, group * rows, D), contiguous."""
        b, heads, rows, d = x.shape
        group = self.p.group
        return x.to(self.dtype).contiguous().view(b * (heads // group), group * rows, d)

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of fold, for (B * Hkv, group * rows, anything)."""
        b, heads = self.q.shape[:2]
        return x.view(b, heads, -1, x.shape[2])

    def by_head(self, x: Tensor) -> Tensor:
        """k's tile, (B * Hkv, keys, D), as (B, Hkv, keys, D)."""
        return x.unflatten(0, (self.q.shape[0], -1))

    @property
    def w(self) -> Tensor:
        """The weights of an additive score, of this share's heads."""
        return self.p.w if self.p.w.ndim == 1 else self.p.w[self.share.heads]

    def of_rows(self, x: Tensor, tile: Tile) -> Tensor:
        """What a (B, Hq, M, D) tensor of the whole problem holds for one tile of this share, folded."""
        return self.fold(x[self.share.batch, self.share.heads, tile.rows])

    def scores(self, q: Tensor, tile: Tile, keys: slice) -> Tensor:
        """The scores of a tile; q is folded. With a softcap, buffer "tanh" holds its tanh afterwards."""
        p, share, dtype = self.p, self.share, self.dtype
        s = self.buffer("scores", tile, keys)
        factor = number(p.scale, dtype, share.heads)
        cap = None if p.softcap is None else number(p.softcap, dtype)
        if cap is not None:
            factor = factor / cap
        if p.w is None:
            # By a factor of 0 a product is not computed, and NaN in it would be lost.
            alpha = 1.0 if isinstance(factor, Tensor) or factor == 0 else factor
            apart, product = alpha is not factor, self.fold(s)
            torch.baddbmm(product, q, self.k[:, keys].mT, beta=0, alpha=alpha, out=product)
        else:
            apart = True
            additive.products(self.unfold(q), self.by_head(self.k[:, keys]), self.w, s)
        if apart:
            s.mul_(factor)
        if p.key_terms is not None:
            s.add_(p.row_terms[share.batch, share.heads, tile.rows, None])
            s.add_(p.key_terms[share.batch, share.heads, None, keys])
        if cap is not None:
            torch.mul(torch.tanh(s, out=self.buffer("tanh", tile, keys)), cap, out=s)
        if p.bias is not None:
            s.add_(part(p.bias, share.batch, share.heads, tile.rows, keys).to(dtype))
        if p.slopes is not None:
            slopes = part(p.slopes[None] if p.slopes.ndim == 1 else p.slopes, share.batch, share.heads)
            distance = distance_to_diagonal(p, tile.rows, keys, dtype).expand_as(s)
            s.sub_(torch.mul(distance, slopes[..., None, None].to(dtype), out=self.buffer("slopes", tile, keys)))
        for cut in tile.partial(keys):
            i, j = (indices(x, s.device) for x in (tile.rows, cut))
            allowed = part(p.span.materialize(i, j, p.shape[3]), share.batch, *[EVERYTHING] * 3)
            _forbid(s[..., cut.start - keys.start : cut.stop - keys.start], allowed)
        if p.pattern is not None and not tile.clear(keys):
            allowed = p.pattern.materialize(indices(tile.rows, s.device), indices(keys, s.device))
            _forbid(s, part(allowed, share.batch, share.heads, EVERYTHING, EVERYTHING))
        if p.mask is not None:
            _forbid(s, part(p.mask, share.batch, share.heads, tile.rows, keys))
        return s

    def kept(self, tile: Tile, keys: slice) -> Tensor:
        """(B, Hq, rows, keys): 1 where dropout lets a weight live, 0 elsewhere; several times as fast as `materialize`.

        Four elements share a call of Philox: it is called for the first half of each 16 rows and of each 16 keys, and
        for as many at once as stay in the cache.
        """
        p, device = self.p, self.q.device
        found = self.buffer("kept", tile, keys)
        j = _first_halves(keys, device)
        height = max(16, CALLS // len(j) // 8 * 16)
        numbers = torch.arange(p.shape[0] * p.shape[1], device=device).view(p.shape[:2])
        numbers = numbers[self.share.batch, self.share.heads] + p.dropout.first
        for start in range(tile.rows.start, tile.rows.stop, height):
            rows = slice(start, min(start + height, tile.rows.stop))
            i = _first_halves(rows, device)[:, None]
            place = slice(start - tile.rows.start, rows.stop - tile.rows.start)
            top, left = rows.start & 15, keys.start & 15
            for heads, own in zip(numbers.flatten(), found[..., place, :].flatten(0, 1), strict=True):
                words = philox(p.dropout.rng, j, i, heads)
                # The fate of eight keys is eight bytes, which move as one number.
                fates = [(word >= p.dropout.threshold).view(torch.int64) for word in words]
                halves = [torch.stack(x, -1).unflatten(0, (-1, 8)) for x in (fates[:2], fates[2:])]
                whole = torch.stack(halves, 1).view(torch.uint8).view(2 * len(i), 2 * len(j))
                own.copy_(whole[top : top + own.shape[0], left : left + own.shape[1]])
        return found


def _first_halves(x: slice, device: torch.device) -> Tensor:
    """The first 8 of every 16 indices from the multiple of 16 before x to that behind it."""
    return indices(slice(x.start & ~15, x.stop + 15 & ~15), device).view(-1, 2, 8)[:, 0].flatten()
