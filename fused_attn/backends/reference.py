"""The reference: attention by its definition, with the whole score matrix in memory and plain autograd.

    out = softmax(scores) @ V,  lse = log(sum(exp(scores)))

It runs any Problem in any floating dtype; in float64 it is the oracle that tests compare every other backend with.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..scores import Additive
from ..spec.problem import HALF, Problem, Statistics


def why_not(p: Problem) -> list[str]:
    """Always empty: the reference runs every problem."""
    return []


def scores(p: Problem, dtype: torch.dtype) -> Tensor:
    """(B, Hq, M, N): scores after every modifier, -inf where masked."""
    q, k = p.q.to(dtype), _expanded(p.k, p).to(dtype)
    score = p.score if p.w is None else Additive(p.w)
    s = (q @ k.mT if score is None else score.materialize(q, k, dtype)) * _per_head(p.scale, dtype)
    if p.row_terms is not None and p.key_terms is not None:
        s = s + p.row_terms.to(dtype)[..., None] + p.key_terms.to(dtype)[..., None, :]
    if p.softcap is not None:
        cap = _per_head(p.softcap, dtype)
        s = cap * torch.tanh(s / cap)
    if p.bias is not None:
        s = s + p.bias.to(dtype)
    i, j = _positions(p)
    if p.slopes is not None:
        s = s - p.slopes.to(dtype)[..., None, None] * (i[:, None] + p.offset - j).abs()
    s = s.masked_fill(~p.visible(i, j), -torch.inf)
    return s if p.mask is None else s.masked_fill(~p.mask, -torch.inf)


def attention(p: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse), computed in dtype; by default in q's dtype, or in float32 for half precision."""
    dtype = dtype or _work_dtype(p)
    if p.ragged is not None:
        return p.joined([attention(sequence, dtype) for _, sequence in p.sequences()])
    weights, lse = normalized(p, scores(p, dtype))
    if p.dropout is not None:
        i, j = _positions(p)
        heads = torch.arange(p.shape[0] * p.shape[1], device=i.device).view(p.shape[:2])
        weights = weights * p.dropout.materialize(heads, i, j) * p.dropout.rescale
    return p.in_order(weights @ _expanded(p.v, p).to(dtype)), lse.to(p.lse_dtype)


def normalized(p: Problem, s: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (B, Hq, M, N) of scores s, before dropout, and the lse (B, Hq, M), or (0,) for a sigmoid."""
    if p.sigmoid:
        return torch.sigmoid(s), p.empty_lse()
    peak = s.detach().amax(-1) if p.shape[3] else s.new_full(s.shape[:-1], -torch.inf)
    # softmax1 is a sink whose logit is 0.
    sink = s.new_zeros(p.shape[1]) if p.normalizer == "softmax1" else None if p.sink is None else p.sink.to(s.dtype)
    if sink is not None:
        sink = sink[:, None].expand(s.shape[:-1])
        peak = torch.maximum(peak, sink.detach())
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(s - peak[..., None])
    total = weights.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    # A fully masked row has total 0. Dividing by 1 keeps its weights 0 and its gradients free of 0 / 0.
    visible = total != 0
    total = torch.where(visible, total, 1.0)
    lse = torch.where(visible, peak + torch.log(total), -torch.inf)
    return weights / total[..., None], lse


def returned_weights(p: Problem, s: Tensor) -> Tensor:
    """The weights (B, Hq, M, N) that maps and statistics return: before dropout, 0 where a score is -inf even if the
    row is NaN."""
    return torch.where(s == -torch.inf, 0.0, normalized(p, s)[0])


def weights(p: Problem, rows: list[int], heads: list[int], dtype: torch.dtype | None = None) -> Tensor:
    """(B, len(heads), len(rows), N): the weights of the given rows and heads."""
    dtype = dtype or _work_dtype(p)
    return returned_weights(p, scores(p, dtype))[:, heads][:, :, rows]


def statistics(
    p: Problem, key_mass: bool, entropy: bool, max_logit: bool, top_k: int, dtype: torch.dtype | None = None
) -> Statistics:
    """The requested statistics, computed in dtype; None for the others."""
    if p.ragged is not None:
        return Statistics.of_sequences(
            p, functools.partial(statistics, dtype=dtype), key_mass, entropy, max_logit, top_k
        )
    s = scores(p, dtype or _work_dtype(p))
    weights = returned_weights(p, s)
    ranked, indices = s.sort(dim=-1, descending=True, stable=True)
    missing = ranked[..., :top_k] == -torch.inf
    return Statistics(
        weights.sum(2) if key_mass else None,
        torch.special.entr(weights).sum(3) if entropy else None,
        ranked[..., 0] if max_logit and p.shape[3] else s.new_full(s.shape[:3], -torch.inf) if max_logit else None,
        indices[..., :top_k].masked_fill(missing, -1) if top_k else None,
        weights.gather(3, indices[..., :top_k]).masked_fill(missing, 0.0) if top_k else None,
    )


def _work_dtype(p: Problem) -> torch.dtype:
    return torch.float32 if p.q.dtype in HALF else p.q.dtype


def _expanded(x: Tensor, p: Problem) -> Tensor:
    """k or v with each head repeated for its group of query heads, and zeros at keys that no row sees.

    A masked key has weight 0, but 0 * NaN is NaN: padding may hold NaN.
    """
    x = x if p.group == 1 else x.repeat_interleave(p.group, dim=1)
    return x if p.all_keys_visible else torch.where(p.visible_keys()[..., None], x, 0.0)


def _per_head(x: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A float unchanged; a tensor () or (Hq,) shaped to multiply (B, Hq, M, N)."""
    return x.to(dtype).view(-1, 1, 1) if isinstance(x, Tensor) else x


def _positions(p: Problem) -> tuple[Tensor, Tensor]:
    m, n = p.shape[2:]
    return torch.arange(m, device=p.q.device), torch.arange(n, device=p.q.device)
