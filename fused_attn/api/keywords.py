"""Errors for unknown arguments, which name the keyword that corresponds to another library's keyword.

A function declares `*extra: NoReturn` and `**unknown: NoReturn`, which type checkers reject arguments for; `closed`
hides them from `inspect.signature`. A valid call costs an empty tuple and an empty dict.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from ..spec.checks import describe

F = TypeVar("F", bound=Callable[..., Any])

WEIGHTS = "attention_map(q, k, ...) returns the weights of chosen rows and heads"
# For each parameter, the keywords of other libraries with the same meaning.
NAMES = {
    "q": ("query",),
    "k": ("key",),
    "v": ("value",),
    "query": ("q",),
    "key": ("k",),
    "value": ("v",),
    "attn_mask": ("mask", "bias", "attn_bias", "attention_mask", "key_padding_mask"),
    "causal": ("is_causal",),
    "bias": ("attn_bias",),
    "scale": ("softmax_scale", "sm_scale", "scaling"),
    "softcap": ("logits_soft_cap", "attn_logits_soft_cap", "soft_cap", "logit_cap"),
    "dropout_p": ("dropout", "attn_dropout", "dropout_rate"),
    "seed": ("dropout_seed", "generator", "rng"),
    "alibi_slopes": ("alibi",),
    "sink": ("sinks", "s_aux", "learnable_sink"),
    "return_lse": ("return_softmax_lse",),
    "layout": ("tensor_layout", "qkv_format"),
    "backend": ("impl", "implementation", "attn_implementation"),
    "k_cache": ("key_cache",),
    "v_cache": ("value_cache",),
    "k_new": ("k",),
    "v_new": ("v",),
    "page_table": ("block_table", "block_tables"),
    "cache_leftpad": ("leftpad_k",),
    "num_pages": ("num_blocks",),
    "page_size": ("block_size",),
}
# Keywords that need more advice: (parameter, advice).
ADVICE = {
    "attn_mask": ("mask", "mask= where it is bool (True = may attend), bias= where it is added to the scores"),
    "attention_mask": ("mask", "mask= where it is bool (True = may attend), bias= where it is added to the scores"),
    "key_padding_mask": ("mask", "mask=Mask.lengths(lengths), or a bool mask (B, 1, 1, N), True = may attend"),
    "block_mask": ("mask", "mask=Mask.blocks(allowed, block)"),
    "mask_mod": ("mask", "mask=, a bool tensor or a Mask; functions are not supported yet"),
    "score_mod": ("scale", "softcap=, bias=, alibi_slopes= or score=; functions are not supported yet"),
    "window_size": ("window", "window=(left, right), where None is unbounded"),
    "sliding_window": ("window", "window=(left, right), where None is unbounded"),
    "rotary_cos": ("rotary", "rotary=(cos, sin, interleaved)"),
    "rotary_sin": ("rotary", "rotary=(cos, sin, interleaved)"),
    "rotary_interleaved": ("rotary", "rotary=(cos, sin, interleaved)"),
}
CACHED = (
    "cache_seqlens= and cache_leftpad= bound the keys of each sequence, window= those of a row, and tree_mask= selects"
    " among the new ones"
)
# Keywords without a parameter of the same meaning.
INSTEAD = {
    **dict.fromkeys(("mask", "attn_mask", "attention_mask", "key_padding_mask"), CACHED),
    **dict.fromkeys(("bias", "attn_bias"), "alibi_slopes= is the only bias over a cache"),
    "enable_gqa": "grouped heads need no keyword: the key-value heads may be fewer and must divide the query heads",
    "return_attn_probs": f"return_lse=True returns the log-sum-exp, and {WEIGHTS}",
    "cu_seqlens": "attention_varlen takes packed sequences",
    "cu_seqlens_q": "attention_varlen takes packed sequences",
    "cu_seqlens_k": "attention_varlen takes packed sequences",
    **dict.fromkeys(("return_weights", "return_attn_weights", "need_weights", "output_attentions"), WEIGHTS),
}
# For each function, the keywords that surplus positional arguments probably stand for.
POSITIONAL = {
    "attention": ADVICE["attn_mask"][1],
    "attention_varlen": f"max_seqlen_q= and max_seqlen_k= for lengths, {ADVICE['attn_mask'][1]}",
    "attention_decode": "k_new= and v_new= for new keys and values, cache_seqlens= for lengths",
    "attention_stats": f"no v, because the weights do not depend on it; {ADVICE['attn_mask'][1]}",
    "attention_map": f"no v, because the weights do not depend on it; {ADVICE['attn_mask'][1]}",
}


def closed(function: F) -> F:
    """Hide `*extra` and `**unknown` from the function's signature, and default its required arguments to None.

    Without the defaults, Python would report `attention(query=x)` as a call without q, k and v, before `check` could
    name the keyword q.
    """
    signature = inspect.signature(function)
    named = [x for x in signature.parameters.values() if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)]
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    positional = sum(x.kind is x.POSITIONAL_OR_KEYWORD for x in named)
    defaults = function.__defaults__ or ()
    function.__defaults__ = (None,) * (positional - len(defaults)) + defaults
    return function


def check(
    function: Callable[..., Any],
    keywords: Iterable[str],
    extra: tuple = (),
    *,
    caller: str = "",
    advice: Mapping[str, tuple[str, str]] = ADVICE,
    instead: Mapping[str, str] = INSTEAD,
) -> None:
    """Raise TypeError for the first unknown keyword, or for extra positional arguments. caller: the name to report."""
    has = inspect.signature(function).parameters
    for name in keywords:
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
    parameter, text = advice.get(name, ("", ""))
    if parameter in has:
        return f"; here it is {text}"
    for parameter in has:
        if name in NAMES.get(parameter, ()):
            return f"; here it is {parameter}="
    if name in instead:
        return f"; {instead[name]}"
    close = difflib.get_close_matches(name, has, n=1)
    return f"; did you mean {close[0]}=?" if close else ""
