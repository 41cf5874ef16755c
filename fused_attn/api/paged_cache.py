"""A paged KV cache for `attention_decode`, with reference-counted pages.

A page has `page_size` slots. A sequence is a list of pages, all full but the last. Sequences with the same tokens can
share a page; its reference count is the number of these sequences, and it is free at 0. A sequence copies a shared page
before it writes into it (copy on write). Kwon et al., "Efficient memory management for large language model serving
with PagedAttention", 2023.

Page lists and counts are Python objects on the host; keys and values stay on the device.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import KeysView, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from ..spec.checks import as_int, check_dense, check_shape, describe
from ..spec.decoding import Cache
from ..spec.problem import DTYPES


class CacheFullError(RuntimeError):
    """A call needs more pages than are free. The cache is unchanged."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(wanted, free)
        self.wanted, self.free = wanted, free

    def __str__(self) -> str:
        return f"the cache is full: {self.wanted} pages are wanted and {self.free} are free"


@dataclass
class _Entry:
    """A sequence of `length` tokens in ceil(length / page_size) pages, in order."""

    name: int
    pages: list[int]
    length: int


class PagedKVCache:
    """A pool of pages for the keys and values of many sequences, which can grow, share prefixes, and be freed.

    `k` (num_layers, num_pages, page_size, num_kv_heads, head_dim) and `v` (..., value_dim) hold the data; `k[layer]`
    and `v[layer]` are the caches that `attention_decode` takes, with what `batch` or `extend` returns. A sequence uses
    the same pages in all layers. It is identified by the int that `allocate` or `fork` returned, which is never reused.

    `append` writes the keys and values of new tokens. `extend` only reserves slots for new tokens, uninitialized, into
    which `attention_decode(k_new=..., v_new=...)` writes, layer by layer.

    Args:
        num_pages, page_size: the capacity is num_pages * page_size tokens. Small pages waste less memory at the end of
            each sequence, but need longer page tables.
        num_kv_heads, head_dim, value_dim: the shape of a token's keys and values; value_dim None is head_dim.
        num_layers: the number of caches that share one page table.
        dtype, device: those of k and v; float16, bfloat16, float32 or float64. None is torch's default.

    Raises:
        CacheFullError (a RuntimeError): more pages are needed than are free. ValueError, TypeError: an invalid
        argument, by name. The cache is unchanged after an error.

    Not thread-safe. copy and deepcopy give a cache with its own data; pickle keeps data and sequences.

    Two continuations of one prompt, 8 query heads, one layer:

    >>> import torch, fused_attn
    >>> cache = fused_attn.PagedKVCache(num_pages=8, page_size=4, num_kv_heads=2, head_dim=16)
    >>> one = cache.allocate()
    >>> cache.append([one], torch.randn(1, 6, 2, 16), torch.randn(1, 6, 2, 16))  # a prompt of 6 tokens: 2 pages
    >>> two = cache.fork(one)  # the same tokens, in the same pages
    >>> for _ in range(3):  # one more token for both, each time
    ...     page_table, cache_seqlens = cache.extend([one, two], 1)
    ...     q, k, v = torch.randn(2, 1, 8, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    ...     out = fused_attn.attention_decode(
    ...         q, cache.k[0], cache.v[0], page_table=page_table, cache_seqlens=cache_seqlens, k_new=k, v_new=v
    ...     )
    >>> out.shape, cache.length(two), cache.pages_free  # the first page is still shared
    (torch.Size([2, 1, 8, 16]), 9, 3)
    >>> cache.free(one)
    >>> cache.pages_free
    5
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        num_layers: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        layers = _count("num_layers", num_layers, 1)
        pages = _count("num_pages", num_pages, 1)
        self.page_size = _count("page_size", page_size, 1)
        heads = _count("num_kv_heads", num_kv_heads, 1)
        key_dim = _count("head_dim", head_dim, 1)
        value_dim = key_dim if value_dim is None else _count("value_dim", value_dim, 1)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        slots = (layers, pages, self.page_size, heads)
        with torch.inference_mode(False):  # a cache made in inference mode could not be written outside it
            self.k = torch.empty(*slots, key_dim, dtype=dtype, device=device)
            self.v = torch.empty(*slots, value_dim, dtype=dtype, device=device)
        self._entries: dict[int, _Entry] = {}
        self._next = 0  # the id of the next sequence
        self._references = [0] * pages  # reference count of each page
        self._free = list(reversed(range(pages)))

    def __repr__(self) -> str:
        layers, pages, page, heads, dim = self.k.shape
        return (
            f"PagedKVCache(num_pages={pages}, page_size={page}, num_kv_heads={heads}, head_dim={dim},"
            f" value_dim={self.v.shape[-1]}, num_layers={layers}, dtype={self.k.dtype}, device={str(self.k.device)!r}):"
            f" {len(self._entries)} sequences, {self.pages_free} pages free"
        )

    def __copy__(self) -> PagedKVCache:
        """A deep copy: two caches on the same data would write into each other's pages."""
        return copy.deepcopy(self)

    @property
    def sequences(self) -> KeysView[int]:
        """The ids of all sequences."""
        return self._entries.keys()

    @property
    def pages_free(self) -> int:
        """The number of free pages."""
        return len(self._free)

    def length(self, sequence: int) -> int:
        """The number of tokens of a sequence."""
        return self._find(sequence).length

    def allocate(self) -> int:
        """Add an empty sequence and return its id."""
        return self._add([], 0)

    @overload
    def fork(self, sequence: int) -> int: ...
    @overload
    def fork(self, sequence: Sequence[int]) -> list[int]: ...
    def fork(self, sequence: int | Sequence[int]) -> int | list[int]:
        """Add a sequence with all tokens of another one, in the same pages, and return its id.

        A shared page is copied when a sequence writes into it. A list or tuple of sequences gives a list of ids.
        """
        if isinstance(sequence, (list, tuple)):
            return [self._fork(x) for x in [self._find(x) for x in sequence]]
        return self._fork(self._find(sequence))

    def truncate(self, sequence: int, length: int) -> None:
        """Remove all but the first `length` tokens of a sequence, for example rejected speculative tokens."""
        entry = self._find(sequence)
        length = _count("length", length, 0)
        if length > entry.length:
            raise ValueError(f"length: expected at most the sequence's {entry.length}, got {length}")
        self._truncate(entry, length)

    def free(self, sequence: int | Sequence[int]) -> None:
        """Remove a sequence, or each of a list or tuple. Pages that no other sequence uses become free."""
        one = not isinstance(sequence, (list, tuple))
        for entry in [self._find(sequence)] if one else self._find_all(sequence):
            self._truncate(entry, 0)
            del self._entries[entry.name]

    def batch(self, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(page_table (B, pages), cache_seqlens (B,)), int32, the arguments of `attention_decode` for these sequences.

        pages is the page count of the longest sequence; shorter rows are padded with 0, which is never read.
        """
        entries = self._find_all(sequences)
        return self._table(entries), self._integers([x.length for x in entries])

    def extend(self, sequences: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """Reserve slots for `tokens` more tokens in each sequence, to be written by `attention_decode(k_new=..., ...)`.

        Returns (page_table, cache_seqlens) like `batch`, with the new slots in the table but not in the lengths: the
        arguments of `attention_decode` with `k_new` and `v_new` (B, tokens, num_kv_heads, ...), once per layer.
        """
        entries = self._find_all(sequences)
        tokens = _count("tokens", tokens, 0)
        shared = self._to_copy(entries) if tokens else []
        wanted = len(shared) + sum(self._pages_of(x.length + tokens) - len(x.pages) for x in entries)
        if wanted > len(self._free):
            raise CacheFullError(wanted, len(self._free))
        self._own_last_page(shared)
        before = self._integers([x.length for x in entries])
        for x in entries:
            x.length += tokens
            x.pages += [self._take() for _ in range(self._pages_of(x.length) - len(x.pages))]
        return self._table(entries), before

    def append(self, sequences: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Append T tokens to each of B sequences, with one scatter for k and one for v per layer.

        k: (num_layers, B, T, num_kv_heads, head_dim); the first dimension may be omitted for one layer. v: the same
        with value_dim. Both have the cache's dtype and device.
        """
        self._check_kv("k", k, len(self._find_all(sequences)), self.k)
        self._check_kv("v", v, len(sequences), self.v)
        tokens = k.shape[-3]
        if v.shape[-3] != tokens:
            raise ValueError(f"v: expected k's {tokens} tokens, got shape {tuple(v.shape)}")
        page_table, before = self.extend(sequences, tokens)
        new = (x if x.ndim == 5 else x[None] for x in (k, v))
        for k_layer, v_layer, *new_layer in zip(self.k, self.v, *new, strict=True):
            Cache(k_layer, v_layer, before, page_table).append(*new_layer)

    # --- ownership of pages

    def _add(self, pages: list[int], length: int) -> int:
        name = self._next
        self._next += 1
        self._entries[name] = _Entry(name, pages, length)
        return name

    def _fork(self, entry: _Entry) -> int:
        for page in entry.pages:
            self._references[page] += 1
        return self._add(entry.pages.copy(), entry.length)

    def _truncate(self, entry: _Entry, length: int) -> None:
        entry.length = length
        while len(entry.pages) > self._pages_of(length):
            self._release(entry.pages.pop())

    def _find(self, sequence: Any) -> _Entry:
        allowed = f"one of the cache's {len(self._entries)} sequences, an int that allocate() or fork() returned"
        entry = self._entries.get(as_int("sequence", sequence, allowed))
        if entry is None:
            raise ValueError(f"sequence: expected {allowed}, got {describe(sequence)}")
        return entry

    def _find_all(self, sequences: Any) -> list[_Entry]:
        if not isinstance(sequences, (list, tuple)):
            raise TypeError(f"sequences: expected a list or tuple of sequences, got {describe(sequences)}")
        entries = [self._find(x) for x in sequences]
        if len({x.name for x in entries}) < len(entries):
            raise ValueError(f"sequences: expected each only once, got {sequences}")
        return entries

    def _pages_of(self, length: int) -> int:
        return -(-length // self.page_size)

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._references[page] -= 1
        if not self._references[page]:
            self._free.append(page)

    def _to_copy(self, growing: list[_Entry]) -> list[_Entry]:
        """The sequences that must copy their last page: it is shared and not full. The last one to write keeps it."""
        leaving: Counter[int] = Counter()
        shared = []
        for x in growing:
            if x.length % self.page_size and self._references[x.pages[-1]] - leaving[x.pages[-1]] > 1:
                leaving[x.pages[-1]] += 1
                shared.append(x)
        return shared

    def _own_last_page(self, shared: list[_Entry]) -> None:
        if not shared:
            return
        old, new = [x.pages[-1] for x in shared], [self._take() for _ in shared]
        for data in (self.k, self.v):
            data[:, new] = data[:, old]
        for x, page in zip(shared, new, strict=True):
            self._release(x.pages[-1])
            x.pages[-1] = page

    # --- tensors

    def _integers(self, x: list) -> Tensor:
        return torch.tensor(x, dtype=torch.int32, device=self.k.device)

    def _table(self, entries: list[_Entry]) -> Tensor:
        width = max((len(x.pages) for x in entries), default=0)
        return self._integers([x.pages + [0] * (width - len(x.pages)) for x in entries]).view(len(entries), width)

    def _check_kv(self, name: str, x: Any, batch: int, data: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {describe(x)}")
        check_dense(name, x)
        layers, _, _, heads, dim = data.shape
        dims, sizes = f"B, T, num_kv_heads, {'head_dim' if name == 'k' else 'value_dim'}", (batch, None, heads, dim)
        if layers == 1 and x.ndim == 4:
            check_shape(name, x, dims, sizes)
        else:
            check_shape(name, x, f"num_layers, {dims}", (layers, *sizes))
        if x.dtype != data.dtype:
            raise TypeError(f"{name}: expected the cache's {data.dtype}, got {x.dtype}")
        if x.device != data.device:
            raise ValueError(f"{name}: expected the cache's device {data.device}, got {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: a cache has no backward; expected a tensor that requires no grad; detach() it")


def _count(name: str, value: Any, least: int) -> int:
    x = as_int(name, value)
    if x < least:
        raise ValueError(f"{name}: must be >= {least}, got {x}")
    return x
