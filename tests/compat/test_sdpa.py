"""Replacing F.scaled_dot_product_attention: same results, scopes, and restoring torch's function."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

import fused_attn
import fused_attn.compat.sdpa as compat_sdpa
from tests import ROOT
from tests.parity import within_budget

TORCH = F.scaled_dot_product_attention


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The query shapes of the calls that reach ours; afterwards torch must be as it was."""
    found: list[tuple[int, ...]] = []

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(tuple(query.shape))
        return fused_attn.scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(compat_sdpa, "fused", counted)
    monkeypatch.setattr(compat_sdpa, "_warned", set())
    yield found
    assert F.scaled_dot_product_attention is TORCH
    assert torch.backends.mha.get_fastpath_enabled()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32)


def test_submodules_are_found_by_name() -> None:
    """Without an import of their own."""
    script = """
import sys, fused_attn
assert "fused_attn.compat.sdpa" not in sys.modules and "transformers" not in sys.modules
assert fused_attn.compat.sdpa.scope and fused_attn.compat.transformers.register
assert "transformers" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert fused_attn.compat.flash_attn.flash_attn_func and fused_attn.compat.bert_padding.unpad_input
    assert not hasattr(fused_attn.compat, "nonsense")


# --- F.scaled_dot_product_attention


def causal_by_flag(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True, scale=0.3)


def float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.arange(q.shape[2] * k.shape[2], dtype=q.dtype).view(q.shape[2], k.shape[2]).sin()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def upper_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, causal_upper_left(q.shape[2], k.shape[2]))


def lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, causal_lower_right(q.shape[2], k.shape[2]))


@pytest.mark.parametrize("lengths", [(11, 11), (7, 19)], ids=str)
@pytest.mark.parametrize("call", [causal_by_flag, grouped, float_mask, upper_left, lower_right])
def test_functional_calls(arrivals: list, call: Callable, lengths: tuple[int, int]) -> None:
    q, k, v = (randn(2, 4, n, 8).requires_grad_() for n in (lengths[0], lengths[1], lengths[1]))
    dout = randn(2, 4, lengths[0], 8)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    plain, oracle = run(torch.float32), run(torch.float64)
    with compat_sdpa.scope():
        ours = run(torch.float32)
    assert arrivals == [(2, 4, lengths[0], 8)]
    for name, got, exact, theirs in zip(("out", "dq", "dk", "dv"), ours, oracle, plain, strict=True):
        within_budget(name, got, exact, theirs)


def test_causal_bias_with_more_queries_than_keys(arrivals: list) -> None:
    """The first rows see nothing: zeros, and the others as if they stood alone."""
    q, k, v = randn(1, 2, 9, 8), randn(1, 2, 4, 8), randn(1, 2, 4, 8)
    with pytest.warns(UserWarning, match="NaNs"):
        bias = causal_lower_right(9, 4)
    with compat_sdpa.scope():
        out = F.scaled_dot_product_attention(q, k, v, bias)
        tail = F.scaled_dot_product_attention(q[:, :, 5:], k, v, is_causal=True)
    assert len(arrivals) == 2
    assert torch.equal(out[:, :, :5], torch.zeros(1, 2, 5, 8))
    within_budget("tail", out[:, :, 5:], TORCH(*(x.double() for x in (q[:, :, 5:], k, v)), is_causal=True), tail)


def test_compiled(arrivals: list) -> None:
    q, k, v = (randn(1, 2, 13, 8) for _ in range(3))
    eager = TORCH(q, k, v, is_causal=True)
    with compat_sdpa.scope():
        out = torch.compile(causal_by_flag, fullgraph=True, backend="aot_eager")(q, k, v)
    assert arrivals
    within_budget("out", out, TORCH(q.double(), k.double(), v.double(), is_causal=True), eager)


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(arrivals: list, training: bool) -> None:
    """With masks, in training and in evaluation, where torch has a fused path that asks nobody."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=True).train(training)
    x = randn(2, 9, 16)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True

    def run(dtype: torch.dtype) -> Tensor:
        layer.to(dtype)
        with torch.set_grad_enabled(training):
            return layer(*(x.to(dtype),) * 3, key_padding_mask=padding, need_weights=False)[0].detach()

    plain, oracle = run(torch.float32), run(torch.float64)
    with compat_sdpa.scope():
        ours = run(torch.float32)
    assert arrivals == [(2, 4, 9, 4)]
    within_budget("out", ours, oracle, plain)


def test_transformer_layer(arrivals: list) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = randn(2, 9, 16)
    with torch.inference_mode():
        plain = layer(x)
        with compat_sdpa.scope():
            ours = layer(x)
        oracle = layer.double()(x.double())
    assert arrivals == [(2, 4, 9, 4)]
    within_budget("out", ours, oracle, plain)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refused_calls_go_to_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat_sdpa, "_warned", set())
    nested = torch.nested.nested_tensor([randn(2, 5, 8), randn(2, 3, 8)], layout=torch.strided)
    expected = TORCH(nested, nested, nested).values()
    with compat_sdpa.scope():
        with pytest.warns(UserWarning, match="leaves a call to torch: query: expected a nested tensor of layout"):
            out = F.scaled_dot_product_attention(nested, nested, nested)
        again = F.scaled_dot_product_attention(nested, nested, nested)  # a second warning would be an error
    assert torch.equal(out.values(), expected)
    assert torch.equal(again.values(), expected)


def test_refused_causal_bias_is_spelled_out_for_torch(arrivals: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch recognises the object by its function, which stands elsewhere now."""

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("not today")

    monkeypatch.setattr(compat_sdpa, "fused", refuse)
    q, k = randn(1, 2, 4, 8), randn(1, 2, 9, 8)
    expected = TORCH(q, k, k, attn_mask=torch.ones(4, 9, dtype=torch.bool).tril(5))
    with compat_sdpa.scope(), pytest.warns(UserWarning, match="not today"):
        out = F.scaled_dot_product_attention(q, k, k, causal_lower_right(4, 9))
    assert torch.equal(out, expected)


def test_mask_with_is_causal_behaves_as_in_torch(arrivals: list) -> None:
    """A mask together with is_causal, which torch takes up to 2.14; a bias of other lengths is wrong for it too."""
    q = randn(1, 2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()

    def outcome(function: Callable[..., Tensor]) -> Any:
        try:
            return function(q, q, q, mask, is_causal=True).tolist()
        except (RuntimeError, ValueError) as error:
            return type(error), str(error)

    expected = outcome(TORCH)
    with compat_sdpa.scope(), pytest.warns(UserWarning, match="attn_mask: must be None when is_causal"):
        assert outcome(F.scaled_dot_product_attention) == expected
    bias: CausalBias = causal_upper_left(4, 5)
    with compat_sdpa.scope(), pytest.warns(UserWarning, match="lengths"), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, q, q, bias)


def test_a_named_backend_never_falls_back(arrivals: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "hopper")
    q = randn(1, 2, 4, 8)
    with compat_sdpa.scope(), pytest.raises(fused_attn.BackendError, match="hopper"):
        F.scaled_dot_product_attention(q, q, q)


def test_switch(arrivals: list) -> None:
    """enable and disable are idempotent, scopes nest, an exception leaves one, and the fast path comes back."""
    ours = compat_sdpa.scaled_dot_product_attention
    compat_sdpa.enable()
    compat_sdpa.enable()
    assert F.scaled_dot_product_attention is ours
    assert not torch.backends.mha.get_fastpath_enabled()
    with compat_sdpa.scope():
        pass
    assert F.scaled_dot_product_attention is ours
    compat_sdpa.disable()
    compat_sdpa.disable()
    assert F.scaled_dot_product_attention is TORCH
    with compat_sdpa.scope():
        with pytest.raises(KeyError), compat_sdpa.scope():
            raise KeyError
        compat_sdpa.disable()
        assert F.scaled_dot_product_attention is ours
    assert F.scaled_dot_product_attention is TORCH


def test_later_replacements_are_kept(arrivals: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        return TORCH(*args, **kwargs)

    with compat_sdpa.scope():
        F.scaled_dot_product_attention = theirs
    try:
        assert F.scaled_dot_product_attention is theirs
    finally:
        F.scaled_dot_product_attention = TORCH


def test_scopes_of_many_threads(arrivals: list) -> None:
    """However they overlap, inside a scope the function is ours; when the last is left, torch's."""
    q = randn(1, 1, 3, 4)
    barrier, wrong = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        for _ in range(50):
            with compat_sdpa.scope():
                if F.scaled_dot_product_attention is not compat_sdpa.scaled_dot_product_attention:
                    wrong.append("not ours")
                F.scaled_dot_product_attention(q, q, q)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(arrivals) == 400


# --- torch.nn.attention.sdpa_kernel


def one_head_at_a_time(q: Tensor) -> Tensor:
    packed, starts = q[0].transpose(0, 1), torch.tensor([0, 4, q.shape[2]], dtype=torch.int32)
    return fused_attn.attention_varlen(packed, packed, packed, starts, starts, causal=True)


KERNELS = {
    "attention": lambda q: fused_attn.attention(q, q, q),
    "with a mask": lambda q: fused_attn.attention(q, q, q, mask=torch.ones(7, 7, dtype=torch.bool).tril()),
    "sdpa": lambda q: fused_attn.scaled_dot_product_attention(q, q, q, is_causal=True),
    "varlen": one_head_at_a_time,
    "inside scope": compat_sdpa.scope()(lambda q: F.scaled_dot_product_attention(q, q, q)),
    "Jagged": lambda q: fused_attn.attention(*[torch.nested.nested_tensor_from_jagged(
        q[0].transpose(0, 1).contiguous(), torch.tensor([0, 3, 7])).transpose(1, 2)] * 3).values(),
}  # fmt: skip


@pytest.mark.parametrize("call", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("kernel", ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"))
def test_sdpa_kernel_context(kernel: str, call: Callable) -> None:
    """It may leave torch's function no kernel at all; ours does not depend on it."""
    q = randn(1, 2, 7, 4)
    oracle, *_, plain = call(q.double()), *(call(q) for _ in range(4))  # some of which may be replayed
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        got = call(q)
        within_budget("out", got, oracle, plain)
        assert fused_attn.explain(q, q, q).backend == "sdpa"


COMPILED: dict[str, Callable[[Callable, Callable], Callable]] = {
    "decorated": lambda call, compiled: compat_sdpa.scope()(compiled(call)),
    "compiled before": lambda call, compiled: compat_sdpa.scope()(used(compiled(call))),
    "inside, with a graph break": lambda call, compiled: compiled(compat_sdpa.scope()(call)),
}


def used(compiled: Callable) -> Callable:
    x = randn(1, 2, 13, 8)
    compiled(x, x, x)
    return compiled


@pytest.mark.parametrize("way", COMPILED)
def test_scope_and_compiled_functions(arrivals: list, way: str) -> None:
    """Around a compiled function ours is traced, also where torch's was before, and afterwards torch's again."""
    q, k, v = (randn(1, 2, 13, 8) for _ in range(3))
    targets: list[Any] = []

    def noting(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def compiled(call: Callable) -> Callable:
        return torch.compile(call, fullgraph=not way.startswith("inside"), backend=noting)

    torch.compiler.reset()
    call = COMPILED[way](causal_by_flag, compiled)
    assert (TORCH in targets) is (way == "compiled before")
    targets.clear()
    out = call(q, k, v)
    assert torch.ops.fused_attn.forward in targets and TORCH not in targets and arrivals
    exact, plain = TORCH(q.double(), k.double(), v.double(), is_causal=True), TORCH(q, k, v, is_causal=True)
    within_budget("out", out, exact, plain)


@pytest.mark.parametrize("switch", (lambda: compat_sdpa.scope().__enter__(), compat_sdpa.enable, compat_sdpa.disable))
def test_switching_inside_compiled_code_is_refused(arrivals: list, switch: Callable) -> None:
    """The error says where the switch belongs, and nothing is left switched."""

    def inside(q: Tensor) -> Tensor:
        switch()
        return causal_by_flag(q, q, q)

    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"scope\(\) or enable\(\) around the call, not inside"):
        torch.compile(inside, fullgraph=True, backend="eager")(randn(1, 2, 13, 8))
    assert not arrivals


# --- torch.jit


def scripted(q: Tensor, mask: Tensor) -> Tensor:
    causal = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, enable_gqa=True)
    return F.scaled_dot_product_attention(causal, q, q, mask, 0.0, scale=0.3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_script(arrivals: list) -> None:
    """torch.jit.script compiles torch's function, and what it compiles can be saved."""
    q, mask = randn(1, 2, 5, 8), randn(5, 5)
    expected, buffer = scripted(q, mask), io.BytesIO()
    with compat_sdpa.scope():
        compiled = torch.jit.script(scripted)
        assert torch.equal(compiled(q, mask), expected)
        torch.jit.save(compiled, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(q, mask), expected)
    assert torch.equal(torch.jit.script(scripted)(q, mask), expected) and not arrivals


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_script_of_layers(arrivals: list) -> None:
    x = randn(2, 5, 8)
    for layer, args in ((nn.MultiheadAttention(8, 2), (x, x, x)), (nn.TransformerEncoderLayer(8, 2, 16).eval(), (x,))):
        with compat_sdpa.scope():
            inside = torch.jit.script(layer)
        got, expected = inside(*args), torch.jit.script(layer)(*args)
        assert torch.equal(*(y[0] if isinstance(y, tuple) else y for y in (got, expected))) and not arrivals


# --- overrides of torch's functions


class Overriding(Tensor):
    """A subclass that has attention of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return "its own"
        return super().__torch_function__(func, types, args, kwargs or {})


class Plain(Tensor):
    """A subclass that overrides nothing."""


class Noting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_subclasses_and_modes(arrivals: list) -> None:
    q = randn(1, 2, 4, 8)
    with compat_sdpa.scope():
        assert F.scaled_dot_product_attention(q, q.as_subclass(Overriding), q) == "its own" and not arrivals
        assert type(F.scaled_dot_product_attention(q.as_subclass(Plain), q, q)) is Plain
        with Noting() as noting:
            F.scaled_dot_product_attention(q, q, q, scale=0.5)
        assert noting.seen == [F.scaled_dot_product_attention]
        with torch.device("meta"):
            assert F.scaled_dot_product_attention(q, q, q).device == q.device
    assert len(arrivals) == 3


def test_symbolic_trace(arrivals: list) -> None:
    """torch.fx records the call, without a warning."""
    q = randn(1, 2, 4, 8)
    with compat_sdpa.scope():
        traced = torch.fx.symbolic_trace(causal_by_flag)
        assert not arrivals
        assert torch.equal(traced(q, q, q), fused_attn.scaled_dot_product_attention(q, q, q, is_causal=True))
