"""Host side of decoding: the split of the keys into parts, and the launches of three kernels."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import append as append_kernels
from ...kernels import combine as combine_kernels
from ...kernels import decode as kernels
from ...kernels import types
from ...spec.decoding import Cache, Decode, Rotary
from ...spec.problem import Problem, Span
from ...tuning import Config
from ...tuning.select import padded
from . import launcher, settings, views

INVARIANT = 512  # keys per part if batch_invariant: a multiple of every tile
RESIDENT = 2  # programs per multiprocessor
MOST = 128  # parts
ENOUGH = 0.85  # of the best occupancy that any number of parts gives


@functools.lru_cache(4096)
def parts_for(work: int, tiles: int, slots: int) -> int:
    """The smallest number of parts that keeps `slots` resident programs nearly as busy as the best number does. work:
    programs without a split; tiles: of keys, per program."""
    if work >= 0.8 * slots:
        return 1

    def busy(parts: int) -> float:
        waves = work * parts / slots
        return waves / math.ceil(waves)

    counts = range(1, max(1, min(MOST, slots, tiles)) + 1)
    best = max(map(busy, counts))
    return next(x for x in counts if busy(x) >= ENOUGH * best)


def parts(d: Decode, c: Config, tiles_of_rows: int) -> tuple[int, int]:
    """(largest number of parts, fewest keys per part), from metadata only."""
    b, _, m, n = d.shape
    if d.batch_invariant:
        return max(1, -(-n // INVARIANT)), INVARIANT
    seen = n if d.left is None else min(n, d.left + m)
    tiles = -(-seen // c.BLOCK_N)
    if d.splits is not None:
        return max(1, min(d.splits, tiles)), c.BLOCK_N
    work = b * d.cache.k.shape[2] * tiles_of_rows
    return parts_for(work, tiles, RESIDENT * settings.multiprocessors(d.q.device)), c.BLOCK_N


def _heads_first(x: Tensor) -> Any:
    return views.view(x.transpose(1, 2))


def _pages(cache: Cache) -> types.Pages | None:
    if cache.table is None:
        return None
    table = cache.table.contiguous()
    return types.Pages(table, views.encode_int(table.stride(0)), views.constant(cache.page))


def _sequences(cache: Cache, leftpad: Tensor | None = None) -> types.Sequences:
    pointers = (None if x is None else x.contiguous() for x in (cache.lengths, cache.index, leftpad))
    return types.Sequences(*pointers, views.encode_int(cache.added))


def _span(d: Decode) -> types.Span:
    """A leftpad is a first key. Kernels look for it only where a window has a left edge, so one is set infinitely
    far."""
    left = views.FAR if d.left is None and d.leftpad is not None else d.left
    span = views.span(Span(None if left is None else -left, d.right))
    if d.tree is None:
        return span
    strides = views.strides_of(d.tree.shape, d.tree.stride())
    return span._replace(tree=types.Tree(d.tree, tuple(map(views.encode_int, strides))))


def _problem(d: Decode) -> Problem:
    """The Problem of these queries over the whole cache, for configurations and scores."""
    k, v = (x.transpose(1, 2) for x in (d.cache.k, d.cache.v))
    return Problem(d.q.transpose(1, 2), k, v, d.scale, d.softcap, slopes=d.slopes, sink=d.sink, span=Span())


def tile_rows(c: Config, rows: int) -> int:
    """Packed rows of a tile: at most the configuration's, and no more than needed."""
    return min(c.BLOCK_M, max(16, 1 << (rows - 1).bit_length()))


def tile_keys(c: Config, page: int | None) -> int:
    """Keys of a tile: few enough that a page holds it and is looked up once, if that leaves at least 32."""
    if page is None:
        return c.BLOCK_N
    sizes = (c.BLOCK_N >> i for i in range(4))
    return next((x for x in sizes if x >= 32 and page % x == 0), c.BLOCK_N)


def decode(d: Decode) -> tuple[Tensor, Tensor]:
    """(out, lse); call under no_grad."""
    p = _problem(d)
    out, lse = d.empty_out(), d.empty_lse()
    (b, _, m, n), hkv, dv = d.shape, p.k.shape[1], p.v.shape[3]
    c = settings.config("decode", p, with_modifiers=d.tree is not None)
    rows = m * p.group
    c = replace(c, BLOCK_M=tile_rows(c, rows), BLOCK_N=tile_keys(c, None if d.cache.table is None else d.cache.page))
    tiles = -(-rows // c.BLOCK_M)
    count, least = parts(d, c, tiles)
    partial = None
    if count > 1 or d.batch_invariant:
        shape = (b * hkv, count, rows)
        partial = types.Parts(*(d.q.new_empty(x, dtype=torch.float32) for x in ((*shape, dv), shape, shape)))
    sink = None if d.sink is None else d.sink.contiguous()
    span, sequences, written = _span(d), _sequences(d.cache, d.leftpad), _heads_first(out)
    numbers = (m, n, hkv, count, least)
    constants = settings.constants(c, p)
    with settings.device_of(d.q):
        launcher.launch(
            kernels.decode_kernel,
            b * hkv * count * tiles,
            *(views.view(x) for x in (p.q, p.k, p.v)),
            *(written, lse),
            views.score(p, None)._replace(offset=None),
            *(span, sink, sequences, _pages(d.cache), partial),
            *numbers,
            **constants,
            OVERLAP=c.overlap,
        )
        if partial is not None:
            launcher.launch(
                combine_kernels.combine_kernel,
                b * hkv * rows,
                *(partial, written, lse, span, sink, sequences),
                *numbers,
                **{x: constants[x] for x in ("GROUP", "DV", "BLOCK_DV", "BLOCK_N")},
                num_warps=4 if dv >= 64 else 1,
            )
    return out, lse


def append(cache: Cache, k: Tensor, v: Tensor, q: Tensor, rotary: Rotary | None, advance: bool) -> Tensor:
    """Write k and v after the sequences of a cache. Returns q rotated, or an empty tensor without rotary embedding."""
    (b, t, hkv, d), (_, m, hq, _), dv = k.shape, q.shape, v.shape[3]
    q_rotated = q.new_empty(0) if rotary is None else torch.empty_like(q)
    tables = None
    if rotary is not None:
        tables = types.Rotary(
            *(views.view(x[None, None]) for x in (rotary.cos, rotary.sin)), views.encode_int(len(rotary.cos)),
            views.constant(rotary.cos.shape[1]), views.constant(rotary.interleaved),
        )  # fmt: skip
    tokens = t if rotary is None else max(t, m)
    heads = 2 * hkv + (0 if rotary is None else hq)
    block = 1 if tokens == 1 else 16
    if b * heads * tokens == 0:
        return q_rotated
    with settings.device_of(q):
        launcher.launch(
            append_kernels.append_kernel,
            heads * -(-tokens // block) * b,
            *map(_heads_first, (k, v, cache.k, cache.v)),
            *((None, None) if rotary is None else map(_heads_first, (q, q_rotated))),
            *(_sequences(cache), _pages(cache), tables),
            *(t, 0 if rotary is None else m, cache.capacity, hkv, heads),
            ADVANCE=advance,
            D=d,
            DV=dv,
            BLOCK_D=padded(d),
            BLOCK_DV=padded(dv),
            BLOCK_T=block,
            num_warps=1 if block == 1 else 4,
        )
    return q_rotated
