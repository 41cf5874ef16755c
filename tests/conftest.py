"""Kernels run in Triton's repaired interpreter; the choice is made before anything imports triton."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
    from tests import interpreter

    interpreter.install()


@pytest.fixture
def nan_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a backend allocates holds NaN (or a large integer) until it is written."""

    def filled(allocate: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = allocate(*args, **kwargs)
            if x.is_floating_point():
                return x.fill_(torch.nan)
            return x if x.dtype == torch.bool or x.is_complex() else x.fill_(torch.iinfo(x.dtype).max)

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"),
                        (torch.Tensor, "new_empty_strided")):  # fmt: skip
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def pytest_collection_modifyitems(items: list) -> None:
    """Slow tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
