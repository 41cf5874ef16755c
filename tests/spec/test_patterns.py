"""Masks that are no interval: their meaning, and the tiles that are visited."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_attn
from fused_attn import Mask
from fused_attn.api.bind import bind
from fused_attn.backends.tiled import tiles
from fused_attn.spec import masks
from fused_attn.spec.options import Options
from fused_attn.spec.problem import Problem
from fused_attn.spec.visibility import visibility
from fused_attn.tuning import Config, override

Shape = tuple[int, int, int, int]
SHAPE = (2, 2, 7, 9)


def problem(mask: Mask, shape: Shape, group: int = 1) -> Problem:
    b, h, m, n = shape
    q, k = torch.zeros(b, h, m, 4), torch.zeros(b, h // group, n, 4)
    return bind(q, k, k, Options(mask=mask))


def by_loop(shape: Shape, allowed: Callable[[int, int, int, int], Any]) -> Tensor:
    grid = torch.zeros(shape, dtype=torch.bool)
    for place in itertools.product(*map(range, shape)):
        grid[place] = bool(allowed(*place))
    return grid


# ------------------------------------------------------------------------------------------------------ what they mean


@pytest.mark.parametrize("side", ("top_left", "bottom_right"))
@pytest.mark.parametrize(("left", "right", "sinks"), ((1, 0, 2), (2, None, 3), (0, 1, 50), (None, 0, 3), (3, 1, 0)))
@pytest.mark.parametrize("shape", ((1, 1, 7, 7), (1, 1, 5, 9), (1, 1, 9, 4)))
def test_sinks(shape: Shape, left: int | None, right: int | None, sinks: int, side: str) -> None:
    offset = 0 if side == "top_left" else shape[3] - shape[2]
    before, after = (10**6 if x is None else x for x in (left, right))
    expected = by_loop(shape, lambda b, h, i, j: (j < sinks or j >= i + offset - before) and j <= i + offset + after)
    assert torch.equal(Mask.window(left, right, side, sinks=sinks).materialize(shape), expected)


INTEGERS = (torch.int8, torch.int32, torch.int64)


@pytest.mark.parametrize("dtypes", [*itertools.combinations_with_replacement(INTEGERS, 2)])
def test_unsorted_segments(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Ids of any width, far apart, of one batch or of each."""
    most = [min(2**62, torch.iinfo(x).max) for x in dtypes]
    for sizes in (((2, 7), (9,)), ((7,), (2, 9)), ((7,), (9,))):
        q, k = (
            torch.tensor([0, -1, 3, x, -x, min(x, 2**31)])[torch.randint(0, 6, size)].to(dtype)
            for x, size, dtype in zip((min(most), min(most)), sizes, dtypes, strict=True)
        )
        own_q, own_k = (x.long().expand(2, -1) for x in (q, k))
        expected = by_loop(SHAPE, lambda b, h, i, j: own_q[b, i] == own_k[b, j])  # noqa: B023
        assert torch.equal(Mask.segments(q, k).materialize(SHAPE), expected)
        assert torch.equal(Mask.segments(q, k, sorted=False).materialize(SHAPE), expected)


def test_sorted_segments_stay_intervals() -> None:
    ids = torch.tensor([0, 0, 1, 1, 4])
    for mask in (Mask.segments(ids), Mask.segments(ids, sorted=True)):
        p = problem(mask, (1, 1, 5, 5))
        assert p.span.lo is not None and not p.needs_block_mask
    assert problem(Mask.segments(ids, sorted=False), (1, 1, 5, 5)).needs_block_mask
    assert problem(Mask.segments(ids.flip(0), ids), (1, 1, 5, 5)).needs_block_mask
    assert problem(Mask.segments(ids, ids.flip(0)), (1, 1, 5, 5)).needs_block_mask


@pytest.mark.parametrize("block", (2, (3, 4), (7, 9), (100, 1)))
def test_blocks(block: int | tuple[int, int]) -> None:
    height, width = (block, block) if isinstance(block, int) else block
    rows, cols = -(-7 // height), -(-9 // width)
    for shape in ((2, 2, rows, cols), (2, 1, 1, cols), (2, 1, rows, 1), (rows, cols), (cols,)):
        allowed = torch.rand(shape) > 0.5
        whole = allowed.expand(2, 2, rows, cols)
        expected = by_loop(SHAPE, lambda b, h, i, j: whole[b, h, i // height, j // width])  # noqa: B023
        assert torch.equal(Mask.blocks(allowed, block).materialize(SHAPE), expected)


PARTS = {
    "runs": lambda: Mask.segments(torch.tensor([3, 3, 0, 3, 1, 1, 0]), torch.tensor([0, 3, 1, 1, 3, 3, 0, 2, 1])),
    "ids": lambda: Mask.segments(torch.randint(-2, 2, (2, 7)), torch.randint(-2, 2, (2, 9)), sorted=False),
    "wide_ids": lambda: Mask.segments(torch.randint(0, 2, (7,)) << 40, torch.randint(0, 2, (2, 9)) << 40),
    "sinks": lambda: Mask.window(1, 1, "top_left", sinks=2),
    "more_sinks": lambda: Mask.window(0, 2, "bottom_right", sinks=4),
    "as_many_sinks": lambda: Mask.window(1, None, "top_left", sinks=3),
    "no_sinks": lambda: Mask.window(2, None, "top_left"),
    "causal": lambda: Mask.causal("bottom_right"),
    "lengths": lambda: Mask.lengths(torch.tensor([8, 5]), torch.tensor([6, 7])),
    "blocks": lambda: Mask.blocks(torch.rand(2, 4, 3) > 0.3, (2, 3)),
    "other_blocks": lambda: Mask.blocks(torch.rand(2, 1, 2, 2) > 0.3, (4, 5)),
    "columns": lambda: Mask.blocks(torch.rand(1, 5) > 0.3, (3, 2)),
    "tensor": lambda: Mask.tensor(torch.rand(7, 9) > 0.2),
}  # fmt: skip


@pytest.mark.parametrize("count", (2, 3))
def test_intersection_is_and(count: int) -> None:
    """Of every two, in either order, and of every three; whatever cannot be said otherwise becomes a tensor."""
    made = [make() for make in PARTS.values()]
    for chosen in itertools.permutations(made, 2) if count == 2 else itertools.combinations(made, 3):
        joined, expected = chosen[0], chosen[0].materialize(SHAPE)
        for mask in chosen[1:]:
            joined, expected = joined & mask, expected & mask.materialize(SHAPE)
        assert torch.equal(joined.materialize(SHAPE), expected)


def test_conditions_that_become_a_tensor() -> None:
    """Only two windows of which the narrower one has more sinks."""
    for a, b in itertools.combinations(PARTS.keys() - {"tensor"}, 2):
        _, _, rest = (PARTS[a]() & PARTS[b]()).resolve(SHAPE)
        tensors = {frozenset(x) for x in (("more_sinks", "no_sinks"), ("sinks", "no_sinks"))}
        tensors |= {frozenset(("as_many_sinks", "no_sinks"))}
        # Of those two, the narrow one is the one that is aligned further to the right.
        tensors |= {frozenset(("more_sinks", "sinks")), frozenset(("more_sinks", "as_many_sinks"))}
        assert (rest is not None) == (frozenset((a, b)) in tensors), (a, b)


def test_blocks_of_two_sizes_are_cut() -> None:
    a, b = Mask.blocks(torch.ones(4, 3, dtype=torch.bool), (64, 96)), Mask.blocks(torch.eye(3, 9) > 0, (96, 32))
    _, pattern, rest = (a & b).resolve((1, 1, 250, 280))
    assert rest is None and (pattern.height, pattern.width) == (32, 32) and pattern.blocks.shape == (1, 1, 8, 9)


def test_docstrings() -> None:
    found = doctest.testmod(masks, raise_on_error=True)
    assert found.attempted >= 10


# ------------------------------------------------------------------------------------------------- tables of the tiles


@st.composite
def random_masks(draw: st.DrawFn) -> tuple[Mask, Shape]:
    """A mask that is no interval, of one to three parts, and its problem."""
    b, h, m, n = shape = (draw(st.integers(1, 2)), 2, draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def ids(length: int) -> Tensor:
        run, kinds = draw(st.integers(1, 12)), draw(st.integers(1, 5))
        made = torch.randint(-kinds, kinds, (draw(st.sampled_from((1, b))), length // run + 1), generator=generator)
        return (made.repeat_interleave(run, 1)[:, :length] * draw(st.sampled_from((1, 64, 2**27)))).int()

    def blocks() -> Mask:
        height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
        size = (draw(st.sampled_from((1, b))), draw(st.sampled_from((1, h))), -(-m // height), -(-n // width))
        return Mask.blocks(torch.rand(size, generator=generator) > draw(st.sampled_from((0.2, 0.8))), (height, width))

    side = st.sampled_from(("top_left", "bottom_right"))
    makes = {
        "ids": lambda: Mask.segments(ids(m), ids(n), sorted=False),
        "blocks": blocks,
        "sinks": lambda: Mask.window(
            draw(st.integers(0, 12)), draw(st.sampled_from((None, 0, 3))), draw(side), sinks=draw(st.integers(1, 20))
        ),
        "lengths": lambda: Mask.lengths(torch.randint(0, n + 1, (b,), generator=generator),
                                        torch.randint(0, m + 1, (b,), generator=generator)),
        "causal": lambda: Mask.causal(draw(side)),
    }  # fmt: skip
    mask = makes[draw(st.sampled_from(("ids", "blocks", "sinks")))]()
    for name in draw(st.lists(st.sampled_from(tuple(makes)), max_size=2)):
        mask = mask & makes[name]()
    return mask, shape


def listed(block_mask: Any, tile: int, width: int, b: int, h: int) -> tuple[list[int], list[int]]:
    """The partial and the full tiles of the other side that a tile visits."""
    row = block_mask.ptr[b % len(block_mask.ptr), h % block_mask.ptr.shape[1], tile].tolist()
    partial, full, visited = row[0], row[1], row[2:]
    assert len(visited) == width
    return visited[:partial], visited[partial : partial + full]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(random_masks(), st.sampled_from(((16, 16), (16, 32), (32, 16))))
def test_block_masks_cover_exactly_the_visible_tiles(drawn: tuple[Mask, Shape], sizes: tuple[int, int]) -> None:
    """Every pair that is visible lies in a tile that is visited, full tiles are, none comes twice, tails are partial;
    and for one kind of pattern alone, no tile is visited for nothing."""
    pytest.importorskip("triton")
    from fused_attn.backends.triton import block_mask

    mask, shape = drawn
    p, c = problem(mask, shape), Config(*sizes, 1, 1)
    if not p.needs_block_mask:
        return
    b, h, m, n = shape
    seen = p.visible(torch.arange(m), torch.arange(n)).expand(shape)
    start, stop = p.span.bounds(torch.arange(m), n)
    exact = p.pattern is None or (p.pattern.q_ids is None and p.span.unbounded)
    for transposed, span in ((False, block_mask.row_span(p, c)), (True, block_mask.key_span(p, c))):
        grid = seen.mT if transposed else seen
        own, other = (n, m) if transposed else (m, n)
        size, across = sizes[::-1] if transposed else sizes
        lo, hi = (span.lo.ptr, span.hi.ptr) if transposed else (start, stop)
        live = (lo < hi).expand(b, -1)
        assert bool((grid.any(-1) <= live[:, None]).all())
        kinds = block_mask.key_span(p, c, kinds=True).block_mask if transposed else None
        for z, y, tile in itertools.product(range(b), range(h), range(-(-own // size))):
            width = -(-other // across)
            partial, full = listed(span.block_mask, tile, width, z, y)
            assert len({*partial, *full}) == len(partial) + len(full)
            mine = grid[z, y, tile * size : (tile + 1) * size]
            awake = live[z, tile * size : (tile + 1) * size]
            if kinds is not None:
                row = kinds.ptr[z % len(kinds.ptr), y % kinds.ptr.shape[1], tile, 2:].tolist()
                assert row == [2 if x in full else int(x in partial) for x in range(width)]
            for x in range(width):
                part = mine[:, x * across : (x + 1) * across]
                assert x in partial or x in full or not part.any()
                if x in full:
                    assert part[awake].all() and (x + 1) * across <= other
                if exact and x in partial + full:
                    assert part.any()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(random_masks(), st.sampled_from((1, 2)))
def test_tiles_of_the_host(drawn: tuple[Mask, Shape], group: int) -> None:
    """The same of the PyTorch backend's tiles; and the keys that matter are those of the definition."""
    mask, shape = drawn
    p = problem(mask, shape, group)
    b, _, m, n = shape
    seen = p.visible(torch.arange(m), torch.arange(n)).expand(shape)
    rows, keys = visibility(p)
    assert torch.equal(keys[..., 0].expand(b, 1, n), p.visible_keys().expand(b, 1, n))
    assert bool((seen.any(-1) <= rows[..., 0]).all()) and bool((seen.any(-2) <= keys[..., 0]).all())
    visited = torch.zeros(shape, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("ROWS", (16, 16)),
            ("KEYS", 16),
            ("PATTERN_BLOCK", 8),
            ("_elements", lambda device: 2**10),
        ):
            patch.setattr(tiles, name, value)
        for chunk in tiles.chunks(p):
            for tile in chunk.tiles:
                for cut in tile.key_tiles():
                    place = (chunk.batch, chunk.heads, tile.rows, cut)
                    visited[place] += 1
                    both = [torch.arange(x.start, x.stop) for x in (tile.rows, cut)]
                    whole = tiles.part(p.span.materialize(*both, n), chunk.batch, *[slice(None)] * 3)
                    for part in tile.partial(cut):
                        whole[..., part.start - cut.start : part.stop - cut.start] = True
                    assert whole.all()
                    if p.pattern is not None and tile.clear(cut):
                        assert p.pattern.part(chunk.batch, chunk.heads).materialize(*both).all()
    assert visited.max() <= 1 and bool((visited.bool() >= seen).all())


# ---------------------------------------------------------------------------------------------- skipping what is unseen

SKIPPED = {
    "blocks": (lambda: Mask.blocks(torch.eye(6) > 0, 32), 6),
    "shared_blocks": (lambda: Mask.blocks(torch.ones(1, 6) > torch.tensor([0, 1, 1, 0, 1, 1.0]), 32), 12),
    "runs": (lambda: Mask.segments(torch.tensor([3, 1, 3, 0, 0, 9]).repeat_interleave(32)), 10),
    "sinks": (lambda: Mask.window(31, 0, sinks=4), 15),
}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each matrix product that an interpreted kernel makes."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpreterBuilder

    made: list[None] = []
    dot = InterpreterBuilder.create_dot

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        made.append(None)
        return dot(self, *args, **options)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    return made


@pytest.mark.parametrize("name", SKIPPED)
def test_kernels_visit_the_listed_tiles(name: str, products: list[None]) -> None:
    """Products of 32 x 32 tiles, of 36 in all: two a tile in the forward, four and three in the backward."""
    make, count = SKIPPED[name]
    q, k, v = (torch.randn(1, 1, 192, 16, requires_grad=True) for _ in range(3))
    c = Config(32, 32, 1, 1, overlap=True)
    with override(forward=c, dkdv=c, dq=c):
        out = fused_attn.attention(q, k, v, mask=make(), backend="triton")
        assert len(products) == 2 * count
        products.clear()
        out.sum().backward()
    assert len(products) == (4 + 3) * count


@pytest.mark.parametrize("name", SKIPPED)
def test_tiled_visits_the_remaining_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, count = SKIPPED[name]
    for constant, value in (("ROWS", (32, 32)), ("KEYS", 32), ("PATTERN_BLOCK", 32)):
        monkeypatch.setattr(tiles, constant, value)
    chunks = tiles.chunks(problem(make(), (1, 1, 192, 192)))
    scores = sum(
        (tile.stop - tile.start) * (keys.stop - keys.start)
        for chunk in chunks for tile in chunk.tiles for keys in tile.key_tiles()
    )  # fmt: skip
    assert scores <= count * 32 * 32 + (31 * 31 * 6 if name == "sinks" else 0)
