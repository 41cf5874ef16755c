"""Arguments that a function does not take: the error says what another library's keyword is called here.

A function declares `*extra: NoReturn` and `**unknown: NoReturn`, which type checkers let nobody fill; `closed` hides
them from `inspect.signature`. A right call pays for an empty tuple and an empty dict.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from ..spec.checks import describe

F = TypeVar("F", bound=Callable[..., Any])

WEIGHTS = "attention_map(q, k, ...) returns the weights of chosen rows and heads"
# Keywords of torch, flash-attn, FlexAttention, xFormers, JAX and Transformers, by the parameter that means the same.
NAMES = {
    "is_causal": "causal", "attn_bias": "bias", "softmax_scale": "scale", "sm_scale": "scale", "scaling": "scale",
    "logits_soft_cap": "softcap", "attn_logits_soft_cap": "softcap", "soft_cap": "softcap", "logit_cap": "softcap",
    "dropout": "dropout_p", "attn_dropout": "dropout_p", "dropout_rate": "dropout_p", "alibi": "alibi_slopes",
    "sinks": "sink", "s_aux": "sink", "learnable_sink": "sink", "return_softmax_lse": "return_lse",
    "tensor_layout": "layout", "qkv_format": "layout", "impl": "backend", "implementation": "backend",
    "attn_implementation": "backend", "block_table": "page_table", "leftpad_k": "cache_leftpad", "k": "k_new",
    "v": "v_new", "dropout_seed": "seed", "generator": "seed", "rng": "seed", "block_tables": "page_table",
    "num_blocks": "num_pages", "block_size": "page_size",
}  # fmt: skip
# The same, where there is more to say: (parameter, advice).
ADVICE = {
    "attn_mask": ("mask", "mask= where it is bool (True = may attend), bias= where it is added to the scores"),
    "attention_mask": ("mask", "mask= where it is bool (True = may attend), bias= where it is added to the scores"),
    "key_padding_mask": ("mask", "mask=Mask.lengths(lengths), or a bool mask (B, 1, 1, N), True = may attend"),
    "block_mask": ("mask", "mask=Mask.blocks(allowed, block)"),
    "mask_mod": ("mask", "mask=, a bool tensor or a Mask; functions are not built yet"),
    "score_mod": ("scale", "softcap=, bias=, alibi_slopes= or score=; functions are not built yet"),
    "window_size": ("window", "window=(left, right), where None is unbounded"),
    "sliding_window": ("window", "window=(left, right), where None is unbounded"),
    "rotary_cos": ("rotary", "rotary=(cos, sin, interleaved)"),
    "rotary_sin": ("rotary", "rotary=(cos, sin, interleaved)"),
    "rotary_interleaved": ("rotary", "rotary=(cos, sin, interleaved)"),
}
# What no keyword does here.
INSTEAD = {
    "enable_gqa": "grouped heads need no keyword: the key-value heads may be fewer and must divide the query heads",
    "cu_seqlens": "attention_varlen takes packed sequences",
    "cu_seqlens_q": "attention_varlen takes packed sequences",
    "cu_seqlens_k": "attention_varlen takes packed sequences",
    **dict.fromkeys(
        ("return_weights", "return_attn_weights", "return_attn_probs", "need_weights", "output_attentions"), WEIGHTS
    ),
}
# What a positional argument too many probably is, by function.
POSITIONAL = {
    "attention": ADVICE["attn_mask"][1],
    "attention_varlen": f"max_seqlen_q= and max_seqlen_k= for lengths, {ADVICE['attn_mask'][1]}",
    "attention_decode": "k_new= and v_new= for new keys and values, cache_seqlens= for lengths",
    "attention_stats": f"no v, for the weights do not depend on it; {ADVICE['attn_mask'][1]}",
    "attention_map": f"no v, for the weights do not depend on it; {ADVICE['attn_mask'][1]}",
}


def closed(function: F) -> F:
    """Hide `*extra` and `**unknown` from the function's signature."""
    signature = inspect.signature(function)
    named = [x for x in signature.parameters.values() if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)]
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return function


def check(
    function: Callable[..., Any],
    given: Iterable[str],
    extra: tuple = (),
    *,
    caller: str = "",
    advice: Mapping[str, tuple[str, str]] = ADVICE,
    instead: Mapping[str, str] = INSTEAD,
) -> None:
    """Raise TypeError for arguments that a function does not have: the first of the given keywords, or extra positional
    ones. caller: named instead.
    """
    has = inspect.signature(function).parameters
    for name in given:
        if name not in has:
            hint = _hint(name, has, advice, instead)
            raise TypeError(f"{caller or function.__name__}() got an unexpected keyword argument {name!r}{hint}")
    if extra:
        *most, last = (name for name, x in has.items() if x.kind is x.POSITIONAL_OR_KEYWORD)
        raise TypeError(
            f"{function.__name__}() takes {', '.join(most)} and {last} by position, got {describe(extra[0])} after"
            f" them; give {POSITIONAL[function.__name__]}"
        )


def _hint(name: str, has: Collection[str], advice: Mapping[str, tuple[str, str]], instead: Mapping[str, str]) -> str:
    ours, said = advice.get(name) or (NAMES.get(name, ""), f"{NAMES.get(name, '')}=")
    close = difflib.get_close_matches(name, has, n=1)
    if ours in has:
        return f"; here it is {said}"
    if name in instead:
        return f"; {instead[name]}"
    return f"; did you mean {close[0]}=?" if close else ""
