"""bench.gpu in the interpreter: it lists every case, detects a wrong kernel and survives crashes.

Worker processes import this file for `obey`, so what is heavy is imported where it is used.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.harness import workers
from tests import ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Workers import the main script again, so what it changes holds in them too.
SCRIPT = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
from tests import interpreter
interpreter.install()
from bench import gpu
from fused_attn.backends.triton import portable
{change}
if __name__ == "__main__":
    sys.exit(gpu.main())
"""
WRONG_BACKWARD = """
backward = portable.backward
def wrong(*args):
    grads = backward(*args)
    grads["k"][..., -1, 0] += 0.01
    return grads
portable.backward = wrong
"""


def rehearse(folder: Path, *arguments: str, change: str | None = "") -> tuple[int, dict[str, Any], str]:
    """(exit code, the record, what was printed) of a run at tiny sizes on the CPU. No change: the command as it is."""
    script = folder / "rehearsal.py"
    script.write_text(SCRIPT.format(change=change))
    module = ["-m", "bench.gpu"] if change is None else [str(script)]
    command = [sys.executable, *module, *arguments, "--tiny", "--device", "cpu", "--workers", "1"]
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OUT": str(folder / "out")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=300)
    (path,) = (folder / "out").iterdir()
    return done.returncode, json.loads(path.read_text()), done.stdout + done.stderr


def statuses(record: dict[str, Any]) -> set[str]:
    return {x["status"] for x in record["cases"]}


def by_name(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{x['part']}/{x['name']}": x for x in record["cases"]}


# At least one case of each part; all that are core would take minutes in the interpreter.
ASKED = (
    "parity/scale_heads/float32", "parity/everything/float32", "parity/large_causal_16/float32",
    "statistics/scale_heads/float32", "statistics/everything/float32", "statistics/large_causal_16/float32",
    "configs/chosen/single/16", "configs/forward/16/64x32w1s1", "races/full_64/float32",
    "overlap/forward/16/64x32w1s1", "costs/first_call/16", "timing/d16/causal/48", "modifiers/softcap/16",
    "additive/additive/16", "ragged/heavy/d16/causal", "decoding/d16/page_16",
    "parity/ragged_self/float32", "parity/large_ragged_16/float32", "races/ragged_128/float32",
    "tune/forward/16/64x32w1s1",
)  # fmt: skip


def every_case() -> dict[str, bool]:
    """Every case of every part at tiny sizes, and whether it is core."""
    from bench.evidence.parts import PARTS
    from bench.evidence.setting import TINY

    setting = replace(TINY, device="cpu", arch="interpreter")
    return {f"{part}/{name}": core for part, noun in PARTS.items() for name, core, _ in noun.cases(setting)}


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "asked",
    (
        pytest.param(tuple(x for x in ASKED if "/large_" not in x and x != "races/ragged_128/float32"), id="small"),
        pytest.param(ASKED, id="all", marks=pytest.mark.nightly),
    ),
)
def test_rehearsal_runs_to_its_end_and_lists_every_case(asked: tuple[str, ...], tmp_path: Path) -> None:
    from bench.harness.samples import heavy_tail

    parts = tuple(dict.fromkeys(name.split("/")[0] for name in asked))
    only = ",".join({name.split("/", 1)[1]: None for name in asked})
    code, record, said = rehearse(tmp_path, *parts, "--only", only, "--seconds", "3000")
    assert code == 0, said
    expected = every_case()
    found = by_name(record)
    assert found.keys() == expected.keys() and len(record["cases"]) == len(expected)
    assert {name for name, x in found.items() if x["status"] == "passed"} == set(asked)
    assert statuses(record) == {"passed", "not asked"}

    assert {"torch", "triton", "python", "cuda", "commit", "source_sha256"} <= record["environment"].keys()
    assert record["machine"]["arch"] == "interpreter"
    everything = found["parity/everything/float32"]["rows"]
    assert {"out", "lse", "dq", "dk", "dv", "dbias", "dsink", "dslopes"} <= everything.keys()
    assert all(0 <= row["share"] <= 1 for row in everything.values())

    timing = found["timing/d16/causal/48"]
    assert set(timing["rows"]["triton"]) == {"out", "dq", "dk", "dv"}
    for name in ("triton", "flash", "math", "naive"):
        for direction in ("forward", "backward"):
            entry = timing["providers"][name][direction]
            assert len(entry["samples_ms"]) == record["setting"]["rounds"] and entry["of_matmul"] > 0
    forward = timing["providers"]["naive"]["forward"]
    flops = 4 * 1 * 2 * 48 * 48 * 16 / 2  # causal, B1 H2
    assert forward["tflops"] == pytest.approx(flops / forward["ms"] * 1e-9)
    backward = timing["providers"]["naive"]["backward"]
    assert backward["tflops"] == pytest.approx(2.5 * flops / backward["ms"] * 1e-9)
    assert "viable backend" in timing["providers"]["cudnn"]["forward"]["refused"]
    assert "compute capability 9.0" in timing["providers"]["hopper"]["forward"]["refused"]
    assert all(found[name]["speedup"] > 0 for name in ASKED if name.startswith(("overlap", "tune")))
    for direction in ("forward", "backward"):
        assert found["modifiers/softcap/16"][direction]["of_plain"] > 0
        assert found["additive/additive/16"]["providers"]["triton"][direction]["over_eager"] > 0
    assert "of_limit" not in found["additive/additive/16"]["providers"]["triton"]["forward"], "a CPU has no such units"
    assert "times as fast as eager" in said and "of the plain product's throughput" in said and "TB/s" in said
    step = found["decoding/d16/page_16"]
    assert set(step["rows"]) == {"{'num_splits': 1}", "{}", "{'batch_invariant': True}"}
    assert step["full"]["bytes"] == 2 * step["alone"]["bytes"] == 2 * 2 * 48 * 16 * 4
    assert step["full"]["call"]["terabytes_per_second"] > 0 and step["splits"]["4"]["call"]["ms"] > 0
    packed = found["ragged/heavy/d16/causal"]
    assert {"out", "dq", "dk", "dv", "dense out"} <= packed["rows"].keys()
    lengths = heavy_tail(3, 48, 0.3)
    flops = 4 * 2 * sum(n * n for n in lengths) * 16 / 2  # causal, two heads
    for direction, times in (("forward", 1), ("backward", 2.5)):
        assert packed[direction]["of_dense"] > 0
        timed = packed["providers"]["triton"][direction]
        assert timed["tflops"] == pytest.approx(times * flops / timed["ms"] * 1e-9)
        assert "GPU" in packed["providers"]["varlen"][direction]["refused"]
        assert "flash-attn is not installed" in packed["providers"]["flash_attn"][direction]["refused"]
    assert "of the dense kernel's throughput" in said and "alone, 4 parts" in said
    first = found["costs/first_call/16"]["cold"]
    assert 0 < first["forward"]["clock"] < first["forward+backward"]["clock"]


@pytest.mark.slow
@needs_triton
def test_a_wrong_kernel_fails_and_is_not_timed(tmp_path: Path) -> None:
    only = "one_query/float32,d16/full/48"
    code, record, said = rehearse(tmp_path, "parity", "timing", "--only", only, change=WRONG_BACKWARD)
    assert code == 1
    found = by_name(record)
    assert found["parity/one_query/float32"]["status"] == "failed"
    assert "dk" in found["parity/one_query/float32"]["error"]
    timing = found["timing/d16/full/48"]
    assert timing["status"] == "failed" and "dk" in timing["error"] and "providers" not in timing
    assert "FAILED timing/d16/full/48" in said


@needs_triton
def test_time_limit(tmp_path: Path) -> None:
    code, record, _ = rehearse(tmp_path, "--only", "core", "--seconds", "0.01", change=None)
    expected, found = every_case(), by_name(record)
    assert found.keys() == expected.keys()
    core = {name for name, is_core in expected.items() if is_core and not name.startswith("tune/")}
    assert {name for name, x in found.items() if x["status"] == "not reached"} == core
    assert {name.split("/")[0] for name in core} == {name.split("/")[0] for name in expected} - {"tune"}
    assert statuses(record) == {"not reached", "not asked"}
    assert code == 1, "a run that shows nothing does not pass"


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--device", "cpu"], "needs --tiny"),
        (["speed"], "PART: expected any of parity, "),
        (["--tiny", "--write-tables"], "--write-tables: not with --tiny"),
    ),
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import gpu

    with pytest.raises(SystemExit, match="2"):
        gpu.arguments(arguments)
    assert message in capsys.readouterr().err


def test_missing_gpu_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the plain command does on a machine that cannot obey it."""
    import torch

    from bench import gpu

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for name in ("TRITON_INTERPRET", "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # restored afterwards
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no cuda device to use" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_limit_of_special_functions() -> None:
    """An H200 of 132 multiprocessors at 1980 MHz does 4.18e12 a second."""
    from bench.evidence.parts import special_function_ms

    assert special_function_ms(132 * 16 * 1980 * 10**6, 132, 1980.0) == pytest.approx(1000.0)


def swept(kernel: str, d: int, speedup: float, block: int, status: str = "passed") -> dict[str, Any]:
    """An entry of a sweep, as far as the tables read it."""
    chosen = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "overlap": False}
    args = {"kernel": kernel, "d": d, "config": chosen | {"BLOCK_M": block}}
    return {"part": "tune", "status": status, "args": args, "chosen": chosen, "speedup": speedup}


def test_tables_take_what_was_faster_and_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import gpu, tune

    monkeypatch.setattr(tune, "TABLES", tmp_path / "tables")
    tune.TABLES.mkdir()
    old = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1, "overlap": False, "validated": False}
    tune.save("sm_90", {"forward/half/64": old, "dq/half/16": old})
    cases = [
        swept("forward", 64, 1.3, 128), swept("forward", 64, 1.1, 32), swept("forward", 64, 9.0, 256, "failed"),
        swept("dq", 64, 1.001, 128),
    ]  # fmt: skip
    setting = {"arch": "sm_90", "dtypes": ("bfloat16",)}
    gpu.write_tables({"setting": setting, "cases": cases}, tmp_path / "gpu-result.json")
    rows = json.loads((tmp_path / "sm_90.json").read_text())["rows"]
    assert rows == tune.load("sm_90")["rows"] and rows["dq/half/16"] == old
    assert {name: row["BLOCK_M"] for name, row in rows.items() if row["validated"]} == {
        "forward/half/64": 128,  # the fastest that passed
        "dq/half/64": 64,  # nothing beat the chosen one by more than noise
    }
    assert rows["forward/half/64"]["result"] == "gpu-result.json"


@pytest.mark.parametrize(
    ("parity", "races", "taken"),
    [
        ("passed", "passed", True),
        ("failed", "passed", False),
        ("passed", "not reached", False),
        ("passed", None, False),
    ],
)
def test_hopper_rows_need_complete_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parity: str, races: str | None, taken: bool
) -> None:
    from bench import gpu, tune

    monkeypatch.setattr(tune, "TABLES", tmp_path / "tables")
    tune.TABLES.mkdir()
    names = (
        "hopper_forward/half/64",
        "hopper_forward/half/64/with_modifiers",
        "hopper_forward/half/128/with_modifiers",
    )
    tune.save("sm_90", {name: {"BLOCK_M": 64, "validated": False} for name in names})
    cases = [
        swept("hopper_forward", 64, 1.1, 64),
        {"part": "parity", "name": "hopper/plain/bfloat16", "status": "passed"},
        {"part": "parity", "name": "hopper/softcap/bfloat16", "status": parity},
        {"part": "parity", "name": "hopper/dropout/bfloat16", "status": "refused"},
        {"part": "parity", "name": "plain/bfloat16", "status": "failed"},
    ]
    cases += [{"part": "races", "name": "hopper/full_64/bfloat16", "status": races}] if races else []
    setting = {"arch": "sm_90", "dtypes": ("bfloat16",)}
    said = gpu.write_tables({"setting": setting, "cases": cases}, tmp_path / "gpu-result.json")
    rows = tune.load("sm_90")["rows"]
    assert [rows[name].get("validated") for name in names] == [taken, taken, False]
    assert taken or "no row of the Hopper kernels" in said[0]


# ---------------------------------------------------------------------------------- the Hopper kernels, in the emulator


@needs_triton
def test_hopper_evidence_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU machine will be asked of the Gluon kernels runs to its end."""
    from bench.evidence.parts import PARTS
    from bench.evidence.setting import TINY
    from fused_attn import tuning
    from tests.emulator import emulated
    from tests.kernels.test_hopper import pretend

    pretend(monkeypatch)
    tiles = {
        "hopper_forward": tuning.Config(16, 16, 4, 2, consumers=2, pingpong=True),
        "hopper_backward": tuning.Config(16, 16, 4, 2, consumers=2),
    }
    s = replace(TINY, device="cpu", arch="sm_90", dims=(16,), dtypes=("bfloat16",), odd=40, repeats=2)
    with emulated(0) as emulation, tuning.override(**tiles):
        found = PARTS["parity"].check(s, "large_causal_16", "bfloat16", backend="hopper")
        assert set(found["rows"]) == {"out", "lse", "dq", "dk", "dv"}
        found = PARTS["races"].check(s, "causal_128", backend="hopper")
        assert found["compared"] == ["out", "lse", "k", "v"], "dq is a sum in any order"
        found = PARTS["configs"].check(s, 16, kernel="hopper_backward", config=tiles["hopper_backward"].to_row())
        assert "dq" in found["rows"]
    kernels = [machine.kernel for machine in emulation.machines]
    forward, backward = (f"hopper_{x}.hopper_{x}_kernel" for x in ("forward", "backward"))
    assert kernels.count(forward) == kernels.count(backward) == 4
    listed = {name for noun in PARTS.values() for name, _, _ in noun.cases(replace(s, dims=(64, 128)))}
    assert {"hopper/causal/bfloat16", "hopper/full_64/bfloat16"} <= listed
    assert any(name.startswith("hopper_forward/128/") for name in listed)
    assert any(name.startswith("hopper_backward/64/") and "ordered" in name for name in listed)


# ------------------------------------------------------------------------------------------------ processes that fail


def obey(request: dict[str, Any]) -> dict[str, Any]:
    """A handler for the tests below; it runs in a worker."""
    if request["do"] == "crash":
        os._exit(3)
    if request["do"] == "hang":
        time.sleep(60)
    return {"status": "passed", "process": os.getpid(), "context_lost": request["do"] == "lose"}


def run(pool: workers.Pool, *orders: str, width: int = 1, seconds: float = 60) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = [{} for _ in orders]
    for index, answer in pool.run([{"do": x} for x in orders], width, time.monotonic() + seconds):
        answers[index] = answer
    return answers


def test_a_crash_costs_one_case() -> None:
    pool = workers.Pool(obey)
    first, crashed, after, lost, last = run(pool, "work", "crash", "work", "lose", "work")
    assert crashed == {"status": "failed", "error": "the process ended with code 3"}
    assert all(x["status"] == "passed" for x in (first, after, lost, last))
    assert after["process"] == lost["process"] and len({x["process"] for x in (first, after, last)}) == 3
    pool.trim()


def test_a_hang_costs_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = workers.Pool(obey)
    run(pool, "work")
    monkeypatch.setattr(workers, "HANG_SECONDS", 0.5)
    (hung,) = run(pool, "hang")
    monkeypatch.undo()
    (after,) = run(pool, "work")
    assert "no answer" in hung["error"] and after["status"] == "passed"
    pool.trim()


def test_the_deadline_ends_what_runs() -> None:
    pool = workers.Pool(obey)
    run(pool, "work")
    began = time.monotonic()
    done, hung, never = run(pool, "work", "hang", "work", seconds=2)
    assert done["status"] == "passed" and hung == never == {}
    assert time.monotonic() - began < 10 and pool.idle == []


def test_trim_leaves_the_device_to_one() -> None:
    pool = workers.Pool(obey)
    run(pool, *["work"] * 4, width=2)
    assert len(pool.idle) == 2
    (alone,) = run(pool, "work", width=1)
    assert alone["status"] == "passed" and len(pool.idle) == 1
    pool.trim()
    assert pool.idle == []
