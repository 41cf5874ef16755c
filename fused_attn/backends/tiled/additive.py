"""Additive scores on the host: w . tanh(q + k) and its derivatives for tiles, without ever holding M x N x D numbers.

    s_ij = sum_d w_d t_ijd,   t_ijd = tanh(q_id + k_jd)
    dq_id = w_d sum_j ds_ij (1 - t_ijd^2),   dk_jd = w_d sum_i ds_ij (1 - t_ijd^2),   dw_d = sum_ij ds_ij t_ijd

A few rows and features at a time meet all keys of a tile, in memory that stays in a cache; the sum over features is a
product with w.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS = 2**17  # of tanh at once, for each thread


class Block(NamedTuple):
    """Features by rows by keys: tanh(q + k), (B * Hq, features, rows * keys), and where it stands in its tile."""

    tanh: Tensor
    rows: slice
    features: slice


def _blocks(q: Tensor, k: Tensor) -> Iterator[Block]:
    """Every feature of every row of q (B, Hq, rows, D) beside all keys of k (B, Hkv, keys, D); one memory for all."""
    (b, heads, m, d), (kv_heads, n) = q.shape, k.shape[1:3]
    group, room = heads // kv_heads, ELEMENTS * (torch.get_num_threads() if q.device.type == "cpu" else 128)
    features = max(1, min(d, 16, room // (b * heads * n)))
    rows = max(1, min(m, room // (b * heads * n * features)))
    q, k = (x.mT.contiguous() for x in (q, k))
    memory = q.new_empty(b * heads * features * rows * n)
    for first in range(0, m, rows):
        some = slice(first, min(first + rows, m))
        for feature in range(0, d, features):
            part = slice(feature, min(feature + features, d))
            shape = (b, kv_heads, group, part.stop - part.start, some.stop - some.start, n)
            t = memory[: torch.Size(shape).numel()].view(shape)
            torch.add(q[:, :, part, some].view(*shape[:5], 1), k[:, :, None, part, None], out=t)
            yield Block(t.tanh_().view(b * heads, shape[3], -1), some, part)


def _weights(w: Tensor, q: Tensor) -> Tensor:
    """w (D,) or (Hq, D) as (B * Hq, 1, D), in q's dtype."""
    b, heads, _, d = q.shape
    return w.to(q.dtype).expand(b, heads, d).reshape(b * heads, 1, d)


def products(q: Tensor, k: Tensor, w: Tensor, out: Tensor) -> None:
    """out (B, Hq, rows, keys) = w . tanh(q + k), of q (B, Hq, rows, D), k (B, Hkv, keys, D) and w (D,) or (Hq, D)."""
    weights, s = _weights(w, q), out.flatten(0, 1)
    for t, rows, features in _blocks(q, k):
        place = s[:, rows].view(len(s), 1, -1)
        place.baddbmm_(weights[..., features], t, beta=float(features.start > 0))


def gradients(q: Tensor, k: Tensor, w: Tensor, ds: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, Hq, rows, D) and dk (B, Hkv, keys, D) of products that are multiplied by scale, a number or (Hq,), and
    dw (B, Hq, D) without it; ds (B, Hq, rows, keys) is the gradient of what has been multiplied."""
    (b, heads, m, d), (kv_heads, n) = q.shape, k.shape[1:3]
    flat = ds.flatten(0, 1)
    dq, dk, dw = q.new_zeros(b * heads, d, m), k.new_zeros(b * heads, d, n), q.new_zeros(b * heads, d, 1)
    for t, rows, features in _blocks(q, k):
        here = flat[:, rows].reshape(b * heads, -1, 1)
        dw[:, features].baddbmm_(t, here)
        slope = torch.ops.aten.tanh_backward.grad_input(here.mT, t, grad_input=t).view(*t.shape[:2], -1, n)
        dq[:, features, rows] = slope.sum(-1)
        dk[:, features] += slope.sum(-2)
    factor = scale.repeat(b)[:, None] if isinstance(scale, Tensor) else scale
    weights = (_weights(w, q)[:, 0] * factor)[..., None]
    dq, dk = dq.mul_(weights), dk.mul_(weights).view(b, kv_heads, heads // kv_heads, d, n).sum(2)
    return dq.mT.view(b, heads, m, d), dk.mT, dw.view(b, heads, d)
