"""Meta and fake tensors get the shapes, strides and dtypes of real ones, at every entry point."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fused_attn
from fused_attn import Mask, attention, modules, scaled_dot_product_attention, scores
from tests.parity import within_budget

INT = torch.int32


class Made:
    """Tensors on one device, for calls that are the same on each."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)

    def ints(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=INT, device=self.device)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self(2, 4, 5, 8), self(2, 2, 7, 8), self(2, 2, 7, 6)


# Options of `attention` with M = 5, N = 7, Hq = 4 and D = 8.
OPTIONS: dict[str, Callable[[Made], dict[str, Any]]] = {
    "plain": lambda at: {},
    "causal": lambda at: {"causal": True, "alignment": "top_left", "return_lse": True},
    "window": lambda at: {"window": (2, 0), "alignment": "bottom_right"},
    "bias": lambda at: {"bias": at(5, 7)},
    "mask": lambda at: {"mask": at(2, 1, 1, 7) == 0},
    "lengths": lambda at: {"mask": Mask.lengths(at.ints(3, 7), at.ints(1, 5))},
    "prefix": lambda at: {"mask": Mask.prefix(at.ints(3, 7), "top_left")},
    "segments": lambda at: {"mask": Mask.segments(at.ints(0, 0, 1, 1, 2), at.ints(*[0] * 7), sorted=False)},
    "segments in an order not said": lambda at: {"mask": Mask.segments(at.ints(0, 0, 1, 1, 2), at.ints(*[0] * 7))},
    "sorted segments": lambda at: {"mask": Mask.segments(at.ints(0, 0, 1, 1, 2), at.ints(*[0] * 7), sorted=True)},
    "blocks": lambda at: {"mask": Mask.blocks(at(3, 4) == 0, 2)},
    "sinks": lambda at: {"mask": Mask.window(2, 0, "bottom_right", sinks=2)},
    "softcap": lambda at: {"softcap": torch.tensor(3.0, device=at.device), "scale": at(4)},
    "sink": lambda at: {"sink": at(4), "return_lse": True},
    "ALiBi": lambda at: {"alibi_slopes": at(4), "alignment": "top_left"},
    "dropout": lambda at: {"dropout_p": 0.5},
    "seed": lambda at: {"dropout_p": 0.5, "seed": 3},
    "softmax1": lambda at: {"normalizer": "softmax1", "return_lse": True},
    "sigmoid": lambda at: {"normalizer": "sigmoid"},
    "additive": lambda at: {"score": scores.Additive(at(8))},
    "bilinear": lambda at: {"score": scores.Bilinear(at(4, 8, 8))},
    "cosine": lambda at: {"score": scores.Cosine(at(4)), "return_lse": True},
    "distance": lambda at: {"score": scores.Distance(2.0), "return_lse": True},
    "tiled": lambda at: {"backend": "tiled", "return_lse": True},
    "reference": lambda at: {"backend": "reference"},
}


def in_heads_last_memory(at: Made) -> Any:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in at.qkv())
    out = attention(q, k, v, softcap=2.0)
    return out, *torch.autograd.grad(out.sum(), (q, k, v))


def scoped(at: Made) -> Tensor:
    with fused_attn.compat.sdpa.scope():
        q = at(2, 4, 5, 8)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def varlen(at: Made, **options: Any) -> Any:
    q, starts = at(7, 4, 8), at.ints(0, 5, 5, 7)
    return fused_attn.attention_varlen(q, q, q, starts, starts, causal=True, return_lse=True, **options)


def decode(at: Made, paged: bool) -> Any:
    q, new, lengths = at(2, 1, 8, 8), at(2, 1, 4, 8), at.ints(3, 7)
    if paged:
        pages = at(5, 4, 4, 8)
        return fused_attn.attention_decode(
            q, pages, pages, cache_seqlens=lengths, page_table=at.ints(0, 1).expand(2, 2)
        )
    k, v, turn = at(2, 16, 4, 8), at(2, 16, 4, 8), (at(32, 4), at(32, 4), False)
    options: dict[str, Any] = {"cache_seqlens": lengths, "k_new": new, "v_new": new, "rotary": turn, "causal": True}
    return fused_attn.attention_decode(q, k, v, return_lse=True, **options)


def statistics(at: Made, **options: Any) -> Any:
    q, k, _ = at.qkv()
    if options:
        q, k = at(7, 4, 8), at(7, 2, 8)
        options = {name: at.ints(0, 5, 5, 7) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    return fused_attn.attention_stats(q, k, key_mass=True, entropy=True, max_logit=True, top_k=2, **options)


def merged(at: Made) -> Any:
    q, k, v = at.qkv()
    parts: Any = [attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(3), slice(3, 7))]
    return fused_attn.merge_states([out for out, _ in parts], [lse for _, lse in parts])


def multihead(at: Made, n: int, **options: Any) -> Any:
    layer = modules.MultiheadAttention(16, 2, device=at.device, **options)
    return layer(at(5, 2, 16), at(n, 2, 16), at(n, 2, 16), key_padding_mask=at(2, n) > 0)


def scored(at: Made, layer: Any, *sizes: int) -> Any:
    return layer(8, 6, *sizes, num_heads=2, device=at.device)(at(2, 3, 8), at(2, 130, 6), need_weights=True)


CALLS: dict[str, Callable[[Made], Any]] = {
    **{name: lambda at, make=make: attention(*at.qkv(), **make(at)) for name, make in OPTIONS.items()},
    "bshd": lambda at: attention(*(x.transpose(1, 2) for x in at.qkv()), layout="bshd", return_lse=True),
    "no queries": lambda at: attention(at(2, 4, 0, 8), at(2, 4, 3, 8), at(2, 4, 3, 8), return_lse=True),
    "no keys": lambda at: attention(at(2, 4, 3, 8), at(2, 4, 0, 8), at(2, 4, 0, 8), return_lse=True),
    "gradients": in_heads_last_memory,
    "sdpa": lambda at: scaled_dot_product_attention(*at.qkv(), at(5, 7) > 0, enable_gqa=True),
    "sdpa of rank 2": lambda at: scaled_dot_product_attention(at(5, 8), at(5, 8), at(5, 6), is_causal=True),
    "sdpa of rank 5": lambda at: scaled_dot_product_attention(at(3, 1, 4, 5, 8), at(2, 1, 7, 8), at(7, 6)),
    "inside compat.sdpa.scope": scoped,
    "varlen": varlen,
    "varlen with a bias": lambda at: varlen(at, bias=at(5, 5), max_seqlen_q=5, max_seqlen_k=5),
    "decode": lambda at: decode(at, False),
    "decode from pages": lambda at: decode(at, True),
    "statistics": statistics,
    "statistics of packed sequences": lambda at: statistics(at, packed=True),
    "map": lambda at: fused_attn.attention_map(*at.qkv()[:2], rows=[0, -1], heads=[1]),
    "merge_states": merged,
    "MultiheadAttention": lambda at: multihead(at, 7, add_bias_kv=True),
    "MultiheadAttention of many keys": lambda at: multihead(at, 150, dropout=0.5),
    "AdditiveAttention": lambda at: scored(at, modules.AdditiveAttention, 12),
    "CosineAttention": lambda at: scored(at, modules.CosineAttention, 12),
    "BilinearAttention": lambda at: scored(at, modules.BilinearAttention),
}


def facts(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.shape, result.stride(), result.dtype
    return result if result is None else [facts(x) for x in result]


@pytest.mark.parametrize("name", CALLS)
def test_same_shapes_and_strides_as_real_tensors(name: str) -> None:
    call = CALLS[name]
    expected = facts(call(Made("cpu")))
    assert facts(call(Made("meta"))) == expected
    with FakeTensorMode():
        assert facts(call(Made("cpu"))) == expected


def test_backward_under_autocast() -> None:
    """Meta has no autocast, and torch raises when asked for it; another device's leaves meta tensors as they are."""
    q = torch.empty(2, 4, 5, 8, device="meta", requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, q, q, softcap=2.0)
        out.sum().backward()
    assert out.dtype == torch.float32 and q.grad is not None and q.grad.shape == q.shape


def test_explain() -> None:
    q = torch.empty(2, 4, 5, 8, device="meta")
    assert fused_attn.explain(q, q, q).backend == "tiled"
    with FakeTensorMode():
        q = torch.empty(2, 4, 5, 8)
        found = fused_attn.explain(q, q, q)
        lengths = fused_attn.explain(q, q, q, mask=fused_attn.Mask.lengths(torch.tensor([2, 5])))
        half = torch.empty(2, 4, 5, 64, dtype=torch.bfloat16)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where a fake tensor is asked for its address
            assert "GPU" in fused_attn.explain(half, half, half, backend="hopper").reasons["hopper"][0]
    assert found.backend == "sdpa"
    assert lengths.backend == "tiled" and "tracing" in lengths.reasons["sdpa"][0]


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_flop_counter(device: str) -> None:
    q = torch.empty(2, 4, 5, 8, device=device)
    with FlopCounterMode(display=False) as counter:
        attention(q, q, q, softcap=2.0)
    assert counter.get_total_flops() == 4 * 2 * 4 * 5 * 5 * 8


LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "MultiheadAttention": (lambda: modules.MultiheadAttention(16, 2, add_bias_kv=True, batch_first=True), (16, 16)),
    "AdditiveAttention": (lambda: modules.AdditiveAttention(8, 6, 12, 2), (8, 6)),
    "CosineAttention": (lambda: modules.CosineAttention(8, 6, 12, 2), (8, 6)),
    "BilinearAttention": (lambda: modules.BilinearAttention(8, 6, 2), (8, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_deferred_initialisation(name: str) -> None:
    """Built on meta, a layer takes parameters from a state dict, or memory and initial values later."""
    make, widths = LAYERS[name]
    inputs = [torch.randn(2, 5, width) for width in (widths[0], widths[1], widths[1])]
    with torch.device("meta"):
        loaded, later = make().eval(), make().eval()
    real = make().eval()
    loaded.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(loaded(*inputs)[0], real(*inputs)[0])
    assert later(*(x.to("meta") for x in inputs))[0].is_meta
    later.to_empty(device="cpu")
    for x in later.parameters():
        torch.nn.init.constant_(x, torch.nan)
    getattr(later, "_reset_parameters", getattr(later, "reset_parameters", None))()  # type: ignore[misc]
    if isinstance(later, torch.nn.MultiheadAttention):  # torch draws every parameter but this layer's own
        later.out_proj.reset_parameters()
    assert later(*inputs)[0].isfinite().all()


def test_device_context() -> None:
    """With another default device, what a call makes for itself is where its tensors are."""
    q = torch.randn(2, 4, 5, 8)
    with torch.device("meta"):
        made = [
            attention(q, q, q, causal=True, softcap=2.0, dropout_p=0.1),
            attention(q, q, q, mask=Mask.lengths(Made("cpu").ints(3, 5)), normalizer="softmax1"),
            fused_attn.attention_stats(q, q, entropy=True).entropy,
            fused_attn.attention_map(q, q),
        ]
    assert all(x.device == q.device for x in made)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ("plain", "softcap", "mask", "lengths", "seed", "additive"))
def test_functionalize(name: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(x.shape) for x in Made("cpu").qkv())
    options = OPTIONS[name](Made("cpu"))

    def call(q: Tensor) -> Any:
        return attention(q, k.to(q.dtype), v.to(q.dtype), **options)

    oracle, plain = call(q.double()), attention(q, k, v, backend="reference", **options)
    within_budget("out", functionalize(call)(q), oracle, plain)
    traced = make_fx(functionalize(call, remove="mutations_and_views"))(q)
    within_budget("traced", traced(q), oracle, plain)
