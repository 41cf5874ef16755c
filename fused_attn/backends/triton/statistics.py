"""Host side of the statistics kernels: allocate, choose a configuration, launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...spec.problem import Problem, Statistics
from ...tuning import Config
from ...tuning.config import overridden
from ...tuning.select import padded
from . import launcher, settings

MOST = 32  # keys ranked per launch; 64 would spill registers on sm_80
# Additive scores have other bottlenecks, and take the tiles of these kernels.
ADDITIVE = {"row_statistics": "additive_forward", "map": "additive_forward", "key_mass": "additive_backward"}


@functools.cache
def _device_code() -> Any:
    """The kernels and their views; imported on first use, because they import triton."""
    from types import SimpleNamespace

    from ...kernels import statistics, types
    from . import additive, block_mask, tile_scheduler, views

    return SimpleNamespace(
        rows=statistics.row_statistics_kernel,
        key_mass=statistics.key_mass_kernel,
        map=statistics.map_kernel,
        types=types,
        additive=additive,
        block_mask=block_mask,
        tile_scheduler=tile_scheduler,
        views=views,
    )


def _constants(c: Config, p: Problem) -> dict[str, Any]:
    return {
        "GROUP": p.group,
        "D": p.q.shape[3],
        "BLOCK_D": padded(p.q.shape[3]),
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
        "PRECISION": settings.precision(p),
        "num_warps": c.num_warps,
        "num_stages": c.num_stages,
    }


def _tiles(kernel: str, p: Problem) -> Config:
    """The configuration of a kernel. One pinned by its own name is used whatever the score."""
    return settings.config(kernel if p.w is None or overridden(kernel) else ADDITIVE[kernel], p)


def _planes(p: Problem) -> tuple[Any, ...]:
    """q, k, the score and the mask, as all three kernels take them."""
    code = _device_code()
    views = code.views
    return views.view(p.q), views.view(p.k), code.additive.score(p), views.plane_view(p.mask, p.shape)


def statistics(p: Problem, key_mass: bool, entropy: bool, max_logit: bool, top_k: int) -> Statistics:
    """The requested statistics of a problem; call under no_grad."""
    found = Statistics.fully_masked(p, key_mass, entropy, max_logit, top_k)
    if p.empty:
        return found
    by_mass = key_mass and not p.sigmoid
    shift, part = (p.q.new_empty(p.q.shape[:3], dtype=torch.float32) if by_mass else None for _ in range(2))
    with settings.device_of(p.q):
        planes = _planes(p)
        if entropy or max_logit or top_k or by_mass:
            _rows(p, planes, found, shift, part)
        if key_mass:
            _mass(p, planes, found.key_mass, shift, part)
    return found


def _rows(p: Problem, planes: tuple[Any, ...], found: Statistics, shift: Tensor | None, part: Tensor | None) -> None:
    code = _device_code()
    (b, hq, _, _), (q, k, score, mask) = p.shape, planes
    c = _tiles("row_statistics", p)
    span, ragged = code.block_mask.row_span(p, c), code.tile_scheduler.ragged(p, c.BLOCK_M)
    top_k = 0 if found.top_k_indices is None else found.top_k_indices.shape[3]
    # If top_k is larger than a launch can rank, further launches rank the scores below its last one.
    size = max(2, min(MOST, c.BLOCK_N, 1 << (top_k - 1).bit_length())) if top_k else 2
    bound, others = None, (found.max_logit, found.entropy, shift, part)
    weighs = not p.sigmoid and (top_k > 0 or any(x is not None for x in others[1:]))
    for first in range(0, max(1, top_k), size):
        following = p.q.new_empty(p.q.shape[:3], dtype=torch.int64) if first + size < top_k else None
        ranked = (found.top_k_indices, found.top_k_weights, bound, following)
        launcher.launch(
            code.rows,
            code.tile_scheduler.programs(p, c.BLOCK_M, hq),
            *(q, k, score, span, mask),
            None if p.sink is None else p.sink.contiguous(),
            ragged,
            code.types.RowStatistics(*others, *ranked, code.views._booleans[weighs]),
            *code.tile_scheduler.lengths(p),
            *(hq, b * hq, settings.wave(p, hq), first, top_k),
            **_constants(c, p),
            BLOCK_K=size,
        )
        bound, others = following, (None, None, None, None)


def _mass(
    p: Problem, planes: tuple[Any, ...], key_mass: Tensor | None, shift: Tensor | None, part: Tensor | None
) -> None:
    code = _device_code()
    (b, hq, _, _), (q, k, score, mask) = p.shape, planes
    c = _tiles("key_mass", p)
    launcher.launch(
        code.key_mass,
        code.tile_scheduler.programs(p, c.BLOCK_N, hq, True),
        *(q, k, score, code.block_mask.key_span(p, c), mask),
        *(shift, part, code.tile_scheduler.ragged(p, c.BLOCK_N, True), key_mass),
        *code.tile_scheduler.lengths(p),
        *(hq, b * hq, settings.wave(p, hq)),
        **_constants(c, p),
    )


def weights(p: Problem, rows: list[int], heads: list[int]) -> Tensor:
    """(B, len(heads), len(rows), N); call under no_grad."""
    code = _device_code()
    b, hq, m, n = p.shape
    once, back = torch.unique(torch.tensor(rows, dtype=torch.int64), return_inverse=True)
    out = p.q.new_zeros((b, len(heads), len(once), n), dtype=torch.float32)
    if out.numel():
        c = _tiles("map", p)
        tiles, place = torch.unique(once // c.BLOCK_M, return_inverse=True)
        slots = torch.full((len(tiles), c.BLOCK_M), -1)
        slots[place, once % c.BLOCK_M] = torch.arange(len(once))
        chosen = (x.to(p.q.device, torch.int32) for x in (tiles, slots, torch.tensor(heads)))
        with settings.device_of(p.q):
            q, k, score, mask = _planes(p)
            launcher.launch(
                code.map,
                len(tiles) * len(heads) * b,
                *(q, k, score, code.block_mask.row_span(p, c), mask),
                None if p.sink is None else p.sink.contiguous(),
                *(*chosen, out),
                *(m, n, hq, len(once), len(heads), len(tiles)),
                **_constants(c, p),
            )
    return out if once.tolist() == rows else out[:, :, back.to(out.device)]
