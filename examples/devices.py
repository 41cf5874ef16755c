"""Selection of the examples' device, and of the backend of fused_attn that they run by name on it."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import fused_attn

# Why a backend that was forced by name can be slower than torch's SDPA.
SLOWER = {
    "triton": "the time includes compiling each kernel at its first call",
    "tiled": "it loops over tiles in PyTorch, while torch has one fused kernel",
    "reference": "it is the definition and stores all scores",
}


def available() -> list[str]:
    """The types of device of this machine, in order of preference."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
        "cpu": True,
    }
    return [kind for kind, found in there.items() if found]


def named(text: str) -> torch.device:
    """A `type` for add_argument that accepts devices of this machine."""
    kinds = available()
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in kinds:
        raise argparse.ArgumentTypeError(f"must be {' or '.join(kinds)} on this machine, not {text!r}")
    count = 1 if device.type in ("cpu", "mps") else torch.get_device_module(device).device_count()
    if (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"must be below {device.type}:{count} on this machine, not {text!r}")
    return device


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=named,
        default=available()[0],
        help="cuda, mps, xpu or cpu (default: the first of them on this machine, %(default)s)",
    )


def shown(device: torch.device) -> str:
    """The backend that an example runs by name: the Triton kernels on CUDA, otherwise tiled PyTorch."""
    return "triton" if device.type == "cuda" else "tiled"


def inference_dtype(device: torch.device) -> torch.dtype:
    """Half precision on CUDA. Examples that train stay in float32, which their checks need."""
    return torch.float16 if device.type == "cuda" else torch.float32


def wait(device: torch.device) -> None:
    """Synchronize the device, so that a clock read afterwards includes all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def note(forced: str, seconds: float, theirs: float, **call: Any) -> str:
    """One line for below a table of times: why a forced backend was slower than torch's SDPA, and the default backend.

    seconds, theirs: times of the forced backend and of SDPA. call: arguments of a timed `fused_attn.attention` call.
    """
    default = fused_attn.explain(**call).backend
    slower = f" and slower than torch's SDPA: {SLOWER[forced]}" if seconds > theirs and forced in SLOWER else ""
    choice = {forced: "the same", "sdpa": "sdpa, torch's own function"}.get(str(default), default)
    return f"{forced} is forced by name here{slower}. The default for these calls: {choice}."
