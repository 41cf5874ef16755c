"""A of the tolerance rule: every result with the terms of its sums replaced by their absolute values.

Cancellation errors of a sum are proportional to the sum of its absolute terms.
"""

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

Gradients = tuple[Tensor, Tensor, Tensor | None]  # of q, of k for every query head, of the score's parameter


class Terms(NamedTuple):
    """Absolute sums of a score: its products (B, Hq, M, N), and a function from |du|, the absolute gradient of the
    products, to the absolute sums of the gradients; that of the parameter is (B, Hq, *its own dims)."""

    products: Tensor
    gradients: Callable[[Tensor], Gradients]


def _dot(q: Tensor, k: Tensor, parameter: None) -> Terms:
    return Terms(q @ k.mT, lambda du: (du @ k, du.mT @ q, None))


def _bilinear(q: Tensor, k: Tensor, w: Tensor) -> Terms:
    def gradients(du: Tensor) -> Gradients:
        du_k = du @ k
        return du_k @ w.mT, du.mT @ (q @ w), q.mT @ du_k

    return Terms(q @ w @ k.mT, gradients)


def _cosine(q: Tensor, k: Tensor, t: Tensor) -> Terms:
    t = t.view(-1, 1, 1)
    (unit_q, norm_q), (unit_k, norm_k) = map(_unit, (q, k))

    def gradients(du: Tensor) -> Gradients:
        dq, dk = (
            (g + unit * (unit * g).sum(-1, keepdim=True)) / norm
            for unit, norm, g in ((unit_q, norm_q, t * du @ unit_k), (unit_k, norm_k, t * du.mT @ unit_q))
        )
        return dq, dk, (du * (unit_q @ unit_k.mT)).sum((2, 3))

    return Terms(t * (unit_q @ unit_k.mT), gradients)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(SHORTEST)
    return x / norm, norm


def _distance(q: Tensor, k: Tensor, h: Tensor) -> Terms:
    inverse = h.view(-1, 1, 1) ** -2.0
    products = inverse * (q @ k.mT + (q.square().sum(-1)[..., None] + k.square().sum(-1)[..., None, :]) / 2)

    def gradients(du: Tensor) -> Gradients:
        du = du * inverse
        return (
            du @ k + q * du.sum(3)[..., None],
            du.mT @ q + k * du.sum(2)[..., None],
            (2 * du * products / inverse / h.view(-1, 1, 1)).sum((2, 3)),
        )

    return Terms(products, gradients)


def _additive(q: Tensor, k: Tensor, w: Tensor) -> Terms:
    """q and k are not absolute: the sum inside tanh is one term."""
    t = torch.tanh(q[..., :, None, :] + k[..., None, :, :]).abs()
    w = w.reshape(-1, 1, w.shape[-1])

    def gradients(du: Tensor) -> Gradients:
        dsum = du[..., None] * (1 + t * t)
        return dsum.sum(3) * w, dsum.sum(2) * w, (du[..., None] * t).sum((2, 3))

    return Terms((t * w[:, None]).sum(-1), gradients)


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
    """(B, Hq, M, N) each: A of the scores s, ds / d(product * scale), and A of ds / dsoftcap."""
    u = products * _scale(p)
    terms, slope, to_softcap = u, torch.ones_like(u), u
    if p.softcap is not None:
        raw = p.replace(bias=None, slopes=None, mask=None, softcap=None)
        t = torch.tanh(u := reference.scores(raw, torch.float64).nan_to_num(neginf=0.0) / p.softcap)
        terms, slope = p.softcap * t.abs(), 1 - t**2
        to_softcap = t.abs() + u.abs() * slope
    if p.bias is not None:
        terms = terms + p.bias.abs()
    if p.slopes is not None:
        terms = terms + p.slopes.abs()[..., None, None] * _distance_to_diagonal(p)
    return terms, slope, to_softcap


@torch.no_grad()
def absolute_scores(p: Problem) -> Tensor:
    """A of the scores, (B, Hq, M, N). p is float64 and not lowered."""
    return _modified(p, _products(p).products)[0]


@torch.no_grad()
def absolute_sums(p: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """A of each result, by name. p is float64 and not lowered."""
    if p.ragged is not None:
        return _ragged_sums(p, inputs)
    b, h, m, n = p.shape
    zero = p.q.new_zeros(())
    v = p.v.repeat_interleave(p.group, 1).abs()
    products, gradients = _products(p)
    terms, slope, to_softcap = _modified(p, products)
    i, j = torch.arange(m, device=v.device), torch.arange(n, device=v.device)
    weights, lse = reference.normalized(p, reference.scores(p, torch.float64))
    kept = weights
    if p.dropout is not None:
        heads = torch.arange(b * h, device=v.device).view(b, h)
        kept = weights * p.dropout.materialize(heads, i, j) * p.dropout.rescale

    out = kept @ v
    result = {"out": out}
    sink_weights = zero
    if not p.sigmoid:
        result["lse"] = torch.where(weights > 0, weights * terms, 0.0).sum(-1) + lse.abs()
    if p.sink is not None:
        sink_weights = (p.sink[:, None] - torch.where(lse.isinf(), torch.inf, lse)).exp()
        result["lse"] += sink_weights * p.sink.abs()[:, None]

    dout = torch.zeros_like(out) if inputs.dout is None else inputs.dout.double().abs()
    delta = (dout * out).sum(-1) + (0.0 if inputs.dlse is None else inputs.dlse.double().abs())
    dp = kept * (dout @ v.mT)
    ds = (1 - weights) * dp if p.sigmoid else weights * delta[..., None] + dp
    dq, dk, dparameter = gradients(ds * slope * _scale(p))

    def by_kv_head(x: Tensor) -> Tensor:
        return x.view(b, p.k.shape[1], p.group, *x.shape[2:]).sum(2)

    result |= {"q": dq, "k": by_kv_head(dk), "v": by_kv_head(kept.mT @ dout)}
    per_parameter = {
        "scale": ds * slope * products,
        "softcap": ds * to_softcap,
        "bias": ds,
        "slopes": ds * _distance_to_diagonal(p),
        "sink": (sink_weights * delta).reshape(b, h, m, 1) if p.sink is not None else ds,
    }
    for name in (PARAMETERS - {"parameter"}) & p.tensors().keys():
        shape = getattr(p, name).shape
        target = shape if name == "bias" else (*shape, 1, 1)
        result[name] = per_parameter[name].sum_to_size(target).reshape(shape)
    if dparameter is not None:
        result["parameter"] = (
            dparameter.sum_to_size(p.parameter.shape) if isinstance(p.parameter, Tensor) else dparameter
        )
    return result


def _ragged_sums(p: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """`absolute_sums` of each packed sequence, in packed results; those of parameters are added."""
    shapes = {"out": (*p.q.shape[:3], p.v.shape[3]), "lse": p.q.shape[:3]}
    shapes |= {name: x.shape for name, x in p.tensors().items()}
    result: dict[str, Tensor] = {}
    for sequence, own_p in p.sequences():
        dout, dlse = (None if x is None else sequence.part("out", x) for x in (inputs.dout, inputs.dlse))
        for name, x in absolute_sums(own_p, replace(inputs, dout=dout, dlse=dlse)).items():
            whole = result.setdefault(name, x.new_zeros(shapes[name]))
            sequence.part(name, whole).add_(x)
    return result
