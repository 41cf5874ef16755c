"""Key and value caches for decoding benchmarks, and a check of their results against float64."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fused_attn import testing
from fused_attn.backends import reference
from fused_attn.spec.decoding import Cache, Decode
from fused_attn.testing.absolute_sums import absolute_sums


def caches(
    lengths: list[int],
    d: int,
    page: int | None,
    heads: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    room: int = 0,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Random k and v, and the arguments that locate sequences in them. Entries after a sequence's keys and unused pages
    are NaN.

    room: capacity per sequence, at least the longest length, rounded up to 256.
    """
    b, room = len(lengths), -(-max(room, *lengths) // 256) * 256
    draw = {"dtype": dtype, "device": device}
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    places: dict[str, Any] = {"cache_seqlens": counts}
    if page is None:
        k, v = (torch.randn(b, room, heads, d, **draw) for _ in range(2))
        behind = torch.arange(room, device=device) >= counts[:, None]
    else:
        width = room // page
        table = torch.randperm(b * width + 5, device=device)[: b * width].view(b, width)
        k, v = (torch.randn(b * width + 5, page, heads, d, **draw) for _ in range(2))
        behind = torch.ones(len(k), page, dtype=torch.bool, device=device)
        behind[table] = (torch.arange(room, device=device) >= counts[:, None]).view(b, width, page)
        places["page_table"] = table.int()
    for x in (k, v):
        x[behind] = torch.nan
    return k, v, places


def judged(q: Tensor, k: Tensor, v: Tensor, places: dict[str, Any], got: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Check each sequence against float64; returns the worst row of the tolerance rule for out and for lse."""
    where = (places["cache_seqlens"], places.get("page_table"))
    exact, plain = (Decode(x, Cache(y, z, *where), x.shape[3] ** -0.5) for x, y, z in
                    ((q.double(), k.double(), v.double()), (q, k, v)))  # fmt: skip
    rows: dict[str, Any] = {}
    for i, (p, near) in enumerate(zip(exact.problems(), plain.problems(), strict=True)):
        wanted, close = reference.attention(p, torch.float64), reference.attention(near, q.dtype)
        terms = absolute_sums(p, SimpleNamespace(dout=None, dlse=None))
        for j, (name, x) in enumerate((("out", got[0][i].transpose(0, 1)[None]), ("lse", got[1][i][None]))):
            dtype = q.dtype if name == "out" else torch.float32
            row = testing.assert_within_budget(f"{name} of {i}", x, wanted[j], close[j], terms[name], dtype)
            rows[name] = max(rows.get(name, row), row, key=lambda x: x.share)
    return {name: asdict(row) for name, row in rows.items()}
