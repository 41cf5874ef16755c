"""Statistics of the attention weights, tile by tile in O(M + N) memory, and the weights of selected rows.

One pass over the keys of a tile of rows keeps the running maximum m of the scores S, the sums l = sum W and
t = sum W (m - S) with W = exp(S - m), and the top-k scores with their key indices. With a = exp(m_old - m):

    l = a l_old + sum W,    t = a (t_old + (m - m_old) l_old) + sum W (m - S)

The entropy, with the softmax denominator Z (which includes a sink), is

    -sum P log P = (t + l log(Z / exp(m))) / (Z / exp(m))

where every term is positive, so nothing cancels. Key mass needs the rows' lse, hence a second pass. Computed in
float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...spec.problem import Problem, Statistics
from ...spec.visibility import tensor_visibility
from .tiles import Chunk, Tile, chunks, one_tile, windows
from .workspace import Workspace, exp_minus, finite_peak, softmax_weights

FAR = 1000.0  # clamps m - S: exp(-FAR) is 0 in float64 too, while inf * 0 is NaN
ROWS, APART = 128, 16  # of `tiles.windows`: most rows, and most rows between two requested ones


def statistics(p: Problem, key_mass: bool, entropy: bool, max_logit: bool, top_k: int) -> Statistics:
    """The requested statistics, in the working dtype; no autograd."""
    if p.ragged is not None:
        return Statistics.of_sequences(p, statistics, key_mass, entropy, max_logit, top_k)
    result: Any = Statistics.fully_masked(p, key_mass, entropy, max_logit, top_k)
    visible = tensor_visibility(p)
    for chunk in chunks(p):
        ws = Workspace(p, chunk, visible)
        for tile in chunk.tiles:
            rows = _Rows(ws, tile, bool(entropy or top_k or key_mass), entropy, top_k)
            index = (chunk.batch, chunk.heads, tile.rows)
            if max_logit:
                result.max_logit[index] = ws.unfold(rows.m)[..., 0]
            if entropy:
                result.entropy[index] = ws.unfold(rows.entropy())[..., 0]
            if top_k:
                result.top_k_indices[index] = ws.unfold(rows.indices)
                result.top_k_weights[index] = ws.unfold(rows.weights(rows.best))
            for keys in tile.key_tiles() if key_mass else ():
                mass = ws.unfold(rows.weights(ws.fold(ws.scores(rows.q, tile, keys)))).sum(2)
                result.key_mass[chunk.batch, chunk.heads, keys] += mass
    return result


def weights(p: Problem, rows: list[int], heads: list[int]) -> Tensor:
    """(B, len(heads), len(rows), N), in the working dtype; no autograd."""
    b, _, _, n = p.shape
    result = p.q.new_zeros((b, len(heads), len(rows), n), dtype=p.lse_dtype)
    visible = tensor_visibility(p)
    for slot, head in enumerate(heads if result.numel() else ()):
        ws = Workspace(p.of_head(head), Chunk(slice(b), slice(1), slice(1), []), visible)
        for window in windows(rows, ROWS, APART):
            tile = one_tile(p, window.start, window.stop)
            own = _Rows(ws, tile, True)
            for keys in tile.key_tiles():
                tile_weights = own.weights(ws.fold(ws.scores(own.q, tile, keys)))
                result[:, slot, window.slots, keys] = tile_weights[:, window.inside]
    return result


class _Rows:
    """Running values of a tile of rows after one pass over its keys: (B * Hkv, group * rows, 1 or top_k) each.

    normalize: compute the softmax denominator. It is not needed for logits alone, and a sigmoid has none.
    """

    def __init__(self, ws: Workspace, tile: Tile, normalize: bool, entropy: bool = False, top_k: int = 0) -> None:
        self.ws, self.tile, self.top_k = ws, tile, top_k
        self.q = q = ws.fold(ws.q[:, :, tile.rows])
        self.m = q.new_full((*q.shape[:2], 1), -torch.inf)
        self.total = torch.zeros_like(self.m)
        self.below: Any = torch.zeros_like(self.m) if entropy else None  # t of the module's formula
        self.best = q.new_full((*q.shape[:2], top_k), -torch.inf)
        self.indices = torch.full_like(self.best, -1, dtype=torch.int64)
        normalize = normalize and not ws.p.sigmoid
        for keys in tile.key_tiles():
            s = ws.fold(ws.scores(q, tile, keys))
            if top_k:
                self._rank(s, keys.start)
            peak = torch.maximum(self.m, s.amax(-1, keepdim=True))
            if normalize:
                self._add(s, keys, peak)
            self.m = peak
        if normalize:
            self._finish()

    def _rank(self, s: Tensor, first: int) -> None:
        best, indices = leading(s, self.top_k)
        # Keys of earlier tiles come first, so that the lower index wins a tie.
        best, order = leading(torch.cat((self.best, best), -1), self.top_k)
        indices = torch.cat((self.indices, indices + first), -1).gather(-1, order)
        self.best, self.indices = best, indices.masked_fill_(best == -torch.inf, -1)

    def _add(self, s: Tensor, keys: slice, peak: Tensor) -> None:
        """Add the weights of a tile relative to the new maximum; s is overwritten."""
        shift = finite_peak(peak)
        shrink = torch.exp(self.m - shift)
        if self.below is not None:
            gaps = self.ws.fold(self.ws.buffer("gaps", self.tile, keys))
            torch.sub(shift, s, out=gaps).clamp_(max=FAR)
            self.below = shrink * (self.below + (shift - finite_peak(self.m)) * self.total)
        exp_minus(s, shift)
        self.total = shrink * self.total + s.sum(-1, keepdim=True)
        if self.below is not None:
            self.below = self.below + gaps.mul_(s).sum(-1, keepdim=True)

    def _finish(self) -> None:
        """Set shift and log, with lse = shift + log: kept apart, since the sum loses log if scores are large. With a
        sink, shift may exceed m; rescale = exp(m - shift)."""
        p, chunk = self.ws.p, self.ws.chunk
        top = self.m
        if p.sink is not None:
            sink = self.ws.unfold(torch.empty_like(top)).copy_(p.sink[chunk.heads, None, None])
            top = torch.maximum(top, self.ws.fold(sink))
        self.shift = finite_peak(top)
        self.rescale = torch.exp(self.m - self.shift)
        denominator = self.rescale * self.total
        if p.sink is not None:
            denominator = denominator + torch.exp(self.ws.fold(sink) - self.shift)
        self.log = torch.log(denominator)

    def entropy(self) -> Tensor:
        depth = self.shift - finite_peak(self.m) + self.log
        result = self.rescale * torch.exp(-self.log) * (self.below + depth * self.total)
        return result.masked_fill(self.total == 0, 0)

    def weights(self, s: Tensor) -> Tensor:
        """The weights of scores s, in place; 0 where a score is -inf, even in a row with NaN."""
        if self.ws.p.sigmoid:
            return s.sigmoid_()
        masked = s == -torch.inf if self.log.isnan().any() else None
        weights = softmax_weights(s, self.shift, self.log.masked_fill(self.log == -torch.inf, 0))
        return weights if masked is None else weights.masked_fill_(masked, 0)


def leading(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row (fewer if the row is shorter) in descending order, and their indices.

    NaN is largest, and the lower index wins a tie. torch.topk does not promise that, so rows with ties are sorted.
    """
    width = s.shape[-1]
    values, indices = s.topk(min(k + 1, width))
    before, after = values[..., :-1], values[..., 1:]
    ties = (~(before > after) & (after != -torch.inf)).any(-1)
    values, indices = values[..., :k], indices[..., :k]
    if ties.any():
        best, order = s[ties].sort(dim=-1, descending=True, stable=True)
        values[ties], indices[ties] = best[..., :k], order[..., :k]
    return values, indices
