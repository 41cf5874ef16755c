"""What the documents call the benchmark's cases and the features of the support matrix."""

from __future__ import annotations

CASES = {
    "plain": "plain",
    "causal": "causal",
    # bench.harness.samples.EVERYDAY
    "padding_bool_b11n": "padding, bool mask (B, 1, 1, N)",
    "padding_bool_b1mn": "padding, bool mask (B, 1, M, N)",
    "padding_float_b11n": "padding, float mask (B, 1, 1, N)",
    "padding_float_b1mn": "padding, float mask (B, 1, M, N)",
    "lengths_60": "padding, `Mask.lengths`",
    "random_bool_11mn": "random bool mask (1, 1, M, N)",
    "random_bool_bhmn": "random bool mask (B, H, M, N)",
    "bias_given_1hmn": "bias (1, H, M, N) without a gradient",
    "plain_384": "plain, 384 tokens",
    "plain_1536": "plain, 1536 tokens",
    "causal_512": "causal, 512 tokens",
    "gqa_512": "4 query heads a key-value head, 512 tokens",
    "cross_100_400": "100 queries on 400 keys",
    "one_query_300": "one query on 300 keys",
    "one_query_padding_300": "one query on 300 keys, padding mask",
    "one_query_gqa_4096": "one query on 4096 keys, 4 query heads a key-value head",
    "plain_512_bf16": "plain, 512 tokens, bfloat16",
    "plain_512_fp16": "plain, 512 tokens, float16",
    "padding_bf16_b11n": "padding, bool mask (B, 1, 1, N), bfloat16",
    # bench.harness.samples.MODIFIED
    "window_causal": "causal window of 256 keys",
    "window_sinks": "window of 256 keys and the first keys",
    "segments_causal": "sorted segments, causal",
    "runs": "unsorted segments",
    "blocks": "`Mask.blocks`",
    "lengths": "`Mask.lengths`",
    "prefix": "`Mask.prefix`",
    "gqa_8": "8 query heads a key-value head",
    "mask_11mn": "bool mask (1, 1, M, N)",
    "bias_1hmn": "learned bias (1, H, M, N)",
    "bias_11mn": "learned bias (1, 1, M, N)",
    "alibi_h": "ALiBi, learned slopes (H,)",
    "softcap": "softcap",
    "scale_heads": "learned scale (H,)",
    "sink": "learned sink (H,)",
    "lse": "differentiable log-sum-exp",
    "dropout": "dropout",
    "softmax1": "softmax1",
    "sigmoid": "sigmoid",
    "bilinear": "bilinear score",
    "cosine": "cosine score",
    "distance": "distance score",
}

FACTORS = {
    "score": "`score`",
    "normalizer": "`normalizer`",
    "mask": "masks",
    "bias": "`bias`",
    "alibi": "`alibi_slopes`",
    "softcap": "`softcap`",
    "sink": "`sink`",
    "dropout": "`dropout_p`",
    "group": "query heads for each key-value head",
    "Dv": "v's head dim",
    "scale": "`scale`",
    "lse": "`return_lse`",
    "dtype": "dtype",
    "layout": "layout",
}

# Of a factor's values; those that are not here are called as in the matrix. None is the value of a call without it.
VALUES: dict[tuple[str, str], str | None] = {
    **{(factor, "none"): None for factor in ("mask", "bias", "alibi", "softcap", "sink", "dropout")},
    ("lse", "no"): None,
    ("mask", "segments"): "sorted segments",
    ("mask", "blocks"): "blocks",
    ("mask", "tensor"): "bool tensor",
    ("mask", "causal & lengths & tensor"): "causal & lengths & bool tensor",
    ("bias", "bhmn"): "(B, H, M, N)",
    ("bias", "1hmn"): "(1, H, M, N)",
    ("bias", "11mn"): "(1, 1, M, N)",
    ("bias", "b11n"): "(B, 1, 1, N)",
    ("bias", "bhm1"): "(B, H, M, 1)",
    ("alibi", "h"): "(H,)",
    ("alibi", "bh"): "(B, H)",
    ("softcap", "tensor"): "tensor ()",
    ("sink", "h"): "(H,)",
    ("dropout", "0.3"): "> 0",
    ("scale", "tensor"): "tensor ()",
    ("scale", "h"): "tensor (H,)",
    ("Dv", "D"): "Dv = D",
    ("Dv", "other"): "Dv ≠ D",
    ("lse", "with gradient"): "with gradient",
    ("layout", "packed"): "varlen",
}


def value(factor: str, name: str) -> str | None:
    """A value of a factor in words, None for the value of a call without that feature."""
    return VALUES.get((factor, name), name)


def feature(factor: str, name: str) -> str:
    """A factor and its value, for a sentence."""
    return f"{FACTORS[factor]} {value(factor, name) or 'absent'}"
