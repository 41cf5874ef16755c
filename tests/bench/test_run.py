"""bench.run at tiny sizes on the CPU: timings, tables, and the detection of wrong results."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_attn
from bench import ragged, report, run
from bench.harness import peers, providers, revisions, rounds, table
from bench.harness.clock import DIRECTIONS, directed, gradients
from bench.harness.packed import PEERS, Padded, ragged_case
from bench.harness.providers import Provider
from bench.harness.samples import ADDITIVE, GRID, MODIFIED, SCORES, WORK, Sample, heavy_tail, sized
from fused_attn import testing

CPU = ("--tiny", "--device", "cpu")


def rehearse(folder: Path, *arguments: str) -> tuple[int, list[table.Row]]:
    """(exit code, the table) of the command."""
    path = folder / "table.csv"
    code = run.main([*CPU, "--out", str(path), *arguments])
    return code, table.read(path)


def about(rows: list[table.Row], **wanted: Any) -> list[table.Row]:
    return [x for x in rows if all(x.get(name) == value for name, value in wanted.items())]


def sample(name: str, scores: int = SCORES["cpu"], batch: int = 2) -> Sample:
    return Sample.draw(sized(name, batch, 4, 40, 16), torch.float32, "cpu", scores)


def results(x: Sample) -> tuple[Any, list[torch.Tensor]]:
    found = fused_attn.attention(*x.inputs.qkv, **x.inputs.kwargs)
    return found, list(gradients(found, x.leaves, x.cotangents, retain=False))


# ---------------------------------------------------------------------------------------------------------- the table


def test_a_row_for_every_case_provider_and_direction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("fused_attn", "tiled", "torch", "naive", "efficient", "hopper", "sage", "cudnn_frontend", "xformers")
    only = ("--only", "causal,alibi_h,dropout", "--directions", ",".join(DIRECTIONS))
    code, rows = rehearse(tmp_path, *only, "--providers", ",".join(asked))
    assert code == 0
    cases = {(x["case"], x["length"]) for x in rows if "batch" in x}
    assert cases == {("causal", 32), ("causal", 48), ("alibi_h", 48), ("dropout", 48)}
    for case, length in cases:
        found = about(rows, case=case, length=length)
        assert {x["provider"] for x in found} == set(asked)
        times = {(x["provider"], x["direction"]) for x in about(found, metric="ms")}
        timed = {"fused_attn", "tiled", "naive", *(["torch"] if case != "alibi_h" else [])}
        assert times == {(name, direction) for name in timed for direction in DIRECTIONS}
        refused = {x["provider"]: x["reason"] for x in about(found, status="unavailable")}
        assert refused.keys() == set(asked) - timed
        for name in peers.WHEELS:
            (reason,) = (r for r in refused.values() if r.startswith(f"{name}: "))
            assert "needs a GPU" in reason

    for x in about(rows, metric="ms"):
        (other,) = about(rows, metric="tflops", **{k: x[k] for k in ("case", "provider", "direction", "length")})
        flops = 4 * x["batch"] * x["heads"] * x["length"] ** 2 * x["dim"] * (0.5 if x["case"] == "causal" else 1.0)
        assert other["value"] * x["value"] == pytest.approx(1e-9 * flops * WORK[x["direction"]], rel=1e-4)
        assert 0 < x["low"] <= x["value"] <= x["high"] and x["samples"] == 2
        judged = x["case"] != "dropout" or x["provider"] in ("fused_attn", "tiled")
        assert 0 < x["share"] <= 1 if judged else "dropout mask" in x["reason"]
    assert {x["config"] for x in about(rows, provider="fused_attn", case="alibi_h", metric="ms")} == {"tiled"}
    assert about(rows, provider="fused_attn", against="torch", case="causal", metric="speedup")
    assert about(rows, provider="torch", against="naive", metric="speedup")
    assert not about(rows, provider="naive", metric="speedup")
    assert about(rows, case="matmul", metric="tflops") and about(rows, case="copy", metric="gbytes_per_second")
    for x in rows:
        assert {"device", "torch", "commit", "modified", "time"} <= x.keys()
    assert "unavailable: xformers" in capsys.readouterr().out


@pytest.mark.skipif(bool(testing.why_not("plain", "triton")), reason="the Triton kernels do not run here")
def test_kernels_name_their_tiles(tmp_path: Path) -> None:
    code, rows = rehearse(tmp_path, "--only", "sink", "--providers", "triton", "--rounds", "1", "--lengths", "17")
    assert code == 0
    (x,) = about(rows, metric="ms", direction="forward")
    assert re.fullmatch(r"forward \d+x\d+w\ds\d\w*, dkdv \S+, dq \S+", x["config"])
    assert [x.split()[0] for x in providers.tiles("hopper", sample("plain").problem)] == list(
        providers.KERNELS["hopper"]
    )


def test_time_limit(tmp_path: Path) -> None:
    code, rows = rehearse(tmp_path, "--only", "causal,sink", "--providers", "naive", "--seconds", "1e-9")
    assert code == 1, "a run that shows nothing does not pass"
    assert {(x["case"], x["status"]) for x in rows if x["case"] != "copy"} == {
        ("causal", "not reached"), ("sink", "not reached"),
    }  # fmt: skip


def test_nothing_requested(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*CPU, "--only", "casual"]) == 2
    assert "causal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "out", "path"),
    (
        ("", None, table.RESULTS / "cpu.csv"),
        ("--base HEAD", None, table.RESULTS / "cpu-base.csv"),
        ("--only causal", None, None),
        ("--lengths 64", None, None),
        ("--device cpu", None, table.RESULTS / "cpu.csv"),
        ("--threads 1", None, None),
        ("--seconds 9", None, None),
        ("--tiny", "there", None),
        ("--only causal", "there", Path("there/cpu.csv")),
        ("--only causal --out some.csv", None, Path("some.csv")),
    ),
)
def test_a_partial_run_does_not_replace_the_table(
    arguments: str, out: str | None, path: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    if out:
        monkeypatch.setenv("OUT", out)
    assert run.destination(run.arguments(arguments.split()), "cpu") == path


# ------------------------------------------------------------------------------------------------------- what is wrong


def broken(name: str, change: Any, **fields: Any) -> Provider:
    """The naive provider with something done to its output."""

    def bind(x: Sample) -> Any:
        call = providers.NAIVE.bind(x)
        return lambda: change(call())

    return Provider(name, bind, **fields)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 1.001 * grad


def crash(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the kernel fell over")


@pytest.mark.parametrize(
    ("wrong", "said"),
    (
        (broken("wrong", lambda out: out * 1.001), "out:"),
        (broken("wrong", WrongBackward.apply), "dv:"),
        (broken("wrong", crash, words={}), "fell over"),
    ),
    ids=("output", "gradient", "ours crashes"),
)
def test_wrong_results_are_not_timed(
    wrong: Provider, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ALL", (wrong, providers.NAIVE))
    code, rows = rehearse(tmp_path, "--only", "causal", "--lengths", "32")
    assert code == 1
    (refused,) = about(rows, provider="wrong")
    assert refused["status"] == "refused" and said in refused["reason"] and "metric" not in refused
    assert about(rows, provider="naive", metric="ms")


@pytest.mark.parametrize("alive", (True, False))
def test_interrupted_case(alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs itself, and on a device that is lost with it, those after it."""
    broken_off = iter((True, False))
    interleave = rounds.interleave

    def fault(*arguments: Any) -> Any:
        if next(broken_off):
            raise RuntimeError("an illegal memory access")
        return interleave(*arguments)

    monkeypatch.setattr(rounds, "interleave", fault)
    monkeypatch.setattr(run, "answers", lambda device: alive and torch.ones(1, device=device).item() == 1)
    code, rows = rehearse(tmp_path, "--only", "causal", "--providers", "naive")
    assert code == 1
    (refused,) = about(rows, status="refused")
    assert "an illegal memory access" in refused["reason"] and refused["length"] == 32
    assert bool(about(rows, metric="ms", length=48)) == alive
    assert bool(about(rows, status="not reached", length=48)) != alive


def test_inexact_peers_are_timed_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = broken("coarse", lambda out: out * 1.01, inexact=True)
    monkeypatch.setattr(run, "ALL", (coarse, broken("absent", crash)))
    code, rows = rehearse(tmp_path, "--only", "causal", "--lengths", "32")
    assert code == 0
    (x,) = about(rows, provider="coarse", metric="ms", direction="forward")
    assert 1e-3 < x["error"] < 1 and "inexact" in x["reason"] and "share" not in x
    (absent,) = about(rows, provider="absent")
    assert absent["status"] == "unavailable", "a peer that falls over is no fault of ours"


@pytest.mark.parametrize("scores", (SCORES["cpu"], 0), ids=("whole", "one head"))
@pytest.mark.parametrize("name", (*GRID, *MODIFIED, *ADDITIVE))
def test_every_case_is_judged(name: str, scores: int) -> None:
    """Right results pass, and a wrong entry of each is seen: anywhere, or in the head that is judged."""
    random.seed(7)  # one draw of ten lets nobody see any of so few blocks
    x = sample(name, scores)
    out, grads = results(x)
    used = x.judge(out, grads)
    wanted = {"out", "dq", "dk", "dv", *(f"d{n}" for n in x.inputs.leaves)} | ({"lse"} if name == "lse" else set())
    missing = {"bias_1hmn": {"dbias"}, "bias_11mn": {"dbias"}, "alibi_h": {"dslopes"}, "scale_heads": {"dscale"}}
    missing |= {x: {"dparameter"} for x in ("bilinear", "cosine", "distance", *ADDITIVE)}
    assert used.keys() == wanted - (missing.get(name, {"dsink"}) if scores == 0 else set())
    for n, leaf in enumerate(x.inputs.leaves):
        if f"d{leaf}" not in used:
            continue
        changed = list(grads)
        changed[n] = grads[n].clone()
        part = x.excerpt.take(leaf, changed[n])
        part[(0,) * part.ndim] += 0.05 * changed[n].abs().max()
        with pytest.raises(AssertionError, match=f"d{leaf}"):
            x.judge(out, changed)


def test_parameters_of_one_batch_are_judged_by_one_head() -> None:
    of = {"sink": "dsink", "bias_1hmn": "dbias", "alibi_h": "dslopes", "bilinear": "dparameter", "cosine": "dparameter"}
    for name, gradient in of.items():
        x = sample(name, scores=0, batch=1)
        assert gradient in x.judge(*results(x))


@pytest.mark.parametrize(
    "name", ("plain", "causal", "window_causal", "segments_causal", "gqa_8", "runs", "blocks", "window_sinks")
)
def test_flops_count_visible_scores(name: str) -> None:
    x = sample(name)
    b, h, m, n = x.problem.shape
    seen = x.problem.visible(torch.arange(m), torch.arange(n)).expand(b, h, m, n).sum().item()
    seen = seen - b * h * m / 2 if name == "causal" else seen  # the convention takes half of the diagonal
    assert x.flops("forward") == pytest.approx(4 * seen * 16)
    assert x.flops("backward") == pytest.approx(2.5 * x.flops("forward"))


@pytest.mark.parametrize("name", ("bias_1hmn", "mask_11mn", "alibi_h"))
def test_samples_are_contiguous(name: str) -> None:
    """The named cases live among gaps of NaN; at a benchmark's size they do not, in any part."""
    x, again = sample(name), sample(name)
    parts = [*x.leaves, *x.cotangents, *(t for t in (x.problem.mask,) if t is not None)]
    assert all(t.is_contiguous() for t in parts) and not x.inputs.buffers
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in parts)
    assert not torch.equal(x.problem.q, again.problem.q), "fresh numbers each time"


def test_bytes_are_those_of_operands_and_results() -> None:
    x = sample("bias_11mn")
    size, bias = 4 * 2 * 4 * 40 * 16, 4 * 40 * 40
    assert x.bytes("forward") == 4 * size + bias
    assert x.bytes("backward") == 8 * size + 2 * bias
    assert x.bytes("forward+backward") == 12 * size + 3 * bias


def test_flex_adapter_passes_every_modifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapter, uncompiled: right where it accepts a case, and clear where it does not."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    (flex,) = (x for x in providers.PROVIDERS if x.name == "flex")
    refused = set()
    for name in (*GRID, *MODIFIED, *ADDITIVE, "segments"):
        x = sample(name)
        started = rounds.run_once(flex, x, "cpu")
        assert "no backward on the CPU" in started.found["backward"]["refused"] or started.call is None
        if started.call is None:
            assert "FlexAttention has no" in started.found["forward"]["refused"]
            refused.add(name)
        else:
            x.judge(started.result, [])
    assert refused == {"sink", "lse", "dropout", "softmax1", "sigmoid", "bilinear", "cosine", "distance", "additive"}


# ------------------------------------------------------------------------------------------------------ ragged batches


def packed_sample(scores: int = SCORES["cpu"], causal: bool = False) -> Sample:
    return Sample.draw(ragged_case([9, 1, 40, 17], 4, 16, causal), torch.float32, "cpu", scores)


def packed_results(x: Sample) -> tuple[Any, list[torch.Tensor]]:
    out = providers.ours("tiled").bind(x)()
    return out, list(gradients(out, x.leaves, x.cotangents, retain=False))


@pytest.mark.parametrize("batch", (8, 32))
def test_lengths_have_a_heavy_tail(batch: int) -> None:
    lengths = heavy_tail(batch, 512, 0.3)
    assert len(lengths) == batch and all(1 <= n <= 512 for n in lengths)
    assert sum(lengths) == pytest.approx(0.3 * 512 * batch, rel=0.01)
    assert max(lengths) > 2.5 * sorted(lengths)[batch // 2], "the longest is far from the median"
    assert lengths == heavy_tail(batch, 512, 0.3) != heavy_tail(batch, 512, 0.3, seed=1)


@pytest.mark.parametrize("scores", (SCORES["cpu"], 0), ids=("whole", "one head"))
def test_packed_sequences_are_judged(scores: int) -> None:
    x = packed_sample(scores)
    q, _, _, starts, _ = x.inputs.qkv
    assert q.is_contiguous() and q.shape == (67, 4, 16) and starts.tolist() == [0, 9, 10, 50, 67]
    out, grads = packed_results(x)
    assert x.judge(out, grads).keys() == {"out", "dq", "dk", "dv"}
    for n, name in enumerate(("out", "dq", "dk", "dv")):
        changed = [y.detach().clone() for y in (out, *grads)]
        changed[n][0, -1, -1, 0] += 0.05
        with pytest.raises(AssertionError, match=f"{name}:"):
            x.judge(changed[0], changed[1:])


@pytest.mark.parametrize("causal", (False, True))
def test_flops_of_packed_sequences(causal: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = packed_sample(causal=causal)
    with FlopCounterMode(display=False) as counter:
        packed_results(x)
    pairs = sum(n * n for n in (9, 1, 40, 17))
    counted = counter.get_total_flops()  # as if nothing were masked
    assert counted == (2 + 5) * 2 * 4 * pairs * 16
    assert x.flops("forward+backward") == counted / (2 if causal else 1)


def test_masked_padding_has_no_effect() -> None:
    """What stands beside ours is the same problem."""
    x = packed_sample()
    padded = Padded(x)
    assert padded.leaves[0].shape == (4, 4, 40, 16)
    found = {}
    for masked in (True, False):
        out = padded.call(masked)()
        grads = gradients(out, padded.leaves, padded.cotangents, retain=False)
        found[masked] = [padded.packed(y) for y in (out, *grads)]
    x.judge(found[True][0], found[True][1:])
    with pytest.raises(AssertionError, match="out:"):
        x.judge(found[False][0], found[False][1:])


def test_unsupported_peers_of_packed_sequences() -> None:
    said = {p.name: rounds.run_once(p, packed_sample(), "cpu").found["forward"]["refused"] for p in PEERS}
    assert "not installed" in said["flash_attn"] and all("GPU" in said[x] for x in ("varlen", "nested"))


def test_ragged_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the table, what the documents say of it, and the picture."""
    path, before = tmp_path / "ragged.csv", torch.get_num_threads()
    assert ragged.main(["--tiny", "--threads", "1", "--out", str(path)]) == 0 and torch.get_num_threads() == before
    rows = table.read(path)
    times = {(x["provider"], x["direction"]) for x in about(rows, case="ragged", metric="ms")}
    assert times == set(itertools.product(("fused_attn", "tiled", "padded", "unmasked"), ragged.DIRECTIONS))
    for x in about(rows, case="ragged", metric="ms"):
        assert 0 < x["share"] <= 1 if x["provider"] != "unmasked" else "not judged" in x["reason"]
    assert {x["against"] for x in about(rows, provider="tiled", metric="speedup")} == {"padded", "unmasked"}
    steps = {(x["case"], x["length"], x["options"]) for x in rows if x["case"] != "ragged"}
    assert {("decode", 256, "room=256"), ("decode_paged", 8, "room=512 page=4")} <= steps and len(steps) == 10
    assert all({"device", "torch", "commit", "threads", "load"} <= x.keys() for x in rows)

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (line,) = (x for x in report.ragged().splitlines() if x.startswith("| `tiled`, forward |"))
    speed = {x["against"]: x for x in about(rows, provider="tiled", metric="speedup", direction="forward")}
    assert [f"{speed[name]['value']:.2f} (" in line for name in ("padded", "unmasked")] == [True, True]
    said = report.decoding().splitlines()
    assert "| keys | 8 | 40 | 256 |" in said and "| capacity | 256 | 512 | 768 |" in said
    assert any(x.startswith("| pages of 4, ms, 8 keys |") for x in said)
    (line,) = (x for x in said if x.startswith("| dense, ms, capacity 256 |"))
    (shown,) = about(rows, case="decode", length=40, metric="ms")
    assert f" {shown['value']:.2f} " in line
    pytest.importorskip("seaborn")
    from bench import plot

    assert plot.main([str(path)]) == 0
    assert [x.name for x in tmp_path.glob("*.png")] == ["ragged_decoding.png"]


# ---------------------------------------------------------------------------------------------------------- revisions


def test_differences_within_the_noise() -> None:
    steady = [1.0, 1.01, 0.99, 1.0, 1.01, 0.99]

    def verdict(again: float, base: float) -> str:
        rows = revisions.compared(steady, [x * again for x in steady[::-1]], [x * base for x in steady])
        (found,) = (x["reason"] for x in rows if x["metric"] == "speedup")
        return found.partition(":")[0]

    assert [verdict(1.0, x) for x in (1.01, 1.3, 0.7)] == ["noise", "faster", "slower"]
    assert [verdict(1.4, x) for x in (1.3, 0.8)] == ["noise", "noise"]
    assert revisions.compared([1.0, 1.0], [1.0, 1.0], [0.5, 1.6])[-1]["reason"].startswith("noise")


needs_git = pytest.mark.skipif(not table.said("git", "rev-parse", "HEAD"), reason="git knows no commit of this tree")


@needs_git
def test_another_revision(tmp_path: Path) -> None:
    asked = ("--only", "sink,segments_causal", "--providers", "fused_attn", "--directions", "forward+backward")
    code, rows = rehearse(tmp_path, "--base", "HEAD", *asked)
    assert code == 0
    (x,) = about(rows, case="sink", metric="speedup")
    assert table.said("git", "rev-parse", "HEAD").startswith(x["against"]) and len(x["against"]) >= 10
    assert re.match(r"(noise|faster|slower): the same version differs by up to", x["reason"])
    assert len(about(rows, case="sink", metric="a/a")) == len(about(rows, case="sink", metric="ms")) == 1
    assert "does not leave its process" in about(rows, case="segments_causal")[0]["reason"]


@needs_git
def test_no_such_revision(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--base no-such-revision"):
        rehearse(tmp_path, "--base", "no-such-revision", "--only", "sink")


def test_revisions_are_checked_before_timing(tmp_path: Path) -> None:
    """A revision that is wrong, and one that does not know the call, are not timed."""
    tree = tmp_path / "tree"
    (tree / "fused_attn").mkdir(parents=True)
    (tree / "fused_attn" / "__init__.py").write_text(
        "def attention(q, k, v, backend=None, **options):\n"
        "    if backend: raise ValueError('no such backend')\n"
        "    return q + k + v\n"
    )
    side = revisions.Side("old", tree, tmp_path)
    x = sample("plain")
    kept = {"qkv": x.inputs.qkv, "kwargs": x.inputs.kwargs, "leaves": x.leaves, "cotangents": x.cotangents}
    torch.save(kept, tmp_path / "problem")
    assert (side.load(x, {}) or "").startswith("wrong: plain: out")
    assert "no such backend" in (side.load(x, {"backend": "hopper"}) or "")
    side.end()
    assert side.process.returncode == 0


# ----------------------------------------------------------------------------------------------------------- pictures


def test_pictures_of_a_table(tmp_path: Path) -> None:
    """Every picture that the figures allow, at a CPU's scale and at a GPU's, and none that they do not."""
    pytest.importorskip("seaborn")
    from bench import plot

    x, directions = sample("causal"), ("forward", "forward+backward")
    rows: list[table.Row] = [
        {"case": "copy", "provider": "torch", "metric": "gbytes_per_second", "value": 10.0},
        {"case": "matmul", "provider": "torch", "metric": "tflops", "value": 0.1},
    ]
    for case, provider, direction in itertools.product(
        ("plain", "causal", "sink", "bias_1hmn"), ("fused_attn", "naive"), directions
    ):
        found = [*run.figures(x, direction, {"samples_ms": [1.0, 1.1, 1.2], "peak_bytes": 2**20})]
        if provider != "naive":
            found.append(table.figure("speedup", [2.0, 3.0, 4.0], against="naive"))
        what = run.described(dataclasses.replace(x.case, name=case), "float32")
        rows += [what | {"provider": provider, "direction": direction} | row for row in found]
    where = table.environment() | {"status": "timed"}
    path = tmp_path / "cpu.csv"
    table.write(path, [where | row for row in rows])
    assert plot.main([str(path)]) == 0
    for picture in ("throughput", "speed", "memory", "roofline"):
        assert (tmp_path / f"cpu_{picture}.png").stat().st_size > 10_000
    assert plot.unit(0.05)[1] == "GFLOP/s" and plot.unit(500.0)[1] == "TFLOP/s"
    some = [row for row in table.read(path) if row["metric"] == "peak_bytes"]
    assert [name for name, draw in plot.PICTURES.items() if draw(plot.framed(some))] == ["memory"]


def test_report_of_additive_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing until there are figures; then speed, and the share of the eager form's memory."""
    code, rows = rehearse(tmp_path, "--only", "additive", "--providers", "fused_attn,naive,torch", "--rounds", "1")
    assert code == 0 and "no score but the dot product" in about(rows, provider="torch", case="additive")[0]["reason"]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table.write(tmp_path / "cpu.csv", about(rows, provider="naive"))
    assert report.additive() == "Not measured yet."
    held = {"tiled": 2**20, "naive": 2**24}
    rows += [
        rows[-1] | run.described(sample("additive").case, "float32") | {"provider": name, "direction": "forward"}
        | {"metric": "peak_bytes", "value": value} for name, value in held.items()
    ]  # fmt: skip
    table.write(tmp_path / "cpu.csv", rows)
    forward = next(line for line in report.additive().splitlines() if line.startswith("| forward |"))
    assert forward.endswith("| 1.0 | 16 | 6.2% |")


def test_a_call_of_each_direction() -> None:
    x = sample("plain")

    def call() -> torch.Tensor:
        return fused_attn.attention(*x.inputs.qkv)

    assert not directed("forward", call, x.leaves, x.cotangents)().requires_grad
    first, second = (directed(d, call, x.leaves, x.cotangents) for d in ("backward", "forward+backward"))
    for a, b in zip(first(), second(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(first(), first(), strict=True)), "the graph is kept"
