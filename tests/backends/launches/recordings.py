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


@pytest.mark.parametrize("name", ("dense", "transposed", "gaps", "expanded", "one row", "requires grad"))
def test_allocations_have_the_same_metadata(name: str) -> None:
    """Also those that a replay makes like an argument, or like each other."""
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": lambda x: x,
        "transposed": lambda x: x.transpose(1, 2),
        "gaps": lambda x: x[:, :, ::2],
        "expanded": lambda x: x[:1, :1].expand(3, 5, -1, -1),
        "one row": lambda x: x.transpose(1, 2)[:, :1],
        "requires grad": lambda x: x.clone().requires_grad_(),
    }

    def work(x: Tensor) -> tuple[Tensor, ...]:
        made = [torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape), x.new_empty(x.shape)]
        made += [x.new_empty(x.shape, dtype=torch.float64), torch.empty_like(x, dtype=torch.float64)]
        return *made, x.new_empty(x.shape[:3]), x.new_empty(x.shape[::-1]).permute(3, 2, 1, 0) * 1

    x, y = (layouts[name](tensors()[0]) for _ in range(2))
    _, kept = recording.record(work, (x,))
    assert kept is not None
    found, expected = kept((y,)), work(y)
    assert found is not None
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.requires_grad) == (b.shape, b.stride(), b.dtype, False)
    assert len({a.data_ptr() for a in (y, *found)}) == 1 + len(found)


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
