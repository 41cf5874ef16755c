"""Host side of additive scores: features, and the one-pass backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import additive as kernels
from ...kernels import scores
from ...kernels.types import Additive, AdditiveGradients
from ...spec.problem import HALF, Problem
from ...spec.ragged import locate
from ...tuning import Config
from ...tuning.select import padded
from . import block_mask, launcher, settings, tile_scheduler, views

BLOCK = scores.PEAKS.value
GAP = scores.GAP.value  # padding after a sequence; no tile is longer, so tiles at the end need no mask

RESIDENT = 4  # programs of the backward per multiprocessor, at most


class Features(NamedTuple):
    """Features of q or k, (B * H, features, length padded to whole tiles), their exponentials and peaks."""

    values: Tensor
    exponentials: Tensor
    peaks: Tensor


def pairs(p: Problem) -> bool:
    """True if tiles may share one reciprocal between two features. float32 needs the accuracy of tanh itself."""
    return p.q.dtype in HALF


def even(d: int) -> int:
    return d + d % 2


def _features(x: Tensor, starts: Tensor | None, paired: bool) -> Features:
    """starts: cumulative lengths of a packed batch, whose sequences are separated by zeros; see
    `kernels.scores.feature_start`."""
    b, heads, length, d = x.shape
    blocks = -(-length // GAP) * GAP // BLOCK
    memory, ragged, programs = x.new_empty, None, blocks * b * heads
    if starts is not None:
        blocks = -(-length // BLOCK) + (len(starts) - 1) * (GAP // BLOCK + 1)
        memory, ragged = x.new_zeros, tile_scheduler.ragged_rows(starts, length, BLOCK)
        programs = len(ragged.schedule) * heads
    values = memory(b * heads, even(d), blocks * BLOCK, dtype=torch.float32)
    exponentials = memory(values.shape, dtype=torch.float32) if paired else values
    peaks = memory(b * heads, blocks, dtype=torch.float32) if paired else values
    launcher.launch(
        kernels.additive_prepare_kernel,
        programs,
        *(views.view(x), values, exponentials, peaks, views.encode_int(blocks), ragged, length, heads, b * heads),
        FEATURES=even(d),
        D=d,
        BLOCK_D=padded(even(d)),
        PAIRS=paired,
        num_warps=4,
    )
    return Features(values, exponentials, peaks)


def score(p: Problem) -> Any:
    """The score as kernels read it; a kernel of its own prepares the features of an additive one."""
    return views.score(p, operands(p, fast=settings.architecture(p.q.device).startswith("sm_")))


def operands(p: Problem, fast: bool) -> Additive | None:
    """The kernels' form of q, k and w; None if the score is a dot product. fast: see `numerics.reciprocal`."""
    if p.w is None:
        return None
    paired, d = pairs(p), p.q.shape[3]
    starts = (None, None) if p.ragged is None else (p.ragged.q, p.ragged.k)
    q, k = (_features(x, own, paired) for x, own in zip((p.q, p.k), starts, strict=True))
    w = torch.nn.functional.pad(p.w.float(), (0, d % 2)).contiguous()
    return Additive(
        w, views.encode_int(0 if w.ndim == 1 else even(d)),
        q.values, k.values, q.exponentials, k.exponentials, q.peaks, k.peaks,
        *(views.encode_int(x.values.shape[2] // BLOCK) for x in (q, k)),
        *(views.constant(x) for x in (even(d), paired, p.group, fast)),
    )  # fmt: skip


class Sums(NamedTuple):
    """Sums that the backward kernel returns, for gradients that are still to be reduced."""

    columns: dict[str, Tensor]  # (B, Hq, N): column sums of dx, and of the gradients of scale, softcap, slopes
    rows: Tensor | None  # (B, Hq, M): row sums of dx
    grads: dict[str, Tensor]  # q, k and w


def backward(
    p: Problem, c: Config, dout: Any, known: Any, planes: tuple[Any, Any, Any],
    dv: Tensor | None, dbias: Any, needs: frozenset[str], wave: int, precision: str,
    multiprocessors: int,
) -> Sums:  # fmt: skip
    """One launch. known: RowNumbers, or None. planes: score, mask and dropout. needs: of q, k, w, scale, softcap,
    slopes, and the sums of dx, "columns" and "rows"."""
    (b, hq, m, d), (hkv, n) = p.q.shape, p.k.shape[1:3]
    features, tiles = even(d), tile_scheduler.tiles(p, c.BLOCK_N, True)
    programs = min(tiles * b * hkv, multiprocessors * RESIDENT)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return p.q.new_zeros(shape, dtype=dtype)

    per_key: list[str] = [x for x in ("columns", "scale", "softcap", "slopes") if x in needs]
    columns: dict[str, Tensor] = {x: p.q.new_empty((b, hq, n), dtype=torch.float32) for x in per_key}
    rows = zeros(b, hq, m) if "rows" in needs else None
    dq = dk = dw = stage = None
    if needs & {"q", "k", "w"}:
        score: Additive = planes[0].additive
        dq, dk = torch.zeros_like(score.q), torch.zeros_like(score.k)
        dw, stage = zeros(b * hq, tiles, features), zeros(programs, features, c.BLOCK_M)
    launcher.launch(
        kernels.additive_backward_kernel,
        programs,
        views.view(p.v),
        dout,
        known,
        planes[0],
        block_mask.key_span(p, c, kinds=True),
        *planes[1:],
        tile_scheduler.ragged(p, c.BLOCK_N, True, in_order=True),
        AdditiveGradients(
            zeros(1, dtype=torch.int32), zeros(b * hq, tile_scheduler.tiles(p, c.BLOCK_M), dtype=torch.int32),
            None if dv is None else views.view(dv), dbias,
            *(columns.get(x) for x in ("columns", "scale", "softcap", "slopes")), rows, dq, dk, dw, stage,
        ),
        *(m, n, hkv, p.shape[0] * hkv, wave),
        GROUP=p.group,
        DV=p.v.shape[3],
        BLOCK_DV=padded(p.v.shape[3]),
        BLOCK_M=c.BLOCK_M,
        BLOCK_N=c.BLOCK_N,
        PRECISION=precision,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )  # fmt: skip
    grads = {}
    scale = p.scale.float().reshape(-1, 1, 1) if isinstance(p.scale, Tensor) else p.scale
    if "q" in needs:
        grads["q"] = _rows_of(dq, p.q, None if p.ragged is None else p.ragged.q, scale)
    if "k" in needs:
        grads["k"] = _rows_of(dk, p.k, None if p.ragged is None else p.ragged.k, 1.0)
    if "w" in needs:
        per_head = dw.view(b, hq, tiles, features).sum((0, 2))[:, :d]
        per_head = per_head * (scale[..., 0] if isinstance(scale, Tensor) else scale)
        grads["w"] = per_head if p.w.ndim == 2 else per_head.sum(0)
    return Sums(columns, rows, grads)


def _rows_of(features: Tensor, like: Tensor, starts: Tensor | None, scale: float | Tensor) -> Tensor:
    """The inverse of `_features`, in like's dtype and memory order."""
    b, heads, length, d = like.shape
    found = features.view(b, heads, *features.shape[1:])[:, :, :d].mT
    if starts is None:
        found = found[:, :, :length]
    else:
        own, index = locate(starts, length)
        found = found[:, :, (-(-starts[own] // BLOCK) + own * (GAP // BLOCK + 1)) * BLOCK + index]
    return torch.mul(found, scale, out=torch.empty_like(like))
