"""The configuration of one kernel launch, and a scope that overrides it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Config:
    """Tile sizes and schedule of one kernel.

    BLOCK_M         query rows of a tile, a power of two from 16
    BLOCK_N         keys of a tile, a power of two from 16
    num_warps       1, 2, 4, 8 or 16
    num_stages      depth of the software pipeline, at least 1
    overlap         issue the products of the next tile (forward), or both products of this one (backward), before the
                    exponentials; it takes more registers
    split           compute dk and dv in two launches, each with fewer registers, for a large head dim; the scores are
                    computed twice
    descriptors     load full tiles of k and v by TMA, which frees the registers of pointers (forward, from sm_90 on)

    Hopper kernels:

    consumers       warpgroups with a tile each, of BLOCK_M rows (forward) or BLOCK_N keys (backward)
    num_stages      tiles of k and v (forward) or q and do (backward) in shared memory
    pingpong        consumers alternate in issuing products
    overlap         issue the scores of the next tile after dk (backward)
    ordered         add dq in a fixed order, so that the one-pass backward is deterministic
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
        """Such as "128x64 w8 s2 x2 overlap": BLOCK_M x BLOCK_N, warps, stages, consumers if not 1, flags."""
        text = f"{self.BLOCK_M}x{self.BLOCK_N} w{self.num_warps} s{self.num_stages}"
        text += f" x{self.consumers}" if self.consumers > 1 else ""
        for flag in ("overlap", "split", "descriptors", "pingpong", "ordered"):
            text += f" {flag}" * getattr(self, flag)
        return text

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Config:
        """From a table row, whose other fields are ignored."""
        return cls(**{f.name: row[f.name] for f in fields(cls) if f.name in row})

    def to_row(self) -> dict[str, Any]:
        return asdict(self)


_overrides: ContextVar[dict[str, Config]] = ContextVar("fused_attn_config_overrides", default={})  # noqa: B039


@contextlib.contextmanager
def override(**configs: Config) -> Iterator[None]:
    """Set the configuration of kernels, by name, inside a `with`: override(forward=Config(...), dq=Config(...)).

    >>> from fused_attn import tuning
    >>> with tuning.override(forward=tuning.Config(64, 32, num_warps=4, num_stages=2)):
    ...     pass  # calls of the triton backend
    """
    token = _overrides.set({**_overrides.get(), **configs})
    try:
        yield
    finally:
        _overrides.reset(token)


def overrides() -> dict[str, Config]:
    """The configurations set by the enclosing `override` scopes."""
    return _overrides.get()


def overridden(kernel: str) -> Config | None:
    return overrides().get(kernel)
