"""What can be recorded, and what cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fused_attn.backends.triton import launch_cache, portable, recording
from tests.backends.launches.stub import tensors


def test_unknown_arguments_are_left_to_triton() -> None:
    """Triton launches them each time, and nothing is recorded."""

    class Strange:
        pass

    kernel = portable._device_code().delta
    assert launch_cache.signature(kernel, (Strange(),), {"DV": 1, "BLOCK_DV": 1, "BLOCK_M": 1}, 0) is None
    recorder = recording.Recorder((), ())
    with pytest.raises(recording.NotRecordable):
        recorder.launched(None, kernel, 1, (Strange(),), {})


def test_work_that_cannot_be_recorded() -> None:
    q, _, _ = tensors()

    def works() -> Iterator[Callable[[Tensor], tuple[Tensor, ...]]]:
        yield lambda x: (torch.empty_like(x).add_(1),)  # writes
        yield lambda x: (x.new_empty(2).fill_(x[0, 0, 0, 0].item()),)
        yield lambda x: (x.new_full((2,), x.sum().item()),)  # reads a value
        yield lambda x: (x.nonzero(),)  # its shape depends on values
        yield lambda x: (torch.rand_like(x),)
        yield lambda x: (q,)  # not an argument

    for work in works():
        _, kept = recording.record(work, (q,))
        assert kept is not None and kept((q,)) is None


def test_operators_are_replayed_on_new_tensors() -> None:
    q, k, _ = tensors()

    def work(x: Tensor) -> tuple[Tensor, ...]:
        x.transpose(1, 2) * 2  # used by nothing
        made = x.new_empty_strided((3, 2), (1, 3))
        ranked = x.float().sort(descending=True)
        return made, torch.zeros_like(x), x[:1].exp(), ranked.values, torch.cat([ranked.indices, ranked.indices])

    results, kept = recording.record(work, (q,))
    for x in (q, k):
        assert kept is not None
        first, *found = kept((x,))
        made, *expected = work(x)
        assert all(map(torch.equal, found, expected)) and len(found) == 4
        assert (first.shape, first.stride(), first.dtype) == (made.shape, made.stride(), made.dtype)
        assert first.data_ptr() != results[0].data_ptr()
