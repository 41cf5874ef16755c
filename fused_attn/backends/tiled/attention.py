"""The PyTorch fallback: attention tile by tile, on any device, in O(M + N) memory.

forward     for each tile of rows, over the tiles of keys that it sees, with a running maximum m:
                S = scores,  P = exp(S - m),  l = exp(m_old - m) l + sum P,  O = exp(m_old - m) O + P V
            then out = O / l and lse = m + log l. A sink starts m at its logit and l at 1.
backward    P = exp(S - m - log l) recomputed, delta = sum(dO * O) - dlse, dS = P * (dO V^T - delta), and then
                dV += P^T dO,  dQ += dS K scale,  dK += dS^T Q scale
sigmoid     P = sigmoid(S) and dS = P * (1 - P) * (dO V^T): no maximum, lse or delta
attention   the same tiles of rows under plain autograd, for transforms that must trace every operation.

The scores of a tile, in order: product * scale, + row and key terms, softcap, + bias, - slope * distance, span,
pattern, mask. Tiles reuse a few buffers: on a CPU, a pass over a tile in cache costs a tenth of its matrix product, and
a pass over the whole matrix in memory as much as the product. Query heads of a group are folded into rows, so k and v
are not repeated. Computed in float32, or in float64 for float64 inputs.

Returns m as `peak` and log l as `log_sum`: their sum loses log l if m is large, so the backward needs both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...scores import Additive
from ...spec import state
from ...spec.problem import Problem
from ...spec.ragged import KEYS, ROWS
from ...spec.visibility import has_tensor_bounds, tensor_visibility, visibility
from . import additive
from .tiles import Chunk, Tile, chunks, part, row_tiles
from .workspace import (
    Workspace,
    distance_to_diagonal,
    exp_minus,
    finite_peak,
    indices,
    per_head,
    softmax_weights,
    work_dtype,
)


def why_not(p: Problem) -> list[str]:
    """Always empty: the tiled backend runs every problem."""
    return []


# ----------------------------------------------------------------------------------------------------------- forward


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, peak, log_sum), without autograd."""
    if p.ragged is not None:
        return _forward_ragged(p)
    out, log_sum = state.empty(p.empty_out(), p.empty_lse())
    peak = torch.zeros_like(log_sum)
    if p.sink is not None:
        log_sum.copy_(p.sink[:, None])
    visible = tensor_visibility(p)
    for chunk in chunks(p):
        ws = Workspace(p, chunk, visible)
        for tile in chunk.tiles:
            index = (chunk.batch, chunk.heads, tile.rows)
            if p.sigmoid:
                out[index] = ws.unfold(_sigmoid_tile(ws, tile))
                continue
            tile_out, *normalizer = _softmax_tile(ws, tile)
            out[index] = ws.unfold(tile_out)
            peak[index], log_sum[index] = (ws.unfold(x)[..., 0] for x in normalizer)
    return out, peak + log_sum, peak, log_sum


def _forward_ragged(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` of each packed sequence."""
    results = p.empty_out(), p.empty_lse(), p.empty_lse(), p.empty_lse()
    names = ("out",) if p.sigmoid else ("out", "lse", "peak", "log_sum")
    for sequence, own_p in p.sequences():
        for name, x, own in zip(names, results, forward(own_p), strict=False):
            sequence.part(name, x).copy_(own)
    return results


def _sigmoid_tile(ws: Workspace, tile: Tile) -> Tensor:
    """out (B * Hkv, group * rows, Dv) of one tile of rows."""
    p, q = ws.p, ws.fold(ws.q[:, :, tile.rows])
    o = q.new_zeros(*q.shape[:2], ws.v.shape[2])
    for keys in tile.key_tiles():
        weights = ws.scores(q, tile, keys).sigmoid_()
        if p.dropout is not None:
            weights.mul_(ws.dropout_mask(tile, keys))
        o.baddbmm_(ws.fold(weights), ws.v[:, keys])
    return o if p.dropout is None else o.mul_(p.dropout.rescale)


def _softmax_tile(ws: Workspace, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Online softmax: out (B * Hkv, group * rows, Dv), peak and log_sum (B * Hkv, group * rows, 1) of one tile."""
    p, q = ws.p, ws.fold(ws.q[:, :, tile.rows])
    o = q.new_zeros(*q.shape[:2], ws.v.shape[2])
    m = q.new_full((*q.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(m)
    if p.sink is not None:
        ws.unfold(m).copy_(p.sink[ws.chunk.heads, None, None])
        total = torch.exp(m - finite_peak(m))
    for keys in tile.key_tiles():
        s4 = ws.scores(q, tile, keys)  # (B, Hq, rows, keys)
        s = ws.fold(s4)  # (B * Hkv, group * rows, keys), the same memory
        new = torch.maximum(m, s.amax(-1, keepdim=True))
        peak = finite_peak(new)
        exp_minus(s, peak)
        shrink = torch.exp(m - peak)
        total = total * shrink + s.sum(-1, keepdim=True)
        if p.dropout is not None:
            s4.mul_(ws.dropout_mask(tile, keys))
        o.mul_(shrink).baddbmm_(s, ws.v[:, keys])
        m = new
    if p.dropout is not None:
        o.mul_(p.dropout.rescale)
    # A fully masked row has total 0: out 0, peak 0 and log_sum -inf. A NaN total stays NaN.
    return o.div_(total.masked_fill(total == 0, 1)), finite_peak(m), torch.log(total)


# ---------------------------------------------------------------------------------------------------------- backward


def backward(
    p: Problem, out: Tensor, peak: Tensor, log_sum: Tensor, dout: Tensor, dlse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients named in needs, with the shape and dtype of their tensors."""
    if p.ragged is not None:
        return _backward_ragged(p, out, peak, log_sum, dout, dlse, needs)
    dtype, visible = work_dtype(p), tensor_visibility(p)
    if visible is not None:
        dout = torch.where(visible[0], dout, 0)
    rows: tuple[Tensor, ...] = ()
    if not p.sigmoid:
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse.to(dtype)[..., None]
        # A fully masked row gets weights exp(s - inf) = 0 and delta 0, so NaN in its cotangents does not spread.
        peak, log_sum = peak[..., None], log_sum[..., None]
        fully_masked = log_sum == -torch.inf
        rows = peak, log_sum.masked_fill(fully_masked, torch.inf), delta.masked_fill(fully_masked, 0)
    grads = _Gradients(p, needs, dtype)
    if "sink" in needs:
        peak, log_sum, delta = rows
        weights = torch.exp(p.sink.to(dtype)[:, None, None] - peak - log_sum)
        grads.sums["sink"] = -(weights * delta).sum((0, 2, 3))
    for chunk in chunks(p) if needs != {"sink"} else ():
        ws = Workspace(p, chunk, visible)
        grads.open(ws)
        for tile in chunk.tiles:
            _backward_tile(ws, tile, dout, rows, grads)
        grads.close(ws)
    return grads.finish()


def _backward_ragged(
    p: Problem, out: Tensor, peak: Tensor, log_sum: Tensor, dout: Tensor, dlse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """`backward` of each packed sequence, added in order; gradients of parameters are summed in the working dtype."""
    inputs = {name: x for name, x in p.tensors().items() if name in needs}
    grads = {
        name: torch.zeros_like(x, dtype=x.dtype if name in ROWS | KEYS else work_dtype(p)) for name, x in inputs.items()
    }
    for sequence, own_p in p.sequences():
        cut = sequence.part
        own_dlse = None if dlse is None else cut("dlse", dlse)
        normalizer = (peak, log_sum) if p.sigmoid else (cut("peak", peak), cut("log_sum", log_sum))
        own_grads = backward(own_p, cut("out", out), *normalizer, cut("dout", dout), own_dlse, needs)
        for name, x in own_grads.items():
            cut(name, grads[name]).add_(x)
    return {name: x.to(inputs[name].dtype) for name, x in grads.items()}


def _backward_tile(ws: Workspace, tile: Tile, dout: Tensor, rows: tuple[Tensor, ...], grads: _Gradients) -> None:
    """Add the contribution of one tile of rows to every gradient. rows: peak, log_sum and delta; () for a sigmoid."""
    p = ws.p
    q, do = ws.fold(ws.q[:, :, tile.rows]), ws.of_rows(dout, tile)
    peak, log_sum, delta = (ws.of_rows(x, tile) for x in rows) if rows else (None, None, None)
    grads.open_rows(ws, q)
    for keys in tile.key_tiles():
        weights4 = ws.scores(q, tile, keys)  # (B, Hq, rows, keys)
        weights = ws.fold(weights4)  # (B * Hkv, group * rows, keys), the same memory
        if p.sigmoid:
            weights.sigmoid_()
        else:
            softmax_weights(weights, peak, log_sum)
        keep = None if p.dropout is None else ws.dropout_mask(tile, keys).mul_(p.dropout.rescale)
        ds4 = None
        if grads.of_scores:
            ds4 = ws.buffer("dscores", tile, keys)
            ds = ws.fold(ds4)
            torch.bmm(do, ws.v[:, keys].mT, out=ds)
            if keep is not None:
                ds4.mul_(keep)
            if p.sigmoid:
                torch.ops.aten.sigmoid_backward.grad_input(ds, weights, grad_input=ds)
            else:
                ds.sub_(delta).mul_(weights)
        if grads.dv is not None:
            if keep is not None:
                weights4.mul_(keep)
            grads.dv[:, keys].baddbmm_(weights.mT, do)
        if ds4 is not None:
            grads.add(ws, tile, keys, ds4)
    grads.close_rows(ws, tile, q)


class _Gradients:
    """The gradients of one call, to which tiles of dS (B, Hq, rows, keys) are added.

    `open` and `close` enclose a chunk and hold its dk and dv in the working dtype; `open_rows` and `close_rows`
    enclose a tile of rows and hold its dq.
    """

    def __init__(self, p: Problem, needs: frozenset[str], dtype: torch.dtype) -> None:
        self.p, self.needs, self.dtype = p, needs, dtype
        self.of_scores = bool(needs - {"v", "sink"})
        self.whole = {name: torch.zeros_like(x) for name, x in p.tensors().items() if name in needs & {"q", "k", "v"}}
        # A dense bias takes most of the call's memory; each entry of its gradient is one dS, written without a sum.
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

    def open(self, ws: Workspace) -> None:
        self.dw = None if self.p.w is None else ws.k.new_zeros(*ws.q.shape[:2], ws.k.shape[2])
        self.dk = torch.zeros_like(ws.k) if "k" in self.needs else None
        self.dv = torch.zeros_like(ws.v) if "v" in self.needs else None

    def open_rows(self, ws: Workspace, q: Tensor) -> None:
        # dK takes Q times a tensor scale here; a float scale is multiplied in `close`.
        self.q = q
        if self.p.w is None and isinstance(self.p.scale, Tensor) and self.dk is not None:
            scale = per_head(self.p.scale, self.dtype, ws.chunk.heads)
            self.q = ws.fold(ws.unfold(q) * scale)
        wanted = {"q", "scale", "softcap"} if self.p.w is None else {"q"}
        self.dq = torch.zeros_like(q) if self.needs & wanted else None

    def add(self, ws: Workspace, tile: Tile, keys: slice, ds4: Tensor) -> None:
        p, chunk, sums = self.p, ws.chunk, self.sums
        if self.dense_bias:
            self.whole["bias"][chunk.batch, chunk.heads, tile.rows, keys] = ds4
        elif "bias" in sums:
            reduced = [d for d in range(4) if p.bias.shape[d] == 1 and ds4.shape[d] != 1]
            total = ds4.sum(reduced, keepdim=True) if reduced else ds4
            part(sums["bias"], chunk.batch, chunk.heads, tile.rows, keys).add_(total)
        if "slopes" in sums:
            distance = distance_to_diagonal(p, tile.rows, keys, self.dtype)
            total = (ds4.view(-1, distance.numel()) @ distance.view(-1)).view(ds4.shape[:2])
            if p.slopes.ndim == 1:
                sums["slopes"][chunk.heads].sub_(total.sum(0))
            else:
                sums["slopes"][chunk.batch, chunk.heads].sub_(total)
        if "row_terms" in sums:
            sums["row_terms"][chunk.batch, chunk.heads, tile.rows].add_(ds4.sum(3))
        if "key_terms" in sums:
            sums["key_terms"][chunk.batch, chunk.heads, keys].add_(ds4.sum(2))
        if p.softcap is not None:
            tanh = ws.buffer("tanh", tile, keys)
            if "softcap" in sums:
                sums["softcap"].add_(torch.dot(ds4.view(-1), tanh.view(-1)))
            torch.ops.aten.tanh_backward.grad_input(ds4, tanh, grad_input=ds4)
        if p.w is not None:
            self._add_additive(ws, tile, keys, ds4)
            return
        ds = ws.fold(ds4)
        if self.dq is not None:
            self.dq.baddbmm_(ds, ws.k[:, keys])
        if self.dk is not None:
            self.dk[:, keys].baddbmm_(ds.mT, self.q)

    def _add_additive(self, ws: Workspace, tile: Tile, keys: slice, du: Tensor) -> None:
        q, k, scale = ws.unfold(self.q), ws.by_head(ws.k[:, keys]), self.p.scale
        if isinstance(scale, Tensor):
            scale = scale.to(self.dtype).expand(self.p.shape[1])[ws.chunk.heads]
        dq, dk, dw = additive.gradients(q, k, ws.w, du, scale)
        self.dw.add_(dw)
        if self.dq is not None:
            self.dq.add_(ws.fold(dq))
        if self.dk is not None:
            self.dk[:, keys].add_(dk.flatten(0, 1))

    def _add_scalars(self, chunk: Chunk, totals: Tensor) -> None:
        """Add to the gradients of scale and softcap; totals (Hq,) are the sums of du times the unscaled product."""
        scale = per_head(self.p.scale, self.dtype, chunk.heads)
        if "scale" in self.sums:
            whole = self.sums["scale"].ndim == 0
            target = self.sums["scale"] if whole else self.sums["scale"][chunk.heads]
            target.add_(totals.sum() if whole else totals)
        if "softcap" in self.sums:
            flat = scale.view(-1) if isinstance(scale, Tensor) else scale
            cap = torch.as_tensor(self.p.softcap, dtype=self.dtype)
            self.sums["softcap"].sub_((totals * flat).sum() / cap)

    def close_rows(self, ws: Workspace, tile: Tile, q: Tensor) -> None:
        """Write dq = dS K scale. The sum of q * (dS K) is the gradient of scale, and a part of that of softcap."""
        if self.dq is None:
            return
        chunk = ws.chunk
        if self.p.w is None:
            if self.sums.keys() & {"scale", "softcap"}:
                self._add_scalars(chunk, ws.unfold(q * self.dq).sum((0, 2, 3)))
            self.dq = ws.fold(ws.unfold(self.dq) * per_head(self.p.scale, self.dtype, chunk.heads))
        if "q" in self.needs:
            self.whole["q"][chunk.batch, chunk.heads, tile.rows] = ws.unfold(self.dq).to(self.p.q.dtype)

    def close(self, ws: Workspace) -> None:
        p, chunk = self.p, ws.chunk
        index = (chunk.batch, chunk.kv_heads)
        if p.w is not None:
            # The unscaled product is linear in w, so the sum of du times the product is w . dw.
            self._add_scalars(chunk, (self.dw * ws.w).sum((0, 2)))
            if "w" in self.sums:
                dw = self.dw.sum(0)[..., None] * per_head(p.scale, self.dtype, chunk.heads)
                whole = p.w.ndim == 1
                target = self.sums["w"] if whole else self.sums["w"][chunk.heads]
                target.add_(dw[..., 0].sum(0) if whole else dw[..., 0])
        if self.dk is not None:
            scaled = p.w is not None or isinstance(p.scale, Tensor)
            dk = self.dk if scaled else self.dk.mul_(p.scale)
            self.whole["k"][index] = dk.view(self.whole["k"][index].shape).to(p.k.dtype)
        if self.dv is not None:
            self.whole["v"][index] = self.dv.view(self.whole["v"][index].shape).to(p.v.dtype)

    def finish(self) -> dict[str, Tensor]:
        return self.whole | {name: x.to(self.p.tensors()[name].dtype) for name, x in self.sums.items()}


# ---------------------------------------------------------------------------------------------------- plain autograd


def attention(p: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) by differentiable operations, for every autograd mode and any number of derivatives.

    Each tile of rows is computed against all its keys. The host reads no tensor values, so torch.func may batch or
    trace every tensor; lo, hi and a pattern therefore mask scores but skip no tile. The exception is `ragged`, whose
    sequence starts are read.
    """
    if p.ragged is not None:
        return p.joined([attention(sequence) for _, sequence in p.sequences()])
    # A tile also multiplies the keys between its sinks and its window, which must hold no NaN.
    visible = visibility(p) if p.span.sinks else tensor_visibility(p)
    if visible is not None:
        rows, keys = visible
        p = p.replace(q=torch.where(rows, p.q, 0), k=torch.where(keys, p.k, 0), v=torch.where(keys, p.v, 0))
    m, tiles = p.shape[2], row_tiles(p)
    begin, end = (tiles[0].start, tiles[-1].stop) if tiles else (m, m)
    fully_masked = [Tile(*rows, 0, 0, 0, 0) for rows in ((0, begin), (end, m)) if rows[0] < rows[1] or not m]
    outs, lses = zip(*(_plain_rows(p, tile) for tile in sorted(fully_masked + tiles)), strict=True)
    return p.in_order(torch.cat(outs, 2)), p.empty_lse() if p.sigmoid else torch.cat(lses, 2).to(p.lse_dtype)


def _plain_rows(p: Problem, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """out (B, Hq, rows, Dv) and lse (B, Hq, rows), or None for a sigmoid, of one tile of rows."""
    dtype, rows, keys = work_dtype(p), tile.rows, tile.keys
    (b, h), kv_heads, size = p.shape[:2], p.k.shape[1], tile.stop - tile.start
    q = p.q[:, :, rows].to(dtype).reshape(b, kv_heads, p.group * size, p.q.shape[3])
    k, v = (x[:, :, keys].to(dtype) for x in (p.k, p.v))
    if p.w is None:
        s = (q @ k.mT).reshape(b, h, size, keys.stop - keys.start)
    else:
        s = Additive(p.w).materialize(p.q[:, :, rows], p.k[:, :, keys], dtype)
    s = s * per_head(p.scale, dtype)
    if p.key_terms is not None:
        s = s + p.row_terms[:, :, rows, None] + p.key_terms[:, :, None, keys]
    if p.softcap is not None:
        cap = per_head(p.softcap, dtype)
        s = cap * torch.tanh(s / cap)
    if p.bias is not None:
        s = s + part(p.bias, slice(b), slice(h), rows, keys).to(dtype)
    if p.slopes is not None:
        s = s - p.slopes.to(dtype)[..., None, None] * distance_to_diagonal(p, rows, keys, dtype)
    i, j = (indices(x, s.device) for x in (rows, keys))
    if has_tensor_bounds(p) or tile.partial(keys):
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
    # The peak cancels in every derivative, so it is detached.
    peak = s.detach().amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    sink = None if p.sink is None else p.sink.to(s.dtype)[:, None]
    if sink is not None:
        peak = torch.maximum(peak, sink.detach())
    peak = finite_peak(peak)
    weights = torch.exp(s - peak[..., None])
    total = weights.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    visible = total != 0
    total = torch.where(visible, total, 1)
    lse = torch.where(visible, peak + torch.log(total), -torch.inf)
    return weights / total[..., None], lse
