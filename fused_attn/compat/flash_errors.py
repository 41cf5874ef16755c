"""Errors of flash-attn's functions: with its argument names, and as RuntimeErrors, which that library raises."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

from ..api import keywords

NAMES = {"page_table": "block_table", "k_new": "k", "v_new": "v"}  # fused_attn's argument: flash-attn's
FIRST = {"scale": "softmax_scale"}  # the same, replaced only at the beginning of a message
LAYOUT = ('pass layout="bhsd"', "transpose(1, 2) q, k and v")  # flash-attn has no layout argument

# Advice for keywords of other libraries, in the form of `api.keywords`.
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
    """A wrong argument: a ValueError as in fused_attn, and a RuntimeError as in flash-attn."""


class FlashAttnTypeError(TypeError, RuntimeError):
    """An argument of a wrong type: a TypeError as in fused_attn, and a RuntimeError as in flash-attn."""


KINDS: dict[type, type[Exception]] = {ValueError: FlashAttnError, TypeError: FlashAttnTypeError}


def as_flash_attn(function: Function) -> Function:
    """Wrap a function so that it raises the errors above."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError) as error:
            if type(error) not in KINDS:
                raise
            raise KINDS[type(error)](_unknown(function, kwargs) or _renamed(str(error))) from error

    return call  # type: ignore[return-value]


def _unknown(function: Callable[..., Any], kwargs: dict[str, Any]) -> str:
    """The message about a keyword that the function does not have, or an empty string."""
    try:
        keywords.check(function, kwargs, advice=ADVICE, instead=INSTEAD)
    except TypeError as error:
        return str(error)
    return ""


def _renamed(message: str) -> str:
    message = message.replace(*LAYOUT)
    message = re.sub(rf"^({'|'.join(FIRST)})\b", lambda match: FIRST[match[1]], message)
    return re.sub(rf"\b({'|'.join(NAMES)})\b", lambda match: NAMES[match[1]], message)
