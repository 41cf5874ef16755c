"""Changing out in place gives the gradients of the same change out of place, at every entry point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from fused_attn import attention, attention_varlen, scaled_dot_product_attention
from fused_attn.compat import flash_attn

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

STARTS = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
BIAS = torch.linspace(-1, 1, 10).view(2, 1, 5)


def nested(x: Tensor, **options: Any) -> Tensor:
    q: Any = torch.nested.nested_tensor_from_jagged(x, STARTS.long())
    return attention(q, q, q, layout="bshd", **options).values()


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


CALLS: dict[str, Callable[..., Tensor]] = {
    "attention": lambda x, **o: attention(*[heads_first(x)] * 3, softcap=3.0, **o),
    "contiguous": lambda x, **o: attention(*[heads_first(x).contiguous()] * 3, bias=BIAS, **o),
    "bshd": lambda x, **o: attention(x[None], x[None], x[None], layout="bshd", dropout_p=0.3, seed=1, **o),
    "lse": lambda x, **o: attention(*[heads_first(x)] * 3, return_lse=True, **o)[0],
    "sigmoid": lambda x, **o: attention(*[heads_first(x)] * 3, normalizer="sigmoid", **o),
    "varlen": lambda x, **o: attention_varlen(x, x, x, STARTS, STARTS, **o),
    "nested": nested,
    "sdpa": lambda x, **o: scaled_dot_product_attention(x, x, x, BIAS[:1, :, :2], **o),
    "sdpa 4-d": lambda x, **o: scaled_dot_product_attention(*[heads_first(x)] * 3, BIAS, **o),
    "sdpa 5-d": lambda x, **o: scaled_dot_product_attention(*[heads_first(x)[None]] * 3, BIAS, **o),
    "flash_attn": lambda x, backend: flash_attn.flash_attn_func(x[None], x[None], x[None], causal=True),
}


def residual(out: Tensor) -> Tensor:
    return torch.linspace(0, 1, out.numel()).view_as(out)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(x, b) for x in CALLS for b in ("tiled", "reference")] + [(x, "triton") for x in ("contiguous", "bshd", "varlen")],
)
def test_residual_added_in_place(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("FUSED_ATTN_BACKEND", backend)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 8, generator=generator).requires_grad_()
    for _ in range(2 if backend == "triton" else 1):  # two calls each: noted, learned and recorded
        out = CALLS[name](x, backend=backend)
        (expected,) = torch.autograd.grad((out + residual(out)).sin().sum(), x)
        out = CALLS[name](x, backend=backend)
        out += residual(out)
        (got,) = torch.autograd.grad(out.sin().sum(), x)
        torch.testing.assert_close(got, expected)


CHANGES = {
    "mul_": lambda out: out.mul_(2.0),
    "part": lambda out: out[..., 1:].mul_(3.0),
    "relu_": lambda out: out.relu_(),
    "unseen by autograd": lambda out: out.detach().mul_(2.0),
}


@pytest.mark.parametrize("create_graph", (False, True))
@pytest.mark.parametrize("change", CHANGES)
def test_changed_out_gives_the_gradient_of_the_original(change: str, create_graph: bool) -> None:
    """As if the change were made to a copy; also where nobody but the version counter saw it."""
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def gradient(out: Tensor) -> Tensor:
        CHANGES[change](out)
        return torch.autograd.grad(out.sum(), x, create_graph=create_graph)[0]

    (first, second), (expected, _) = (
        [
            gradient(call(attention(x, x, x, sink=x[0, :, 0, 0], dropout_p=0.2, seed=4, backend="tiled")))
            for _ in range(2)
        ]
        for call in (lambda out: out, torch.clone)
    )
    torch.testing.assert_close(first, expected)
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning", "ignore::DeprecationWarning")
def test_compiled() -> None:
    """A compiler traces the second forward where it sees the change, and none where there is none."""
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def in_place(x: Tensor) -> Tensor:
        out: Any = attention(x, x, x, softcap=3.0, backend="tiled")
        out += residual(out)
        return out.sin().sum()

    def out_of_place(x: Tensor) -> Tensor:
        out: Any = attention(x, x, x, softcap=3.0, backend="tiled")
        return (out + residual(out)).sin().sum()

    (expected,) = torch.autograd.grad(out_of_place(x), x)
    for call, forwards in ((in_place, 2), (out_of_place, 1)):
        graphs: list[str] = []

        def note(graph: Any, _: Any, graphs: list[str] = graphs) -> Any:
            graphs.append(graph.print_readable(print_output=False))
            return make_boxed_func(graph.forward)

        compiled = torch.compile(call, backend=aot_autograd(fw_compiler=note), fullgraph=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)
        assert sum(x.count("ops.fused_attn.forward.default") for x in graphs) == forwards


def test_lse_may_change_too() -> None:
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64).requires_grad_()
    out, lse = attention(x, x, x, return_lse=True, backend="tiled")
    (expected,) = torch.autograd.grad(out.sum() + (2 * lse).sum(), x, retain_graph=True)
    lse *= 2
    torch.testing.assert_close(torch.autograd.grad(out.sum() + lse.sum(), x)[0], expected, rtol=0, atol=0)


def test_changed_inputs_are_refused() -> None:
    """They are saved, and torch says so."""
    x = torch.randn(1, 2, 5, 4).requires_grad_()
    q = x * 1.0
    out = attention(q, x, x, backend="tiled")
    q += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_tensors_can_be_moved() -> None:
    """Nothing but what hooks pack keeps the memory of out alive, and a change is noticed all the same."""
    x = torch.randn(1, 2, 5, 4).requires_grad_()
    packed = []

    def pack(y: Tensor) -> Tensor:
        packed.append(y.data_ptr())
        return y.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        out = attention(x, x, x, backend="tiled")
    assert out.data_ptr() in packed
    changed, alive = out * 1.0, torch.multiprocessing.reductions.StorageWeakRef(out.untyped_storage())
    del out
    assert alive.expired()
    torch.autograd.grad(changed.sum(), x)
