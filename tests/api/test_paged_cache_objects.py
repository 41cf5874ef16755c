"""PagedKVCache prints, copies and pickles; its methods take numbers and lists of any type."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fused_attn import PagedKVCache


def filled() -> PagedKVCache:
    """Sequence 0 of 3 tokens, and 1, which shares them and has 2 more."""
    torch.manual_seed(0)
    cache = PagedKVCache(6, 2, 1, 4, 3, num_layers=2)
    cache.append([cache.allocate()], torch.randn(2, 1, 3, 1, 4), torch.randn(2, 1, 3, 1, 3))
    cache.append([cache.fork(0)], torch.randn(2, 1, 2, 1, 4), torch.randn(2, 1, 2, 1, 3))
    return cache


def held(cache: PagedKVCache) -> list[Any]:
    table, lengths = cache.batch(list(cache.sequences))
    return [cache.sequences, cache.pages_free, table.tolist(), lengths.tolist(), cache.k.nan_to_num().tolist()]


def test_repr() -> None:
    assert repr(filled()) == (
        "PagedKVCache(num_pages=6, page_size=2, num_kv_heads=1, head_dim=4, value_dim=3, num_layers=2,"
        " dtype=torch.float32, device='cpu'): 2 sequences, 2 pages free"
    )


@pytest.mark.parametrize(
    "copied", (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))), ids=("copy", "deepcopy", "pickle")
)
def test_copies_have_data_of_their_own(copied: Callable[[PagedKVCache], PagedKVCache]) -> None:
    cache = filled()
    before = held(cache)
    other = copied(cache)
    assert held(other) == before
    assert other.allocate() == cache.allocate() == 2  # no name comes twice
    other.append([1], torch.ones(2, 1, 1, 1, 4), torch.ones(2, 1, 1, 1, 3))
    other.free(0)
    cache.free(2)
    assert held(cache) == before and held(other) != before


def test_lists_of_sequences() -> None:
    cache = filled()
    assert cache.fork([1, 0, 1]) == [2, 3, 4] and cache.fork(()) == []
    assert [cache.length(x) for x in (2, 3, 4)] == [5, 3, 5]
    assert torch.equal(cache.batch([2, 3])[0], cache.batch([1, 0])[0])
    free = cache.pages_free
    cache.free((2, 3, 4))
    assert list(cache.sequences) == [0, 1] and cache.pages_free == free
    cache.free([0, 1])
    assert not cache.sequences and cache.pages_free == 6


@pytest.mark.parametrize("kind", (np.int8, np.uint16, torch.tensor), ids=lambda kind: kind.__name__)
def test_numbers_of_any_kind(kind: Callable[[int], Any]) -> None:
    cache = PagedKVCache(kind(6), kind(2), kind(1), kind(4), kind(3), num_layers=kind(2))
    assert repr(cache).startswith("PagedKVCache(num_pages=6, page_size=2, num_kv_heads=1, head_dim=4, value_dim=3")
    one = kind(cache.allocate())
    cache.append([one], torch.zeros(2, 1, 3, 1, 4), torch.zeros(2, 1, 3, 1, 3))
    assert cache.length(one) == 3
    _, lengths = cache.extend([one], kind(2))
    assert lengths.tolist() == [3] and cache.length(one) == 5
    cache.truncate(one, kind(1))
    assert cache.length(cache.fork(one)) == 1
    with pytest.raises(ValueError, match="sequences: expected each only once"):
        cache.batch([0, one])
    cache.free(one)
    assert list(cache.sequences) == [1]
