"""The parts of bench.gpu: the cases of each, their check and their measurement.

`cases` yields (name, core, arguments). `check` and `measure` run in a worker process with these arguments, and return
what the record stores, or raise. A case is measured only after its check passed, alone on the device; `measure` also
gets the result of the check.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

import fused_attn
from bench.evidence.configs import Configs, Overlap, Tune
from bench.evidence.decoding import Steps
from bench.evidence.ragged import RaggedBatches
from bench.evidence.setting import Listed, Setting, bits, compared, judged, poisoned, seconds, throughputs, verify
from bench.harness import first_call, providers, rounds
from bench.harness.packed import ragged_case
from bench.harness.providers import ours
from bench.harness.samples import ADDITIVE, MODIFIED, Sample, heavy_tail, sized
from fused_attn import testing
from fused_attn.testing import CASES, Case, statistics


class Parity:
    """Forward and every gradient of every case of `testing.CASES`, and of larger ones, through the public call.

    Backend `triton`, and in half precision `hopper` with deterministic=False, which selects its own backward.
    """

    shares = seconds(check=160)

    def all_cases(self, s: Setting) -> dict[str, Case]:
        large = {}
        for d in s.dims:
            sizes: dict[str, dict[str, Any]] = {
                "full": {"m": s.large // 2 + 1, "n": s.large - 1},
                "causal": {"m": s.large - 1, "causal": True},
                "window": {"m": s.large * 7 // 8, "window": (s.large // 6, s.large // 9)},
            }
            for kind, fields in sizes.items():
                tags = {"half", "core"} if d == s.dims[0] else {"half"}
                name = f"large_{kind}_{d}"
                large[name] = Case(name, frozenset(tags), hq=4, hkv=2, d=d, return_lse=True, **fields)
            name, lengths = f"large_ragged_{d}", heavy_tail(8, s.large, 0.3)
            large[name] = replace(ragged_case(lengths, 4, d, causal=True), name=name, tags=frozenset({"half"}), hkv=2)
        # Cases with tens of thousands of programs take hours in the interpreter.
        return large | {name: c for name, c in CASES.items() if s.device == "cuda" or "large" not in c.tags}

    def cases(self, s: Setting) -> Iterator[Listed]:
        for name, case in self.all_cases(s).items():
            for dtype in s.dtypes:
                allowed = getattr(torch, dtype) in case.dtypes
                if allowed and (dtype == "float32" or "half" in case.tags):
                    yield f"{name}/{dtype}", "core" in case.tags, {"case": name, "dtype": dtype}
                if allowed and dtype != "float32":
                    args = {"case": name, "dtype": dtype, "backend": "hopper"}
                    yield f"hopper/{name}/{dtype}", "core" in case.tags, args

    def check(self, s: Setting, case: str, dtype: str, backend: str = "triton") -> dict[str, Any]:
        found = self.all_cases(s)[case]
        found = replace(found, deterministic=False) if backend == "hopper" else found
        return {"rows": judged(s, found, backend, getattr(torch, dtype))}


class Statistics(Parity):
    """attention_stats and attention_map by `triton`: the core cases, and larger ones."""

    shares = seconds(check=40)

    def cases(self, s: Setting) -> Iterator[Listed]:
        for name, case in self.all_cases(s).items():
            for dtype in s.dtypes:
                core = "core" in case.tags and getattr(torch, dtype) in case.dtypes
                if core and (dtype == "float32" or "half" in case.tags):
                    yield f"{name}/{dtype}", name in ("plain", "everything"), {"case": name, "dtype": dtype}

    def check(self, s: Setting, case: str, dtype: str, backend: str = "triton") -> dict[str, Any]:
        with poisoned():
            found = statistics.check_statistics(
                self.all_cases(s)[case], backend, getattr(torch, dtype), device=s.device, top_k=40
            )
        return {"rows": {name: asdict(row) for name, row in found.rows.items()}}


class Races:
    """Bit-identical results from every repeat of a forward and backward, including parameter gradients.

    In the unordered backward of `hopper` only dq may differ; it is held to the tolerance rule.
    """

    shares = seconds(check=35)

    def problems(self, s: Setting) -> dict[str, Case]:
        everything, m = CASES["everything"], s.large // 2
        cases = (
            Case("full_64", hq=4, hkv=2, m=m, n=s.large, d=64),
            Case("causal_128", hq=4, m=s.large, d=128, causal=True, return_lse=True),
            Case("window_256", hq=2, m=s.large, d=256, window=(m // 2, m // 3)),
            Case("bias_broadcast", b=2, hq=4, m=m // 2, d=64, bias="11mn", sink=True, scale_tensor="h"),
            Case("bias_keys", b=2, hq=4, m=m // 2, d=128, bias="b11n", softcap=4.0, softcap_tensor=True),
            replace(ragged_case(heavy_tail(8, s.large, 0.3), 4, 128, causal=True), name="ragged_128", hkv=2),
            replace(everything, name="everything_64", m=m // 2, n=m, d=64, dv=64),
            replace(everything, name="everything_128", m=m // 2, n=m, d=128, dv=128),
        )
        small: dict[str, Any] = {"d": s.dims[0], "dv": s.dims[0]} if max(s.dims) < 64 else {}
        return {c.name: replace(c, **small) for c in cases}

    def cases(self, s: Setting) -> Iterator[Listed]:
        dtype = str(s.half).removeprefix("torch.")
        for i, name in enumerate(self.problems(s)):
            yield f"{name}/{dtype}", i == 0, {"case": name}
            yield f"hopper/{name}/{dtype}", i == 0, {"case": name, "backend": "hopper"}

    def check(self, s: Setting, case: str, backend: str = "triton") -> dict[str, Any]:
        problem = replace(self.problems(s)[case], deterministic=backend != "hopper")
        inputs = testing.make_inputs(problem, s.half, s.device)
        with poisoned():
            last = testing.run_public(inputs, backend)
            first = {name: bits(x) for name, x in last.items() if problem.deterministic or name != "q"}
            for repeat in range(1, s.repeats):
                last = testing.run_public(inputs, backend)
                for name in first:
                    if not torch.equal(bits(last[name]), first[name]):
                        raise AssertionError(f"{case}: {name} differs at repeat {repeat}")
        testing.compare(inputs, last, testing.expect(inputs), case)
        return {"repeats": s.repeats, "compared": list(first)}


class Costs:
    """The first call with a cold and with a warm cache, and peak memory beyond inputs and results."""

    shares = seconds(check=3, measure=25)

    def cases(self, s: Setting) -> Iterator[Listed]:
        yield f"memory/{s.dims[0]}/{s.memory}", False, {"d": s.dims[0], "length": s.memory}
        yield f"first_call/{s.dims[0]}", True, {"d": s.dims[0]}

    def check(self, s: Setting, d: int, length: int = 0) -> dict[str, Any]:
        return {"rows": judged(s, Case("odd", m=s.odd, d=d, causal=True), "triton", s.half)}

    def measure(self, s: Setting, checked: dict[str, Any], d: int, length: int = 0) -> dict[str, Any]:
        if length:
            x = replace(s, tokens=length).sample(d, length, False)
            inputs = sum(t.untyped_storage().nbytes() for t in (*x.leaves, *x.cotangents))
            _, found = rounds.start(ours(), x, s.device)
            if any("refused" in found[direction] for direction in rounds.DIRECTIONS):
                raise RuntimeError(f"ours did not run: {found}")
            return {"input_bytes": inputs, "beyond": found}
        return first_call.measured(device=s.device, dtype=str(s.half).removeprefix("torch."), d=d)


class Timing:
    """fused_attn against every peer, forward and backward, by head dim, mask and length."""

    shares = seconds(check=70, measure=190)

    def cases(self, s: Setting) -> Iterator[Listed]:
        for length in s.lengths:
            for d in s.dims:
                for mask in ("causal", "full"):
                    args = {"d": d, "causal": mask == "causal", "length": length}
                    yield f"d{d}/{mask}/{length}", length == s.lengths[0] and d == s.dims[0], args

    def check(self, s: Setting, d: int, causal: bool, length: int) -> dict[str, Any]:
        """Compile in parallel, so that timing finds warm caches, and record which providers cannot run."""
        x = s.sample(d, length, causal)
        refused, took = {}, {}
        for provider in providers.COMPILED:
            began = time.perf_counter()
            _, found = rounds.start(provider, x, s.device)
            took[provider.name] = round(time.perf_counter() - began, 2)
            if "refused" in found["forward"]:
                refused[provider.name] = found["forward"]["refused"]
        return {"refused": refused, "first_run_seconds": took}

    def measure(self, s: Setting, checked: dict[str, Any], d: int, causal: bool, length: int) -> dict[str, Any]:
        x, refused = s.sample(d, length, causal), checked["refused"]
        right = {}
        for provider in providers.PROVIDERS:
            backend = providers.OURS.get(provider.name)
            if backend and not fused_attn.explain(*x.inputs.qkv, causal=causal, backend=backend).reasons:
                right[provider.name] = verify(provider, x)
        willing = [p for p in providers.PROVIDERS if p.name not in refused or p.name in right]
        found = compared(willing, x, s, rounds.DIRECTIONS, list(right))
        for name in refused.keys() - right.keys():
            found["providers"][name] = {direction: {"refused": refused[name]} for direction in rounds.DIRECTIONS}
        return found | {"rows": right, "shape": list(x.problem.q.shape)}


class Modifiers:
    """Throughput with each modifier, mask, normalizer and score relative to plain attention, interleaved.

    Only visible scores count as work, so skipping masked tiles does not raise the throughput.
    """

    shares = seconds(check=40, measure=40)

    def cases(self, s: Setting) -> Iterator[Listed]:
        for name in MODIFIED:
            yield f"{name}/{s.dims[0]}", name == "softcap", {"case": name}

    def check(self, s: Setting, case: str) -> dict[str, Any]:
        """Compile, and check one head of the timed tensors against the tolerance rule."""
        return {"rows": verify(ours(), s.named(case, s.dims[0], s.lengths[0]))}

    def measure(self, s: Setting, checked: dict[str, Any], case: str) -> dict[str, Any]:
        samples = [s.named(name, s.dims[0], s.lengths[0]) for name in (case, "plain")]
        return {
            direction: {"ms": own[0], "plain_ms": plain[0], "of_plain": own[1] / plain[1]}
            for direction, (own, plain) in throughputs(samples, s).items()
        }


# Special-function operations per multiprocessor and clock (NVIDIA, sm_80 to sm_100), and evaluations of each tanh in
# the forward and in the one-pass backward, which recomputes the scores and then needs their slopes.
SPECIAL = 16
EVALUATIONS = {"forward": 1, "backward": 2}


class AdditiveScores:
    """Additive scores against their eager form, and against the limit of the special-function units.

    The limit is one operation per tanh, or half of one by the paired identity, which shares a reciprocal.
    """

    shares = seconds(check=20, measure=30)

    def cases(self, s: Setting) -> Iterator[Listed]:
        for name, d in itertools.product(ADDITIVE, s.dims):
            yield f"{name}/{d}", d == s.dims[0], {"case": name, "d": d}

    def sample(self, s: Setting, case: str, d: int) -> Sample:
        batch, heads, length = s.additive
        return Sample.draw(sized(case, batch, heads, length, d), s.half, s.device, scores=0)

    def check(self, s: Setting, case: str, d: int) -> dict[str, Any]:
        return {"rows": verify(ours(), self.sample(s, case, d))}

    def measure(self, s: Setting, checked: dict[str, Any], case: str, d: int) -> dict[str, Any]:
        x, pair = self.sample(s, case, d), [ours(), providers.NAIVE]
        found = compared(pair, x, s, rounds.DIRECTIONS[:2], [pair[0].name])
        b, h, m, n = x.problem.shape
        for direction, times in EVALUATIONS.items():
            own, eager = (found["providers"][p.name][direction] for p in pair)
            own["over_eager"] = eager["ms"] / own["ms"] if "ms" in eager else None
            if s.device == "cuda":
                limit = special_function_ms(times * b * h * m * n * d, *clocked())
                own |= {"limit_ms": limit, "of_limit": limit / own["ms"]}
                own |= {"paired_limit_ms": limit / 2, "of_paired_limit": limit / 2 / own["ms"]}
        return found


def special_function_ms(operations: int, multiprocessors: int, megahertz: float) -> float:
    """The least time for a number of special-function operations."""
    return operations / (SPECIAL * multiprocessors * megahertz * 1e3)


def clocked() -> tuple[int, float]:
    """The number of multiprocessors, and their maximum clock in MHz."""
    query = ("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits")
    said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    return torch.cuda.get_device_properties(0).multi_processor_count, float(said.split()[0])


PARTS: dict[str, Any] = {
    "parity": Parity(), "statistics": Statistics(), "configs": Configs(), "races": Races(), "overlap": Overlap(),
    "costs": Costs(), "timing": Timing(), "modifiers": Modifiers(), "additive": AdditiveScores(),
    "ragged": RaggedBatches(), "decoding": Steps(),
    "tune": Tune(),
}  # fmt: skip
