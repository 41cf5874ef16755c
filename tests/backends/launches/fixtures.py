"""The stub driver, for every test of this folder. A plugin and no conftest, because a conftest would be loaded in every
run of the tests, also without triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import triton.compiler
from triton.runtime import driver, jit

from fused_attn.api import varlen
from fused_attn.backends.triton import hopper, launch_cache, portable, settings
from fused_attn.runtime import call_cache
from fused_attn.spec import checks, decoding
from tests.backends.launches.stub import LAUNCHES, Machine, compile_nothing


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(triton.compiler, "compile", compile_nothing)
    monkeypatch.setattr(settings, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(settings, "interpreted", lambda: True)
    monkeypatch.setattr(hopper, "_machine", lambda device: [])
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 132)
    found = Machine()
    driver.set_active(found)
    for kernels in (*vars(portable._device_code()).values(), *vars(hopper._device_code()).values()):
        if isinstance(kernels, jit.JITFunction):
            kernels.device_caches.clear()
    for cache in (launch_cache._compiled, call_cache._calls, call_cache._replays, LAUNCHES):
        cache.clear()
    yield found


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, index tensors are not read."""
    for module in (checks, decoding, varlen):
        monkeypatch.setattr(module, "readable", lambda x: False)
