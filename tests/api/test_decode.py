"""attention_decode over dense and paged caches: values, appended keys, memory order, compilations, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fused_attn
from fused_attn import BackendError, attention_decode
from fused_attn.backends.triton import decode as decoding
from fused_attn.backends.triton import settings
from tests import ROOT
from tests.api.decoding import Call, Given
from tests.runtime.compilations import COMPILATIONS

HOST = ("reference", "tiled")
ALL = (*HOST, "triton")

CALLS = {
    "plain": Call(),
    "one_long": Call(lengths=(130,), hq=1, hkv=1, d=32),
    "group_3": Call(hq=6, hkv=2, dv=24, lengths=(70, 33)),
    "group_8": Call(hq=8, hkv=1, m=3, causal=True, lengths=(70, 33)),
    "chunk": Call(m=17, causal=True, lengths=(70, 33), hkv=1, hq=2),
    "chunk_longer_than_keys": Call(lengths=(5, 70), m=17, causal=True, sink=True, hq=3, hkv=1),
    "pages_of_1": Call(page=1, lengths=(37, 5), room=40),
    "pages_of_16": Call(page=16, m=3, causal=True),
    "pages_of_64": Call(page=64, softcap=3.0),
    "pages_of_256": Call(page=256, room=256, hq=6, hkv=2),
    "window": Call(window=(20, 0), m=3),
    "window_both_sides": Call(window=(20, 5), m=17, page=16, lengths=(70, 33), hq=2, hkv=1),
    "window_right": Call(window=(None, 2), m=17, sink=True, lengths=(70, 33), hq=2, hkv=1),
    "alibi": Call(alibi=True, m=3),
    "alibi_of_each": Call(alibi_batch=True, m=3, causal=True, page=16, lengths=(70, 2, 96)),
    "sink": Call(sink=True, page=64),
    "softmax1": Call(normalizer="softmax1", lengths=(70, 0)),
    "scale_of_heads": Call(scale="heads", softcap=2.0),
    "negative_scale": Call(scale=-0.3),
    "tree": Call(tree="shared", m=17, lengths=(70, 17), hq=2, hkv=1),
    "tree_of_each": Call(tree="own", m=3, page=16, causal=True, lengths=(70, 2, 33)),
    "tree_leftpad": Call(tree="own", m=17, leftpad=True, lengths=(70, 18), hq=3, hkv=1),
    "leftpad": Call(leftpad=True),
    "leftpad_pages": Call(leftpad=True, page=16, m=3, causal=True),
    "leftpad_window": Call(leftpad=True, window=(40, 0)),
    "indexed": Call(indexed=True, m=3, causal=True),
    "heads_first": Call(layout="bhmd", cache_order="bhnd", m=3, causal=True),
    "everything": Call(m=5, hq=6, hkv=2, dv=8, page=16, window=(60, 0), alibi_batch=True, softcap=4.0, sink=True,
                       tree="own", leftpad=True, scale="heads", lengths=(70, 33, 3)),
}  # fmt: skip
APPENDS = {
    "append": Call(new=1, lengths=(70, 33, 1, 96)),
    "append_pages": Call(new=3, m=3, causal=True, page=16, lengths=(70, 33, 3, 96)),
    "append_indexed": Call(new=2, m=1, indexed=True, lengths=(70, 33, 2)),
    "append_leftpad": Call(new=2, m=2, leftpad=True, lengths=(70, 33)),
    "halves": Call(new=1, rotary="halves", lengths=(70, 33, 1)),
    "pairs": Call(new=3, m=3, causal=True, rotary="pairs", page=16, lengths=(70, 33, 3)),
    "halves_window": Call(new=3, m=5, window=(20, 0), rotary="halves", dv=8, lengths=(70, 33, 5)),
    "pairs_at_one_place": Call(new=3, m=3, rotary="pairs", page=1, lengths=(40, 33, 3)),
}


def tensors(b: int = 2, m: int = 1, n: int = 32, hq: int = 4, hkv: int = 2, d: int = 16) -> tuple[Tensor, ...]:
    return torch.randn(b, m, hq, d), torch.randn(b, n, hkv, d), torch.randn(b, n, hkv, d)


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(("backend", "splits"), [*((x, None) for x in HOST), ("triton", 1), ("triton", 3)])
@pytest.mark.parametrize("name", CALLS)
def test_parity(name: str, backend: str, splits: int | None, nan_outputs: None) -> None:
    """In memory that holds NaN wherever nobody has written or may look."""
    given = Given(CALLS[name])
    given.check(*given.run(backend, num_splits=splits))
    given.check_caches()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("name", ("chunk", "everything", "pairs"))
def test_types(name: str, dtype: torch.dtype, backend: str) -> None:
    given = Given((CALLS | APPENDS)[name], dtype)
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(BackendError, match="float64"):
            given.run(backend)
        return
    given.check(*given.run(backend))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", APPENDS)
def test_append(name: str, backend: str, nan_outputs: None) -> None:
    """New keys stand where they should, rotated; every other byte is as it was; and the queries see them."""
    given = Given(APPENDS[name])
    out, lse = given.run(backend)
    given.check_caches()
    given.check(out, lse)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("sink", (False, True))
def test_fully_masked_rows(backend: str, sink: bool) -> None:
    given = Given(Call(lengths=(0, 0), m=3, sink=sink))
    out, lse = given.run(backend)
    assert (out == 0).all()
    expected = given.kwargs["sink"][:, None] if sink else torch.tensor(-torch.inf)
    assert torch.equal(lse, expected.expand_as(lse))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", ({"b": 0}, {"m": 0}, {"hq": 0}, {"n": 0}), ids=str)
def test_empty(backend: str, shape: dict[str, int]) -> None:
    q, k, v = tensors(**shape)
    out, lse = attention_decode(q, k, v, return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", ALL)
def test_without_lengths_the_whole_cache_is_attended(backend: str) -> None:
    q, k, v = tensors(m=3)
    full = ints(32, 32)
    a, b = (attention_decode(q, k, v, cache_seqlens=x, causal=True, backend=backend) for x in (None, full))
    assert torch.equal(a, b)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    paged = [x.reshape(8, 8, 2, 16) for x in (k, v)]
    assert torch.equal(a, attention_decode(q, *paged, page_table=table, causal=True, backend=backend))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("page", (None, 16))
def test_bits_do_not_depend_on_the_batch(backend: str, page: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in company, in another place, with more or less room: the same bits, of one part or of several."""
    monkeypatch.setattr(decoding, "INVARIANT", 64)
    call = Call(lengths=(96, 130, 3, 70), m=2, causal=True, page=page, hq=6, hkv=2, sink=True)
    given = Given(call)
    out, lse = given.run(backend, batch_invariant=True)
    per_batch = {"cache_seqlens", "page_table"}
    words = {x: y for x, y in given.kwargs.items() if x not in per_batch}

    def some(order: list[int]) -> tuple[Tensor, Tensor]:
        own = {x: given.kwargs[x][order] for x in per_batch & given.kwargs.keys()}
        caches, room = [given.k, given.v], max(call.lengths[i] for i in order)
        if page is None:
            own["cache_batch_idx"] = ints(*order)
            caches = [x[:, :room] for x in caches]
        else:
            own["page_table"] = own["page_table"][:, : -(-room // page)]
        return attention_decode(
            given.q[order], *caches, **words, **own, batch_invariant=True, return_lse=True, backend=backend
        )

    for order in ([0], [3], [2, 1, 0], [3, 3, 1]):
        found, found_lse = some(order)
        assert torch.equal(found, out[order]) and torch.equal(found_lse, lse[order])


@pytest.mark.parametrize("backend", ALL)
def test_shared_prefix(backend: str) -> None:
    """All queries of a batch as rows over the prefix that they share, each over what it has alone, and both merged."""
    given = Given(Call(lengths=(40, 33, 0), hq=4, hkv=2))
    prefix, values = torch.randn(1, 50, 2, 16), torch.randn(1, 50, 2, 16)
    together = given.q.transpose(0, 1)  # (1, B, Hq, D)
    shared, shared_lse = attention_decode(together, prefix, values, return_lse=True, backend=backend)
    alone, alone_lse = given.run(backend)
    outs, lses = [shared.transpose(0, 1), alone], [shared_lse.permute(2, 1, 0), alone_lse]
    out, lse = fused_attn.merge_states(outs, lses, layout="bshd")
    given.keys = [torch.cat((prefix[0], x)) for x in given.keys]
    given.values = [torch.cat((values[0], x)) for x in given.values]
    given.call = replace(given.call, lengths=tuple(map(len, given.keys)))
    given.check(out, lse)


@pytest.mark.parametrize("backend", ALL)
def test_nan_propagates_to_its_rows_only(backend: str) -> None:
    """In a key or a value that somebody sees, it comes out where it was seen, and nowhere else."""
    for i in (1, 2):
        x = list(tensors(n=70))
        x[i][0, 40, 0, 3] = torch.nan
        out, lse = attention_decode(*x, return_lse=True, backend=backend)
        hit = out[0, :, :2].isnan()
        assert hit.all() if i == 1 else hit[..., 3].all() and hit.sum() == 2
        assert out[1].isfinite().all() and out[0, :, 2:].isfinite().all()
        assert lse[0, :2].isnan().all() == (i == 1) and lse[1].isfinite().all()


# ------------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("page", (None, 16))
@pytest.mark.parametrize("layout", ("bmhd", "bhmd", "gaps"))
@pytest.mark.parametrize("cache_order", ("bnhd", "bhnd", "gaps"))
def test_every_layout(layout: str, cache_order: str, page: int | None, nan_outputs: None) -> None:
    """Every memory order of q and of the cache, into several parts and what merges them."""
    call = Call(layout=layout, cache_order=cache_order, page=page, m=2, lengths=(70, 33), hq=3, hkv=1)
    given = Given(call)
    given.check(*given.run("triton", num_splits=3))


@pytest.mark.parametrize("backend", ALL)
def test_pages_beyond_int32(backend: str) -> None:
    """Offsets past 2**31, in memory of which only what is touched exists."""
    pages, values = torch.empty(2, 2**31 // 256 + 8, 16, 1, 16, dtype=torch.float16)
    q, new = torch.randn(1, 1, 1, 16).half(), torch.randn(1, 20, 1, 16).half()
    words = {"page_table": ints([len(pages) - 1, 2**23 + 1]), "cache_seqlens": ints(0), "k_new": new, "v_new": new}
    out = attention_decode(q, pages, values, **words, backend=backend)
    assert torch.equal(pages[-1], new[0, :16]) and torch.equal(pages[2**23 + 1, :4], new[0, 16:])
    assert torch.equal(out, attention_decode(q, new, new, backend=backend))


def test_the_same_bits_every_time() -> None:
    given = Given(CALLS["everything"])
    (out, lse), *others = (given.run("triton", num_splits=3) for _ in range(3))
    assert all(torch.equal(out, x) and torch.equal(lse, y) for x, y in others)


@pytest.mark.parametrize("name", ("plain", "pages_of_16", "leftpad_window"))
def test_number_of_splits_fills_the_device(name: str, monkeypatch: pytest.MonkeyPatch, nan_outputs: None) -> None:
    """Chosen without looking at a length, in pages too; and right."""
    counts = []
    real = decoding.parts

    def counted(*args: Any) -> tuple[int, int]:
        counts.append(real(*args)[0])
        return real(*args)

    monkeypatch.setattr(settings, "multiprocessors", lambda device: 16)
    monkeypatch.setattr(decoding, "parts", counted)
    given = Given(CALLS[name])
    given.check(*given.run("triton"))
    # 32 programs are resident, and 4 sequences of 2 heads make 8; the window reaches into 2 tiles.
    assert counts == [2 if name == "leftpad_window" else 4]


@pytest.mark.parametrize("work", (1, 3, 8, 100, 132, 1000))
@pytest.mark.parametrize("tiles", (1, 2, 40, 4096))
def test_splits_fill_whole_waves(work: int, tiles: int) -> None:
    slots = 264
    count = decoding.parts_for(work, tiles, slots)
    assert 1 <= count <= min(tiles, decoding.MOST)
    assert count == 1 or work < slots
    if work * min(tiles, decoding.MOST) >= slots > work:
        waves = work * count / slots
        assert waves / -(-waves // 1) >= 0.8


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses of every load of a kernel that takes place."""
    from triton.runtime import interpreter

    found: list[Any] = []
    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def masked(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        found.append(ptrs.data[mask.data])
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", masked)
    return found


def bytes_within(loaded: list[Any], x: Tensor) -> int:
    start = x.untyped_storage().data_ptr()
    stop = start + x.untyped_storage().nbytes()
    return sum(int(((a >= start) & (a < stop)).sum()) for a in loaded) * x.element_size()


@pytest.mark.parametrize("page", (None, 16, 64))
@pytest.mark.parametrize("options", ({"num_splits": 1}, {"num_splits": 3}, {"batch_invariant": True}), ids=str)
def test_bytes_moved(page: int | None, options: dict[str, Any], loaded: list[Any]) -> None:
    """Every key and value is read once for all the heads of its group, in however many parts: within 2% of what must
    be. What each sequence has room for costs nothing."""
    lengths = (64, 192, 128, 0)
    given = Given(Call(lengths=lengths, hq=8, hkv=2, d=32, dv=16, page=page, room=1024))
    given.check(*given.run("triton", **options))
    for x in (given.k, given.v):
        needed = sum(lengths) * 2 * x.shape[3] * x.element_size()
        assert needed <= bytes_within(loaded, x) <= 1.02 * needed


def test_bytes_of_a_window(loaded: list[Any]) -> None:
    """What lies before it is not read, nor what lies between its parts twice."""
    given = Given(Call(lengths=(192, 96), window=(31, 0), room=256, d=16))
    given.check(*given.run("triton", num_splits=3))
    assert bytes_within(loaded, given.k) == 2 * 32 * 2 * 16 * 4


COUNTER = (
    COMPILATIONS
    + """
from fused_attn.spec.decoding import Cache, Decode, Rotary
from fused_attn.backends.triton import decode, settings

settings.multiprocessors = lambda device: 132
z = lambda *shape, dtype=torch.float16: torch.zeros(shape, dtype=dtype)
counts = []
for b, room, added in json.loads(sys.argv[1]):
    before = len(compiled)
    lengths, turn = z(b, dtype=torch.int32), z(room, 16)
    for table, k in ((None, z(b, room, 2, 32)), (z(b, room // 16, dtype=torch.int32), z(b + 5, 16, 2, 32))):
        new = z(b, added, 2, 32)
        q = decode.append(Cache(k, k, lengths, table), new, new, z(b, 1, 8, 32), Rotary(turn, turn), True)
        for left in (None, added):
            cache = Cache(k, k, lengths, table, added=added)
            decode.decode(Decode(q, cache, 0.125, left=left, right=0, leftpad=lengths, splits=4))
    counts.append(len(compiled) - before)
print(json.dumps(counts))
"""
)


def test_no_compilation_per_step() -> None:
    """Whatever the batch, the room in the cache and the new tokens, nothing compiles after the first calls."""
    steps = [(2, 64, 2), (1, 64, 2), (3, 48, 3), (16, 4096, 16), (17, 272, 17), (5, 1600, 7)]
    done = subprocess.run(
        [sys.executable, "-c", COUNTER, json.dumps(steps)], capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, *others = json.loads(done.stdout.splitlines()[-1])
    # Dense and paged: an append, parts, and a window that needs none; and a combination.
    assert first == 7 and not any(others), (first, others)


# ---------------------------------------------------------------------------------------------------------- operators


def arguments(call: Call, backend: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What `append` and `decode` are called with."""
    given, w = Given(call), None
    w = given.kwargs
    rotary = w.get("rotary") or (None, None, False)
    place = (w["cache_seqlens"], w.get("page_table"), w.get("cache_batch_idx"))
    append = (
        given.k,
        given.v,
        *place,
        w.get("cache_leftpad"),
        w["k_new"],
        w["v_new"],
        given.q,
        *rotary,
        call.causal,
        backend,
    )
    softcap = torch.tensor(3.0)
    decode = (
        given.q, given.k.nan_to_num(), given.v.nan_to_num(), *place, w.get("cache_leftpad"), w.get("tree_mask"),
        w.get("scale"), softcap, w.get("alibi_slopes"), w.get("sink"), call.new, 1.0, None, 20, 0, None, False, backend,
    )  # fmt: skip
    return append, decode


OPERATORS = (
    Call(new=3, m=3, causal=True, rotary="pairs", page=16, lengths=(70, 33), tree="own", sink=True, scale="heads"),
    Call(new=1, indexed=True, lengths=(70, 33), alibi=True, leftpad=True),
)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("call", OPERATORS, ids=("pages", "rows"))
def test_opcheck(call: Call, backend: str) -> None:
    """Torch's own examination; what `append` writes to stands in its schema."""
    append, decode = arguments(call, backend)
    # Where it compares what was written, NaN would differ from itself.
    append = tuple(x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for x in append)
    torch.library.opcheck(torch.ops.fused_attn.append.default, append)
    torch.library.opcheck(torch.ops.fused_attn.decode.default, decode)


@pytest.mark.parametrize("backend", ALL)
def test_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, new: Tensor) -> Tensor:
        return attention_decode(
            q.sin(), k, v, cache_seqlens=lengths, k_new=new, v_new=new.cos(), causal=True, backend=backend
        ).cos()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q, k, v = tensors()
    new = torch.randn(2, 1, 2, 16)
    caches = [(k.clone(), v.clone()) for _ in range(2)]
    for lengths in (ints(5, 30), ints(6, 31)):
        got, expected = (f(q, *c, lengths, new) for f, c in zip((compiled, step), caches, strict=True))
        assert torch.equal(got, expected)
        assert all(torch.equal(x, y) for x, y in zip(*caches, strict=True))


def test_flops() -> None:
    """Two products for each score with a key that there is room for."""
    q, k, v = tensors(b=2, m=3, n=32, hq=4, d=16)
    with FlopCounterMode(display=False) as counter:
        attention_decode(q, k, v[..., :6], backend="tiled")
    assert counter.get_total_flops() == 2 * 2 * 4 * 3 * 32 * (16 + 6)
