"""Errors of flash-attn's functions: by their arguments' names, and RuntimeErrors too, which that library raises."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

NAMES = {"page_table": "block_table", "k_new": "k", "v_new": "v"}  # ours, and what is said there
FIRST = {"scale": "softmax_scale"}  # the same, where an error begins with it

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
            raise KINDS[type(error)](_renamed(str(error))) from error

    return call  # type: ignore[return-value]


def _renamed(message: str) -> str:
    message = re.sub(rf"^({'|'.join(FIRST)})\b", lambda found: FIRST[found[1]], message)
    return re.sub(rf"\b({'|'.join(NAMES)})\b", lambda found: NAMES[found[1]], message)
