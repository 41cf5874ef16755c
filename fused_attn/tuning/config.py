"""A configuration is data: frozen, hashable, and pinned through a scope, never by editing a global."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Config:
    """How one kernel is cut and scheduled.

    BLOCK_M counts query rows, BLOCK_N keys; the tile that a program owns and the tile that its loop visits follow from
    the kernel. overlap: the products of the next tile (forward) or both products of this one (backward) are issued
    before the exponentials, at the price of registers. split: dk and dv come from two launches, because registers do
    not hold both at a large head dim; the scores are computed once more. descriptors: full tiles of keys and values
    come by TMA, which leaves the registers of their pointers to the products (forward, from sm_90 on).

    Of the Hopper kernels: consumers, groups of four warps with a tile each, BLOCK_M rows (forward) or BLOCK_N keys
    (backward); num_stages of keys and values (forward) or rows (backward) stand in shared memory; pingpong: consumers
    take turns in issuing products; overlap (backward): the scores of the next tile are issued behind dk; ordered: dq is
    added up in one order, and the one-pass backward serves deterministic calls too.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    overlap: bool = False
    split: bool = False
    descriptors: bool = False
    consumers: int = 1
    pingpong: bool = False
    ordered: bool = False

    def __post_init__(self) -> None:
        for name in ("BLOCK_M", "BLOCK_N"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}: must be a power of two and at least 16, got {size}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps: must be 1, 2, 4, 8 or 16, got {self.num_warps}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages: must be at least 1, got {self.num_stages}")
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, f.name) for f in fields(self))))

    def __hash__(self) -> int:
        """Computed once: launches look up what is cached for a configuration."""
        return self._hash  # type: ignore[attr-defined]

    def __str__(self) -> str:
        """128x64 w8 s2 overlap: BLOCK_M x BLOCK_N, warps, stages; x2: of each of two consumers."""
        text = f"{self.BLOCK_M}x{self.BLOCK_N} w{self.num_warps} s{self.num_stages}"
        text += f" x{self.consumers}" if self.consumers > 1 else ""
        for flag in ("overlap", "split", "descriptors", "pingpong", "ordered"):
            text += f" {flag}" * getattr(self, flag)
        return text

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Config:
        """A table row may hold more than the configuration: who validated it, and where the result lies."""
        return cls(**{f.name: row[f.name] for f in fields(cls) if f.name in row})

    def to_row(self) -> dict[str, Any]:
        return asdict(self)


_overrides: ContextVar[dict[str, Config]] = ContextVar("fused_attn_config_overrides", default={})  # noqa: B039


@contextlib.contextmanager
def override(**configs: Config) -> Iterator[None]:
    """Pin the configuration of kernels by name inside a `with`: override(forward=Config(...), dq=Config(...))."""
    token = _overrides.set({**_overrides.get(), **configs})
    try:
        yield
    finally:
        _overrides.reset(token)


def overrides() -> dict[str, Config]:
    """What is pinned here and now."""
    return _overrides.get()


def overridden(kernel: str) -> Config | None:
    return overrides().get(kernel)
