"""A of the tolerance rule: each result's sum with every term taken absolute, since cancellation noise grows with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import reference
from ..scores import SHORTEST, Additive, Bilinear, Cosine, Distance
from ..spec.problem import Problem
from .cases import PARAMETERS
from .inputs import Inputs

Pulled = tuple[Tensor, Tensor, Tensor | None]


class Terms(NamedTuple):
    """The absolute terms of the products (B, Hq, M, N); and what |du|, of the products' gradient, gives q, k (of every
    query head) and the score's parameter (B, Hq, and its own dims)."""

    products: Tensor
    pull: Callable[[Tensor], Pulled]


def _dot(q: Tensor, k: Tensor, parameter: None) -> Terms:
    return Terms(q @ k.mT, lambda du: (du @ k, du.mT @ q, None))


def _bilinear(q: Tensor, k: Tensor, w: Tensor) -> Terms:
    def pull(du: Tensor) -> Pulled:
        seen = du @ k
        return seen @ w.mT, du.mT @ (q @ w), q.mT @ seen

    return Terms(q @ w @ k.mT, pull)


def _cosine(q: Tensor, k: Tensor, t: Tensor) -> Terms:
    t = t.view(-1, 1, 1)
    (unit_q, norm_q), (unit_k, norm_k) = map(_unit, (q, k))

    def pull(du: Tensor) -> Pulled:
        found = []
        for unit, norm, g in ((unit_q, norm_q, t * du @ unit_k), (unit_k, norm_k, t * du.mT @ unit_q)):
            found.append((g + unit * (unit * g).sum(-1, keepdim=True)) / norm)
        return found[0], found[1], (du * (unit_q @ unit_k.mT)).sum((2, 3))

    return Terms(t * (unit_q @ unit_k.mT), pull)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(SHORTEST)
    return x / norm, norm


def _distance(q: Tensor, k: Tensor, h: Tensor) -> Terms:
    inverse = h.view(-1, 1, 1) ** -2.0
    products = inverse * (q @ k.mT + (q.square().sum(-1)[..., None] + k.square().sum(-1)[..., None, :]) / 2)

    def pull(du: Tensor) -> Pulled:
        du = du * inverse
        return (
            du @ k + q * du.sum(3)[..., None],
            du.mT @ q + k * du.sum(2)[..., None],
            (2 * du * products / inverse / h.view(-1, 1, 1)).sum((2, 3)),
        )

    return Terms(products, pull)


def _additive(q: Tensor, k: Tensor, w: Tensor) -> Terms:
    """q and k keep their signs."""
    t = torch.tanh(q[..., :, None, :] + k[..., None, :, :]).abs()
    each = w.reshape(-1, 1, w.shape[-1])

    def pull(du: Tensor) -> Pulled:
        slopes = du[..., None] * (1 + t * t)
        return slopes.sum(3) * each, slopes.sum(2) * each, (du[..., None] * t).sum((2, 3))

    return Terms((t * each[:, None]).sum(-1), pull)


SCORES: dict[type, Callable[..., Terms]] = {
    type(None): _dot, Bilinear: _bilinear, Cosine: _cosine, Distance: _distance, Additive: _additive,
}  # fmt: skip


def _products(p: Problem) -> Terms:
    signed = p.q, p.k.repeat_interleave(p.group, 1)
    q, k = signed if isinstance(p.score, Additive) else (x.abs() for x in signed)
    parameter = None if p.score is None else torch.as_tensor(p.parameter).to(p.q).abs()
    return SCORES[type(p.score)](q, k, parameter)


def _scale(p: Problem) -> Tensor:
    return torch.as_tensor(p.scale).to(p.q).reshape(-1, 1, 1).abs()


def _distance_to_diagonal(p: Problem) -> Tensor:
    i, j = (torch.arange(x, device=p.q.device) for x in p.shape[2:])
    return (i[:, None] + p.offset - j).abs().double()


def _modified(p: Problem, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, Hq, M, N) each: the scores' terms, their slope by what softcap bends, and their bend by its parameter."""
    u = products * _scale(p)
    terms, slope, bend = u, torch.ones_like(u), u
    if p.softcap is not None:
        raw = p.replace(bias=None, slopes=None, mask=None, softcap=None)
        bent = torch.tanh(u := reference.scores(raw, torch.float64).nan_to_num(neginf=0.0) / p.softcap)
        terms, slope = p.softcap * bent.abs(), 1 - bent**2
        bend = bent.abs() + u.abs() * slope
    if p.bias is not None:
        terms = terms + p.bias.abs()
    if p.slopes is not None:
        terms = terms + p.slopes.abs()[..., None, None] * _distance_to_diagonal(p)
    return terms, slope, bend


@torch.no_grad()
def of_scores(p: Problem) -> Tensor:
    """A of the scores, (B, Hq, M, N). p is in float64 and not lowered."""
    return _modified(p, _products(p).products)[0]


@torch.no_grad()
def absolutes(p: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """A of each result. p is in float64 and not lowered."""
    if p.ragged is not None:
        return _of_sequences(p, inputs)
    b, h, m, n = p.shape
    zero = p.q.new_zeros(())
    v = p.v.repeat_interleave(p.group, 1).abs()
    products, pull = _products(p)
    terms, slope, bend = _modified(p, products)
    i, j = torch.arange(m, device=v.device), torch.arange(n, device=v.device)
    weights, lse = reference.normalized(p, reference.scores(p, torch.float64))
    kept = weights
    if p.dropout is not None:
        heads = torch.arange(b * h, device=v.device).view(b, h)
        kept = weights * p.dropout.materialize(heads, i, j) * p.dropout.rescale

    out = kept @ v
    found = {"out": out}
    to_sink = zero
    if not p.sigmoid:
        found["lse"] = torch.where(weights > 0, weights * terms, 0.0).sum(-1) + lse.abs()
    if p.sink is not None:
        to_sink = (p.sink[:, None] - torch.where(lse.isinf(), torch.inf, lse)).exp()
        found["lse"] += to_sink * p.sink.abs()[:, None]

    dout = torch.zeros_like(out) if inputs.dout is None else inputs.dout.double().abs()
    delta = (dout * out).sum(-1) + (0.0 if inputs.dlse is None else inputs.dlse.double().abs())
    dp = kept * (dout @ v.mT)
    ds = (1 - weights) * dp if p.sigmoid else weights * delta[..., None] + dp
    dq, dk, dparameter = pull(ds * slope * _scale(p))

    def by_kv_head(x: Tensor) -> Tensor:
        return x.view(b, p.k.shape[1], p.group, *x.shape[2:]).sum(2)

    found |= {"q": dq, "k": by_kv_head(dk), "v": by_kv_head(kept.mT @ dout)}
    per_parameter = {
        "scale": ds * slope * products,
        "softcap": ds * bend,
        "bias": ds,
        "slopes": ds * _distance_to_diagonal(p),
        "sink": (to_sink * delta).reshape(b, h, m, 1) if p.sink is not None else ds,
    }
    for name in (PARAMETERS - {"parameter"}) & p.tensors().keys():
        shape = getattr(p, name).shape
        target = shape if name == "bias" else (*shape, 1, 1)
        found[name] = per_parameter[name].sum_to_size(target).reshape(shape)
    if dparameter is not None:
        found["parameter"] = (
            dparameter.sum_to_size(p.parameter.shape) if isinstance(p.parameter, Tensor) else dparameter
        )
    return found


def _of_sequences(p: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """Of each ragged sequence, put together or added up."""
    shapes = {"out": (*p.q.shape[:3], p.v.shape[3]), "lse": p.q.shape[:3]}
    shapes |= {name: x.shape for name, x in p.tensors().items()}
    found: dict[str, Tensor] = {}
    for one, alone in p.sequences():
        dout, dlse = (None if x is None else one.part("out", x) for x in (inputs.dout, inputs.dlse))
        own = replace(inputs, dout=dout, dlse=dlse)
        for name, x in absolutes(alone, own).items():
            whole = found.setdefault(name, x.new_zeros(shapes[name]))
            one.part(name, whole).add_(x)
    return found
