"""GPU evidence on kernel configurations: parity under each, and its speed against its neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.evidence.setting import Listed, Refused, Setting, compared, judged, seconds, verify
from bench.harness import providers, rounds
from bench.harness.providers import Provider, ours
from fused_attn import tuning
from fused_attn.backends.triton import hopper, portable
from fused_attn.testing import CASES, Case
from fused_attn.tuning import Config
from fused_attn.tuning.select import KERNELS, table

SWEPT = ("forward", "dkdv", "dq")  # the kernels that dominate the time
GLUON = ("hopper_forward", "hopper_backward")  # likewise of the Hopper backend
FLAGS = ("overlap", "descriptors", "pingpong", "ordered")  # boolean fields of Config
OVERLAPPING = ("forward",)  # kernels that read Config.overlap and Config.descriptors
CLASSES = {"half": torch.bfloat16, "single": torch.float32}


class Configs:
    """Parity under the configuration of every row of the tuning tables, and under its neighbours.

    Kernels are called below autograd, so that the override of this thread holds for the backward too.
    """

    shares = seconds(check=75)

    def cases(self, s: Setting) -> Iterator[Listed]:
        for kind in s.classes:
            for d in s.tiles:
                for with_modifiers in (False, True):
                    name = f"chosen/{kind}/{d}" + ("/with_modifiers" if with_modifiers else "")
                    yield (
                        name,
                        d == s.tiles[0] and not with_modifiers,
                        {"kind": kind, "d": d, "with_modifiers": with_modifiers},
                    )
        for kernel, d, config in rivals(s):
            yield spelled(kernel, d, config), False, {"kernel": kernel, "d": d, "config": config.to_row()}

    def check(
        self, s: Setting, d: int, kind: str = "", with_modifiers: bool = False, kernel: str = "", config: Any = None
    ) -> dict[str, Any]:
        dtype = CLASSES[kind] if kind else s.half
        if config is None:
            pins = {name: tuning.config(name, s.arch, dtype, d, d, with_modifiers=with_modifiers) for name in KERNELS}
        else:
            pins = {kernel: Config.from_row(config)}
        gluon = kernel in GLUON
        case = Case("odd", hq=2, hkv=1, m=s.odd, d=d, causal=True, return_lse=True, deterministic=not gluon)
        if with_modifiers:
            case = replace(CASES["everything"], m=s.odd // 2, n=s.odd, d=d, dv=d)
        try:
            with tuning.override(**pins):
                rows = judged(s, case, hopper if gluon else portable, dtype)
        except Exception as error:
            if config is not None and type(error).__name__ == "OutOfResources":
                raise Refused(str(error)) from error
            raise
        return {"configs": {name: c.to_row() for name, c in pins.items()}, "rows": rows}


class Overlap:
    """Speed with one flag of the configuration flipped: overlap, TMA descriptors, ping-pong, and the ordered dq sum."""

    shares = seconds(check=20, measure=40)

    def wanted(self, chosen: Config, rival: Config) -> bool:
        return any(rival == replace(chosen, **{flag: not getattr(chosen, flag)}) for flag in FLAGS)

    def provider(self, name: str, kernel: str, config: Config) -> Provider:
        if kernel in GLUON:
            return ours("hopper", name, {kernel: config}, deterministic=False)
        return ours("triton", name, {kernel: config})

    def cases(self, s: Setting) -> Iterator[Listed]:
        for kernel, d, config in rivals(s):
            if self.wanted(tuning.config(kernel, s.arch, s.half, d, d), config):
                yield spelled(kernel, d, config), d == s.dims[0], {"kernel": kernel, "d": d, "config": config.to_row()}

    def check(self, s: Setting, kernel: str, d: int, config: Any) -> dict[str, Any]:
        answer = Configs().check(s, d, kernel=kernel, config=config)
        rival = self.provider("rival", kernel, Config.from_row(config))
        for causal in (False, True):
            rounds.start(rival, s.sample(d, s.lengths[0], causal), s.device)  # compiled in the parallel stage
        return answer

    def measure(self, s: Setting, checked: dict[str, Any], kernel: str, d: int, config: Any) -> dict[str, Any]:
        chosen = tuning.config(kernel, s.arch, s.half, d, d)
        pair = [self.provider("chosen", kernel, chosen), self.provider("rival", kernel, Config.from_row(config))]
        direction = "forward" if kernel.endswith("forward") else "backward"
        found: dict[str, Any] = {"chosen": chosen.to_row()}
        ratios = []
        for mask, causal in (("full", False), ("causal", True)):
            x = s.sample(d, s.lengths[0], causal)
            for provider in pair:
                verify(provider, x)
            found[mask] = compared(pair, x, s, (direction,), [p.name for p in pair])
            old, new = (found[mask]["providers"][p.name][direction] for p in pair)
            ratios.append(old["ms"] / new["ms"])
        return found | {"speedup": math.sqrt(math.prod(ratios))}


class Tune(Overlap):
    """All neighbours of the chosen configurations, each timed against the one that it would replace."""

    shares = seconds(check=120, measure=300)

    def wanted(self, chosen: Config, rival: Config) -> bool:
        return True


def neighbours(c: Config) -> list[Config]:
    """Configurations one step from c: another tile, warps, stages or flag; or another tile and warps."""
    other = {"num_warps": 4 if c.num_warps != 4 else 8}
    tiles = [
        {name: size}
        for name in ("BLOCK_M", "BLOCK_N")
        for size in (getattr(c, name) // 2, getattr(c, name) * 2)
        if 16 <= size <= 256
    ]
    steps = [
        {"overlap": not c.overlap},
        {"descriptors": not c.descriptors},
        *tiles,
        other,
        {"num_stages": c.num_stages + 1},
    ]
    steps += [{"num_stages": c.num_stages - 1}] if c.num_stages > 1 else []
    return [replace(c, **step) for step in [*steps, *(tile | other for tile in tiles)]]


def gluon_neighbours(kernel: str, c: Config) -> list[Config]:
    """Likewise for a Hopper kernel, whose consumers are groups of four warps; its flag comes first."""
    steps: list[dict[str, Any]] = [{"num_stages": c.num_stages + 1}]
    steps += [{"num_stages": c.num_stages - 1}] if c.num_stages > 1 else []
    if kernel == "hopper_forward":
        steps = [{"pingpong": not c.pingpong}, *steps, {"consumers": 5 - c.consumers}]
        steps += [{"BLOCK_N": c.BLOCK_N // 2}, {"BLOCK_N": c.BLOCK_N * 2}]
    else:
        steps = [{"ordered": not c.ordered}, *steps, {"BLOCK_M": c.BLOCK_M // 2}, {"BLOCK_M": c.BLOCK_M * 2}]
    return [replace(c, **step) for step in steps]


def rivals(s: Setting) -> Iterator[tuple[str, int, Config]]:
    for d in s.dims:
        gluon = [x for x in GLUON if tuning.key(x, s.half, d, d) in table(s.arch)]
        for kernel in (*SWEPT, *gluon):
            chosen = tuning.config(kernel, s.arch, s.half, d, d)
            if kernel in GLUON:
                found = gluon_neighbours(kernel, chosen)
            else:
                same = [
                    c for c in neighbours(chosen) if (c.overlap, c.descriptors) == (chosen.overlap, chosen.descriptors)
                ]
                found = neighbours(chosen) if kernel in OVERLAPPING else same
            for config in found[: s.rivals]:
                yield kernel, d, config


def spelled(kernel: str, d: int, c: Config) -> str:
    return f"{kernel}/{d}/{providers.spelled(c)}"
