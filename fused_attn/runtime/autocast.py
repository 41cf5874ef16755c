"""Autocast: inputs are cast once, at the start of a call; the rest of the call runs with autocast off."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..spec.torch_internals import any_autocast

UNCHANGED = contextlib.nullcontext()
CASTABLE = (torch.float16, torch.bfloat16, torch.float32)


def autocasts(device: str) -> bool:
    """True if autocast is on for a device type. torch raises for types without autocast, such as meta."""
    if not any_autocast():
        return False
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on, as torch casts the inputs of its own ops."""
    if not any_autocast():
        return tensors
    device = next((x.device.type for x in tensors if isinstance(x, Tensor)), None)
    if device is None or not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in CASTABLE else x for x in tensors)


def no_autocast(q: Tensor) -> contextlib.AbstractContextManager:
    """A context with autocast off, which would change the dtypes of products. Inputs have been cast before."""
    if any_autocast() and autocasts(q.device.type):
        return torch.autocast(q.device.type, enabled=False)
    return UNCHANGED
