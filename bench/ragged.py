"""Ragged batches beside padded ones, and a step of decoding by the cache that it reads, on a CPU.

    python -m bench.ragged                  both, into bench/results/ragged.csv
    python -m bench.ragged --tiny           a rehearsal in seconds, no table

A batch's lengths are drawn from a heavy tail. Ours gets it packed; torch's function gets it padded, once with the mask
of padded keys and once without one, its fastest, which lets the padding take part. A step of decoding is timed over the
keys that there are and over the room that there is for more. All take turns, round by round, and what is timed has been
held to the tolerance rule first, but for the call without a mask.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A thread that waits gives its core to whoever else computes. Else a call of many small operations, which wait at
    # the end of each, takes a hundred times as long where another process has one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from bench.harness import table
from bench.harness.clock import directed, gradients, milliseconds
from bench.harness.kv_caches import caches, judged
from bench.harness.packed import Padded, ragged_case
from bench.harness.providers import ours
from bench.harness.samples import Sample, heavy_tail
from bench.harness.table import Row, figure
from fused_attn import attention_decode

DIRECTIONS = ("forward", "forward+backward")
OWN = {"fused_attn": None, "tiled": "tiled"}  # backends by the names of providers
THEIRS = ("padded", "unmasked")


@dataclass(frozen=True)
class Size:
    """How large the cases are."""

    batch: int = 32
    longest: int = 512
    fill: float = 0.3  # of the padded batch
    heads: int = 8
    dim: int = 64
    rounds: int = 7
    cached: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)  # keys in a cache with the largest room
    rooms: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)  # room of a cache that holds `held` keys
    held: int = 4096
    sequences: int = 2  # of a step
    kv_heads: int = 2  # of a step
    page: int = 64


TINY = Size(
    batch=3, longest=24, heads=2, dim=8, rounds=2, kv_heads=1, cached=(40, 256), rooms=(256, 512, 768), held=8, page=4
)


@dataclass(frozen=True)
class Contender:
    """What is timed, and what its backward flows from and to."""

    call: Callable[[], Any]
    leaves: list
    cotangents: list


def batch(size: Size) -> Iterator[Row]:
    """A ragged batch, packed and padded."""
    lengths = heavy_tail(size.batch, size.longest, size.fill)
    x = Sample.draw(ragged_case(lengths, size.heads, size.dim), torch.float32, "cpu")
    padded = Padded(x)
    found = {name: Contender(ours(backend).bind(x), x.leaves, x.cotangents) for name, backend in OWN.items()}
    found |= {name: Contender(padded.call(name == THEIRS[0]), padded.leaves, padded.cotangents) for name in THEIRS}
    fill = sum(lengths) / len(lengths) / size.longest
    what = {
        "case": "ragged", "length": size.longest, "batch": size.batch, "heads": size.heads, "kv_heads": size.heads,
        "dim": size.dim, "dtype": "float32", "status": "timed", "options": f"fill={fill:.3f}",
    }  # fmt: skip
    shares = {}
    for name, c in found.items():
        if name != "unmasked":
            out = c.call()
            grads = gradients(out, c.leaves, c.cotangents, retain=False)
            if name == "padded":
                out, *grads = map(padded.packed, (out, *grads))
            shares[name] = max(row["share"] for row in x.judge(out, grads).values())
    for direction in DIRECTIONS:
        timed = {name: directed(direction, c.call, c.leaves, c.cotangents) for name, c in found.items()}
        samples = in_turns(timed, size.rounds)
        for name, took in samples.items():
            where = what | {"provider": name, "direction": direction}
            where |= {"share": shares[name]} if name in shares else {"reason": "not judged: padding takes part"}
            yield where | figure("ms", took)
            yield where | figure("tflops", [1e-9 * x.flops(direction) / ms for ms in took])
            for other in THEIRS if name in OWN else ():
                ratios = [b / a for a, b in zip(took, samples[other], strict=True)]
                yield where | figure("speedup", ratios, against=other)


def steps(size: Size) -> Iterator[Row]:
    """One step of decoding, by keys in the cache and by room in it, dense and in pages."""
    most, heads = max(size.cached), size.kv_heads
    asked = [(n, most) for n in size.cached] + [(size.held, room) for room in size.rooms]
    timed, shares = {}, {}
    for length, room, page in ((*x, page) for x in dict.fromkeys(asked) for page in (None, size.page)):
        k, v, places = caches([length] * size.sequences, size.dim, page, heads, room=room)
        q = torch.randn(size.sequences, 1, size.heads, size.dim)
        call = functools.partial(attention_decode, q, k, v, **places, return_lse=True, backend="tiled")
        shares[length, room, page] = max(row["share"] for row in judged(q, k, v, places, call()).values())
        timed[length, room, page] = call
    for (length, room, page), took in in_turns(timed, 3 * size.rounds, least=3).items():
        where = {
            "case": "decode" if page is None else "decode_paged", "provider": "tiled", "direction": "forward",
            "length": length, "batch": size.sequences, "heads": size.heads, "kv_heads": heads, "dim": size.dim,
            "dtype": "float32", "options": f"room={room}" + (f" page={page}" if page else ""), "status": "timed",
            "share": shares[length, room, page],
        }  # fmt: skip
        yield where | figure("ms", took)
        moved = 2 * 4 * size.sequences * length * heads * size.dim
        yield where | figure("gbytes_per_second", [1e-6 * moved / ms for ms in took])


def in_turns(calls: dict[Any, Callable[[], Any]], rounds: int, least: int = 1) -> dict[Any, list[float]]:
    """Milliseconds of each, one sample a round of so many calls, in an order that turns round."""
    found: dict[Any, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(rounds):
        for name in list(calls) if turn % 2 else reversed(calls):
            found[name].append(milliseconds(calls[name], "cpu", least=least))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ragged", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of ragged batches; steps take one")
    parser.add_argument("--out", type=Path, help="the table; bench/results/ragged.csv, none with --tiny")
    args = parser.parse_args(argv)
    size = TINY if args.tiny else Size()
    path = args.out or (None if args.tiny else table.RESULTS / "ragged.csv")
    before, rows = torch.get_num_threads(), []
    parts = [(threads, batch) for threads in args.threads] + [(1, steps)]
    try:
        for threads, part in parts:
            torch.set_num_threads(threads)
            where = table.environment("cpu", threads)
            for row in part(size):
                rows.append({**where, "load": os.getloadavg()[0], **row})
                if row["metric"] in ("ms", "speedup"):
                    print(said(threads, row), flush=True)
            if path:
                table.write(path, rows)
    finally:
        torch.set_num_threads(before)
    return 0


def said(threads: int, x: Row) -> str:
    """A figure in words."""
    what = "ms" if x["metric"] == "ms" else f"times as fast as {x['against']}"
    where = f"{x['case']} {x['length']} {x['options']}, {threads} thread{'s' * (threads > 1)}, {x['direction']}"
    return f"{where}: {x['provider']} {x['value']:.3g} ({x['low']:.3g} to {x['high']:.3g}) {what}"


if __name__ == "__main__":
    raise SystemExit(main())
