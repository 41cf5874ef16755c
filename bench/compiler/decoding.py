"""The decoding calls that bench.static compiles: single steps and chunks, over dense and paged caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_attn.spec.decoding import Cache, Decode, Rotary
from fused_attn.tuning import Config, config, override

DIRECTIONS = ("decode", "append")
# page: keys per page, None for a dense cache; m: queries per sequence; one split needs no combine kernel.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "page_1": {"page": 1},
    "page_16": {"page": 16},
    "page_64": {"page": 64},
    "one_part": {"splits": 1},
    "chunk": {"m": 64, "right": 0},
    "modified": {"m": 4, "page": 16, "right": 0, "left": 100, "softcap": 30.0, "sink": True, "alibi": True,
                 "tree": True, "leftpad": True},
}  # fmt: skip
BATCH, GROUP, KV_HEADS, ROOM = 2, 4, 2, 4096


def cases(target: str) -> list[tuple[str, str, int, str]]:
    """(direction, dtype, head dim, feature)."""
    found = [("decode", "bf16", d, feature) for d in (64, 128) for feature in ("plain", "page_16", "page_64")]
    found += [("append", "bf16", 128, feature) for feature in ("plain", "page_16")]
    if target == "sm_90":
        found += [("decode", "bf16", d, "plain") for d in (72, 256)]
        found += [("decode", "bf16", 128, feature) for feature in ("page_1", "one_part", "chunk", "modified")]
        found += [("decode", "fp32", 64, "plain"), ("decode", "fp16", 128, "plain")]
    return found


def kernels(direction: str, feature: str) -> tuple[str, ...]:
    """Names of the launched kernels."""
    return ("decode", "combine") if direction == "decode" and feature != "one_part" else (direction,)


def chosen(arch: str, dtype: torch.dtype, d: int, feature: str) -> Config:
    """The tuning-table configuration, with the tile sizes that the launch derives from it."""
    from fused_attn.backends.triton import decode

    said = FEATURES[feature]
    c = config("decode", arch, dtype, d, d, with_modifiers="tree" in said)
    return replace(
        c, BLOCK_M=decode.tile_rows(c, said.get("m", 1) * GROUP), BLOCK_N=decode.tile_keys(c, said.get("page"))
    )


def launcher(direction: str, dtype: torch.dtype, d: int, feature: str, scope: dict[str, Config]) -> Callable[[], Any]:
    from fused_attn.backends.triton import decode

    asked = _call(dtype, d, **FEATURES[feature])
    new = torch.zeros(BATCH, 1, KV_HEADS, d, dtype=dtype)
    turn = torch.zeros(ROOM, d // 2, dtype=dtype)

    def run() -> None:
        with override(**scope), torch.no_grad():
            if direction == "append":
                decode.append(asked.cache, new, new, asked.q, Rotary(turn, turn), True)
            else:
                decode.decode(asked)

    return run


def _call(
    dtype: torch.dtype,
    d: int,
    page: int | None = None,
    m: int = 1,
    *,
    splits: int | None = 8,
    tree: bool = False,
    leftpad: bool = False,
    sink: bool = False,
    alibi: bool = False,
    **words: Any,
) -> Decode:
    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    lengths, heads = zeros(BATCH, dtype=torch.int32), GROUP * KV_HEADS
    table = None if page is None else zeros(BATCH, ROOM // page, dtype=torch.int32)
    k = zeros(BATCH, ROOM, KV_HEADS, d) if page is None else zeros(8, page, KV_HEADS, d)
    return Decode(
        zeros(BATCH, m, heads, d), Cache(k, k, lengths, table), d**-0.5, splits=splits,
        sink=zeros(heads, dtype=torch.float32) if sink else None,
        slopes=zeros(heads, dtype=torch.float32) if alibi else None,
        leftpad=lengths if leftpad else None, tree=zeros(1, m, m, dtype=torch.bool) if tree else None, **words,
    )  # fmt: skip
