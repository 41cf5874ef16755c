"""Device and problem sizes of the GPU evidence, and helpers that several parts share."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness import rounds
from bench.harness.clock import directed, gradients, milliseconds
from bench.harness.providers import Provider, ours
from bench.harness.samples import Sample, sized
from fused_attn import testing
from fused_attn.api import bind
from fused_attn.testing import Case

Listed = tuple[str, bool, dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """Device and problem sizes. Tuples are in order of importance: time may run out."""

    device: str = "cuda"
    arch: str = ""
    dims: tuple[int, ...] = (128, 64, 256)
    lengths: tuple[int, ...] = (4096, 16384, 1024, 8192, 2048, 512)
    tokens: int = 16384  # B * S of a timed problem
    width: int = 2048  # H * D of a timed problem
    large: int = 2000  # lengths of the larger parity problems, at most
    odd: int = 333  # length of the problems that check a configuration
    repeats: int = 200
    rounds: int = 3
    matmul: int = 8192
    memory: int = 65536
    additive: tuple[int, int, int] = (1, 32, 1024)  # batch, heads and length of additive scores
    ragged: tuple[int, int] = (32, 4096)  # number of sequences, and the longest length
    decoding: tuple[int, int] = (32, 8192)  # batch and keys of a decoding step: 1 GiB of keys at D 128
    rivals: int | None = None  # neighbours tried of each configuration, None for all
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    classes: tuple[str, ...] = ("half", "single")
    tiles: tuple[int, ...] = (64, 128, 256, 16, 32, 512)  # head dims with rows in the tuning tables

    @property
    def half(self) -> torch.dtype:
        """The dtype of timed problems."""
        return torch.bfloat16 if "bfloat16" in self.dtypes else torch.float32

    def sample(self, d: int, length: int, causal: bool) -> Sample:
        return self.named("causal" if causal else "plain", d, length)

    def named(self, name: str, d: int, length: int) -> Sample:
        """A case of `testing.CASES` at the timed size."""
        case = sized(name, max(1, self.tokens // length), max(1, self.width // d), length, d)
        return Sample.draw(case, self.half, self.device, scores=0)  # scores=0: one head of one batch is checked


TINY = Setting(
    dims=(16, 32), lengths=(48,), tokens=48, width=32, large=65, odd=65, repeats=3, rounds=1, matmul=64, memory=64,
    additive=(1, 1, 48), ragged=(3, 48), decoding=(2, 48), rivals=1, dtypes=("float32",), classes=("single",),
    tiles=(16, 32),
)  # fmt: skip


STAGES = ("check", "measure")


class Refused(Exception):
    """A case that cannot run on this machine, and is not required to."""


def seconds(check: int, measure: int = 0) -> dict[str, int]:
    """Estimated seconds of each stage on 16 cores, for sharing the time limit; 0 if there is no such stage."""
    return {"check": check, "measure": measure}


def judged(s: Setting, case: Case, backend: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Forward and every gradient of a case against float64: the share of its error budget that each result uses."""
    with poisoned():
        parity = testing.check_parity(case, backend, dtype, s.device)
    return {name: asdict(row) for name, row in parity.rows.items()}


def compared(
    some: list[Provider], x: Sample, s: Setting, directions: tuple[str, ...], needed: list[str]
) -> dict[str, Any]:
    """Timings of some providers; raises if one of the needed ones was not timed."""
    found = rounds.compare(some, x, s.device, s.rounds, directions, s.matmul)
    for name, direction in ((n, d) for n in needed for d in directions):
        if "ms" not in found["providers"][name][direction]:
            raise RuntimeError(f"{name}, {direction}: {found['providers'][name][direction]}")
    return found


def throughputs(samples: list[Sample], s: Setting) -> dict[str, list[tuple[float, float]]]:
    """fused_attn on several samples, interleaved: by direction, (milliseconds, FLOPs per millisecond) of each."""
    calls = [ours().bind(x) for x in samples]
    found = {}
    for direction in rounds.DIRECTIONS:
        timed = [directed(direction, f, x.leaves, x.cotangents) for f, x in zip(calls, samples, strict=True)]
        turns = [[milliseconds(call, s.device) for call in timed] for _ in range(s.rounds)]
        took = [statistics.median(x) for x in zip(*turns, strict=True)]
        found[direction] = [(ms, x.flops(direction) / ms) for x, ms in zip(samples, took, strict=True)]
    return found


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def verify(provider: Provider, x: Sample) -> dict[str, Any]:
    """Check one head of the timed tensors against the tolerance rule, forward and backward."""
    with provider.scope():
        out = provider.bind(x)()
        return x.judge(out, gradients(out, x.leaves, x.cotangents, retain=False))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill new tensors with NaN, so that an element that no kernel writes is detected.

    torch does this in deterministic mode. Calls may still ask for deterministic=False.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with mock.patch.object(bind, "FOLLOW_TORCH", False):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
