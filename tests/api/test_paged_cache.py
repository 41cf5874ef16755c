"""PagedKVCache under random operations, compared with a dict of lists; and its refusals."""

from __future__ import annotations

import doctest
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from fused_attn import CacheFullError, PagedKVCache, attention_decode
from fused_attn.api import paged_cache as module

LAYERS, PAGES, HEADS, D, DV = 2, 12, 2, 4, 3


def small(page_size: int = 4, layers: int = LAYERS, **changed: Any) -> PagedKVCache:
    return PagedKVCache(PAGES, page_size, HEADS, D, DV, num_layers=layers, **changed)


def drawn(cache: PagedKVCache, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values to append, (layers, batch, tokens, heads, dim); no number comes twice, as good as surely."""
    places = (cache.k.shape[0], batch, tokens, HEADS)
    return torch.randn(*places, D, dtype=cache.k.dtype), torch.randn(*places, DV, dtype=cache.k.dtype)


def contents(cache: PagedKVCache, sequence: int) -> tuple[Tensor, Tensor]:
    """(layers, length, heads, dim): what the table of a sequence leads to."""
    (pages,), (length,) = cache.batch([sequence])
    k, v = (x[:, pages.long()].flatten(1, 2)[:, :length] for x in (cache.k, cache.v))
    return k, v


def books(cache: PagedKVCache) -> Any:
    """All that the cache knows of its pages and sequences, as a value to compare."""
    held = {name: (tuple(x.pages), x.length) for name, x in cache._entries.items()}
    return held, tuple(cache._references), tuple(cache._free)


def snapshot(cache: PagedKVCache) -> tuple[Any, Tensor, Tensor]:
    return books(cache), cache.k.clone(), cache.v.clone()


def unchanged(cache: PagedKVCache, before: tuple[Any, Tensor, Tensor]) -> bool:
    """Bit for bit; NaN has bits too."""
    same = (
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in ((cache.k, before[1]), (cache.v, before[2]))
    )
    return books(cache) == before[0] and all(same)


# ------------------------------------------------------------------------------------------------- random operations


class Operations(RuleBasedStateMachine):
    """The model is, for each sequence, the list of its tokens, by number; keys and values hold a row for each number.

    A number is that of a writing, so two sequences share a token just if one was forked from the other.
    """

    count: ClassVar[Counter[str]] = Counter()  # of operations, over all runs

    @initialize(page_size=st.sampled_from((1, 2, 4)))
    def begin(self, page_size: int) -> None:
        torch.manual_seed(page_size)
        self.cache = small(page_size)
        self.model: dict[int, list[int]] = {}
        self.keys, self.values = torch.empty(LAYERS, 0, HEADS, D), torch.empty(LAYERS, 0, HEADS, DV)

    def one(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model)))

    def some(self, data: st.DataObject, least: int = 1) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=least, max_size=4, unique=True))

    def noted(self, sequences: list[int], k: Tensor, v: Tensor) -> None:
        """The model gets what was written."""
        for b, name in enumerate(sequences):
            first = self.keys.shape[1]
            self.model[name] += range(first, first + k.shape[2])
            self.keys, self.values = torch.cat((self.keys, k[:, b]), 1), torch.cat((self.values, v[:, b]), 1)

    def grown(self, sequences: list[int], tokens: int) -> bool:
        """Whether there is room; where there is none, the error says so and nothing has changed."""
        size = self.cache.page_size
        held = {name: len(self.model[name]) for name in sequences}
        fresh = sum(-(-(n + tokens) // size) - -(-n // size) for n in held.values())
        partial = Counter(self.cache._entries[name].pages[-1] for name, n in held.items() if n % size and tokens)
        copies = sum(min(n, self.cache._references[page] - 1) for page, n in partial.items())
        if fresh + copies <= self.cache.pages_free:
            return True
        before = snapshot(self.cache)
        with pytest.raises(CacheFullError) as full:
            self.cache.append(sequences, *drawn(self.cache, len(sequences), tokens))
        assert (full.value.wanted, full.value.free) == (fresh + copies, self.cache.pages_free)
        assert unchanged(self.cache, before)
        self.count["full"] += 1
        return False

    @precondition(lambda self: len(self.model) < 8)
    @rule()
    def allocate(self) -> None:
        self.count["allocate"] += 1
        name = self.cache.allocate()
        assert name not in self.model
        self.model[name] = []

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tokens=st.integers(0, 7))
    def append(self, data: st.DataObject, tokens: int) -> None:
        self.count["append"] += 1
        sequences = self.some(data, 0)
        if self.grown(sequences, tokens):
            k, v = drawn(self.cache, len(sequences), tokens)
            self.cache.append(sequences, k, v)
            self.noted(sequences, k, v)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tokens=st.integers(1, 3))
    def step(self, data: st.DataObject, tokens: int) -> None:
        """As a model does: room once, then each layer writes and attends."""
        self.count["step"] += 1
        sequences = self.some(data)
        if self.grown(sequences, tokens):
            page_table, before = self.cache.extend(sequences, tokens)
            k, v = drawn(self.cache, len(sequences), tokens)
            q = torch.randn(LAYERS, len(sequences), tokens, 2 * HEADS, D)
            self.noted(sequences, k, v)
            for i in range(LAYERS):
                out = attention_decode(
                    q[i], self.cache.k[i], self.cache.v[i], page_table=page_table, cache_seqlens=before, k_new=k[i],
                    v_new=v[i], causal=True, backend="tiled",
                )  # fmt: skip
                assert torch.equal(out, self.dense(sequences, i, q[i]))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), rows=st.integers(1, 3), layer=st.integers(0, LAYERS - 1))
    def attend(self, data: st.DataObject, rows: int, layer: int) -> None:
        self.count["attend"] += 1
        sequences = self.some(data)
        q = torch.randn(len(sequences), rows, 2 * HEADS, D)
        page_table, lengths = self.cache.batch(sequences)
        out = attention_decode(
            q, self.cache.k[layer], self.cache.v[layer], page_table=page_table, cache_seqlens=lengths, causal=True,
            backend="tiled",
        )  # fmt: skip
        assert torch.equal(out, self.dense(sequences, layer, q))

    def dense(self, sequences: list[int], layer: int, q: Tensor) -> Tensor:
        """The same attention over the model's tokens, side by side in memory, NaN behind them.

        tiled takes one sequence after another, its keys gathered or sliced into one tensor: the same numbers in the
        same shape, so the answer must have the same bits.
        """
        lengths = torch.tensor([len(self.model[name]) for name in sequences], dtype=torch.int32)
        k, v = (torch.full((len(sequences), int(lengths.max()), HEADS, d), torch.nan) for d in (D, DV))
        for b, name in enumerate(sequences):
            numbers = self.model[name]
            k[b, : len(numbers)], v[b, : len(numbers)] = self.keys[layer, numbers], self.values[layer, numbers]
        return attention_decode(q, k, v, cache_seqlens=lengths, causal=True, backend="tiled")

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.count["fork"] += 1
        name = self.one(data)
        free = self.cache.pages_free
        new = self.cache.fork(name)
        assert new not in self.model and self.cache.pages_free == free
        self.model[new] = self.model[name].copy()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        self.count["truncate"] += 1
        name = self.one(data)
        length = data.draw(st.integers(0, len(self.model[name])))
        self.cache.truncate(name, length)
        del self.model[name][length:]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.count["free"] += 1
        name = self.one(data)
        self.cache.free(name)
        del self.model[name]
        with pytest.raises(ValueError, match="sequence: expected one of"):
            self.cache.length(name)

    @invariant()
    def nothing_leaks(self) -> None:
        """Each page is held as often as the tables say, or is free, once."""
        cache = self.cache
        held = Counter(page for x in cache._entries.values() for page in x.pages)
        assert cache._references == [held[page] for page in range(PAGES)]
        assert sorted([*held, *cache._free]) == list(range(PAGES))
        assert cache.pages_free == len(cache._free)
        assert cache.sequences == self.model.keys()

    @invariant()
    def nothing_is_aliased(self) -> None:
        """Two tokens lie in one place just if they are the same writing; and full pages are never copied."""
        size = self.cache.page_size
        places: dict[tuple[int, int], int] = {}
        full: dict[tuple[int, ...], int] = {}
        for name, numbers in self.model.items():
            pages = self.cache._entries[name].pages
            assert len(set(pages)) == len(pages) == -(-len(numbers) // size)
            for i, number in enumerate(numbers):
                assert places.setdefault((pages[i // size], i % size), number) == number
            for i in range(len(numbers) // size):
                assert full.setdefault(tuple(numbers[i * size : (i + 1) * size]), pages[i]) == pages[i]

    @invariant()
    def contents_are_the_models(self) -> None:
        """As `batch` leads to them, for all at once."""
        names, size = list(self.model), self.cache.page_size
        assert [self.cache.length(name) for name in names] == [len(self.model[name]) for name in names]
        table, lengths = (x.tolist() for x in self.cache.batch(names))
        assert lengths == [len(self.model[name]) for name in names]
        numbers = [number for name in names for number in self.model[name]]
        rows = [pages[i // size] * size + i % size for pages, n in zip(table, lengths, strict=True) for i in range(n)]
        for data, expected in ((self.cache.k, self.keys), (self.cache.v, self.values)):
            assert torch.equal(data.flatten(1, 2)[:, rows], expected[:, numbers])

    @invariant()
    def free_pages_are_poison(self) -> None:
        """Whoever gets one of them and reads what it did not write reads NaN."""
        for data in (self.cache.k, self.cache.v):
            data[:, self.cache._free] = torch.nan


OPERATIONS = ("allocate", "append", "step", "attend", "fork", "truncate", "free")
SETTINGS = settings(
    stateful_step_count=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("sequences", "least"), ((30, 50), pytest.param(150, 500, marks=pytest.mark.nightly)))
def test_random_operations(sequences: int, least: int) -> None:
    Operations.count.clear()
    run_state_machine_as_test(Operations, settings=settings(SETTINGS, max_examples=sequences))
    done = {name: Operations.count[name] for name in (*OPERATIONS, "full")}
    assert sum(done[name] for name in OPERATIONS) >= 66 * sequences, done
    assert min(done.values()) >= least, done


# ----------------------------------------------------------------------------------------------------- one at a time


def test_pages() -> None:
    """Who takes how many; the last one to write into a shared page keeps it, and the others take what was in it."""
    cache = small(4)
    one, prompt, more = cache.allocate(), drawn(cache, 1, 6), drawn(cache, 3, 1)
    cache.append([one], *prompt)
    assert cache.pages_free == PAGES - 2
    two, three = cache.fork(one), cache.fork(one)
    assert cache.pages_free == PAGES - 2
    cache.append([one, two, three], *more)  # two copies of the second page; the third stays in place
    assert cache.pages_free == PAGES - 4
    table, lengths = cache.batch([one, two, three])
    assert table.dtype == lengths.dtype == torch.int32 and lengths.tolist() == [7, 7, 7]
    assert len(table[:, 0].unique()) == 1 and len(table[:, 1].unique()) == 3
    for b, name in enumerate((one, two, three)):
        for found, first, last in zip(contents(cache, name), prompt, more, strict=True):
            assert torch.equal(found, torch.cat((first[:, 0], last[:, b]), 1))
    for name in (one, two):
        cache.free(name)
    assert cache.pages_free == PAGES - 2 and list(cache.sequences) == [three]
    cache.truncate(three, 4)
    assert cache.pages_free == PAGES - 1
    cache.append([cache.fork(three)], *drawn(cache, 1, 1))  # a full page is written no more, so it stays shared
    assert cache.pages_free == PAGES - 2


def test_page_tables_are_padded_with_a_valid_page() -> None:
    cache = small(4)
    names = [cache.allocate() for _ in range(3)]
    cache.append(names[:1], *drawn(cache, 1, 9))
    cache.append(names[2:], *drawn(cache, 1, 1))
    table, lengths = cache.batch(names)
    assert table.shape == (3, 3) and lengths.tolist() == [9, 0, 1]
    assert table[1].tolist() == [0, 0, 0] and table[2, 1:].tolist() == [0, 0]
    assert len({*table[0].tolist(), table[2, 0].item()}) == 4
    assert [x.shape for x in cache.batch([])] == [(0, 0), (0,)]


def test_extend_reserves_pages() -> None:
    """extend says the lengths before, and where the new tokens go; what was there stays."""
    cache = small(4)
    one = cache.allocate()
    cache.append([one], *drawn(cache, 1, 3))
    before = contents(cache, one)
    table, lengths = cache.extend([one], 6)
    assert lengths.tolist() == [3] and cache.length(one) == 9 and table.shape == (1, 3)
    assert torch.equal(table, cache.batch([one])[0])
    assert all(torch.equal(x, y[:, :3]) for x, y in zip(before, contents(cache, one), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_layer(dtype: torch.dtype) -> None:
    cache = PagedKVCache(3, 2, HEADS, D, dtype=dtype)
    assert cache.k.shape == cache.v.shape == (1, 3, 2, HEADS, D) and cache.k.dtype == cache.v.dtype == dtype
    one, two = cache.allocate(), cache.allocate()
    k, v = torch.randn(2, 2, 1, HEADS, D).to(dtype)
    cache.append([two, one], k, v)
    cache.append([one], k[None, :1], v[None, :1])  # and may have it
    for name, own in ((one, [1, 0]), (two, [0])):
        assert all(torch.equal(x[0], y[own, 0]) for x, y in zip(contents(cache, name), (k, v), strict=True))


def test_created_in_inference_mode() -> None:
    with torch.inference_mode():
        cache = small()
        one = cache.allocate()
        cache.append([one], *drawn(cache, 1, 3))
    cache.append([cache.fork(one)], *drawn(cache, 1, 3))
    with torch.inference_mode():
        cache.append([one], *drawn(cache, 1, 3))


def test_keys_that_require_grad_are_refused() -> None:
    cache, (k, v) = small(), drawn(small(), 1, 2)
    one = cache.allocate()
    with pytest.raises(ValueError, match="v: a cache has no backward"):
        cache.append([one], k, v.requires_grad_())
    with torch.no_grad():
        cache.append([one], k, v)
    assert not cache.v.requires_grad


def test_a_full_cache() -> None:
    """The named error, its numbers, and a copy that nothing is left for; then it fits."""
    cache = small(4)
    one = cache.allocate()
    cache.append([one], *drawn(cache, 1, 4 * PAGES - 2))
    two, before = cache.fork(one), snapshot(cache)
    for grow in (lambda: cache.append([two], *drawn(cache, 1, 1)), lambda: cache.extend([one, two], 3)):
        with pytest.raises(CacheFullError, match=r"1 pages are wanted|3 pages are wanted") as full:
            grow()
        assert full.value.free == 0 and isinstance(full.value, RuntimeError) and unchanged(cache, before)
    again = pickle.loads(pickle.dumps(full.value))
    assert str(again) == "the cache is full: 3 pages are wanted and 0 are free" and again.wanted == 3
    cache.free(one)
    cache.append([two], *drawn(cache, 1, 2))
    assert cache.pages_free == 0


K, V = torch.zeros(LAYERS, 1, 2, HEADS, D), torch.zeros(LAYERS, 1, 2, HEADS, DV)

LONG_K, LONG_V = torch.zeros(LAYERS, 1, 5, HEADS, D), torch.zeros(LAYERS, 1, 5, HEADS, DV)
KEYS = "(num_layers, B, T, num_kv_heads, head_dim)"
VALUES = "(num_layers, B, T, num_kv_heads, value_dim)"
HEADS_FIRST = "it looks heads-first: transpose(2, 3) it"
NO_SEQUENCE = "sequence: expected one of the cache's 1 sequences, an int that allocate() or fork() returned"

# what is done to a cache whose one sequence is 0, of 6 tokens; the error, and what it says
WRONG: list[tuple[Callable[[PagedKVCache], Any], type[Exception], str]] = [
    (lambda c: c.free(1), ValueError, f"{NO_SEQUENCE}, got int 1"),
    (lambda c: c.free([0, 1]), ValueError, f"{NO_SEQUENCE}, got int 1"),
    (lambda c: c.free([0, 0]), ValueError, "sequences: expected each only once, got [0, 0]"),
    (lambda c: c.fork(-1), ValueError, f"{NO_SEQUENCE}, got int -1"),
    (lambda c: c.fork([0, 7]), ValueError, f"{NO_SEQUENCE}, got int 7"),
    (lambda c: c.length("a"), TypeError, f"{NO_SEQUENCE}, got str 'a'"),
    (lambda c: c.length(False), TypeError, f"{NO_SEQUENCE}, got bool False"),
    (lambda c: c.truncate([0], 0), TypeError, f"{NO_SEQUENCE}, got list [0]"),
    (lambda c: c.truncate(0, 7), ValueError, "length: expected at most the sequence's 6, got 7"),
    (lambda c: c.truncate(0, -1), ValueError, "length: must be >= 0, got -1"),
    (lambda c: c.truncate(0, 1.0), TypeError, "length: expected an int, got float 1.0"),
    (lambda c: c.batch(0), TypeError, "sequences: expected a list or tuple of sequences, got int 0"),
    (lambda c: c.batch([0, 0]), ValueError, "sequences: expected each only once, got [0, 0]"),
    (lambda c: c.extend([0, 3], 1), ValueError, f"{NO_SEQUENCE}, got int 3"),
    (lambda c: c.extend([0], -1), ValueError, "tokens: must be >= 0, got -1"),
    (lambda c: c.extend([0], True), TypeError, "tokens: expected an int, got bool True"),
    (lambda c: c.append([0, 0], K, V), ValueError, "sequences: expected each only once"),
    (lambda c: c.append([0], None, V), TypeError, "k: expected a tensor, got NoneType"),
    (lambda c: c.append([0], K[0], V), ValueError, f"k: expected shape {KEYS} = (2, 1, T, 2, 4), got (1, 2, 2, 4)"),
    (lambda c: c.append([0], K, K), ValueError, f"v: expected shape {VALUES} = (2, 1, T, 2, 3), got (2, 1, 2, 2, 4)"),
    (lambda c: c.append([0], K, V[:, :, :1]), ValueError, "v: expected k's 2 tokens, got shape (2, 1, 1, 2, 3)"),
    (lambda c: c.append([], K, V), ValueError, f"k: expected shape {KEYS} = (2, 0, T, 2, 4), got (2, 1, 2, 2, 4)"),
    (lambda c: c.append([0], K.double(), V), TypeError, "k: expected the cache's torch.float32, got torch.float64"),
    (lambda c: c.append([0], K, V.to("meta")), ValueError, "v: expected the cache's device cpu, got meta"),
    (lambda c: c.append([0], K, V[0, 0, 0, 0, 0]), ValueError, f"v: expected shape {VALUES} = (2, 1, T, 2, 3), got ()"),
    (
        lambda c: c.append([0], LONG_K.mT, LONG_V),
        ValueError,
        f"k: expected shape {KEYS} = (2, 1, T, 2, 4), got (2, 1, 5, 4, 2)",
    ),
    (
        lambda c: c.append([0], LONG_K.transpose(2, 3), LONG_V),
        ValueError,
        f"k: expected shape {KEYS} = (2, 1, T, 2, 4), got (2, 1, 2, 5, 4); {HEADS_FIRST}",
    ),
    (
        lambda c: c.append([0], LONG_K, LONG_V.transpose(2, 3)),
        ValueError,
        f"v: expected shape {VALUES} = (2, 1, T, 2, 3), got (2, 1, 2, 5, 3); {HEADS_FIRST}",
    ),
]


@pytest.mark.parametrize(("act", "error", "said"), WRONG, ids=[said for _, _, said in WRONG])
def test_refused_operations_change_nothing(
    act: Callable[[PagedKVCache], Any], error: type[Exception], said: str
) -> None:
    cache = small()
    cache.append([cache.allocate()], *drawn(cache, 1, 6))
    before = snapshot(cache)
    with pytest.raises(error) as raised:
        act(cache)
    assert said in str(raised.value)
    assert unchanged(cache, before)


def test_one_layer_heads_first() -> None:
    cache = PagedKVCache(4, 2, HEADS, D)
    k = torch.zeros(1, 5, HEADS, D)
    shape = r"\(B, T, num_kv_heads, head_dim\) = \(1, T, 2, 4\), got \(1, 2, 5, 4\)"
    with pytest.raises(ValueError, match=rf"^k: expected shape {shape}; it looks heads-first: transpose\(1, 2\) it$"):
        cache.append([cache.allocate()], k.transpose(1, 2), k)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"num_pages": 0}, ValueError, "num_pages: must be >= 1, got 0"),
        ({"page_size": 2.0}, TypeError, "page_size: expected an int, got float 2.0"),
        ({"num_layers": -1}, ValueError, "num_layers: must be >= 1, got -1"),
        ({"value_dim": 0}, ValueError, "value_dim: must be >= 1, got 0"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected one of"),
        ({"dtype": "half"}, TypeError, "got 'half'"),
    ],
)
def test_wrong_sizes(changed: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {"num_pages": 2, "page_size": 4, "num_kv_heads": 1, "head_dim": 8}
    with pytest.raises(error, match=said):
        PagedKVCache(**given | changed)


def test_docstrings() -> None:
    assert doctest.testmod(module, raise_on_error=True).attempted >= 5
