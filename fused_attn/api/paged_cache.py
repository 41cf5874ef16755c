"""Keys and values of growing sequences, in pages: what `attention_decode` reads, and who owns which page.

A page holds `page_size` places. A sequence is a list of pages, all full but the last; a page may be held by several
sequences, which then have the same tokens in it, and is free again when nobody holds it. Before a sequence writes into
a page that others hold too, it takes a copy of its own, so what is shared never changes. Kwon et al., "Efficient memory
management for large language model serving with PagedAttention", 2023.

Who holds what is plain Python on the host; keys and values stay on the device.
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
    """More pages are wanted than are free. The cache is as it was before the call."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(wanted, free)
        self.wanted, self.free = wanted, free

    def __str__(self) -> str:
        return f"the cache is full: {self.wanted} pages are wanted and {self.free} are free"


@dataclass
class _Held:
    """A sequence: ceil(length / page_size) pages, in order."""

    name: int
    pages: list[int]
    length: int


class PagedKVCache:
    """A pool of pages for the keys and values of many sequences, which grow, share their beginnings, and end.

    `k` (num_layers, num_pages, page_size, num_kv_heads, head_dim) and `v` (..., value_dim) hold the data; `k[layer]`
    and `v[layer]` are the caches that `attention_decode` takes, with what `batch` or `extend` returns. All layers of a
    sequence lie in the same pages. A sequence is an int that `allocate` or `fork` returned; no int comes twice.

    Tokens come in by `append`, which writes keys and values that are known; or by `extend`, which only makes room, for
    `attention_decode(k_new=..., v_new=...)` to write into, layer by layer. Until then that room holds anything.

    Args:
        num_pages, page_size: places for num_pages * page_size tokens in all. Small pages waste less at the end of each
            sequence, and make longer tables.
        num_kv_heads, head_dim, value_dim: of one token's keys and values; value_dim None is head_dim.
        num_layers: as many caches that share one table.
        dtype, device: of k and v; float16, bfloat16, float32 or float64. None is torch's default.

    Raises:
        CacheFullError (a RuntimeError): says how many pages are wanted and how many are free. ValueError, TypeError: a
        wrong argument, by name. None of them changes anything.

    One thread at a time: sequences of one cache depend on each other. copy and deepcopy give a cache with data of its
    own; pickle keeps data and sequences.

    Two continuations of one prompt, 8 query heads, one layer:

    >>> import torch, fused_attn
    >>> cache = fused_attn.PagedKVCache(num_pages=8, page_size=4, num_kv_heads=2, head_dim=16)
    >>> one = cache.allocate()
    >>> cache.append([one], torch.randn(1, 6, 2, 16), torch.randn(1, 6, 2, 16))  # a prompt of 6 tokens: 2 pages
    >>> two = cache.fork(one)  # the same tokens, in the same pages
    >>> for _ in range(3):  # a token more for both, each time
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
        places = (layers, pages, self.page_size, heads)
        with torch.inference_mode(False):  # else a cache made in inference mode could not be written outside it
            self.k = torch.empty(*places, key_dim, dtype=dtype, device=device)
            self.v = torch.empty(*places, value_dim, dtype=dtype, device=device)
        self._held: dict[int, _Held] = {}
        self._next = 0  # the name of the next sequence
        self._holders = [0] * pages  # how many sequences hold each page
        self._free = list(reversed(range(pages)))

    def __repr__(self) -> str:
        layers, pages, page, heads, dim = self.k.shape
        return (
            f"PagedKVCache(num_pages={pages}, page_size={page}, num_kv_heads={heads}, head_dim={dim},"
            f" value_dim={self.v.shape[-1]}, num_layers={layers}, dtype={self.k.dtype}, device={str(self.k.device)!r}):"
            f" {len(self._held)} sequences, {self.pages_free} pages free"
        )

    def __copy__(self) -> PagedKVCache:
        """Two caches that shared their data would write into each other's pages."""
        return copy.deepcopy(self)

    @property
    def sequences(self) -> KeysView[int]:
        """The sequences there are."""
        return self._held.keys()

    @property
    def pages_free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def length(self, sequence: int) -> int:
        """How many tokens a sequence has."""
        return self._find(sequence).length

    def allocate(self) -> int:
        """A new sequence, without tokens or pages."""
        return self._add([], 0)

    @overload
    def fork(self, sequence: int) -> int: ...
    @overload
    def fork(self, sequence: Sequence[int]) -> list[int]: ...
    def fork(self, sequence: int | Sequence[int]) -> int | list[int]:
        """A new sequence with all tokens of another, in the same pages. Nothing is copied until one of them grows.

        Of a list or tuple of sequences, each as often as it stands there, a list of new ones.
        """
        if isinstance(sequence, (list, tuple)):
            return [self._fork(x) for x in [self._find(x) for x in sequence]]
        return self._fork(self._find(sequence))

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence, such as those that speculation got wrong."""
        found = self._find(sequence)
        length = _count("length", length, 0)
        if length > found.length:
            raise ValueError(f"length: expected at most the sequence's {found.length}, got {length}")
        self._truncate(found, length)

    def free(self, sequence: int | Sequence[int]) -> None:
        """End a sequence, or each of a list or tuple; pages that no other sequence holds are free again."""
        one = not isinstance(sequence, (list, tuple))
        for found in [self._find(sequence)] if one else self._find_all(sequence):
            self._truncate(found, 0)
            del self._held[found.name]

    def batch(self, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(page_table (B, pages), cache_seqlens (B,)), int32, as `attention_decode` takes them for these sequences.

        pages is that of the longest sequence; shorter rows are filled up with 0, which nobody reads: the length ends
        before it.
        """
        found = self._find_all(sequences)
        return self._table(found), self._integers([x.length for x in found])

    def extend(self, sequences: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """Make room for `tokens` more in each of the sequences, to be written by `attention_decode(k_new=..., ...)`.

        Returns (page_table, cache_seqlens) as `batch` does, the table with the new room and the lengths without it:
        what `attention_decode` takes with `k_new` and `v_new` (B, tokens, num_kv_heads, ...), once for each layer.
        """
        found = self._find_all(sequences)
        tokens = _count("tokens", tokens, 0)
        shared = self._to_copy(found) if tokens else []
        wanted = len(shared) + sum(self._pages_of(x.length + tokens) - len(x.pages) for x in found)
        if wanted > len(self._free):
            raise CacheFullError(wanted, len(self._free))
        self._own_last_page(shared)
        before = self._integers([x.length for x in found])
        for x in found:
            x.length += tokens
            x.pages += [self._take() for _ in range(self._pages_of(x.length) - len(x.pages))]
        return self._table(found), before

    def append(self, sequences: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Add T tokens to each of B sequences; each layer takes one scatter for k and one for v.

        k: (num_layers, B, T, num_kv_heads, head_dim), or without its first dimension where there is one layer. v: the
        same with value_dim. Both of the cache's dtype and device.
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

    # --- who holds what

    def _add(self, pages: list[int], length: int) -> int:
        name = self._next
        self._next += 1
        self._held[name] = _Held(name, pages, length)
        return name

    def _fork(self, found: _Held) -> int:
        for page in found.pages:
            self._holders[page] += 1
        return self._add(found.pages.copy(), found.length)

    def _truncate(self, found: _Held, length: int) -> None:
        found.length = length
        while len(found.pages) > self._pages_of(length):
            self._release(found.pages.pop())

    def _find(self, sequence: Any) -> _Held:
        allowed = f"one of the cache's {len(self._held)} sequences, an int that allocate() or fork() returned"
        found = self._held.get(as_int("sequence", sequence, allowed))
        if found is None:
            raise ValueError(f"sequence: expected {allowed}, got {describe(sequence)}")
        return found

    def _find_all(self, sequences: Any) -> list[_Held]:
        if not isinstance(sequences, (list, tuple)):
            raise TypeError(f"sequences: expected a list or tuple of sequences, got {describe(sequences)}")
        found = [self._find(x) for x in sequences]
        if len({x.name for x in found}) < len(found):
            raise ValueError(f"sequences: expected each only once, got {sequences}")
        return found

    def _pages_of(self, length: int) -> int:
        return -(-length // self.page_size)

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def _to_copy(self, growing: list[_Held]) -> list[_Held]:
        """Those whose last page has room and is held by others too: all its holders but one, if all of them grow."""
        leaving: Counter[int] = Counter()
        shared = []
        for x in growing:
            if x.length % self.page_size and self._holders[x.pages[-1]] - leaving[x.pages[-1]] > 1:
                leaving[x.pages[-1]] += 1
                shared.append(x)
        return shared

    def _own_last_page(self, shared: list[_Held]) -> None:
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

    def _table(self, found: list[_Held]) -> Tensor:
        width = max((len(x.pages) for x in found), default=0)
        return self._integers([x.pages + [0] * (width - len(x.pages)) for x in found]).view(len(found), width)

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


def _count(name: str, given: Any, least: int) -> int:
    x = as_int(name, given)
    if x < least:
        raise ValueError(f"{name}: must be >= {least}, got {x}")
    return x
