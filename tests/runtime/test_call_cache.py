"""The call cache: calls that look alike and are not, and training steps whose layers are at different stages of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_attn
from fused_attn import attention, attention_decode, attention_varlen, testing
from fused_attn.api import varlen
from fused_attn.backends.sdpa.kernel import Kernel
from fused_attn.runtime import call_cache
from fused_attn.spec import checks, decoding
from tests.parity import randn


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_calls", "_replays"):
        monkeypatch.setattr(call_cache, name, {})


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, index tensors are read under `debug` alone."""
    for module in (checks, decoding, varlen):
        monkeypatch.setattr(module, "readable", lambda x: checks._debugging.get())


OPTIONS: dict[str, dict[str, Any]] = {
    "sink": {"sink": torch.zeros(2)},
    "slopes": {"alibi_slopes": torch.ones(2)},
    "bias": {"bias": torch.zeros(1, 2, 16, 16)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ("triton", "tiled"))
def test_a_checkpoint_recomputes_what_it_saved(name: str, backend: str) -> None:
    """Its layers are the first, second and third call of one key, and are recomputed as later ones."""
    if reasons := testing.why_not("plain", backend):
        pytest.skip(reasons[0])
    options = OPTIONS[name] | {"mask": torch.ones(2, 1, 16, 16, dtype=torch.bool), "backend": backend}

    def gradient(layer: Any) -> Tensor:
        x = leaf = randn(2, 2, 16, 16).requires_grad_()
        for _ in range(3):
            x = layer(x)
        return torch.autograd.grad(x.sum(), leaf)[0]

    torch.manual_seed(0)
    found = gradient(lambda x: checkpoint(lambda y: attention(y, y, y, **options), x, use_reentrant=False))
    torch.manual_seed(0)
    assert torch.equal(found, gradient(lambda x: attention(x, x, x, **options)))


UNSOUND: dict[str, dict[str, Any]] = {
    "large scores": {"scale": 1000.0},
    "NaN": {"scale": 1.0},
    "a bias of -1e9": {"bias": torch.full((1, 1, 1, 16), -1e9)},
    "lengths": {"mask": fused_attn.Mask.lengths(torch.tensor([16, 9])), "scale": 1000.0},
    "padding": {"mask": (torch.arange(16) < torch.tensor([16, 9])[:, None])[:, None, None], "scale": 1000.0},
}


@pytest.mark.parametrize("name", UNSOUND)
def test_a_checkpoint_recomputes_what_torch_s_kernel_got_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer saves the tensors of torch's kernel once, then those of `tiled`, whatever the stage of its key."""
    runs = []
    forward = Kernel.forward
    monkeypatch.setattr(Kernel, "forward", lambda self, *args: runs.append(0) or forward(self, *args))

    def gradient(layer: Any) -> tuple[Tensor, int]:
        torch.manual_seed(0)
        x = leaf = randn(2, 2, 16, 16).requires_grad_()
        if name == "NaN":
            leaf.data[0, 0, 3, 5] = torch.nan
        runs.clear()
        for _ in range(4):
            x = layer(x)
        return torch.autograd.grad(x.nan_to_num().sum(), leaf)[0], len(runs)

    found, count = gradient(lambda x: checkpoint(lambda y: attention(y, y, y, **UNSOUND[name]), x, use_reentrant=False))
    expected, once = gradient(lambda x: attention(x, x, x, **UNSOUND[name]))
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert (count, once) == (8, 4)  # forward and recomputation of four layers


def packed(starts_q: Tensor, starts_k: Tensor) -> Any:
    q = torch.zeros(64, 2, 16)
    return attention_varlen(
        q, q, q, starts_q, starts_k, causal=True, max_seqlen_q=64, max_seqlen_k=64, backend="triton"
    )


@pytest.mark.skipif(bool(testing.why_not("ragged", "triton")), reason="triton does not run here")
def test_packed_batches_are_checked_at_each_call(unread: None) -> None:
    starts, wrong = torch.tensor([0, 30, 64], dtype=torch.int32), torch.tensor([0, 80, 64], dtype=torch.int32)
    for _ in range(4):
        packed(starts, starts)
    with pytest.raises(ValueError, match="alignment"):
        packed(starts, starts.clone())  # whether they are equal is not known
    with fused_attn.debug(), pytest.raises(ValueError, match="cu_seqlens_q"):
        packed(wrong, wrong)


@pytest.mark.parametrize("name", ("k_cache", "v_cache"))
def test_sparse_tensors_are_refused(name: str, unread: None) -> None:
    caches = {x: torch.zeros(1, 8, 2, 16) for x in ("k_cache", "v_cache")}
    new = torch.zeros(1, 1, 2, 16)
    caches[name] = caches[name].to_sparse()
    with pytest.raises(ValueError, match=f"{name}: expected a dense tensor"):
        attention_decode(new, **caches, cache_seqlens=torch.tensor([1]), k_new=new, v_new=new)
