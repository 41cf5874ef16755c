"""GPU evidence on decoding: steps over KV caches, checked, bit-identical across repeats, and timed."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.evidence.setting import Listed, Setting, poisoned, seconds
from bench.harness.clock import milliseconds
from bench.harness.kv_caches import caches, judged
from fused_attn import attention_decode

HEADS, KV_HEADS = 32, 8
PAGES = (None, 64, 16, 256, 1)  # keys per page; None for a dense cache
SPLITS = (None, 4, 8, 16, 32, 64)  # splits of one sequence's keys; None is the default
BANDWIDTH = 4.3  # TB/s of a copy on the reference GPU
GOALS = {None: 0.95, 64: 0.90, 16: 0.85}  # share of it, by page size
GOAL_MS = 0.013  # one step of one sequence of 8192 keys at D 128
HOW: tuple[dict[str, Any], ...] = ({"num_splits": 1}, {}, {"batch_invariant": True})


class Steps:
    """Decoding steps: against float64 with NaN in unused cache entries; bit-identical at every repeat and, if batch
    invariant, in any batch. Then the time of a step against the bytes of keys and values that it reads."""

    shares = seconds(check=25, measure=40)

    def cases(self, s: Setting) -> Iterator[Listed]:
        for d, page in itertools.product(s.dims[:2], PAGES):
            name = "dense" if page is None else f"page_{page}"
            yield f"d{d}/{name}", page in PAGES[:2] and d == s.dims[0], {"d": d, "page": page}

    def check(self, s: Setting, d: int, page: int | None) -> dict[str, Any]:
        heads = KV_HEADS if s.device == "cuda" else 1
        lengths = [s.large, 1, s.odd]
        k, v, places = caches(lengths, d, page, heads, s.half, s.device)
        q = torch.randn(3, 1, 4 * heads, d, dtype=s.half, device=s.device)
        rows = {}
        with poisoned():
            for how in HOW:
                got = attention_decode(q, k, v, **places, **how, return_lse=True, backend="triton")
                rows[str(how)] = judged(q, k, v, places, got)
                for _ in range(s.repeats // 10):
                    again = attention_decode(q, k, v, **places, **how, return_lse=True, backend="triton")
                    if not all(map(torch.equal, again, got)):
                        raise AssertionError(f"{how}: not the same bits at every repeat")
            turned = {name: x.flip(0) for name, x in places.items()}
            order = torch.arange(3, dtype=torch.int32, device=s.device).flip(0)
            where = {} if page else {"cache_batch_idx": order}
            out = attention_decode(q.flip(0), k, v, **turned, **where, batch_invariant=True, backend="triton")
        if not torch.equal(out.flip(0), got[0]):
            raise AssertionError("a sequence's bits depend on its place in the batch")
        return {"rows": rows}

    def measure(self, s: Setting, checked: dict[str, Any], d: int, page: int | None) -> dict[str, Any]:
        """full: many sequences, at least 1 GiB of bfloat16 at D 128. alone: one of them, by number of splits."""
        gpu = s.device == "cuda"
        heads, length = KV_HEADS if gpu else 1, s.decoding[1]
        full = self._timed(s, s.decoding[0], d, page, heads)
        if gpu and page in GOALS and full["bytes"] >= 2**30:
            share = full["graph"]["terabytes_per_second"] / BANDWIDTH
            full["graph"] |= {"of_copy": share, "goal": GOALS[page]}
        # Enough copies for four times an L2 cache of 60 MB.
        copies = 1 + 2**28 // (4 * length * heads * d) if gpu else 2
        splits = SPLITS if gpu and page in GOALS else SPLITS[:2]
        alone = {str(n): self._timed(s, 1, d, page, heads, copies, n) for n in splits}
        found = {"full": full, "alone": alone.pop("None"), "splits": alone, "copies": copies}
        if (d, length, page) == (128, 8192, None):
            found["alone"]["goal_ms"] = GOAL_MS
        return found

    def _timed(
        self, s: Setting, batch: int, d: int, page: int | None, heads: int, copies: int = 1, splits: int | None = None
    ) -> dict[str, Any]:
        """Time by call, and on a GPU by replaying a CUDA graph that reads one copy of the buffers after another."""
        length = s.decoding[1]
        given = []
        for _ in range(copies):
            k, v, places = caches([length] * batch, d, page, heads, s.half, s.device)
            q = torch.randn(batch, 1, HEADS // KV_HEADS * heads, d, dtype=s.half, device=s.device)
            given.append(functools.partial(attention_decode, q, k, v, **places, num_splits=splits, backend="triton"))

        def replayed() -> None:
            for call in given:
                call()

        timed: dict[str, tuple[Callable[[], Any], int]] = {"call": (given[0], 1)}
        if s.device == "cuda":
            replayed()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed()
            timed["graph"] = graph.replay, copies
        moved = 2 * batch * length * heads * d * s.half.itemsize
        found: dict[str, Any] = {"bytes": moved}
        for name, (f, times) in timed.items():
            ms = statistics.median(milliseconds(f, s.device) for _ in range(s.rounds)) / times
            found[name] = {"ms": ms, "terabytes_per_second": moved / ms * 1e-9}
        return found
