"""What attention looks at, tile by tile: statistics of the weights in memory linear in length, and chosen rows of them.

A sweep over the keys of a tile of rows keeps a running maximum m, the sum l of weights, the sum t of weights times how
far their scores lie below the maximum, and the largest scores with their places. W = exp(S - m), a = exp(m_old - m):

    l = a l_old + sum W,    t = a (t_old + (m - m_old) l_old) + sum W (m - S)

and at the end, over the whole denominator, a sink's share included,

    -sum P log P = (t + l log(denominator / exp(m))) / (denominator / exp(m))

where every term is positive and nothing cancels. What a key gets of every row needs the rows' lse first, and so a
second sweep. Everything is computed in float32, or in float64 for float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...spec.problem import Problem, Statistics
from ...spec.reach import seen
from .tiles import Share, Tile, one_tile, shares, windows
from .workspace import Work, exp_minus, finite_peak, softmax_weights

FAR = 1000.0  # exp(-FAR) is 0 in float64 too, and FAR times 0 is 0
ROWS, APART = 128, 16  # of chosen rows: at most so many at once, and what lies between two of them


def statistics(p: Problem, key_mass: bool, entropy: bool, max_logit: bool, top_k: int) -> Statistics:
    """What is asked for, in the working dtype; no autograd."""
    if p.ragged is not None:
        return Statistics.of_sequences(p, statistics, key_mass, entropy, max_logit, top_k)
    found: Any = Statistics.of_nothing(p, key_mass, entropy, max_logit, top_k)
    visible = seen(p)
    for share in shares(p):
        work = Work(p, share, visible)
        for tile in share.tiles:
            rows = _Rows(work, tile, bool(entropy or top_k or key_mass), entropy, top_k)
            place = (share.batch, share.heads, tile.rows)
            if max_logit:
                found.max_logit[place] = work.unfold(rows.m)[..., 0]
            if entropy:
                found.entropy[place] = work.unfold(rows.entropy())[..., 0]
            if top_k:
                found.top_k_indices[place] = work.unfold(rows.places)
                found.top_k_weights[place] = work.unfold(rows.weights(rows.best))
            for keys in tile.key_tiles() if key_mass else ():
                mass = work.unfold(rows.weights(work.fold(work.scores(rows.q, tile, keys)))).sum(2)
                found.key_mass[share.batch, share.heads, keys] += mass
    return found


def weights(p: Problem, rows: list[int], heads: list[int]) -> Tensor:
    """(B, len(heads), len(rows), N), in the working dtype; no autograd."""
    b, _, _, n = p.shape
    found = p.q.new_zeros((b, len(heads), len(rows), n), dtype=p.lse_dtype)
    visible = seen(p)
    for slot, head in enumerate(heads if found.numel() else ()):
        one = p.of_head(head)
        work = Work(one, Share(slice(b), slice(1), slice(1), []), visible)
        for window in windows(rows, ROWS, APART):
            tile = one_tile(p, window.start, window.stop)
            chosen = _Rows(work, tile, True)
            for keys in tile.key_tiles():
                tile_weights = chosen.weights(work.fold(work.scores(chosen.q, tile, keys)))
                found[:, slot, window.slots, keys] = tile_weights[:, window.inside]
    return found


class _Rows:
    """What is known of a tile of rows, each (B * Hkv, group * rows, 1 or top_k), after a sweep over its keys.

    weighs: whether anything but scores is wanted; a sigmoid has no denominator to sum up.
    """

    def __init__(self, work: Work, tile: Tile, weighs: bool, entropy: bool = False, top_k: int = 0) -> None:
        self.work, self.tile, self.top_k = work, tile, top_k
        self.q = q = work.fold(work.q[:, :, tile.rows])
        self.m = q.new_full((*q.shape[:2], 1), -torch.inf)
        self.total = torch.zeros_like(self.m)
        self.below: Any = torch.zeros_like(self.m) if entropy else None
        self.best = q.new_full((*q.shape[:2], top_k), -torch.inf)
        self.places = torch.full_like(self.best, -1, dtype=torch.int64)
        weighs = weighs and not work.p.sigmoid
        for keys in tile.key_tiles():
            s = work.fold(work.scores(q, tile, keys))
            if top_k:
                self._rank(s, keys.start)
            peak = torch.maximum(self.m, s.amax(-1, keepdim=True))
            if weighs:
                self._weigh(s, keys, peak)
            self.m = peak
        if weighs:
            self._close()

    def _rank(self, s: Tensor, first: int) -> None:
        best, places = leading(s, self.top_k)
        # What was found before stands first, and with it the first of two keys that are alike.
        best, order = leading(torch.cat((self.best, best), -1), self.top_k)
        places = torch.cat((self.places, places + first), -1).gather(-1, order)
        self.best, self.places = best, places.masked_fill_(best == -torch.inf, -1)

    def _weigh(self, s: Tensor, keys: slice, peak: Tensor) -> None:
        """Add weights relative to a new maximum; s is overwritten."""
        shift = finite_peak(peak)
        shrink = torch.exp(self.m - shift)
        if self.below is not None:
            gaps = self.work.fold(self.work.buffer("gaps", self.tile, keys))
            torch.sub(shift, s, out=gaps).clamp_(max=FAR)
            self.below = shrink * (self.below + (shift - finite_peak(self.m)) * self.total)
        exp_minus(s, shift)
        self.total = shrink * self.total + s.sum(-1, keepdim=True)
        if self.below is not None:
            self.below = self.below + gaps.mul_(s).sum(-1, keepdim=True)

    def _close(self) -> None:
        """lse = shift + log, apart because their sum would round away log where scores are large; and whose share of
        the denominator the keys have."""
        p, share = self.work.p, self.work.share
        top = self.m
        if p.sink is not None:
            sink = self.work.unfold(torch.empty_like(top)).copy_(p.sink[share.heads, None, None])
            top = torch.maximum(top, self.work.fold(sink))
        self.shift = finite_peak(top)
        self.share = torch.exp(self.m - self.shift)
        denominator = self.share * self.total
        if p.sink is not None:
            denominator = denominator + torch.exp(self.work.fold(sink) - self.shift)
        self.log = torch.log(denominator)

    def entropy(self) -> Tensor:
        depth = self.shift - finite_peak(self.m) + self.log
        found = self.share * torch.exp(-self.log) * (self.below + depth * self.total)
        return found.masked_fill(self.total == 0, 0)

    def weights(self, s: Tensor) -> Tensor:
        """Of scores, in their place; 0 where a score is -inf, in a row of NaN too."""
        if self.work.p.sigmoid:
            return s.sigmoid_()
        forbidden = s == -torch.inf if self.log.isnan().any() else None
        weights = softmax_weights(s, self.shift, self.log.masked_fill(self.log == -torch.inf, 0))
        return weights if forbidden is None else weights.masked_fill_(forbidden, 0)


def leading(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (all, where there are fewer), the largest first, and their places; NaN above all.

    Of equals the first comes first. torch.topk does not promise that, so rows with equals are sorted.
    """
    width = s.shape[-1]
    values, places = s.topk(min(k + 1, width))
    before, after = values[..., :-1], values[..., 1:]
    equals = (~(before > after) & (after != -torch.inf)).any(-1)
    values, places = values[..., :k], places[..., :k]
    if equals.any():
        best, order = s[equals].sort(dim=-1, descending=True, stable=True)
        values[equals], places[equals] = best[..., :k], order[..., :k]
    return values, places
