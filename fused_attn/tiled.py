"""The PyTorch fallback: attention tile by tile, on any device, with memory linear in length.

forward     for each tile of rows, over the tiles of keys that its span reaches, with a running maximum m:
                S = scores,  P = exp(S - m),  l = exp(m_old - m) l + sum P,  O = exp(m_old - m) O + P V
            and at the end O / l and lse = m + log l; a sink starts m at its logit and l at 1.
backward    P = exp(S - lse) again, delta = sum(dO * O) - dlse, dS = P * (dO V^T - delta), and then
                dV += P^T dO,  dQ += dS K scale,  dK += dS^T Q scale
attention   the same tiles of rows under plain autograd, for the transforms that need to see every operation.

The score of a tile, in order: product * scale, softcap, + bias, - slope * distance, span, mask. A tile lies in a few
buffers that every step overwrites: on a CPU, passes over a tile in cache cost a tenth of its products, passes over a
whole matrix in memory cost as much as they do. Query heads of one group are folded into rows, so k and v are never
repeated. Everything is computed in float32, or float64 for float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import state
from .spec import HALF, Problem, Span, philox

TILE_ROWS, TILE_KEYS = 128, 512


def why_not(p: Problem) -> list[str]:
    """Every problem can be tiled."""
    return []


# ---------------------------------------------------------------------------------------------------------- geometry


class Tile(NamedTuple):
    """Rows [start, stop) see keys inside [first, last), and every one of them sees all of [full_from, full_to)."""

    start: int
    stop: int
    first: int
    last: int
    full_from: int
    full_to: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def _static_tiles(span: Span, m: int, n: int, size: int) -> list[Tile]:
    """Tiles of the rows that may see a key, as far as left and right tell."""
    left, right = span.left, span.right
    if left is not None and right is not None and left > right:
        return []
    begin = 0 if right is None else max(0, -right)
    end = m if left is None else min(m, n - left)
    tiles = []
    for start in range(begin, end, size):
        stop = min(start + size, end)
        first, full_from = (0, 0) if left is None else (max(0, start + left), max(0, stop - 1 + left))
        last, full_to = (n, n) if right is None else (min(n, stop + right), min(n, start + right + 1))
        if first < last:
            tiles.append(Tile(start, stop, first, last, full_from, full_to))
    return tiles


def _bounded_per_row(p: Problem) -> bool:
    return p.span.lo is not None or p.span.hi is not None


def _bounds(p: Problem) -> tuple[Tensor, Tensor]:
    """lo, hi (B or 1, M): row i sees lo <= j < hi."""
    bounds = p.span.bounds(torch.arange(p.shape[2], device=p.q.device), p.shape[3])
    lo, hi = torch.broadcast_tensors(*bounds)
    return lo.contiguous(), hi.contiguous()


def _tiles(p: Problem, size: int) -> list[list[Tile]]:
    """For each batch, or one list for all of them: the tiles of rows, with lo and hi read."""
    m, n = p.shape[2:]
    tiles = _static_tiles(p.span, m, n, size)
    if not tiles or not _bounded_per_row(p):
        return [tiles]
    lo, hi = _bounds(p)
    blind = lo >= hi
    edges = (
        (lo.masked_fill(blind, n), torch.amin),
        (hi.masked_fill(blind, 0), torch.amax),
        (lo, torch.amax),
        (hi, torch.amin),
    )
    limits = torch.stack([torch.stack([pick(x[:, t.rows], 1) for x, pick in edges], 1) for t in tiles], 1).tolist()
    return [
        [Tile(t.start, t.stop, *map(int, limit)) for t, limit in zip(tiles, batch, strict=True) if limit[0] < limit[1]]
        for batch in limits
    ]


def _tile_elements(device: torch.device) -> int:
    """How many scores to hold at once: about a core's cache for each thread, or enough to fill an accelerator."""
    return 2**18 * torch.get_num_threads() if device.type == "cpu" else 2**24


class Share(NamedTuple):
    """The part of the batch and of the heads that one round of tiles works on."""

    batch: slice
    kv_heads: slice
    heads: slice
    tiles: list[Tile]


def _shares(p: Problem) -> Iterator[Share]:
    """Enough heads at once to keep a device busy, few enough for their tiles to stay in a cache."""
    b, _, m, n = p.shape
    kv_heads = p.k.shape[1]
    rows = max(1, min(m, max(16, TILE_ROWS // p.group)))
    heads = max(1, _tile_elements(p.q.device) // (p.group * rows * min(n, TILE_KEYS))) if n else 1
    per_head, tiles = min(kv_heads, heads), _tiles(p, rows)
    # Lists of tiles that differ between batches are walked one batch at a time, so that each skips its own.
    per_batch = max(1, min(b, heads // kv_heads)) if kv_heads and len(tiles) == 1 else 1
    for i in range(0, b, per_batch):
        for h in range(0, kv_heads, max(1, per_head)):
            stop = min(h + per_head, kv_heads)
            yield Share(
                slice(i, min(i + per_batch, b)),
                slice(h, stop),
                slice(h * p.group, stop * p.group),
                tiles[i if len(tiles) > 1 else 0],
            )


def _part(x: Tensor, *slices: slice) -> Tensor:
    """The part of a tensor that broadcasts: an axis of length 1 is kept as it is."""
    return x[tuple(slice(None) if size == 1 else part for part, size in zip(slices, x.shape, strict=True))]


def _fold(x: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """(B, Hq, M, D) -> (B * Hkv, group * M, D), contiguous and in dtype."""
    b, h, m, d = x.shape
    return x.to(dtype).contiguous().view(b * (h // group), group * m, d)


def _hide_unseen(p: Problem) -> tuple[Tensor, Tensor] | None:
    """bool (B or 1, 1, M, 1) and (B or 1, 1, N, 1): rows that see a key and keys that a row sees, where lo, hi say so.

    What is padding may hold NaN, and a product with a weight of zero would let it through.
    """
    if not _bounded_per_row(p):
        return None
    n = p.shape[3]
    lo, hi = _bounds(p)
    keys = torch.arange(n, device=p.q.device).expand(lo.shape[0], n).contiguous()
    # Neither bound decreases, so the rows with lo <= j are the first ones and those with j < hi are the last ones.
    seen = torch.searchsorted(hi, keys, right=True) < torch.searchsorted(lo, keys, right=True)
    return (lo < hi)[:, None, :, None], seen[:, None, :, None]


# ------------------------------------------------------------------------------------------------------------ scores


def _work_dtype(p: Problem) -> torch.dtype:
    return torch.float32 if p.q.dtype in HALF else p.q.dtype


def _number(x: float | Tensor, dtype: torch.dtype, heads: slice = slice(None)) -> float | Tensor:
    """A float as it is; a tensor () or (Hq,) shaped to multiply (B, Hq, M, N)."""
    if not isinstance(x, Tensor):
        return x
    return x.to(dtype) if x.ndim == 0 else x[heads].to(dtype)[:, None, None]


def _distance(p: Problem, rows: slice, keys: slice, dtype: torch.dtype) -> Tensor:
    """(M, N): how far a key lies from the row's diagonal, which is what ALiBi multiplies."""
    i = torch.arange(rows.start, rows.stop, device=p.q.device)
    j = torch.arange(keys.start, keys.stop, device=p.q.device)
    return (i[:, None] + p.offset - j).abs().to(dtype)


def _slopes(p: Problem, share: Share, dtype: torch.dtype) -> Tensor:
    slopes = p.slopes[None] if p.slopes.ndim == 1 else p.slopes
    return _part(slopes, share.batch, share.heads)[..., None, None].to(dtype)


def _forbid(s: Tensor, allowed: Tensor) -> None:
    """s = -inf where not allowed, whatever it held. On a CPU masked_fill branches at every element; bits do not."""
    ints, minus_inf = (torch.int64, -(1 << 52)) if s.dtype == torch.float64 else (torch.int32, -(1 << 23))
    keep = allowed.to(ints).neg_()
    s.view(ints).bitwise_and_(keep).bitwise_or_(keep.bitwise_not_().bitwise_and_(minus_inf))


def _score(
    p: Problem, s: Tensor, q: Tensor, k: Tensor, share: Share, tile: Tile, keys: slice, t: Tensor | None
) -> None:
    """Fill s (B, Hq, M, N) with the scores of a tile; t takes the tanh of the softcap, where there is one."""
    dtype, capped = s.dtype, p.softcap is not None
    factor = _number(p.scale, dtype, share.heads)
    if capped:
        factor = factor / _number(p.softcap, dtype)
    flat = s.view(q.shape[0], q.shape[1], -1)
    by_product = not isinstance(factor, Tensor)
    torch.baddbmm(flat, q, k[:, keys].mT, beta=0, alpha=1 if isinstance(factor, Tensor) else factor, out=flat)
    if not by_product:
        s.mul_(factor)
    if capped:
        torch.mul(torch.tanh(s, out=t), _number(p.softcap, dtype), out=s)
    if p.bias is not None:
        s.add_(_part(p.bias, share.batch, share.heads, tile.rows, keys).to(dtype))
    if p.slopes is not None:
        s.addcmul_(_slopes(p, share, dtype), _distance(p, tile.rows, keys, dtype), value=-1)
    for part in _partial(tile, keys):
        i = torch.arange(tile.start, tile.stop, device=s.device)
        j = torch.arange(part.start, part.stop, device=s.device)
        allowed = _part(p.span.materialize(i, j, p.shape[3]), share.batch, *[slice(None)] * 3)
        _forbid(s[..., part.start - keys.start : part.stop - keys.start], allowed)
    if p.mask is not None:
        _forbid(s, _part(p.mask, share.batch, share.heads, tile.rows, keys))


def _partial(tile: Tile, keys: slice) -> list[slice]:
    """The stretches of these keys that not every row of the tile sees."""
    if tile.full_from >= tile.full_to:
        return [keys]
    before = slice(keys.start, min(keys.stop, tile.full_from))
    after = slice(max(keys.start, tile.full_to), keys.stop)
    return [x for x in (before, after) if x.start < x.stop]


def _kept(p: Problem, share: Share, rows: slice, keys: slice, dtype: torch.dtype) -> Tensor:
    """(B, Hq, M, N): 1 where dropout lets a weight live, 0 elsewhere; `Dropout.materialize` at a quarter of its cost.

    Four elements share a call of Philox, so that is made for the first half of each 16 rows and of each 16 keys alone.
    """

    def firsts(x: slice) -> Tensor:
        blocks = torch.arange(x.start & ~15, (x.stop + 15) & ~15, device=p.q.device)
        return blocks.view(-1, 2, 8)[:, 0].reshape(-1)

    b, h = p.shape[:2]
    heads = torch.arange(b * h, device=p.q.device).view(b, h)[share.batch, share.heads, None, None]
    i, j = firsts(rows), firsts(keys)
    blocks = (*heads.shape[:2], len(i) // 8, 2, 8, len(j) // 8, 2, 8)
    kept = torch.empty(blocks, dtype=dtype, device=p.q.device)
    for n, word in enumerate(philox(p.dropout.rng, j, i[:, None], heads)):
        part = kept[:, :, :, n >> 1, :, :, n & 1]
        part.copy_((word >= p.dropout.threshold).view(part.shape))
    top, left = rows.start & 15, keys.start & 15
    whole = kept.view(*heads.shape[:2], 2 * len(i), 2 * len(j))
    return whole[..., top : top + rows.stop - rows.start, left : left + keys.stop - keys.start]


def _key_tiles(tile: Tile) -> Iterator[slice]:
    for start in range(tile.first, tile.last, TILE_KEYS):
        yield slice(start, min(start + TILE_KEYS, tile.last))


class _Buffer:
    """One piece of memory that every tile of a call is written into in turn."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=dtype, device=device)

    def take(self, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        if self.memory.numel() < size:
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(shape)


# ----------------------------------------------------------------------------------------------------------- forward


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem; no autograd."""
    out, lse = state.empty(p.empty_out(), p.q.new_empty(p.shape[:3], dtype=p.lse_dtype))
    if p.sink is not None:
        lse.copy_(p.sink[:, None])
    dtype, unseen = _work_dtype(p), _hide_unseen(p)
    tiles, tanhs = (_Buffer(dtype, p.q.device) for _ in range(2))
    for share in _shares(p):
        q, k, v = _inputs(p, share, unseen)
        k, v = (_fold(x, 1, dtype) for x in (k, v))
        for tile in share.tiles:
            part = out[share.batch, share.heads, tile.rows]
            o, part_lse = _row_tile(p, share, tile, _fold(q[:, :, tile.rows], p.group, dtype), k, v, tiles, tanhs)
            part.copy_(o.view(part.shape))
            lse[share.batch, share.heads, tile.rows] = part_lse.view(part.shape[:3])
    return out, lse


def _inputs(p: Problem, share: Share, unseen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a share, with zeros where nobody looks or is looked at."""
    q, k, v = p.q[share.batch, share.heads], p.k[share.batch, share.kv_heads], p.v[share.batch, share.kv_heads]
    if unseen is None:
        return q, k, v
    rows, keys = (_part(x, share.batch, *[slice(None)] * 3) for x in unseen)
    return torch.where(rows, q, 0), torch.where(keys, k, 0), torch.where(keys, v, 0)


def _row_tile(
    p: Problem, share: Share, tile: Tile, q: Tensor, k: Tensor, v: Tensor, tiles: _Buffer, tanhs: _Buffer
) -> tuple[Tensor, Tensor]:
    """out (B * Hkv, group * M, Dv) and lse (B * Hkv, group * M, 1) of one tile of rows. The online softmax."""
    shape = (share.batch.stop - share.batch.start, share.heads.stop - share.heads.start, tile.stop - tile.start)
    o = q.new_zeros(*q.shape[:2], v.shape[2])
    m = q.new_full((*q.shape[:2], 1), -torch.inf)
    if p.sink is not None:
        m.view(shape).copy_(p.sink[share.heads, None])
    total = torch.exp(m - _finite_peak(m)) if p.sink is not None else torch.zeros_like(m)
    for keys in _key_tiles(tile):
        size = keys.stop - keys.start
        s4 = tiles.take(*shape, size)
        _score(p, s4, q, k, share, tile, keys, None if p.softcap is None else tanhs.take(*shape, size))
        s = s4.view(*q.shape[:2], size)
        new = torch.maximum(m, s.amax(-1, keepdim=True))
        peak = _finite_peak(new)
        s.sub_(peak).exp_()
        shrink = torch.exp(m - peak)
        total = total * shrink + s.sum(-1, keepdim=True)
        if p.dropout is not None:
            s4.mul_(_kept(p, share, tile.rows, keys, s.dtype))
        o.mul_(shrink).baddbmm_(s, v[:, keys])
        m = new
    if p.dropout is not None:
        o.mul_(p.dropout.rescale)
    # A row that has seen nothing has total 0: out 0 and lse -inf. NaN is no zero.
    return o.div_(total.masked_fill(total == 0, 1)), _finite_peak(m) + torch.log(total)


def _finite_peak(m: Tensor) -> Tensor:
    """The maximum to subtract: 0 while a row has seen nothing, since -inf - -inf would be NaN."""
    return m.masked_fill(m == -torch.inf, 0)


# ---------------------------------------------------------------------------------------------------------- backward


def backward(
    p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients named in needs, each in its own tensor's shape and dtype."""
    dtype, unseen = _work_dtype(p), _hide_unseen(p)
    if unseen is not None:
        dout = torch.where(unseen[0], dout, 0)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(dtype)
    # A row that sees nothing: exp(s - inf) = 0, and whatever stands in its cotangents goes nowhere.
    blind = lse == -torch.inf
    lse, delta = lse.to(dtype).masked_fill(blind, torch.inf), delta.masked_fill(blind, 0)
    grads = _Gradients(p, needs, dtype)
    if "sink" in needs:
        grads.sums["sink"] = -(torch.exp(p.sink.to(dtype)[:, None] - lse) * delta).sum((0, 2))
    if needs == {"sink"}:
        return grads.finish()
    scores, products, tanhs = (_Buffer(dtype, p.q.device) for _ in range(3))
    for share in _shares(p):
        q, k, v = _inputs(p, share, unseen)
        k, v = (_fold(x, 1, dtype) for x in (k, v))
        do = dout[share.batch, share.heads]
        grads.open(share, k, v)
        for tile in share.tiles:
            rows = q[:, :, tile.rows]
            grads.open_rows(rows)
            shape = rows.shape[:3]
            q_tile, do_tile = (_fold(x[:, :, tile.rows], p.group, dtype) for x in (q, do))
            q_scaled = q_tile
            if isinstance(p.scale, Tensor):
                q_scaled = _fold(rows.to(dtype) * _number(p.scale, dtype, share.heads), p.group, dtype)
            lse_tile, delta_tile = (x[share.batch, share.heads, tile.rows, None] for x in (lse, delta))
            for keys in _key_tiles(tile):
                size = keys.stop - keys.start
                s4 = scores.take(*shape, size)
                t = None if p.softcap is None else tanhs.take(*shape, size)
                _score(p, s4, q_tile, k, share, tile, keys, t)
                s4.sub_(lse_tile).exp_()
                kept = None if p.dropout is None else _kept(p, share, tile.rows, keys, dtype).mul_(p.dropout.rescale)
                ds4 = None
                if grads.of_scores:
                    ds4 = products.take(*shape, size)
                    ds = ds4.view(*q_tile.shape[:2], size)
                    torch.bmm(do_tile, v[:, keys].mT, out=ds)
                    if kept is not None:
                        ds4.mul_(kept)
                    ds4.sub_(delta_tile).mul_(s4)
                if "v" in needs:
                    if kept is not None:
                        s4.mul_(kept)
                    grads.dv[:, keys].add_(torch.bmm(s4.view(*q_tile.shape[:2], size).mT, do_tile))
                if ds4 is not None:
                    grads.add(share, tile, keys, ds4, t, k, q_scaled)
            grads.close_rows(share, tile, q_tile)
        grads.close(share)
    return grads.finish()


class _Gradients:
    """The gradients of one call: where they lie, and how a tile of dS (B, Hq, M, N) is added to each."""

    def __init__(self, p: Problem, needs: frozenset[str], dtype: torch.dtype) -> None:
        self.p, self.needs, self.dtype = p, needs, dtype
        self.of_scores = bool(needs - {"v", "sink"})
        self.of_rows = bool(needs & {"q", "scale", "softcap"})
        self.whole = {name: torch.zeros_like(getattr(p, name)) for name in ("q", "k", "v") if name in needs}
        self.sums: dict[str, Tensor] = {}
        for name in needs & {"scale", "softcap", "slopes"}:
            self.sums[name] = torch.zeros_like(getattr(p, name), dtype=dtype)
        if "bias" in needs:
            # A dense bias gets each entry once, so it needs no wider sum.
            dense = p.bias.shape == p.shape
            self.sums["bias"] = torch.zeros_like(p.bias, dtype=None if dense else dtype)
        self.dq: Tensor | None = None
        self.dk: Tensor | None = None
        self.dv: Tensor | None = None

    def open(self, share: Share, k: Tensor, v: Tensor) -> None:
        self.dk = torch.zeros_like(k) if "k" in self.needs else None
        self.dv = torch.zeros_like(v) if "v" in self.needs else None

    def open_rows(self, q: Tensor) -> None:
        b, h, m, d = q.shape
        group = self.p.group
        self.dq = q.new_zeros(b * (h // group), group * m, d, dtype=self.dtype) if self.of_rows else None

    def add(
        self, share: Share, tile: Tile, keys: slice, ds4: Tensor, t: Tensor | None, k: Tensor, q_scaled: Tensor
    ) -> None:
        p, sums = self.p, self.sums
        if "bias" in self.needs:
            reduced = [d for d in range(4) if p.bias.shape[d] == 1 and ds4.shape[d] != 1]
            part = ds4.sum(reduced, keepdim=True) if reduced else ds4
            _part(sums["bias"], share.batch, share.heads, tile.rows, keys).add_(part)
        if "slopes" in self.needs:
            distance = _distance(p, tile.rows, keys, ds4.dtype)
            part = -(ds4.view(-1, distance.numel()) @ distance.view(-1)).view(ds4.shape[:2])
            if p.slopes.ndim == 1:
                sums["slopes"][share.heads].add_(part.sum(0))
            else:
                sums["slopes"][share.batch, share.heads].add_(part)
        if p.softcap is not None:
            if "softcap" in self.needs:
                sums["softcap"].add_(torch.dot(ds4.view(-1), t.view(-1)))
            torch.ops.aten.tanh_backward.grad_input(ds4, t, grad_input=ds4)
        ds = ds4.view(*q_scaled.shape[:2], -1)
        if self.dq is not None:
            self.dq.baddbmm_(ds, k[:, keys])
        if self.dk is not None:
            self.dk[:, keys].add_(torch.bmm(ds.mT, q_scaled))

    def close_rows(self, share: Share, tile: Tile, q: Tensor) -> None:
        """dq so far is dS K. Its product with q, summed, is the gradient of the scale and part of the softcap's."""
        if self.dq is None:
            return
        p, rows = self.p, tile.stop - tile.start
        scale = _number(p.scale, self.dtype, share.heads)
        shape = (share.batch.stop - share.batch.start, share.heads.stop - share.heads.start, rows, q.shape[2])
        if self.needs & {"scale", "softcap"}:
            per_head = (q * self.dq).view(shape).sum((0, 2, 3))
            if "scale" in self.needs:
                total = self.sums["scale"]
                part = total if total.ndim == 0 else total[share.heads]
                part.add_(per_head.sum() if total.ndim == 0 else per_head)
            if "softcap" in self.needs:
                flat = scale.view(-1) if isinstance(scale, Tensor) else scale
                cap = torch.as_tensor(p.softcap, dtype=self.dtype)
                self.sums["softcap"].sub_((per_head * flat).sum() / cap)
        if "q" in self.needs:
            self.whole["q"][share.batch, share.heads, tile.rows] = (self.dq.view(shape) * scale).to(p.q.dtype)

    def close(self, share: Share) -> None:
        p = self.p
        if self.dk is not None:
            dk = self.dk if isinstance(p.scale, Tensor) else self.dk.mul_(p.scale)
            part = self.whole["k"][share.batch, share.kv_heads]
            part.copy_(dk.view(part.shape))
        if self.dv is not None:
            part = self.whole["v"][share.batch, share.kv_heads]
            part.copy_(self.dv.view(part.shape))

    def finish(self) -> dict[str, Tensor]:
        sums = {name: x.to(getattr(self.p, name).dtype) for name, x in self.sums.items()}
        return {name: x for name, x in (self.whole | sums).items() if name in self.needs}


# ---------------------------------------------------------------------------------------------------- plain autograd


def attention(p: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) by operations that torch differentiates as often, and in whichever mode, as it is asked to.

    Each tile of rows meets all its keys at once. Python reads no tensor, so torch.func may batch or trace any of them;
    lo and hi therefore mask and skip nothing.
    """
    unseen = _hide_unseen(p)
    if unseen is not None:
        rows, keys = unseen
        p = p.replace(q=torch.where(rows, p.q, 0), k=torch.where(keys, p.k, 0), v=torch.where(keys, p.v, 0))
    m, n = p.shape[2:]
    tiles = _static_tiles(p.span, m, n, max(16, TILE_ROWS // p.group))
    begin, end = (tiles[0].start, tiles[-1].stop) if tiles else (m, m)
    blind = [Tile(*rows, 0, 0, 0, 0) for rows in ((0, begin), (end, m)) if rows[0] < rows[1] or not m]
    outs, lses = zip(*(_plain_rows(p, tile) for tile in sorted(blind + tiles)), strict=True)
    return p.in_order(torch.cat(outs, 2)), torch.cat(lses, 2).to(p.lse_dtype)


def _plain_rows(p: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    """out (B, Hq, rows, Dv) and lse (B, Hq, rows) of one tile of rows."""
    dtype, rows, keys = _work_dtype(p), tile.rows, slice(tile.first, tile.last)
    (b, h), kv_heads, size = p.shape[:2], p.k.shape[1], tile.stop - tile.start
    q = p.q[:, :, rows].to(dtype).reshape(b, kv_heads, p.group * size, p.q.shape[3])
    k, v = (x[:, :, keys].to(dtype) for x in (p.k, p.v))
    s = (q @ k.mT).reshape(b, h, size, keys.stop - keys.start) * _number(p.scale, dtype)
    if p.softcap is not None:
        cap = _number(p.softcap, dtype)
        s = cap * torch.tanh(s / cap)
    if p.bias is not None:
        s = s + _part(p.bias, slice(b), slice(h), rows, keys).to(dtype)
    if p.slopes is not None:
        s = s - p.slopes.to(dtype)[..., None, None] * _distance(p, rows, keys, dtype)
    i = torch.arange(rows.start, rows.stop, device=s.device)
    j = torch.arange(keys.start, keys.stop, device=s.device)
    if _bounded_per_row(p) or _partial(tile, keys):
        s = torch.where(p.span.materialize(i, j, p.shape[3]), s, -torch.inf)
    if p.mask is not None:
        s = torch.where(_part(p.mask, slice(b), slice(h), rows, keys), s, -torch.inf)
    # The peak cancels in every derivative, so none needs to flow through it.
    peak = s.detach().amax(-1) if keys.stop > keys.start else s.new_full(s.shape[:-1], -torch.inf)
    sink = None if p.sink is None else p.sink.to(dtype)[:, None]
    if sink is not None:
        peak = torch.maximum(peak, sink.detach())
    peak = _finite_peak(peak)
    weights = torch.exp(s - peak[..., None])
    total = weights.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    seen = total != 0
    total = torch.where(seen, total, 1)
    lse = torch.where(seen, peak + torch.log(total), -torch.inf)
    weights = weights / total[..., None]
    if p.dropout is not None:
        heads = torch.arange(b * h, device=s.device).view(b, h)
        weights = weights * p.dropout.materialize(heads, i, j) * p.dropout.rescale
    weights = weights.reshape(b, kv_heads, p.group * size, keys.stop - keys.start)
    return (weights @ v).reshape(b, h, size, v.shape[3]), lse
