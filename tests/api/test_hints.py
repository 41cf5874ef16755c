"""Errors with a hint: another layout, keywords of other libraries, too many positional arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_attn
from fused_attn import attention, scaled_dot_product_attention
from tests.api.test_errors import B, D, zeros


@pytest.mark.parametrize("causal", (True, False))
def test_axes_of_the_other_layout(causal: bool) -> None:
    """(B, S, H, D) taken for (B, H, S, D), and the other way round."""
    options: dict[str, Any] = {"causal": causal, "alignment": "top_left"}
    q, k = zeros(B, 9, 4, D), zeros(B, 6, 2, D)
    with pytest.raises(
        ValueError, match=r'6 key-value heads .* 9 query heads; if dim 2 counts heads, pass layout="bshd"'
    ):
        attention(q, k, k, **options)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    with pytest.raises(
        ValueError, match=r'6 key-value heads .* 9 query heads; if dim 1 counts heads, pass layout="bhsd"'
    ):
        attention(q, k, k, layout="bshd", **options)


def test_layout_hint() -> None:
    q, k = zeros(B, 9, 6, 4, D)[:, :, :, 0], zeros(B, 6, 4, D)  # 6 and 4 divide neither way
    with pytest.raises(ValueError, match=r"do not divide the 9 query heads$"):
        attention(q, k, k)
    packed = zeros(8, 3, D), zeros(4, 2, D)  # the lengths would divide, and there is no other layout
    starts = [torch.tensor([0, x], dtype=torch.int32) for x in (8, 4)]
    with pytest.raises(ValueError, match=r"do not divide the 3 query heads$"):
        fused_attn.attention_varlen(packed[0], packed[1], packed[1], *starts)


def test_alignment_of_the_other_layout() -> None:
    q, k = zeros(B, 9, 8, D), zeros(B, 9, 2, D)
    with pytest.raises(ValueError, match=r'M = 8 and N = 2 .*got None; if 8 and 2 count heads, pass layout="bshd"'):
        attention(q, k, k, causal=True)
    with pytest.raises(ValueError, match=r"M = 8 and N = 3 .*got None$"):
        attention(zeros(B, 9, 8, D), zeros(B, 9, 3, D), zeros(B, 9, 3, D), causal=True)


FOREIGN = [
    ("is_causal", "here it is causal="),
    ("attn_mask", r"here it is mask= where it is bool \(True = may attend\), bias= where it is added"),
    ("key_padding_mask", r"here it is mask=Mask.lengths\(lengths\)"),
    ("window_size", r"here it is window=\(left, right\), where None is unbounded"),
    ("softmax_scale", "here it is scale="),
    ("logits_soft_cap", "here it is softcap="),
    ("attn_bias", "here it is bias="),
    ("s_aux", "here it is sink="),
    ("enable_gqa", "grouped heads need no keyword"),
    ("return_weights", "attention_map.* returns the weights"),
    ("return_attn_probs", "attention_map.* returns the weights"),
    ("normaliser", "did you mean normalizer="),
    ("temperature", ""),
    ("query", "here it is q="),
    ("key", "here it is k="),
]
X = zeros(1, 2, 4, 8)
STARTS = torch.tensor([0, 4], dtype=torch.int32)
CALLS: dict[str, Callable[..., Any]] = {
    "attention": lambda **given: attention(X, X, X, **given),
    "attention_varlen": lambda **given: fused_attn.attention_varlen(X[0], X[0], X[0], STARTS, STARTS, **given),
    "attention_stats": lambda **given: fused_attn.attention_stats(X, X, **given),
    "attention_map": lambda **given: fused_attn.attention_map(X, X, **given),
    "explain": lambda **given: fused_attn.explain(X, X, X, **given),
}


@pytest.mark.parametrize("name", CALLS)
def test_keywords_of_other_libraries(name: str) -> None:
    for keyword, hint in FOREIGN:
        words = rf"^{name}\(\) got an unexpected keyword argument '{keyword}'" + (f"; .*{hint}" if hint else "$")
        with pytest.raises(TypeError, match=words):
            CALLS[name](**{keyword: None})


@pytest.mark.parametrize(
    ("call", "keyword", "hint"),
    [
        (lambda **x: attention(X, X, X, **x), "dropout", "here it is dropout_p="),
        (lambda **x: attention(X, X, X, **x), "score_mod", "here it is softcap=.*functions are not supported yet"),
        (lambda **x: attention(X, X, X, **x), "cu_seqlens_q", "attention_varlen takes packed sequences"),
        (lambda **x: attention(X, X, X, **x), "attn_implementation", "here it is backend="),
        (lambda **x: fused_attn.attention_stats(X, X, **x), "dropout", ""),
        (lambda **x: scaled_dot_product_attention(X, X, X, **x), "softmax_scale", "here it is scale="),
        (lambda **x: scaled_dot_product_attention(X, X, X, **x), "causal", "did you mean is_causal="),
        (lambda **x: fused_attn.attention_decode(X, X, X, **x), "block_table", "here it is page_table="),
        (lambda **x: fused_attn.attention_decode(X, X, X, **x), "k", "here it is k_new="),
        (lambda **x: fused_attn.attention_decode(X, X, X, **x), "rotary_cos", r"here it is rotary=\(cos, sin, inter"),
        (lambda **x: scaled_dot_product_attention(X, X, X, **x), "k", "here it is key="),
        (lambda **x: scaled_dot_product_attention(X, X, X, **x), "mask", "here it is attn_mask="),
        (lambda **x: fused_attn.attention_decode(X, X, X, **x), "mask", "cache_seqlens= and cache_left.* tree_mask="),
        (lambda **x: fused_attn.attention_decode(X, X, X, **x), "attn_mask", "cache_seqlens= and cache_leftpad="),
        (lambda **x: fused_attn.attention_decode(X, X, X, **x), "bias", "alibi_slopes= is the only bias"),
        (lambda **x: fused_attn.attention_decode(X, X, X, **x), "key_cache", "here it is k_cache="),
        (lambda **x: attention(**x), "query", "here it is q="),
        (lambda **x: attention(X, **x), "value", "here it is v="),
        (lambda **x: scaled_dot_product_attention(**x), "q", "here it is query="),
        (lambda **x: fused_attn.attention_varlen(**x), "query", "here it is q="),
        (lambda **x: fused_attn.attention_decode(**x), "query", "here it is q="),
        (lambda **x: fused_attn.attention_map(**x), "key", "here it is k="),
        (lambda **x: fused_attn.warmup([(1, 1, 1, 1, 1, 1)], device="cpu", **x), "is_causal", "here it is causal="),
    ],
)
def test_keyword(call: Callable, keyword: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'" + (f"; .*{hint}" if hint else "$")):
        call(**{keyword: None})


@pytest.mark.parametrize("name", ("attention", "attention_varlen", "attention_decode", "attention_map"))
def test_required_arguments(name: str) -> None:
    function = getattr(fused_attn, name)
    assert inspect.signature(function).parameters["k_cache" if "decode" in name else "k"].default is inspect._empty
    with pytest.raises(TypeError, match=r"^q: expected a tensor, got NoneType None"):
        function()


MASK_OR_BIAS = r"mask= where it is bool \(True = may attend\), bias= where it is added to the scores"
TOO_MANY = [
    (lambda x: attention(X, X, X, x), "attention", "q, k and v", f"give {MASK_OR_BIAS}"),
    (
        lambda x: fused_attn.attention_varlen(X[0], X[0], X[0], STARTS, STARTS, x),
        "attention_varlen",
        "q, k, v, cu_seqlens_q and cu_seqlens_k",
        f"give max_seqlen_q= and max_seqlen_k= for lengths, {MASK_OR_BIAS}",
    ),
    (
        lambda x: fused_attn.attention_decode(X, X, X, x, x),
        "attention_decode",
        "q, k_cache and v_cache",
        "give k_new= and v_new= for new keys and values, cache_seqlens= for lengths",
    ),
    (lambda x: fused_attn.attention_stats(X, X, x), "attention_stats", "q and k", "give no v, .*mask= where"),
    (lambda x: fused_attn.attention_map(X, X, x), "attention_map", "q and k", "give no v, .*mask= where"),
]


@pytest.mark.parametrize(("call", "name", "positional", "hint"), TOO_MANY, ids=[x[1] for x in TOO_MANY])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (zeros(4, 4, dtype=torch.bool), r"torch.bool tensor of shape \(4, 4\)"),
        (X, "torch.float32 tensor of shape"),
        (None, "NoneType None"),
    ],
)
def test_positional_arguments_too_many(
    call: Callable, name: str, positional: str, hint: str, given: Any, said: str
) -> None:
    words = rf"^{name}\(\) takes {positional} by position, got {said}.* after them; {hint}"
    with pytest.raises(TypeError, match=words):
        call(given)


@pytest.mark.parametrize(
    "name", ("attention", "scaled_dot_product_attention", "attention_varlen", "attention_decode", "attention_stats",
             "attention_map")
)  # fmt: skip
def test_signatures_hide_the_catch_alls(name: str) -> None:
    """The parameters that catch what is not taken are no part of the signature."""
    kinds = {x.kind for x in inspect.signature(getattr(fused_attn, name)).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", ("key_mass", "entropy", "max_logit"))
def test_statistics_flags_must_be_bools(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a bool, got str 'yes'"):
        fused_attn.attention_stats(X, X, **{name: "yes"})
