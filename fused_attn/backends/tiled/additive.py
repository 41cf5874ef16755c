"""Additive scores of a tile, w . tanh(q + k), and their derivatives in PyTorch, without an M x N x D tensor:

    s_ij = sum_d w_d t_ijd,   t_ijd = tanh(q_id + k_jd)
    dq_id = w_d sum_j ds_ij (1 - t_ijd^2),   dk_jd = w_d sum_i ds_ij (1 - t_ijd^2),   dw_d = sum_ij ds_ij t_ijd

A block is a few rows and features against all keys of a tile, in one buffer that stays in cache; the sum over features
is a matrix product with w.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS = 2**17  # tanh values of a block per thread


class Block(NamedTuple):
    """tanh(q + k) as (B * Hq, features, rows * keys), and its rows and features in the tile."""

    tanh: Tensor
    rows: slice
    features: slice


def _blocks(q: Tensor, k: Tensor) -> Iterator[Block]:
    """The blocks of q (B, Hq, rows, D) and k (B, Hkv, keys, D); each overwrites the one before."""
    (b, heads, m, d), (kv_heads, n) = q.shape, k.shape[1:3]
    group, limit = heads // kv_heads, ELEMENTS * (torch.get_num_threads() if q.device.type == "cpu" else 128)
    features = max(1, min(d, 16, limit // (b * heads * n)))
    rows = max(1, min(m, limit // (b * heads * n * features)))
    q, k = (x.mT.contiguous() for x in (q, k))
    buffer = q.new_empty(b * heads * features * rows * n)
    for start in range(0, m, rows):
        offs_m = slice(start, min(start + rows, m))
        for feature in range(0, d, features):
            offs_d = slice(feature, min(feature + features, d))
            shape = (b, kv_heads, group, offs_d.stop - offs_d.start, offs_m.stop - offs_m.start, n)
            t = buffer[: torch.Size(shape).numel()].view(shape)
            torch.add(q[:, :, offs_d, offs_m].view(*shape[:5], 1), k[:, :, None, offs_d, None], out=t)
            yield Block(t.tanh_().view(b * heads, shape[3], -1), offs_m, offs_d)


def _weights(w: Tensor, q: Tensor) -> Tensor:
    """w (D,) or (Hq, D) as (B * Hq, 1, D), in q's dtype."""
    b, heads, _, d = q.shape
    return w.to(q.dtype).expand(b, heads, d).reshape(b * heads, 1, d)


def products(q: Tensor, k: Tensor, w: Tensor, out: Tensor) -> None:
    """out (B, Hq, rows, keys) = w . tanh(q + k), for q (B, Hq, rows, D), k (B, Hkv, keys, D) and w (D,) or (Hq, D)."""
    weights, s = _weights(w, q), out.flatten(0, 1)
    for t, rows, features in _blocks(q, k):
        target = s[:, rows].view(len(s), 1, -1)
        target.baddbmm_(weights[..., features], t, beta=float(features.start > 0))


def gradients(q: Tensor, k: Tensor, w: Tensor, ds: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, Hq, rows, D), dk (B, Hkv, keys, D) and dw (B, Hq, D) of products(q, k, w) * scale, with scale a float or
    (Hq,); ds (B, Hq, rows, keys) is the gradient of the scaled products. dw lacks the factor scale."""
    (b, heads, m, d), (kv_heads, n) = q.shape, k.shape[1:3]
    flat = ds.flatten(0, 1)
    dq, dk, dw = q.new_zeros(b * heads, d, m), k.new_zeros(b * heads, d, n), q.new_zeros(b * heads, d, 1)
    for t, rows, features in _blocks(q, k):
        block_ds = flat[:, rows].reshape(b * heads, -1, 1)
        dw[:, features].baddbmm_(t, block_ds)
        dsum = torch.ops.aten.tanh_backward.grad_input(block_ds.mT, t, grad_input=t).view(*t.shape[:2], -1, n)
        dq[:, features, rows] = dsum.sum(-1)
        dk[:, features] += dsum.sum(-2)
    factor = scale.repeat(b)[:, None] if isinstance(scale, Tensor) else scale
    weights = (_weights(w, q)[:, 0] * factor)[..., None]
    dq, dk = dq.mul_(weights), dk.mul_(weights).view(b, kv_heads, heads // kv_heads, d, n).sum(2)
    return dq.mT.view(b, heads, m, d), dk.mT, dw.view(b, heads, d)
