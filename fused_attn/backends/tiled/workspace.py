"""The workspace of a chunk: its inputs in the working dtype, buffers that every tile overwrites, and tile scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...spec.dropout import philox
from ...spec.problem import HALF, Problem
from . import additive
from .tiles import EVERYTHING, Chunk, Tile, part

LOG2E = 1 / math.log(2)
CALLS = 2**16  # Philox calls per batch


def work_dtype(p: Problem) -> torch.dtype:
    return torch.float32 if p.q.dtype in HALF else p.q.dtype


def per_head(x: float | Tensor, dtype: torch.dtype, heads: slice = EVERYTHING) -> float | Tensor:
    """A float unchanged; a tensor () or (Hq,) shaped to multiply (B, Hq, M, N)."""
    if not isinstance(x, Tensor):
        return x
    return x.to(dtype) if x.ndim == 0 else x[heads].to(dtype)[:, None, None]


def indices(x: slice, device: torch.device) -> Tensor:
    return torch.arange(x.start, x.stop, device=device)


def distance_to_diagonal(p: Problem, rows: slice, keys: slice, dtype: torch.dtype) -> Tensor:
    """(rows, keys): |i + offset - j|, the distance that ALiBi multiplies."""
    i = torch.arange(rows.start + p.offset, rows.stop + p.offset, device=p.q.device).to(dtype)
    return (i[:, None] - indices(keys, p.q.device).to(dtype)).abs_()


def finite_peak(m: Tensor) -> Tensor:
    """The maximum to subtract from scores: m, or 0 while it is -inf, since -inf - -inf is NaN."""
    return m.masked_fill(m == -torch.inf, 0)


def exp_minus(s: Tensor, peak: Tensor) -> Tensor:
    """exp(s - peak), in place. On a CPU exp2 is 3 times as fast as exp, and 30 times where exp underflows."""
    return s.sub_(peak).mul_(LOG2E).exp2_()


def softmax_weights(s: Tensor, peak: Tensor, log_sum: Tensor) -> Tensor:
    """exp(s - peak - log_sum), in place. Subtracted one by one: peak + log_sum loses log_sum if peak is large."""
    return torch.add(log_sum * -LOG2E, s.sub_(peak), alpha=LOG2E, out=s).exp2_()


def _mask_out(s: Tensor, allowed: Tensor) -> None:
    """Set s to -inf where not allowed, NaN included. Bit operations: on a CPU masked_fill branches at every element."""
    ints, minus_inf = (torch.int64, -(1 << 52)) if s.dtype == torch.float64 else (torch.int32, -(1 << 23))
    keep = allowed.to(ints).neg_()
    s.view(ints).bitwise_and_(keep).bitwise_or_(keep.bitwise_not_().bitwise_and_(minus_inf))


class Workspace:
    """The inputs of a chunk in the working dtype, and the buffers that its tiles overwrite.

    A tile of scores is (B, Hq, rows, keys); matrix products view it as (B * Hkv, group * rows, keys), "folded".
    """

    def __init__(self, p: Problem, chunk: Chunk, visible: tuple[Tensor, Tensor] | None) -> None:
        self.p, self.chunk, self.dtype = p, chunk, work_dtype(p)
        q, k, v = p.q[chunk.batch, chunk.heads], p.k[chunk.batch, chunk.kv_heads], p.v[chunk.batch, chunk.kv_heads]
        if visible is not None:
            rows, keys = (part(x, chunk.batch, *[EVERYTHING] * 3) for x in visible)
            q, k, v = torch.where(rows, q, 0), torch.where(keys, k, 0), torch.where(keys, v, 0)
        self.q = q
        k, v = (x.to(self.dtype) for x in (k, v))
        if len(chunk.tiles) > 1:  # otherwise each key is read once, and a copy does not pay
            k, v = k.contiguous(), v.contiguous()
        self.k, self.v = k.flatten(0, 1), v.flatten(0, 1)
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, tile: Tile, keys: slice) -> Tensor:
        """(B, Hq, rows, keys), not initialized: it holds values of the previous tile."""
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
        """A tile of k, (B * Hkv, keys, D), as (B, Hkv, keys, D)."""
        return x.unflatten(0, (self.q.shape[0], -1))

    @property
    def w(self) -> Tensor:
        """The weights of an additive score for this chunk's heads."""
        return self.p.w if self.p.w.ndim == 1 else self.p.w[self.chunk.heads]

    def of_rows(self, x: Tensor, tile: Tile) -> Tensor:
        """The rows of a tile, folded, from a (B, Hq, M, D) tensor of the whole problem."""
        return self.fold(x[self.chunk.batch, self.chunk.heads, tile.rows])

    def scores(self, q: Tensor, tile: Tile, keys: slice) -> Tensor:
        """The scores of a tile, for folded q. With a softcap, buffer "tanh" holds tanh(score / softcap) afterwards."""
        p, chunk, dtype = self.p, self.chunk, self.dtype
        s = self.buffer("scores", tile, keys)
        factor = per_head(p.scale, dtype, chunk.heads)
        cap = None if p.softcap is None else per_head(p.softcap, dtype)
        if cap is not None:
            factor = factor / cap
        if p.w is None:
            # With alpha 0, baddbmm skips the product and loses its NaN; an infinite one it may apply to parts of a sum.
            alpha = factor if isinstance(factor, float) and factor != 0 and math.isfinite(factor) else 1.0
            unscaled, product = alpha is not factor, self.fold(s)
            torch.baddbmm(product, q, self.k[:, keys].mT, beta=0, alpha=alpha, out=product)
        else:
            unscaled = True
            additive.products(self.unfold(q), self.by_head(self.k[:, keys]), self.w, s)
        if unscaled:
            s.mul_(factor)
        if p.key_terms is not None:
            s.add_(p.row_terms[chunk.batch, chunk.heads, tile.rows, None])
            s.add_(p.key_terms[chunk.batch, chunk.heads, None, keys])
        if cap is not None:
            torch.mul(torch.tanh(s, out=self.buffer("tanh", tile, keys)), cap, out=s)
        if p.bias is not None:
            s.add_(part(p.bias, chunk.batch, chunk.heads, tile.rows, keys).to(dtype))
        if p.slopes is not None:
            slopes = part(p.slopes[None] if p.slopes.ndim == 1 else p.slopes, chunk.batch, chunk.heads)
            distance = distance_to_diagonal(p, tile.rows, keys, dtype).expand_as(s)
            s.sub_(torch.mul(distance, slopes[..., None, None].to(dtype), out=self.buffer("slopes", tile, keys)))
        for cut in tile.partial(keys):  # keys that the span hides from some rows
            i, j = (indices(x, s.device) for x in (tile.rows, cut))
            allowed = part(p.span.materialize(i, j, p.shape[3]), chunk.batch, *[EVERYTHING] * 3)
            _mask_out(s[..., cut.start - keys.start : cut.stop - keys.start], allowed)
        if p.pattern is not None and not tile.clear(keys):
            allowed = p.pattern.materialize(indices(tile.rows, s.device), indices(keys, s.device))
            _mask_out(s, part(allowed, chunk.batch, chunk.heads, EVERYTHING, EVERYTHING))
        if p.mask is not None:
            _mask_out(s, part(p.mask, chunk.batch, chunk.heads, tile.rows, keys))
        return s

    def dropout_mask(self, tile: Tile, keys: slice) -> Tensor:
        """(B, Hq, rows, keys): 1 where dropout keeps a weight, 0 elsewhere.

        Several times as fast as `Dropout.materialize`: one Philox call gives the elements of rows i, i + 8 and keys
        j, j + 8, so it is called for the first half of each 16 rows and 16 keys, in batches that stay in cache.
        """
        p, device = self.p, self.q.device
        mask = self.buffer("dropout_mask", tile, keys)
        j = _first_halves(keys, device)
        height = max(16, CALLS // len(j) // 8 * 16)
        numbers = torch.arange(p.shape[0] * p.shape[1], device=device).view(p.shape[:2])
        numbers = numbers[self.chunk.batch, self.chunk.heads] + p.dropout.first
        for start in range(tile.rows.start, tile.rows.stop, height):
            rows = slice(start, min(start + height, tile.rows.stop))
            i = _first_halves(rows, device)[:, None]
            band = slice(start - tile.rows.start, rows.stop - tile.rows.start)
            top, left = rows.start & 15, keys.start & 15
            for head, own in zip(numbers.flatten(), mask[..., band, :].flatten(0, 1), strict=True):
                # 8 bool results are moved as one int64.
                keep = [(x >= p.dropout.threshold).view(torch.int64) for x in philox(p.dropout.rng, j, i, head)]
                halves = [torch.stack(x, -1).unflatten(0, (-1, 8)) for x in (keep[:2], keep[2:])]
                whole = torch.stack(halves, 1).view(torch.uint8).view(2 * len(i), 2 * len(j))
                own.copy_(whole[top : top + own.shape[0], left : left + own.shape[1]])
        return mask


def _first_halves(x: slice, device: torch.device) -> Tensor:
    """The first 8 indices of each block of 16 that overlaps x."""
    return indices(slice(x.start & ~15, x.stop + 15 & ~15), device).view(-1, 2, 8)[:, 0].flatten()
