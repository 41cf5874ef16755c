"""The torch operators: fake tensors, compilers, autocast, saved tensors, and the number of compilations."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fused_attn
from fused_attn import Mask, attention, scores, testing
from fused_attn.runtime import ops
from fused_attn.spec.problem import DIFFERENTIABLE
from fused_attn.testing.cases import CASES, Case
from fused_attn.testing.inputs import MEMORIES
from tests import ROOT
from tests.runtime.compilations import COMPILATIONS

LAUNCHED = ("triton", "tiled")
SMALL = {"hq": 2, "m": 9, "n": 11, "d": 16}
# One of everything that changes the flat arguments.
PROBLEMS = {
    c.name: c
    for c in (
        Case("plain", **SMALL),
        Case("spans", **SMALL, b=2, masks=("lengths",), window=(3, 2), alignment="bottom_right"),
        Case(
            "modifiers",
            **SMALL,
            bias="h1n",
            alibi="h",
            alignment="top_left",
            softcap=2.0,
            softcap_tensor=True,
            scale_tensor="h",
            sink=True,
        ),
        Case("pattern", **SMALL, masks=("runs_cross", "blocks_heads", "window_sinks"), alignment="bottom_right"),
        Case("dropout_mask", **SMALL, masks=("random_b11n",), dropout_p=0.3, hkv=1, dv=8),
        Case("half", **SMALL, softcap=2.0),
        Case("bshd", **SMALL, b=2, memory="bshd"),
        Case("sigmoid", **SMALL, normalizer="sigmoid", causal=True, alignment="top_left"),
        Case("distance", **SMALL, score="distance", parameter="h", scale_tensor=""),
        Case("additive", **SMALL, score="additive", parameter="hd", softcap=3.0),
        Case("ragged", **SMALL, lengths=((9, 11), (0, 3), (4, 0)), causal=True, alignment="bottom_right", bias="h1n"),
    )
}


def available(backend: str, case: Case = CASES["plain"]) -> None:
    reasons = testing.why_not(case, backend)
    if reasons:
        pytest.skip(reasons[0])


def arguments(case: Case, backend: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Flat arguments of the forward and of the backward operator."""
    inputs = testing.make_inputs(case, torch.bfloat16 if case.name == "half" else torch.float32)
    # A bias is a view of the caller's tensor; torch's examination wants leaves.
    flat = tuple(
        x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in ops.flatten(inputs.problem().lower(), backend)
    )
    out, _, *normaliser = (x.detach() for x in torch.ops.fused_attn.forward(*flat))
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in flat)
    needs = [x is not None for x in flat[: len(DIFFERENTIABLE)]]
    return flat, (*plain, out, *normaliser, inputs.dout, inputs.dlse, needs)


@pytest.mark.parametrize(
    ("backend", "name"),
    # The backends share the operators; one that launches kernels needs a look at little beside its launch.
    [("tiled", x) for x in PROBLEMS]
    + [pytest.param("triton", x, marks=[] if x in ("plain", "half") else pytest.mark.nightly) for x in PROBLEMS],
)
def test_opcheck(backend: str, name: str) -> None:
    """Torch's own examination of an operator: schema, autograd registration, fake tensors, AOT dispatch."""
    available(backend, PROBLEMS[name])
    forward, backward = arguments(PROBLEMS[name], backend)
    torch.library.opcheck(torch.ops.fused_attn.forward.default, forward)
    torch.library.opcheck(torch.ops.fused_attn.backward.default, backward)


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize("memory", [*MEMORIES, "packed"])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_fake_tensors_have_the_real_layout(backend: str, memory: str, dtype: torch.dtype) -> None:
    """Shape, strides, dtype and device, for every memory order and both operators; out follows q's order."""
    available(backend)
    case = Case("here", b=2, hq=2, m=9, d=16, memory=memory, bias="11mn", sink=True)
    inputs = testing.make_inputs(case, dtype)
    p = inputs.problem()
    flat = tuple(x.detach() if isinstance(x, Tensor) else x for x in ops.flatten(p, backend))
    needs = [x is not None for x in flat[: len(DIFFERENTIABLE)]]
    mode = FakeTensorMode()
    fake_flat = tuple(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in flat)
    real, fake = torch.ops.fused_attn.forward(*flat), ()
    with mode:
        fake = torch.ops.fused_attn.forward(*fake_flat)
        fake_dout = mode.from_tensor(inputs.dout)
        fake_grads = torch.ops.fused_attn.backward(*fake_flat, fake[0], *fake[2:], fake_dout, None, needs)
    grads = torch.ops.fused_attn.backward(*flat, real[0], *real[2:], inputs.dout, None, needs)
    for x, y in zip((*real, *grads), (*fake, *fake_grads), strict=True):
        assert (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)
    order = fused_attn.spec.problem.memory_order
    assert order(real[0]) == order(p.empty_out())
    if memory not in ("transposed", "strided"):
        assert order(real[0]) == order(p.q)


@pytest.mark.parametrize("backend", ("triton", "tiled", "reference", "sdpa"))
@pytest.mark.parametrize("fields", ({}, {"m": 1, "n": 1}, {"m": 5, "n": 0}, {"dout": "ones"},
                                    {"sink": True, "bias": "11mn"}),
                         ids=("plain", "one", "empty", "ones", "parameters"))  # fmt: skip
def test_outputs_never_alias_inputs(backend: str, fields: dict) -> None:
    """No result shares memory with an argument, nor with another result."""
    case = Case("here", **{"hq": 2, "m": 9, "d": 16} | fields)
    available(backend, case)
    inputs = testing.make_inputs(case)
    results = testing.run_public(inputs, backend)
    given = [*inputs.tensors.values(), inputs.dout]
    places = [x.untyped_storage().data_ptr() for x in (*given, *results.values()) if x.numel()]
    assert len(set(places)) == len(places)


# ---------------------------------------------------------------------------------------------------- compilations

COUNTER = (
    COMPILATIONS
    + """
counts = {}
for name, fields, steps in json.loads(sys.argv[1]):
    counts[name] = []
    for sizes in steps:
        p = testing.make_inputs(Case(name, **(fields | sizes)), torch.float16).problem()
        before = len(compiled)
        out, _, *normaliser = portable.forward(p)
        portable.backward(p, out, *normaliser, torch.empty_like(out), None, frozenset(p.tensors()))
        if name in ("plain", "lengths"):
            statistics.statistics(p, True, True, True, 1)
            statistics.weights(p, [0, p.shape[2] - 1], [0])
        counts[name].append(len(compiled) - before)
print(json.dumps(counts))
"""
)


def test_no_compilation_per_length() -> None:
    """Over a hundred lengths, and over the steps of a decode, nothing compiles after the first call."""
    pytest.importorskip("triton")
    lengths = [{"m": n, "n": n} for n in itertools.chain(range(2, 90, 2), range(3, 1200, 21))]
    steps = [{"m": 1, "n": n, "alignment": "bottom_right"} for n in range(1, 101)]
    fields = {"hq": 2, "d": 32}
    plan = [
        ("plain", fields, lengths),
        ("causal", fields | {"causal": True}, lengths),
        ("window", fields | {"window": (7, 3)}, lengths),
        ("lengths", fields | {"b": 2, "masks": ("lengths",), "sink": True}, lengths),
        ("ids", fields | {"b": 2, "masks": ("speckled",)}, lengths[::3]),
        ("blocks", fields | {"masks": ("blocks_heads",)}, lengths[::3]),
        ("window_sinks", fields | {"masks": ("window_sinks",)}, lengths[::3]),
        ("alibi_softcap", fields | {"alibi": "h", "softcap": 3.0}, lengths),
        ("dropout", fields | {"dropout_p": 0.1}, lengths[:20]),
        (
            "ragged",
            fields | {"causal": True, "alignment": "bottom_right"},
            [{"lengths": [(n, n + 3), (1, n)] + [(7, 2)] * (n % 3)} for n in range(1, 90, 3)],
        ),
        ("decode", fields | {"causal": True}, steps),
        # The rows of a dense mask or bias are aligned, or they are not: two kernels, whatever the lengths.
        ("dense_bias", fields | {"bias": "1hmn"}, lengths),
        ("dense_mask", fields | {"masks": ("random_11mn",)}, lengths),
        ("heads", {"d": 32, "m": 40}, [{"b": b, "hq": h} for b in (1, 2, 3, 16) for h in (1, 2, 5, 16, 17)]),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COUNTER, json.dumps(plan)], capture_output=True, text=True, cwd=ROOT, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["plain"][0] >= 6  # forward, dk and dv, dq; statistics of rows and of keys, a map
    for name, after in counts.items():
        allowed = after[0] if name.startswith("dense") else 0
        assert sum(after[1:]) <= allowed, f"{name} compiled {sum(after[1:])} times after its first call: {after}"


# ------------------------------------------------------------------------------------------------- autocast, memory


@pytest.mark.parametrize("backend", ("triton", "tiled", "reference", "sdpa"))
def test_autocast_with_mixed_types(backend: str) -> None:
    """Float32 q and k beside a bfloat16 v under autocast, and each gradient in its own tensor's dtype."""
    available(backend)
    q, k, v = (x.detach().clone() for x in testing.make_inputs(Case("here", hq=2, m=9, d=16)).clean.values())
    leaves = [q.requires_grad_(), k.requires_grad_(), v.bfloat16().requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*leaves, backend=backend)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32, torch.bfloat16]
    cast = [x.detach().bfloat16().requires_grad_() for x in leaves]
    plain = attention(*cast, backend=backend)
    assert torch.equal(out, plain)
    for g, expected in zip(grads, torch.autograd.grad(plain, cast, torch.ones_like(out)), strict=True):
        assert torch.equal(g.bfloat16(), expected)


def test_without_autocast_mixed_types_are_refused() -> None:
    """Nobody casts in silence."""
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(TypeError, match=r"v: expected q's torch\.float32, got torch\.bfloat16"):
        attention(x, x, x.bfloat16())


@pytest.mark.parametrize("backend", LAUNCHED)
def test_backward_under_autocast(backend: str) -> None:
    """A backward that is called under autocast computes what it would outside."""
    available(backend)
    inputs = testing.make_inputs(replace(CASES["everything"], b=1, hq=2, hkv=1, m=17, n=19))
    outside = testing.run_public(inputs, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        out, lse = attention(*inputs.qkv, **inputs.kwargs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = testing.parity.gradients(out, lse, inputs.tensors, inputs)
    for name, g in inside.items():
        assert torch.equal(g, outside[name]), name


@pytest.mark.parametrize("backend", LAUNCHED)
def test_saved_tensors(backend: str) -> None:
    """Everything that backward needs passes through the hooks of save_for_backward, and nothing leaks."""
    available(backend)
    inputs = testing.make_inputs(replace(CASES["everything"], b=1, hq=2, hkv=1, m=17, n=19))
    expected = testing.run_public(inputs, backend)
    stored: list[Tensor] = []

    def pack(x: Tensor) -> int:
        stored.append(x.detach().clone())
        return len(stored) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda at: stored[at]):
        out, lse = attention(*inputs.qkv, **inputs.kwargs, backend=backend)
    assert len(stored) >= 5  # q, k, v, out, lse at the least
    with torch.no_grad():  # what was not saved through the hooks is destroyed
        for x in inputs.tensors.values():
            x.detach().zero_()
    for name, g in testing.parity.gradients(out, lse, inputs.tensors, inputs).items():
        assert torch.equal(g, expected[name]), name


@pytest.mark.parametrize("backend", LAUNCHED)
def test_no_tensor_leaks(backend: str) -> None:
    """Inputs and outputs die with their last reference, before and after a backward, without the collector."""
    available(backend)

    def run(backward: bool) -> list[weakref.ref]:
        leaves = [torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3)]
        middle = [x * 2 for x in leaves]
        out, lse = attention(*middle, return_lse=True, backend=backend)
        if backward:
            (out.sum() + lse.sum()).backward()
        return [weakref.ref(x) for x in (*leaves, *middle, out, lse)]

    gc.disable()
    try:
        for backward in (False, True):
            assert [x() for x in run(backward)] == [None] * 8
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------------------- compilers


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    # The reference traces operation by operation, which takes long with symbolic sizes.
    [
        pytest.param(x, y, marks=pytest.mark.nightly if (x, y) == ("reference", True) else [])
        for x in ("triton", "tiled", "reference", "sdpa", None)
        for y in (False, True)
    ],
)
def test_compile_fullgraph(backend: str | None, dynamic: bool) -> None:
    """torch.compile without a graph break, forward and gradients, over changing lengths."""
    if backend is not None:
        available(backend)
    torch._dynamo.reset()
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Tensor:
        alignment = "top_left" if backend == "sdpa" else "bottom_right"
        return attention(q.sin(), k, v, causal=True, alignment=alignment, sink=sink, backend=backend).cos()

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=compiles)
    first = 0
    for m, n in ((9, 11), (13, 17), (20, 33)) if dynamic else ((9, 11),):
        leaves = [torch.randn(2, 2, s, 16, requires_grad=True) for s in (m, n, n)]
        sink = None if backend == "sdpa" else torch.randn(2, requires_grad=True)
        expected, got = call(*leaves, sink), compiled(*leaves, sink)
        torch.testing.assert_close(got, expected)
        every = [*leaves, *([] if sink is None else [sink])]
        for ours, theirs in zip(*(torch.autograd.grad(y.sum(), every) for y in (got, expected)), strict=True):
            torch.testing.assert_close(ours, theirs)
        first = first or compiles.frame_count
    assert compiles.frame_count == first


# Of two heads of 16, beside lengths of 9.
STATIC = {
    "sink": lambda x: {"sink": x[:, 0, 0]},
    "slopes": lambda x: {"alibi_slopes": x[:, 0, 0].abs()},
    "scale": lambda x: {"scale": x[:, 0, 0]},
    "bias": lambda x: {"bias": x[:, :9, :9]},
    "mask": lambda x: {"mask": x[:, :9, :9] > 0},
    "blocks": lambda x: {"mask": Mask.blocks(x[:, :3, :3] > -9.0, 4)},
    "lengths": lambda x: {"mask": Mask.lengths((x[:, 0, 0] * 0 + 5).int())},
    "segments": lambda x: {"mask": Mask.segments(x[:, 0, :9].sign().int(), sorted=False)},
    "additive": lambda x: {"score": scores.Additive(x[:, 0])},
}


@pytest.mark.parametrize("name", STATIC)
def test_compile_dynamic_with_parameters(name: str) -> None:
    """A module's parameters have static shapes, also where the sizes of its inputs are symbols."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parameter = torch.nn.Parameter(torch.randn(2, 16, 16))

        def forward(self, q: Tensor) -> Tensor:
            return attention(q, q, q, **STATIC[name](self.parameter), backend="tiled")

    torch._dynamo.reset()
    module, q = Module(), torch.randn(2, 2, 9, 16)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), module(q))


def test_compile_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled function takes the backend that FUSED_ATTN_BACKEND names now, and keeps one graph for each."""
    monkeypatch.delenv("FUSED_ATTN_BACKEND", raising=False)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: attention(x, x, x, softcap=2.0), fullgraph=True, backend=keep)
    x = torch.randn(1, 2, 5, 8)
    for name, count in ((None, 1), ("reference", 2), ("", 2), ("reference", 2), ("tiled", 3), (None, 3)):
        if name is None:
            monkeypatch.delenv("FUSED_ATTN_BACKEND", raising=False)
        else:
            monkeypatch.setenv("FUSED_ATTN_BACKEND", name)
        for turn in range(3):
            monkeypatch.setenv("UNRELATED", str(turn))
            compiled(x)
        monkeypatch.delenv("UNRELATED")
        assert len(graphs) == count, name
    ours = ["fused_attn.forward" in graph.code for graph in graphs]
    assert ours == [True, False, True]
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "fastest")
    with pytest.raises(Exception, match="fastest"):
        compiled(x)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_traced_by_fx(mode: str) -> None:
    """Tensors that have no memory find a backend, and the graph holds our operator."""
    from torch.fx.experimental.proxy_tensor import make_fx

    q, sink = torch.randn(1, 2, 16, 64), torch.zeros(2)
    graph = make_fx(lambda q, sink: attention(q, q, q, causal=True, sink=sink), tracing_mode=mode)(q, sink)
    assert torch.ops.fused_attn.forward.default in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(q, sink), attention(q, q, q, causal=True, sink=sink))


def test_compile_inductor() -> None:
    """The default compiler, where it has a C++ compiler to call."""
    if not any(os.access(os.path.join(p, "g++"), os.X_OK) for p in os.environ["PATH"].split(os.pathsep)):
        pytest.skip("g++ is not installed")
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
    compiled = torch.compile(lambda *x: attention(*x, softcap=2.0, backend="tiled") * 2, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, softcap=2.0, backend="tiled") * 2)


@pytest.mark.parametrize("backend", ("tiled", "triton"))
def test_export(backend: str) -> None:
    available(backend)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, causal=True, backend=backend)

    leaves = tuple(torch.randn(1, 2, 9, 16) for _ in range(3))
    exported = torch.export.export(Module(), leaves)
    assert "fused_attn.forward" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*leaves), Module()(*leaves))


def test_flops() -> None:
    """Two products forward and five backward, grouped heads counted as they are used."""
    q = torch.randn(2, 4, 8, 16, requires_grad=True)
    k, v = torch.randn(2, 2, 12, 16, requires_grad=True), torch.randn(2, 2, 12, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = attention(q, k, v, backend="tiled")
    one, other = 2 * 2 * 4 * 8 * 12 * 16, 2 * 2 * 4 * 8 * 12 * 6
    assert counter.get_total_flops() == one + other
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 3 * one + 2 * other


@pytest.mark.parametrize("backend", LAUNCHED)
def test_same_bits_at_every_call(backend: str) -> None:
    """Every gradient, parameters included; and use_deterministic_algorithms overrides deterministic=False."""
    available(backend)
    inputs = testing.make_inputs(replace(CASES["everything_tensor"], b=1, hq=2, hkv=1, m=35, n=70))
    first, second = (testing.run_public(inputs, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    x = torch.zeros(1, 1, 2, 4)
    from fused_attn.api.bind import bind
    from fused_attn.spec.options import Options

    assert bind(x, x, x, Options()).deterministic and not bind(x, x, x, Options(deterministic=False)).deterministic
    torch.use_deterministic_algorithms(True)
    try:
        assert bind(x, x, x, Options(deterministic=False)).deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_runs_without_triton() -> None:
    """With triton not installed the package imports and answers on its PyTorch backends."""
    program = """
import sys
sys.modules["triton"] = None
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else found(name, *rest)
import torch, fused_attn
x = torch.randn(1, 2, 9, 16, requires_grad=True)
fused_attn.attention(x, x, x, sink=torch.zeros(2)).sum().backward()
try:
    fused_attn.attention(x, x, x, backend="triton")
except fused_attn.BackendError as refusal:
    print(refusal)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "triton is not installed" in done.stdout, done.stderr[-2000:]
