"""Packed against padded batches, and decoding steps by cache size, on a CPU.

    python -m bench.ragged                  both, into bench/results/ragged.csv
    python -m bench.ragged --tiny           a dry run in seconds, without a table

Sequence lengths have a heavy-tailed distribution. fused_attn gets them packed. SDPA gets them padded, once with a mask
of the padded keys and once without, which is faster but attends to the padding. A decoding step is timed by the number
of keys in the cache and by the cache's capacity. Rounds are interleaved. Results are checked against the tolerance rule
before timing, except for the call without a mask.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

if __name__ == "__main__":
    # Waiting threads yield their core. Busy waiting makes calls of many small operations a hundred times slower if
    # another process uses one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from bench.harness import argtypes, table
from bench.harness.clock import directed, gradients, milliseconds
from bench.harness.kv_caches import caches, judged
from bench.harness.packed import Padded, ragged_case
from bench.harness.providers import ours
from bench.harness.samples import Sample, heavy_tail
from bench.harness.table import Row, figure
from fused_attn import attention_decode

DIRECTIONS = ("forward", "forward+backward")
OWN = {"fused_attn": None, "tiled": "tiled"}  # provider: backend
THEIRS = ("padded", "unmasked")


@dataclass(frozen=True)
class Size:
    """Sizes of the cases."""

    batch: int = 32
    longest: int = 512
    fill: float = 0.3  # share of the padded batch that is not padding
    heads: int = 8
    dim: int = 64
    rounds: int = 7
    cached: tuple[int, ...] = (
        1024,
        2048,
        4096,
        8192,
        16384,
        32768,
    )  # numbers of keys, in a cache with the largest capacity of these
    rooms: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)  # capacities of a cache with `held` keys
    held: int = 4096
    sequences: int = 2  # of a decoding step
    kv_heads: int = 2  # of a decoding step
    page: int = 64


TINY = Size(
    batch=3, longest=24, heads=2, dim=8, rounds=2, kv_heads=1, cached=(40, 256), rooms=(256, 512, 768), held=8, page=4
)


@dataclass(frozen=True)
class Contender:
    """A timed call, with its inputs and cotangents."""

    call: Callable[[], Any]
    leaves: list
    cotangents: list


def batch(size: Size) -> Iterator[Row]:
    """One batch of sequences, packed and padded."""
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
            where |= {"share": shares[name]} if name in shares else {"reason": "not judged: it attends to padding"}
            yield where | figure("ms", took)
            yield where | figure("tflops", [1e-9 * x.flops(direction) / ms for ms in took])
            for other in THEIRS if name in OWN else ():
                ratios = [b / a for a, b in zip(took, samples[other], strict=True)]
                yield where | figure("speedup", ratios, against=other)


def steps(size: Size) -> Iterator[Row]:
    """One decoding step by number of keys and by capacity, with dense and paged caches."""
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
    """Milliseconds of each call, one sample of `least` calls per round; the order alternates."""
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
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds, without a table")
    parser.add_argument(
        "--threads",
        type=argtypes.count,
        nargs="+",
        default=[1, 2],
        help="numbers of threads for batches; decoding steps use one",
    )
    parser.add_argument(
        "--out", type=argtypes.output, metavar="FILE", help="default: bench/results/ragged.csv; with --tiny: no table"
    )
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
    """A figure as text."""
    what = "ms" if x["metric"] == "ms" else f"times as fast as {x['against']}"
    where = f"{x['case']} {x['length']} {x['options']}, {threads} thread{'s' * (threads > 1)}, {x['direction']}"
    return f"{where}: {x['provider']} {x['value']:.3g} ({x['low']:.3g} to {x['high']:.3g}) {what}"


if __name__ == "__main__":
    raise SystemExit(main())
