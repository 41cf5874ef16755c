"""Errors of flash-attn's functions: by their arguments' names, and RuntimeErrors too, which that library raises."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

from ..api import keywords

NAMES = {"page_table": "block_table", "k_new": "k", "v_new": "v"}  # ours, and what is said there
FIRST = {"scale": "softmax_scale"}  # the same, where an error begins with it
LAYOUT = ('pass layout="bhsd"', "transpose(1, 2) q, k and v")  # our advice, and what there is to do here

# Keywords of fused_attn and others, as `keywords` has them.
WINDOW = ("window_size", "window_size=(left, right), where -1 is unbounded")
ROWS = ("return_attn_probs", "return_attn_probs=, which returns the log-sum-exp too")
ADVICE = keywords.ADVICE | {
    **dict.fromkeys(("scale", "sm_scale", "scaling"), ("softmax_scale", "softmax_scale=")),
    **dict.fromkeys(("window", "sliding_window"), WINDOW),
    **dict.fromkeys(("return_lse", "return_softmax_lse"), ROWS),
    **dict.fromkeys(("page_table", "block_tables"), ("block_table", "block_table=")),
    "return_attn_probs": ("return_softmax_lse", "return_softmax_lse="),
    "rotary": ("rotary_cos", "rotary_cos=, rotary_sin= and rotary_interleaved="),
    "k_new": ("k", "k="),
    "v_new": ("v", "v="),
}
ELSEWHERE = "flash-attn has none; fused_attn.attention takes mask=, bias=, sink=, seed= and backend="
PACKED = "flash_attn_varlen_func takes packed sequences"
INSTEAD = keywords.INSTEAD | {
    **dict.fromkeys(("mask", "attn_mask", "attention_mask", "key_padding_mask", "bias", "attn_bias"), ELSEWHERE),
    **dict.fromkeys(("sink", "sinks", "s_aux", "learnable_sink", "seed", "generator", "backend"), ELSEWHERE),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"), PACKED),
}

Function = TypeVar("Function", bound=Callable[..., Any])


class FlashAttnError(ValueError, RuntimeError):
    """A wrong argument: a ValueError as everywhere here, and a RuntimeError as in flash-attn."""


class FlashAttnTypeError(TypeError, RuntimeError):
    """An argument of a wrong type: a TypeError as everywhere here, and a RuntimeError as in flash-attn."""


KINDS: dict[type, type[Exception]] = {ValueError: FlashAttnError, TypeError: FlashAttnTypeError}


def as_flash_attn(function: Function) -> Function:
    """The function, whose errors are flash-attn's."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError) as error:
            if type(error) not in KINDS:
                raise
            raise KINDS[type(error)](_unknown(function, kwargs) or _renamed(str(error))) from error

    return call  # type: ignore[return-value]


def _unknown(function: Callable[..., Any], given: dict[str, Any]) -> str:
    """The error of a keyword that the function does not have, if one is given."""
    try:
        keywords.check(function, given, advice=ADVICE, instead=INSTEAD)
    except TypeError as error:
        return str(error)
    return ""


def _renamed(message: str) -> str:
    message = message.replace(*LAYOUT)
    message = re.sub(rf"^({'|'.join(FIRST)})\b", lambda found: FIRST[found[1]], message)
    return re.sub(rf"\b({'|'.join(NAMES)})\b", lambda found: NAMES[found[1]], message)
