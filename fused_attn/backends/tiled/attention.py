"""The PyTorch fallback: attention tile by tile, on any device, with memory linear in length.

forward     for each tile of rows, over the tiles of keys that its span reaches, with a running maximum m:
                S = scores,  P = exp(S - m),  l = exp(m_old - m) l + sum P,  O = exp(m_old - m) O + P V
            and at the end O / l, m and log l, whose sum is lse; a sink starts m at its logit and l at 1.
backward    P = exp(S - m - log l) again, delta = sum(dO * O) - dlse, dS = P * (dO V^T - delta), and then
                dV += P^T dO,  dQ += dS K scale,  dK += dS^T Q scale
sigmoid     P = sigmoid(S) and dS = P * (1 - P) * (dO V^T): no maximum, no lse and no delta
attention   the same tiles of rows under plain autograd, for the transforms that need to see every operation.

The score of a tile, in order: product * scale, terms of rows and keys, softcap, + bias, - slope * distance, span, mask.
A tile lies in a few buffers that every step overwrites: on a CPU, a pass over a tile in cache costs a tenth of its
product, and a pass over a whole matrix in memory as much as one. Query heads of one group are folded into rows, so k
and v are never repeated. Everything is computed in float32, or in float64 for float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...scores import Additive
from ...spec import state
from ...spec.problem import Problem
from ...spec.ragged import KEYS, ROWS
from ...spec.reach import masked_by_tensors, reached, seen
from . import additive
from .tiles import Share, Tile, part, row_tiles, shares
from .workspace import Work, distance_to_diagonal, exp_minus, finite_peak, indices, number, softmax_weights, work_dtype


def why_not(p: Problem) -> list[str]:
    """Every problem can be tiled."""
    return []


# ----------------------------------------------------------------------------------------------------------- forward


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, peak, log_sum) of a problem; no autograd."""
    if p.ragged is not None:
        return _forward_each(p)
    out, log_sum = state.empty(p.empty_out(), p.empty_lse())
    peak = torch.zeros_like(log_sum)
    if p.sink is not None:
        log_sum.copy_(p.sink[:, None])
    visible = seen(p)
    for share in shares(p):
        work = Work(p, share, visible)
        for tile in share.tiles:
            place = (share.batch, share.heads, tile.rows)
            if p.sigmoid:
                out[place] = work.unfold(_sigmoid_tile(work, tile))
                continue
            tile_out, *normaliser = _row_tile(work, tile)
            out[place] = work.unfold(tile_out)
            peak[place], log_sum[place] = (work.unfold(x)[..., 0] for x in normaliser)
    return out, peak + log_sum, peak, log_sum


def _forward_each(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sequences one after another."""
    whole = p.empty_out(), p.empty_lse(), p.empty_lse(), p.empty_lse()
    names = ("out",) if p.sigmoid else ("out", "lse", "peak", "log_sum")
    for one, alone in p.sequences():
        for name, x, own in zip(names, whole, forward(alone), strict=False):
            one.part(name, x).copy_(own)
    return whole


def _sigmoid_tile(work: Work, tile: Tile) -> Tensor:
    """out (B * Hkv, group * rows, Dv) of one tile of rows: each weight is of its score alone."""
    p, q = work.p, work.fold(work.q[:, :, tile.rows])
    o = q.new_zeros(*q.shape[:2], work.v.shape[2])
    for keys in tile.key_tiles():
        weights = work.scores(q, tile, keys).sigmoid_()
        if p.dropout is not None:
            weights.mul_(work.kept(tile, keys))
        o.baddbmm_(work.fold(weights), work.v[:, keys])
    return o if p.dropout is None else o.mul_(p.dropout.rescale)


def _row_tile(work: Work, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """out (B * Hkv, group * rows, Dv), peak and log_sum (B * Hkv, group * rows, 1) of one tile of rows: the online
    softmax."""
    p, q = work.p, work.fold(work.q[:, :, tile.rows])
    o = q.new_zeros(*q.shape[:2], work.v.shape[2])
    m = q.new_full((*q.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(m)
    if p.sink is not None:
        work.unfold(m).copy_(p.sink[work.share.heads, None, None])
        total = torch.exp(m - finite_peak(m))
    for keys in tile.key_tiles():
        s4 = work.scores(q, tile, keys)
        s = work.fold(s4)
        new = torch.maximum(m, s.amax(-1, keepdim=True))
        peak = finite_peak(new)
        exp_minus(s, peak)
        shrink = torch.exp(m - peak)
        total = total * shrink + s.sum(-1, keepdim=True)
        if p.dropout is not None:
            s4.mul_(work.kept(tile, keys))
        o.mul_(shrink).baddbmm_(s, work.v[:, keys])
        m = new
    if p.dropout is not None:
        o.mul_(p.dropout.rescale)
    # A row that has seen nothing has total 0: out 0, peak 0 and log_sum -inf. NaN is no zero.
    return o.div_(total.masked_fill(total == 0, 1)), finite_peak(m), torch.log(total)


# ---------------------------------------------------------------------------------------------------------- backward


def backward(
    p: Problem, out: Tensor, peak: Tensor, log_sum: Tensor, dout: Tensor, dlse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients named in needs, each in its own tensor's shape and dtype."""
    if p.ragged is not None:
        return _backward_each(p, out, peak, log_sum, dout, dlse, needs)
    dtype, visible = work_dtype(p), seen(p)
    if visible is not None:
        dout = torch.where(visible[0], dout, 0)
    rows: tuple[Tensor, ...] = ()
    if not p.sigmoid:
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse.to(dtype)[..., None]
        # A row that sees nothing: exp(s - inf) = 0, and whatever stands in its cotangents goes nowhere.
        peak, log_sum = peak[..., None], log_sum[..., None]
        blind = log_sum == -torch.inf
        rows = peak, log_sum.masked_fill(blind, torch.inf), delta.masked_fill(blind, 0)
    grads = _Gradients(p, needs, dtype)
    if "sink" in needs:
        peak, log_sum, delta = rows
        weights = torch.exp(p.sink.to(dtype)[:, None, None] - peak - log_sum)
        grads.sums["sink"] = -(weights * delta).sum((0, 2, 3))
    for share in shares(p) if needs != {"sink"} else ():
        work = Work(p, share, visible)
        grads.open(work)
        for tile in share.tiles:
            _backward_tile(work, tile, dout, rows, grads)
        grads.close(work)
    return grads.finish()


def _backward_each(
    p: Problem, out: Tensor, peak: Tensor, log_sum: Tensor, dout: Tensor, dlse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """What each sequence gives, added in their order; parameters in the working dtype."""
    own = {name: x for name, x in p.tensors().items() if name in needs}
    found = {
        name: torch.zeros_like(x, dtype=x.dtype if name in ROWS | KEYS else work_dtype(p)) for name, x in own.items()
    }
    for one, alone in p.sequences():
        own_out, own_dout = one.part("out", out), one.part("dout", dout)
        own_dlse = None if dlse is None else one.part("dlse", dlse)
        normaliser = (peak, log_sum) if p.sigmoid else (one.part("peak", peak), one.part("log_sum", log_sum))
        for name, x in backward(alone, own_out, *normaliser, own_dout, own_dlse, needs).items():
            one.part(name, found[name]).add_(x)
    return {name: x.to(own[name].dtype) for name, x in found.items()}


def _backward_tile(work: Work, tile: Tile, dout: Tensor, rows: tuple[Tensor, ...], grads: _Gradients) -> None:
    """Add what one tile of rows gives to every gradient. rows: peak, log_sum and delta, but of a sigmoid."""
    p = work.p
    q, do = work.fold(work.q[:, :, tile.rows]), work.of_rows(dout, tile)
    peak, log_sum, delta = (work.of_rows(x, tile) for x in rows) if rows else (None, None, None)
    grads.open_rows(work, q)
    for keys in tile.key_tiles():
        weights4 = work.scores(q, tile, keys)
        weights = work.fold(weights4)
        if p.sigmoid:
            weights.sigmoid_()
        else:
            softmax_weights(weights, peak, log_sum)
        kept = None if p.dropout is None else work.kept(tile, keys).mul_(p.dropout.rescale)
        ds4 = None
        if grads.of_scores:
            ds4 = work.buffer("dscores", tile, keys)
            ds = work.fold(ds4)
            torch.bmm(do, work.v[:, keys].mT, out=ds)
            if kept is not None:
                ds4.mul_(kept)
            if p.sigmoid:
                torch.ops.aten.sigmoid_backward.grad_input(ds, weights, grad_input=ds)
            else:
                ds.sub_(delta).mul_(weights)
        if grads.dv is not None:
            if kept is not None:
                weights4.mul_(kept)
            grads.dv[:, keys].baddbmm_(weights.mT, do)
        if ds4 is not None:
            grads.add(work, tile, keys, ds4)
    grads.close_rows(work, tile, q)


class _Gradients:
    """The gradients of one call: where they lie, and how a tile of dS (B, Hq, rows, keys) is added to each.

    `open` and `close` enclose a share, whose dk and dv are summed in the working dtype; `open_rows` and `close_rows`
    a tile of rows, whose dq is.
    """

    def __init__(self, p: Problem, needs: frozenset[str], dtype: torch.dtype) -> None:
        self.p, self.needs, self.dtype = p, needs, dtype
        self.of_scores = bool(needs - {"v", "sink"})
        self.whole = {name: torch.zeros_like(x) for name, x in p.tensors().items() if name in needs & {"q", "k", "v"}}
        # Each entry of a dense bias gets one term, which is written there; and that is most of the call's memory.
        self.dense_bias = "bias" in needs and p.bias.shape == p.shape
        if self.dense_bias:
            self.whole["bias"] = (torch.empty_like if p.unbounded else torch.zeros_like)(p.bias)
        self.sums = {
            name: torch.zeros_like(x, dtype=dtype)
            for name, x in p.tensors().items()
            if name in needs - self.whole.keys() - {"sink"}
        }
        self.dq: Tensor | None = None
        self.dk: Tensor | None = None
        self.dv: Tensor | None = None

        self.dw: Tensor | None = None

    def open(self, work: Work) -> None:
        self.dw = None if self.p.w is None else work.k.new_zeros(*work.q.shape[:2], work.k.shape[2])
        self.dk = torch.zeros_like(work.k) if "k" in self.needs else None
        self.dv = torch.zeros_like(work.v) if "v" in self.needs else None

    def open_rows(self, work: Work, q: Tensor) -> None:
        # k's product with a tensor scale takes q times that scale; a number is left to the end.
        self.q = q
        if self.p.w is None and isinstance(self.p.scale, Tensor) and self.dk is not None:
            scale = number(self.p.scale, self.dtype, work.share.heads)
            self.q = work.fold(work.unfold(q) * scale)
        wanted = {"q", "scale", "softcap"} if self.p.w is None else {"q"}
        self.dq = torch.zeros_like(q) if self.needs & wanted else None

    def add(self, work: Work, tile: Tile, keys: slice, ds4: Tensor) -> None:
        p, share, sums = self.p, work.share, self.sums
        if self.dense_bias:
            self.whole["bias"][share.batch, share.heads, tile.rows, keys] = ds4
        elif "bias" in sums:
            reduced = [d for d in range(4) if p.bias.shape[d] == 1 and ds4.shape[d] != 1]
            total = ds4.sum(reduced, keepdim=True) if reduced else ds4
            part(sums["bias"], share.batch, share.heads, tile.rows, keys).add_(total)
        if "slopes" in sums:
            distance = distance_to_diagonal(p, tile.rows, keys, self.dtype)
            total = (ds4.view(-1, distance.numel()) @ distance.view(-1)).view(ds4.shape[:2])
            if p.slopes.ndim == 1:
                sums["slopes"][share.heads].sub_(total.sum(0))
            else:
                sums["slopes"][share.batch, share.heads].sub_(total)
        if "row_terms" in sums:
            sums["row_terms"][share.batch, share.heads, tile.rows].add_(ds4.sum(3))
        if "key_terms" in sums:
            sums["key_terms"][share.batch, share.heads, keys].add_(ds4.sum(2))
        if p.softcap is not None:
            tanh = work.buffer("tanh", tile, keys)
            if "softcap" in sums:
                sums["softcap"].add_(torch.dot(ds4.view(-1), tanh.view(-1)))
            torch.ops.aten.tanh_backward.grad_input(ds4, tanh, grad_input=ds4)
        if p.w is not None:
            self._add_additive(work, tile, keys, ds4)
            return
        ds = work.fold(ds4)
        if self.dq is not None:
            self.dq.baddbmm_(ds, work.k[:, keys])
        if self.dk is not None:
            self.dk[:, keys].baddbmm_(ds.mT, self.q)

    def _add_additive(self, work: Work, tile: Tile, keys: slice, du: Tensor) -> None:
        q, k, scale = work.unfold(self.q), work.by_head(work.k[:, keys]), self.p.scale
        if isinstance(scale, Tensor):
            scale = scale.to(self.dtype).expand(self.p.shape[1])[work.share.heads]
        dq, dk, dw = additive.gradients(q, k, work.w, du, scale)
        self.dw.add_(dw)
        if self.dq is not None:
            self.dq.add_(work.fold(dq))
        if self.dk is not None:
            self.dk[:, keys].add_(dk.flatten(0, 1))

    def _add_numbers(self, share: Share, per_head: Tensor) -> None:
        """What the sum of du times the product, (Hq,), is to scale and softcap."""
        scale = number(self.p.scale, self.dtype, share.heads)
        if "scale" in self.sums:
            whole = self.sums["scale"].ndim == 0
            target = self.sums["scale"] if whole else self.sums["scale"][share.heads]
            target.add_(per_head.sum() if whole else per_head)
        if "softcap" in self.sums:
            flat = scale.view(-1) if isinstance(scale, Tensor) else scale
            cap = torch.as_tensor(self.p.softcap, dtype=self.dtype)
            self.sums["softcap"].sub_((per_head * flat).sum() / cap)

    def close_rows(self, work: Work, tile: Tile, q: Tensor) -> None:
        """dq so far is dS K. Its product with q, summed, is the gradient of the scale and part of the softcap's."""
        if self.dq is None:
            return
        share = work.share
        if self.p.w is None:
            if self.sums.keys() & {"scale", "softcap"}:
                self._add_numbers(share, work.unfold(q * self.dq).sum((0, 2, 3)))
            self.dq = work.fold(work.unfold(self.dq) * number(self.p.scale, self.dtype, share.heads))
        if "q" in self.needs:
            self.whole["q"][share.batch, share.heads, tile.rows] = work.unfold(self.dq).to(self.p.q.dtype)

    def close(self, work: Work) -> None:
        p, share = self.p, work.share
        place = (share.batch, share.kv_heads)
        if p.w is not None:
            # The weights' gradient, as far as the scale has not been multiplied in, knows the products too.
            self._add_numbers(share, (self.dw * work.w).sum((0, 2)))
            if "w" in self.sums:
                per_head = self.dw.sum(0)[..., None] * number(p.scale, self.dtype, share.heads)
                whole = p.w.ndim == 1
                target = self.sums["w"] if whole else self.sums["w"][share.heads]
                target.add_(per_head[..., 0].sum(0) if whole else per_head[..., 0])
        if self.dk is not None:
            scaled = p.w is not None or isinstance(p.scale, Tensor)
            dk = self.dk if scaled else self.dk.mul_(p.scale)
            self.whole["k"][place] = dk.view(self.whole["k"][place].shape).to(p.k.dtype)
        if self.dv is not None:
            self.whole["v"][place] = self.dv.view(self.whole["v"][place].shape).to(p.v.dtype)

    def finish(self) -> dict[str, Tensor]:
        return self.whole | {name: x.to(self.p.tensors()[name].dtype) for name, x in self.sums.items()}


# ---------------------------------------------------------------------------------------------------- plain autograd


def attention(p: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) by operations that torch differentiates as often, and in whichever mode, as it is asked to.

    Each tile of rows meets all its keys at once. Python reads no tensor, so torch.func may batch or trace any of them;
    lo, hi and a pattern therefore mask and skip nothing. Where ragged sequences begin it does read.
    """
    if p.ragged is not None:
        return p.joined([attention(alone) for _, alone in p.sequences()])
    # A tile meets the keys between its sinks and its window too.
    visible = reached(p) if p.span.sinks else seen(p)
    if visible is not None:
        rows, keys = visible
        p = p.replace(q=torch.where(rows, p.q, 0), k=torch.where(keys, p.k, 0), v=torch.where(keys, p.v, 0))
    m, tiles = p.shape[2], row_tiles(p)
    begin, end = (tiles[0].start, tiles[-1].stop) if tiles else (m, m)
    blind = [Tile(*rows, 0, 0, 0, 0) for rows in ((0, begin), (end, m)) if rows[0] < rows[1] or not m]
    outs, lses = zip(*(_plain_rows(p, tile) for tile in sorted(blind + tiles)), strict=True)
    return p.in_order(torch.cat(outs, 2)), p.empty_lse() if p.sigmoid else torch.cat(lses, 2).to(p.lse_dtype)


def _plain_rows(p: Problem, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """out (B, Hq, rows, Dv) and lse (B, Hq, rows), None for a sigmoid, of one tile of rows."""
    dtype, rows, keys = work_dtype(p), tile.rows, tile.keys
    (b, h), kv_heads, size = p.shape[:2], p.k.shape[1], tile.stop - tile.start
    q = p.q[:, :, rows].to(dtype).reshape(b, kv_heads, p.group * size, p.q.shape[3])
    k, v = (x[:, :, keys].to(dtype) for x in (p.k, p.v))
    if p.w is None:
        s = (q @ k.mT).reshape(b, h, size, keys.stop - keys.start)
    else:
        s = Additive(p.w).materialize(p.q[:, :, rows], p.k[:, :, keys], dtype)
    s = s * number(p.scale, dtype)
    if p.key_terms is not None:
        s = s + p.row_terms[:, :, rows, None] + p.key_terms[:, :, None, keys]
    if p.softcap is not None:
        cap = number(p.softcap, dtype)
        s = cap * torch.tanh(s / cap)
    if p.bias is not None:
        s = s + part(p.bias, slice(b), slice(h), rows, keys).to(dtype)
    if p.slopes is not None:
        s = s - p.slopes.to(dtype)[..., None, None] * distance_to_diagonal(p, rows, keys, dtype)
    i, j = (indices(x, s.device) for x in (rows, keys))
    if masked_by_tensors(p) or tile.partial(keys):
        s = torch.where(p.visible(i, j), s, -torch.inf)
    if p.mask is not None:
        s = torch.where(part(p.mask, slice(b), slice(h), rows, keys), s, -torch.inf)
    weights, lse = (torch.sigmoid(s), None) if p.sigmoid else _plain_softmax(p, s)
    if p.dropout is not None:
        heads = torch.arange(b * h, device=s.device).view(b, h)
        weights = weights * p.dropout.materialize(heads, i, j) * p.dropout.rescale
    weights = weights.reshape(b, kv_heads, p.group * size, keys.stop - keys.start)
    return (weights @ v).reshape(b, h, size, v.shape[3]), lse


def _plain_softmax(p: Problem, s: Tensor) -> tuple[Tensor, Tensor]:
    # The peak cancels in every derivative, so none needs to flow through it.
    peak = s.detach().amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    sink = None if p.sink is None else p.sink.to(s.dtype)[:, None]
    if sink is not None:
        peak = torch.maximum(peak, sink.detach())
    peak = finite_peak(peak)
    weights = torch.exp(s - peak[..., None])
    total = weights.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    some = total != 0
    total = torch.where(some, total, 1)
    lse = torch.where(some, peak + torch.log(total), -torch.inf)
    return weights / total[..., None], lse
