"""Select a kernel's configuration: an `override` scope, else the table of the architecture, else a heuristic.

A table, tables/<architecture>.json, maps `key(...)` to a row: the fields of Config, and "validated" (correct and fast
on a GPU) with the "result" file that shows it. A key is "<kernel>/<class>/<D>" or "<kernel>/<class>/<D>/<variant>":

    kernel   forward, dkdv, dq, dbias, delta; additive_forward and additive_backward, whose D is that of the values; and
             on sm_90 hopper_forward and hopper_backward, which have no heuristic
    class    half (float16, bfloat16) or single (float32)
    D        the larger of the padded head dims of q and v: 16, 32, 64, 128, 256, 512
    variant  with_modifiers: with a modifier, tensor mask or dropout, which need registers. If there is no such row, the
             plain row is used.

A key has no sequence length, so a new length does not recompile.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace
from importlib import resources
from typing import Any

import torch

from ..spec.problem import HALF
from .config import Config, overridden

KERNELS = ("forward", "dkdv", "dq", "dbias", "delta", "additive_forward", "additive_backward")
STATISTICS = ("row_statistics", "key_mass", "map")  # these and "decode" have heuristics but no rows
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

# Bytes of shared memory that one program may use.
SHARED = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


def padded(dim: int) -> int:
    """The head dim of a tile: the next power of two, at least 16, the minimum of a matrix product."""
    return max(16, 1 << (dim - 1).bit_length())


def key(kernel: str, dtype: torch.dtype, d: int, dv: int, with_modifiers: bool = False) -> str:
    """The name of a table row."""
    kind = "half" if dtype in HALF else "single"
    return f"{kernel}/{kind}/{max(padded(d), padded(dv))}" + ("/with_modifiers" if with_modifiers else "")


def architecture(device: torch.device) -> str:
    """The name of a device's table; "interpreter" on the CPU."""
    if device.type != "cuda":
        return "interpreter"
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(major, "sm_80" if major < 8 else "sm_120")


@functools.cache
def table(arch: str) -> dict[str, dict[str, Any]]:
    """The rows of an architecture; empty if it has no table."""
    file = resources.files(__package__) / "tables" / f"{arch}.json"
    return json.loads(file.read_text())["rows"] if file.is_file() else {}


def config(kernel: str, arch: str, dtype: torch.dtype, d: int, dv: int, *, with_modifiers: bool = False) -> Config:
    """The configuration that a kernel runs with. with_modifiers: see `key`."""
    pinned = overridden(kernel)
    return pinned if pinned is not None else _chosen(kernel, arch, dtype, d, dv, with_modifiers)


@functools.cache
def _chosen(kernel: str, arch: str, dtype: torch.dtype, d: int, dv: int, with_modifiers: bool) -> Config:
    row = _row(kernel, arch, dtype, d, dv, with_modifiers)
    return Config.from_row(row) if row else heuristic(kernel, arch, dtype, max(padded(d), padded(dv)), with_modifiers)


def _row(kernel: str, arch: str, dtype: torch.dtype, d: int, dv: int, with_modifiers: bool) -> dict[str, Any]:
    """The table's row for this key, or an empty one."""
    rows = table(arch)
    return rows.get(key(kernel, dtype, d, dv, with_modifiers)) or rows.get(key(kernel, dtype, d, dv), {})


@functools.cache
def validated(kernel: str, arch: str, dtype: torch.dtype, d: int, dv: int, *, with_modifiers: bool = False) -> bool:
    """True if the table's configuration was correct and fast on a GPU."""
    return bool(_row(kernel, arch, dtype, d, dv, with_modifiers).get("validated"))


def heuristic(kernel: str, arch: str, dtype: torch.dtype, d: int, with_modifiers: bool) -> Config:
    """A configuration that fits the shared memory and registers of the architecture."""
    if arch == "interpreter":
        # The cost per tile hardly depends on its size: large tiles, but small enough that loops run several times.
        size = int(os.environ.get("FUSED_ATTN_INTERPRETER_BLOCK", 64))
        return Config(size // 2, size // 2, 1, 1, overlap=True) if d > 128 else Config(size, size // 2, 1, 1, True)
    if kernel == "delta":
        return Config(32 if d > 128 else 64, 16, 4, 1)
    if kernel.startswith("additive"):
        return _additive(kernel, arch, dtype, d)
    if kernel == "decode":
        return _decode(arch, dtype, d, with_modifiers)
    if kernel in STATISTICS:
        return _statistics(kernel, arch, dtype, d)
    half = dtype in HALF
    large = SHARED[arch] > 200 * 1024
    if not half:
        small = {16: (64, 32), 32: (64, 32), 64: (64, 32), 128: (32, 32), 256: (32, 16), 512: (16, 16)}[d]
        return Config(*small, num_warps=4 if d < 256 else 8, num_stages=1)
    if kernel == "forward":
        m, n, warps, stages = {
            16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 2),
            256: (64, 32, 8, 2), 512: (32, 16, 8, 1),
        }[d]  # fmt: skip
        chosen = Config(m, n, warps, stages, overlap=arch == "sm_90")
    elif kernel == "dq":
        m, n, warps, stages = {
            16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 2),
            256: (32, 32, 8, 1), 512: (16, 16, 8, 1),
        }[d]  # fmt: skip
        chosen = Config(m, n, warps, stages)
    else:
        m, n, warps, stages = {
            16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (32, 64, 8, 2),
            256: (16, 32, 8, 1), 512: (16, 16, 8, 1),
        }[d]  # fmt: skip
        chosen = Config(m, n, warps, stages)
    if not large and d >= 128:
        chosen = replace(chosen, num_stages=1)
    if with_modifiers:
        chosen = replace(chosen, overlap=False, num_stages=min(chosen.num_stages, 2))
    return chosen


def _additive(kernel: str, arch: str, dtype: torch.dtype, dv: int) -> Config:
    """Limited by tanh and instruction issue. A row of a tile is a multiple of 32 lanes, so long rows load the fewest
    features; registers hold the scores and the output, whose size is Dv."""
    if dtype not in HALF:
        owned, swept, warps = {16: (32, 32, 4), 32: (32, 32, 4), 64: (32, 32, 4), 128: (16, 32, 4)}.get(dv, (16, 16, 8))
    elif kernel == "additive_forward":
        owned = 32 if arch in ("sm_80", "sm_90") else 16
        owned, swept, warps = (owned, 128, 4) if dv <= 128 else (16, 64, 4 if dv == 256 else 8)
    elif arch == "sm_90" and dv <= 128:
        owned, swept, warps = 16, 2 * max(64, dv), 4 if dv <= 64 else 8
    else:
        owned, swept, warps = 16, 64, 4 if dv <= 256 else 8
    if dv == 512 and SHARED[arch] < 200 * 1024:
        swept = 16
    if kernel == "additive_forward":
        return Config(owned, swept, warps, num_stages=1)
    return Config(swept, min(owned, 16), warps, num_stages=1)


def _statistics(kernel: str, arch: str, dtype: torch.dtype, d: int) -> Config:
    """No values and no output accumulator; a map needs registers for its output pointers."""
    if dtype in HALF:
        # A wavefront of gfx942 has 64 lanes; 32 rows of at most 32 elements have less than 16 bytes per lane.
        short = kernel == "map" and not (arch == "gfx942" and d <= 32)
        owned, swept = {256: (64, 32), 512: (64, 16)}.get(d, (64, 32 if short else 64))
    else:
        owned, swept = {128: (32, 32), 256: (32, 16), 512: (16, 16)}.get(d, (32 if kernel == "map" else 64, 32))
    large = SHARED[arch] > 128 * 1024
    owned = owned if d < 512 or large else min(owned, 32)
    stages = 2 if dtype in HALF and (d < 256 or large) else 1
    return Config(*((swept, owned) if kernel == "key_mass" else (owned, swept)), num_warps=4, num_stages=stages)


def _decode(arch: str, dtype: torch.dtype, d: int, with_modifiers: bool) -> Config:
    """Limited by memory bandwidth: as many stages of keys and values as let two programs share an SM. BLOCK_M is an
    upper bound for the packed rows; a decoding step has fewer. In float32 more rows or fewer warps spill registers."""
    if dtype not in HALF:
        return Config(16, 32 if d <= 128 else 16, num_warps=8, num_stages=2 if d <= 128 and arch != "gfx942" else 1)
    keys = {16: 128, 32: 128, 64: 128, 128: 64, 256: 32, 512: 16}[d]
    keys = keys // 2 if with_modifiers and d in (64, 128) else keys
    stages = max(1, min(3, SHARED[arch] // 2 // (4 * keys * d)))
    rows = {256: 32, 512: 16}.get(d, 64)
    return Config(rows, keys, num_warps=4 if d < 512 else 8, num_stages=1 if arch == "gfx942" else stages)
