"""Autocast: inputs are cast once, where they enter; inside a call it is off."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..spec.torch_internals import any_autocast

UNCHANGED = contextlib.nullcontext()
CASTABLE = (torch.float16, torch.bfloat16, torch.float32)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device. Those that have none, such as meta, raise when they are asked."""
    if not any_autocast():
        return False
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, q, k and v in its dtype, as torch's own ops take them."""
    if not any_autocast():
        return tensors
    device = next((x.device.type for x in tensors if isinstance(x, Tensor)), None)
    if device is None or not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in CASTABLE else x for x in tensors)


def no_autocast(q: Tensor) -> contextlib.AbstractContextManager:
    """Autocast has done its work on the inputs; inside, it would change the types of the products."""
    if any_autocast() and autocasts(q.device.type):
        return torch.autocast(q.device.type, enabled=False)
    return UNCHANGED
