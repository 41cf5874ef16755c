"""What fused_attn costs on a CPU, against torch's own op and against attention written in whole matrices.

    python -m bench.cpu                       every part, into bench/results/cpu.json
    python -m bench.cpu plain modifiers       some parts; the others keep what the file holds
    python -m bench.cpu --quick               small lengths and few rounds, to see that it runs

    plain         the public call against F.scaled_dot_product_attention, on 4096 tokens
    modifiers     each modifier, and a window of 256, against the same in whole matrices
    memory        what one call adds to a process at its peak, by length
    overhead      host time of a call that launches nothing, as a ratio to an empty operator
    compilations  kernels compiled over lengths that no call has seen

Ours and the peer take turns in one process, and a ratio is the median over rounds of the peer's time by ours. The file
holds every sample. A result that is not the peer's, to float32's own tolerance, is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import fused_attn
from bench import memory

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "cpu.json"
HEADS, DIM = 8, 64
WINDOW = 256
TOKENS = 4096  # of a plain call, in as many sequences as their length allows

Call = Callable[[], Any]
Entry = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much to measure."""

    plain: tuple[int, ...] = (512, 1024, 2048, 4096)
    modified: int = 2048
    memory: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    memory_naive: tuple[int, ...] = (1024, 2048, 4096)
    rounds: int = 15
    seconds: float = 0.2  # of one sample, at least
    calls: int = 3000
    lengths: int = 100


QUICK = Size((128,), 192, (256, 512), (256, 512), 3, 0.0, 150, 3)


def environment(threads: int | None = None) -> Entry:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    model = [x for x in _lines("/proc/cpuinfo") if x.startswith("model name")]
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": model[0].partition(":")[2].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_attn": fused_attn.__version__,
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--", "fused_attn", "kernels", "bench/*.py")),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


# ------------------------------------------------------------------------------------------------------------ timing


def interleave(ours: Call, peer: Call, size: Size) -> Entry:
    """Both in turn, rounds times. Seconds a call, and the median over rounds of how much faster ours is."""
    calls = {"ours": ours, "peer": peer}
    for call in calls.values():
        call()
    number = {name: max(1, round(size.seconds / timeit.timeit(call, number=1))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(size.rounds):
        for name in calls if i % 2 else reversed(calls):
            samples[name].append(timeit.timeit(calls[name], number=number[name]) / number[name])
    ratios = [b / a for a, b in zip(samples["ours"], samples["peer"], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_quantiles": _quantiles(ratios),
        **{f"{name}_median": statistics.median(x) for name, x in samples.items()},
        **{f"{name}_quantiles": _quantiles(x) for name, x in samples.items()},
        "samples": samples,
    }


def _quantiles(x: list[float]) -> list[float]:
    """The 10th and the 90th percent."""
    deciles = statistics.quantiles(x, n=10, method="inclusive")
    return [deciles[0], deciles[-1]]


def _tensors(length: int, batch: int = 1) -> list[Tensor]:
    """q, k, v that want gradients, and a cotangent, drawn anew."""
    q, k, v, dout = (torch.randn(batch, HEADS, length, DIM) for _ in range(4))
    return [*(x.requires_grad_() for x in (q, k, v)), dout]


def _directions(ours: Call, peer: Call, leaves: list[Tensor], dout: Tensor) -> dict[str, tuple[Call, Call]]:
    def inference(f: Call) -> Call:
        return torch.no_grad()(f)

    def training(f: Call) -> Call:
        return lambda: torch.autograd.grad(f(), leaves, dout)

    return {
        "forward": (inference(ours), inference(peer)),
        "forward+backward": (training(ours), training(peer)),
    }


def plain(size: Size, tick: Call) -> list[Entry]:
    entries = []
    for length in size.plain:
        batch = max(1, TOKENS // length)
        for causal in (False, True):
            q, k, v, dout = _tensors(length, batch)

            def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, causal: bool = causal) -> Tensor:
                return fused_attn.attention(q, k, v, causal=causal)

            def peer(q: Tensor = q, k: Tensor = k, v: Tensor = v, causal: bool = causal) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

            torch.testing.assert_close(ours(), peer())
            backend = fused_attn.explain(q, k, v, causal=causal).backend
            for direction, pair in _directions(ours, peer, [q, k, v], dout).items():
                entry = {
                    "name": "causal" if causal else "full",
                    "batch": batch,
                    "length": length,
                    "direction": direction,
                }
                entries.append(entry | {"backend": backend, "peer": "F.sdpa"} | interleave(*pair, size))
                tick()
    return entries


# --------------------------------------------------------------------------------------------------------- modifiers


def whole(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | Tensor = DIM**-0.5, softcap: float | None = None,
    bias: Tensor | None = None, slopes: Tensor | None = None, distance: Tensor | None = None,
    forbidden: Tensor | None = None, sink: Tensor | None = None, dropout_p: float = 0.0, lse: bool = False,
) -> Any:  # fmt: skip
    """Attention as it is first written: the whole score matrix, a line for each modifier, torch's softmax."""
    s = (q @ k.mT) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    if slopes is not None:
        s = s - slopes[:, None, None] * distance
    if forbidden is not None:
        s = s.masked_fill(forbidden, -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink[:, None, None].expand(*s.shape[:-1], 1)], -1)
    weights = torch.softmax(s, -1)
    if sink is not None:
        weights = weights[..., :-1]
    if dropout_p:
        weights = torch.dropout(weights, dropout_p, True)
    out = weights @ v
    return (out, torch.logsumexp(s, -1)) if lse else out


def _modifiers(n: int) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], list[Tensor]]]:
    """Name, our arguments, those of `whole`, and the parameters that want gradients."""
    i = torch.arange(n)
    distance = (i[:, None] - i).abs().float()
    mask = torch.rand(1, 1, n, n) < 0.7
    mask[..., 0] = True
    near = (i[:, None] - i >= 0) & (i[:, None] - i < WINDOW)
    bias, shared = (torch.randn(1, h, n, n, requires_grad=True) for h in (HEADS, 1))
    slopes, sink = torch.rand(HEADS, requires_grad=True), torch.randn(HEADS, requires_grad=True)
    scale = torch.full((HEADS,), 0.1, requires_grad=True)
    yield "mask", {"mask": mask}, {"forbidden": ~mask}, []
    yield "bias", {"bias": bias}, {"bias": bias}, [bias]
    yield "shared bias", {"bias": shared}, {"bias": shared}, [shared]
    yield "ALiBi", {"alibi_slopes": slopes}, {"slopes": slopes, "distance": distance}, [slopes]
    yield "softcap", {"softcap": 20.0}, {"softcap": 20.0}, []
    yield "sink", {"sink": sink}, {"sink": sink}, [sink]
    yield "scale tensor", {"scale": scale}, {"scale": scale[:, None, None]}, [scale]
    yield "LSE", {"return_lse": True}, {"lse": True}, []
    yield "dropout", {"dropout_p": 0.1}, {"dropout_p": 0.1}, []
    yield f"window {WINDOW}", {"window": (WINDOW - 1, 0)}, {"forbidden": ~near}, []


def modifiers(size: Size, tick: Call) -> list[Entry]:
    n, entries = size.modified, []
    for name, kwargs, naive_kwargs, parameters in _modifiers(n):
        q, k, v, dout = _tensors(n)
        several = "return_lse" in kwargs

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, kwargs: Entry = kwargs, several: bool = several) -> Any:
            found = fused_attn.attention(q, k, v, **kwargs)
            return found[0] + found[1][..., None] if several else found

        def peer(
            q: Tensor = q, k: Tensor = k, v: Tensor = v, kwargs: Entry = naive_kwargs, several: bool = several
        ) -> Any:
            found = whole(q, k, v, **kwargs)
            return found[0] + found[1][..., None] if several else found

        if name != "dropout":  # whose masks differ
            torch.testing.assert_close(ours(), peer())
        backend = fused_attn.explain(q, k, v, **kwargs).backend
        for direction, pair in _directions(ours, peer, [q, k, v, *parameters], dout).items():
            entry = {"name": name, "length": n, "direction": direction, "backend": backend, "peer": "whole matrices"}
            entries.append(entry | interleave(*pair, size))
            tick()
    return entries


# --------------------------------------------------------------------------------------------- memory, host and report


def peaks(size: Size, tick: Call) -> list[Entry]:
    entries = []
    for provider, lengths in (("tiled", size.memory), ("naive", size.memory_naive)):
        for direction in memory.DIRECTIONS:
            for length in lengths:
                found = memory.peak(provider, direction, length)
                entries.append({"name": provider, "direction": direction, "length": length, "bytes": found})
                tick()
    return entries


def _host(part: str, count: int) -> Entry:
    command = [sys.executable, "-m", "bench.host", part, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def overhead(size: Size, tick: Call) -> Entry:
    found = _host("overhead", size.calls)
    tick()
    return found


def compilations(size: Size, tick: Call) -> Entry:
    found = _host("compilations", size.lengths)
    tick()
    return found


PARTS: dict[str, Callable[[Size, Call], Any]] = {
    "plain": plain,
    "modifiers": modifiers,
    "memory": peaks,
    "overhead": overhead,
    "compilations": compilations,
}


def steps(part: str, size: Size) -> int:
    """How often a part ticks."""
    return {
        "plain": 4 * len(size.plain),
        "modifiers": 20,
        "memory": 2 * (len(size.memory) + len(size.memory_naive)),
    }.get(part, 1)


def report(result: Entry) -> Iterator[str]:
    """The figures in words, one a line."""
    for part in ("plain", "modifiers"):
        for x in result.get(part, []):
            low, high = x["ratio_quantiles"]
            yield (
                f"{x['name']:>12} S {x['length']:<5} {x['direction']:<17} {1e3 * x['ours_median']:8.1f} ms on"
                f" {x['backend']:<6} {x['ratio']:6.2f} x {x['peer']} ({low:.2f} to {high:.2f})"
            )
    for x in result.get("memory", []):
        yield f"{x['name']:>12} S {x['length']:<5} {x['direction']:<17} {x['bytes'] / 2**20:8.1f} MiB at the peak"
    for name, ratio in result.get("overhead", {}).get("ratios", {}).items():
        yield f"{name:>17}: {result['overhead']['microseconds'][name]:.0f} us, {ratio:.1f} x an empty operator"
    for name, x in result.get("compilations", {}).get("kinds", {}).items():
        lengths = result["compilations"]["lengths"]
        yield f"{name:>17}: {x['warm-up']} kernels at the first call, {x['unseen lengths']} more over {lengths} lengths"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small and few: shows that it runs, measures nothing")
    parser.add_argument("--out", type=Path, help="the JSON file; bench/results/cpu.json, or none with --quick")
    parser.add_argument("--rounds", type=int, help=f"turns that ours and the peer take; {Size().rounds} by default")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    chosen = args.parts or list(PARTS)
    size = QUICK if args.quick else Size()
    size = replace(size, rounds=args.rounds or size.rounds)
    path = args.out or (None if args.quick else RESULT)
    result: Entry = json.loads(path.read_text()) if path and path.exists() else {}
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=sum(steps(part, size) for part in chosen))
        for part in chosen:
            progress.update(bar, description=part)
            result[part] = PARTS[part](size, lambda: progress.advance(bar))
            result.setdefault("environment", {})[part] = environment(memory.THREADS if part == "memory" else None)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(report({part: result[part] for part in chosen})))


if __name__ == "__main__":
    main()
