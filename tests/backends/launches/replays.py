"""Replayed calls launch the same as calls that are bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import Mask, tuning
from tests.backends.launches.stub import LAUNCHES, attention, launched, replays, tensors

# Options by name, as functions of B, Hq, M, N; tensors of their own are made anew for each call.
VARIANTS: dict[str, Callable[..., dict[str, Any]]] = {
    "plain": lambda b, h, m, n: {},
    "causal": lambda b, h, m, n: {"causal": True, "alignment": "bottom_right"},
    "window": lambda b, h, m, n: {"window": (7, 3), "alignment": "top_left", "return_lse": True},
    "left": lambda b, h, m, n: {"window": (7, None), "alignment": "bottom_right"},
    "scale": lambda b, h, m, n: {"scale": 0.5, "softcap": 3.0},
    "mask": lambda b, h, m, n: {"mask": torch.ones(b, 1, m, n, dtype=torch.bool)},
    "mask (M, N)": lambda b, h, m, n: {"mask": torch.ones(m, n, dtype=torch.bool)},
    "bias (M, N)": lambda b, h, m, n: {"bias": torch.zeros(m, n, requires_grad=True)},
    "bias (H, M, N)": lambda b, h, m, n: {"bias": torch.zeros(h, m, n, requires_grad=True)},
    "bias": lambda b, h, m, n: {"bias": torch.zeros(1, h, m, n, requires_grad=True)},
    "full bias": lambda b, h, m, n: {"bias": torch.zeros(b, h, m, n, requires_grad=True)},
    "column bias": lambda b, h, m, n: {"bias": torch.zeros(b, 1, 1, n, requires_grad=True)},
    "alibi": lambda b, h, m, n: {"alibi_slopes": torch.zeros(h, requires_grad=True), "alignment": "top_left"},
    "sink": lambda b, h, m, n: {"sink": torch.zeros(h, requires_grad=True), "return_lse": True},
    "lengths": lambda b, h, m, n: {"mask": fused_attn.Mask.lengths(torch.full((b,), n))},
    "learned scale": lambda b, h, m, n: {"scale": torch.ones(h, requires_grad=True)},
    "dropout": lambda b, h, m, n: {"dropout_p": 0.5, "seed": 1},
    "nondeterministic": lambda b, h, m, n: {"deterministic": False},
}
RECORDED = {
    "plain", "causal", "window", "left", "scale", "mask", "mask (M, N)", "bias", "bias (M, N)", "bias (H, M, N)",
    "full bias", "nondeterministic",
}  # fmt: skip
FORWARD_ONLY = {"column bias", "alibi", "sink"}  # the backward adds up in torch


SIZES: tuple[dict[str, Any], ...] = (
    {}, {"m": 7, "n": 130}, {"d": 40, "dtype": torch.float16}, {"dtype": torch.float32}, {"d": 256},
    {"d": 64, "backend": "hopper"},
)  # fmt: skip
LACKING = {"mask", "mask (M, N)", "lengths", "dropout"}  # of the Hopper kernels


@pytest.mark.parametrize(
    ("name", "sizes"), [(x, sizes) for x in VARIANTS for sizes in SIZES if not ("backend" in sizes and x in LACKING)]
)
def test_replay_launches_the_same_as_an_uncached_call(
    name: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, on new tensors each time: the same kernels, grids, numbers and pointers."""
    replayed = replays(monkeypatch)
    found = []
    for _ in range(5):
        q, k, v = tensors(**sizes, grad=True)
        options = VARIANTS[name](q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        options["backend"] = sizes.get("backend", "triton")
        own = [q, k, v, *(x for x in options.values() if isinstance(x, Tensor))]

        def work(q: Tensor = q, k: Tensor = k, v: Tensor = v, options: dict[str, Any] = options) -> Any:
            result = attention(q, k, v, **options)
            out, lse = result if isinstance(result, tuple) else (result, None)
            wanted = [x for x in (q, k, v, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
            cotangents = [(x, torch.ones_like(x)) for x in (out, lse) if x is not None]
            grads = torch.autograd.grad([x for x, _ in cotangents], wanted, [g for _, g in cotangents])
            for x, g in zip(wanted, grads, strict=True):
                assert (g.shape, g.dtype, g.stride()) == (x.shape, x.dtype, torch.empty_like(x).stride())
            return result, grads, cotangents

        found.append(launched(work, *own))
    assert len(found[0]) >= 3
    assert all(x == found[0] for x in found)
    if options.keys() & {"mask", "bias"} and k.shape[2] == 130:
        assert not any(replayed)  # rows that are not aligned are copied first
    elif name in RECORDED:
        assert replayed == [True, True] * 2  # forward and backward of the last two
    elif name in FORWARD_ONLY:
        assert replayed == [True, False] * 2
    else:
        assert not replayed


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True}, {"attn_mask": torch.bool},
                                   {"attn_mask": torch.float32}, {"scale": 0.5, "window": (3, 4)}])  # fmt: skip
def test_sdpa_calls_are_replayed(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = replays(monkeypatch)
    found = []
    for _ in range(5):
        q, k, v = tensors(g=2 if options.get("enable_gqa") else 4)
        call_options = {n: torch.ones(2, 1, 48, 48, dtype=x) if n == "attn_mask" else x for n, x in options.items()}
        call = lambda: fused_attn.scaled_dot_product_attention(q, k, v, **call_options, backend="triton")  # noqa: B023, E731
        found.append(launched(call, q, k, v, call_options.get("attn_mask")))
    assert len(found[0]) == 1 and all(x == found[0] for x in found)
    assert replayed == [True, True]


def test_replay_of_one_tensor_as_q_k_and_v_takes_three(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = replays(monkeypatch)
    x = torch.zeros(1, 2, 32, 32)
    for _ in range(4):
        attention(x, x, x)
    q, k, v = (torch.zeros(1, 2, 32, 32) for _ in range(3))
    (launch,) = launched(lambda: attention(q, k, v), q, k, v)
    assert replayed == [True, True]
    assert [launch[-1][i][0][0] for i in range(3)] == ["tensor 0", "tensor 1", "tensor 2"]


DECODED: dict[str, dict[str, Any]] = {
    "lengths": {},
    "a length": {"cache_seqlens": 17},
    "pages": {"page_table": torch.arange(8, dtype=torch.int64).view(2, 4)},
    "rotary": {"rotary": (torch.zeros(64, 16), torch.zeros(64, 16), False)},
    "splits": {"num_splits": 4, "window": (9, 0)},
    "sink": {"sink": torch.zeros(4), "softcap": 3.0},
    "no new keys": {"k_new": None, "v_new": None},
}


def decoded(name: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Fresh arguments of a step of decoding, and its tensors."""
    k, v = torch.zeros(2, *((8, 16) if name == "pages" else (2, 64)), 2, 64, dtype=torch.bfloat16)
    call = {
        "q": torch.zeros(2, 1, 4, 64, dtype=torch.bfloat16), "k_cache": k, "v_cache": v, "causal": True,
        "cache_seqlens": torch.full((2,), 17, dtype=torch.int32), "backend": "triton",
        **{n: torch.zeros(2, 1, 2, 64, dtype=torch.bfloat16) for n in ("k_new", "v_new")}, **DECODED[name],
    }  # fmt: skip
    rotary: tuple[Any, ...] = call.get("rotary", ())
    return call, [x for x in (*call.values(), *rotary) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", DECODED)
def test_replayed_decode_launches_the_same(name: str, monkeypatch: pytest.MonkeyPatch, unread: None) -> None:
    replayed, found = replays(monkeypatch), []
    for _ in range(5):
        call, own = decoded(name)
        found.append(launched(lambda call=call: fused_attn.attention_decode(**call), *own))
    assert found[0] and all(x == found[0] for x in found)
    assert replayed == [True] * (0 if name == "a length" else 3)


@pytest.mark.parametrize("other", ("capacity", "causal", "softcap", "lengths"))
def test_changed_decode_is_not_replayed(other: str, monkeypatch: pytest.MonkeyPatch, unread: None) -> None:
    for _ in range(3):
        fused_attn.attention_decode(**decoded("lengths")[0])
    replayed = replays(monkeypatch)
    call, _ = decoded("lengths")
    call |= {
        "capacity": {x: call[x][:, :40] for x in ("k_cache", "v_cache")}, "causal": {"causal": False},
        "softcap": {"softcap": 1.0}, "lengths": {"cache_seqlens": 1},
    }[other]  # fmt: skip
    fused_attn.attention_decode(**call)
    assert not replayed


def test_overlapping_caches_are_refused_after_a_replay(unread: None) -> None:
    for _ in range(3):
        fused_attn.attention_decode(**decoded("lengths")[0])
    call, _ = decoded("lengths")
    with pytest.raises(ValueError, match="v_cache"):
        fused_attn.attention_decode(**call | {"v_cache": call["k_cache"]})


@pytest.mark.parametrize(
    "options", ({}, {"causal": True}, {"mask": Mask.window(5, 0, sinks=2)}, {"softcap": 2.0}), ids=str
)
@pytest.mark.parametrize("grad", (False, True))
def test_replayed_varlen_launches_the_same(
    options: dict[str, Any], grad: bool, monkeypatch: pytest.MonkeyPatch, unread: None
) -> None:
    replayed, found = replays(monkeypatch), []
    for n in range(5):
        q, k, v = (torch.zeros(90, 4, 64, dtype=torch.bfloat16, requires_grad=grad) for _ in range(3))
        starts = torch.tensor([0, 40 + n, 90], dtype=torch.int32)

        def work(q: Tensor = q, k: Tensor = k, v: Tensor = v, starts: Tensor = starts) -> Any:
            out: Any = fused_attn.attention_varlen(
                q, k, v, starts, starts, max_seqlen_q=64, max_seqlen_k=64, backend="triton", **options
            )
            return out, torch.autograd.grad(out, (q, k, v), torch.ones_like(out)) if grad else None

        found.append(launched(work, q, k, v, starts))
    assert found[0] and all(x == found[0] for x in found)
    assert any(replayed) or "mask" in options


def test_tma_descriptors_are_used_where_tma_can_copy() -> None:
    """On sm_90, head dim 256; elsewhere by pointers, with a configuration that has registers for them."""
    q, k, _ = tensors(d=256)
    odd = torch.zeros(k.numel() + 4, dtype=k.dtype)[4:].view(k.shape)
    roomy = tensors(n=64, d=256)[1][:, :, :48]
    copied = {"dense": k, "bshd": k.transpose(1, 2).contiguous().transpose(1, 2), "roomy": roomy}
    refused = {"one head for all": k[:, :1].expand(k.shape), "odd": odd, "columns": k.mT.contiguous().mT}
    for name, x in (copied | refused).items():
        LAUNCHES.clear()
        attention(q, x, x)
        args = dict(zip(LAUNCHES[0].kernel.src.fn.arg_names, LAUNCHES[0].args, strict=True))
        chosen = tuning.config("forward", "sm_90", q.dtype, 256, 256, with_modifiers=name in refused)
        assert chosen.descriptors is (name in copied)
        assert (args["BLOCK_N"], args["OVERLAP"]) == (chosen.BLOCK_N, chosen.overlap)
        for descriptor in (args["k_desc"], args["v_desc"]):
            if name in refused:
                assert descriptor is None
            else:
                assert descriptor.base is x and descriptor.shape == [2, 2, 48, 256]
                assert descriptor.strides == [*x.stride()]
                assert descriptor.block_shape == [1, 1, chosen.BLOCK_N, 256]
