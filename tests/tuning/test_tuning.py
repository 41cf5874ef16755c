"""Kernel configurations: scopes, tables, and scopes that reach the backward in another thread."""

from __future__ import annotations

import doctest
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

import fused_attn
from fused_attn import tuning
from fused_attn.backends.triton import hopper, launcher
from fused_attn.tuning import Config

pytest.importorskip("triton")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """(kernel, BLOCK_M, BLOCK_N) of every launch."""
    seen: list[tuple[str, int, int]] = []
    real = launcher.launch

    def record(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
        seen.append((kernel.fn.__name__, options.get("BLOCK_M", 0), options.get("BLOCK_N", 0)))
        real(kernel, grid, *args, **options)

    monkeypatch.setattr(launcher, "launch", record)
    yield seen


def test_a_scope_reaches_the_backward_in_another_thread(launched: list[tuple[str, int, int]]) -> None:
    """A graph that is differentiated after its scope, by a thread that never saw it, keeps the scope's choice."""
    q = torch.randn(1, 1, 40, 16, requires_grad=True)
    with tuning.override(forward=Config(16, 32, 1, 1), dkdv=Config(32, 16, 1, 1), dq=Config(16, 16, 1, 1)):
        out = fused_attn.attention(q, q, q, backend="triton")
    thread = threading.Thread(target=lambda: out.sum().backward())
    thread.start()
    thread.join()
    tiles = {name: (m, n) for name, m, n in launched}
    assert tiles["forward_kernel"] == (16, 32)
    assert tiles["dkdv_kernel"] == (32, 16)
    assert tiles["dq_kernel"] == (16, 16)


def test_a_scope_ends() -> None:
    usual = tuning.config("forward", "sm_90", torch.bfloat16, 64, 64)
    with tuning.override(forward=Config(16, 16, 1, 1)):
        assert tuning.config("forward", "sm_90", torch.bfloat16, 64, 64) == Config(16, 16, 1, 1)
    assert tuning.config("forward", "sm_90", torch.bfloat16, 64, 64) == usual


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"BLOCK_M": 24}, "BLOCK_M"), ({"BLOCK_N": 8}, "BLOCK_N"), ({"num_warps": 3}, "num_warps"),
     ({"num_stages": 0}, "num_stages")],
)  # fmt: skip
def test_a_configuration_that_no_kernel_can_have_is_refused(changed: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Config(**{"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2} | changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq", "dbias", "delta", "decode"])
def test_every_architecture_has_every_head_dim(kernel: str, dtype: torch.dtype) -> None:
    for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter"):
        for dim in (1, 16, 40, 64, 96, 128, 192, 256, 512):
            for with_modifiers in (False, True):
                chosen = tuning.config(kernel, arch, dtype, dim, dim, with_modifiers=with_modifiers)
                assert chosen.BLOCK_M >= 16
                assert chosen.BLOCK_N >= 16


# ------------------------------------------------------------------------------------------- the Hopper kernels' gate


def refusals(**options: Any) -> list[str]:
    q = torch.randn(1, 2, 40, options.pop("d", 64), dtype=options.pop("dtype", torch.bfloat16))
    return fused_attn.explain(q, q, options.pop("v", q), **options).reasons.get("hopper", [])


def test_hopper_is_chosen_only_with_a_validated_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_machine", lambda device: [])
    (reason,) = refusals(causal=True)
    assert "hopper_forward has no validated row" in reason and "only by name" in reason
    assert refusals(causal=True, backend="hopper") == []
    unordered = refusals(causal=True, deterministic=False)
    assert [x.split()[0] for x in unordered] == ["hopper_forward", "hopper_backward"]
    monkeypatch.setattr(hopper, "validated", lambda *args, **words: True)
    q = torch.randn(1, 2, 40, 64, dtype=torch.bfloat16)
    assert fused_attn.explain(q, q, q).backend == "hopper"


def test_other_architectures_are_refused_before_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gluon ends the process where the target is not its own."""
    monkeypatch.setattr(hopper, "_device_code", lambda: pytest.fail("the kernels were asked for"))
    q = torch.randn(1, 2, 40, 64, dtype=torch.bfloat16)
    with pytest.raises(fused_attn.BackendError, match=r"compute capability 9\.0"):
        fused_attn.attention(q, q, q, backend="hopper")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"d": 80}, "head dim 80"),
        ({"d": 60}, "multiple of 8"),
        ({"v": torch.randn(1, 2, 40, 32, dtype=torch.bfloat16)}, "head dim 32"),
        ({"mask": torch.ones(40, 40, dtype=torch.bool)}, "tensor mask"),
        ({"mask": fused_attn.Mask.lengths(torch.tensor([9]))}, "bounds for each row"),
        ({"dropout_p": 0.5}, "dropout"),
        ({"d": 256, "bias": torch.zeros(40, 40, dtype=torch.bfloat16)}, "bias"),
        ({"v": torch.randn(1, 2, 64, 40, dtype=torch.bfloat16).mT}, "v's rows"),
    ],
)
def test_hopper_refusals_name_the_feature(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], word: str) -> None:
    monkeypatch.setattr(hopper, "_machine", lambda device: [])
    assert any(word in reason for reason in refusals(**options, backend="hopper"))


def test_examples() -> None:
    assert doctest.testmod(import_module("fused_attn.tuning.config"), raise_on_error=True).attempted >= 2
