"""materialize() of spans, masks, dropout and other specifications against loops over their definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from fused_attn import Mask
from fused_attn.api.bind import bind
from fused_attn.spec import state
from fused_attn.spec.dropout import Dropout
from fused_attn.spec.options import Options
from fused_attn.spec.problem import Span, check_broadcastable, diagonal_offset, memory_order
from fused_attn.testing.cases import CASES
from fused_attn.testing.inputs import make_inputs
from tests.parity import within_budget

SHAPES = ((2, 1, 7, 7), (2, 1, 5, 9), (2, 1, 9, 5), (2, 1, 1, 6), (2, 1, 6, 1))
SIDES = ("top_left", "bottom_right")


def offset_of(side: str, m: int, n: int) -> int:
    return 0 if side == "top_left" else n - m


def by_loop(shape: tuple[int, int, int, int], allowed) -> torch.Tensor:
    b, _, m, n = shape
    grid = torch.zeros(shape, dtype=torch.bool)
    for z, i, j in itertools.product(range(b), range(m), range(n)):
        grid[z, :, i, j] = allowed(z, i, j)
    return grid


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_causal(shape: tuple, side: str) -> None:
    offset = offset_of(side, *shape[2:])
    assert torch.equal(Mask.causal(side).materialize(shape), by_loop(shape, lambda z, i, j: j <= i + offset))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("window", ((2, 1), (0, 0), (None, 1), (2, None), (None, None), (50, 50)))
def test_window(shape: tuple, side: str, window: tuple) -> None:
    left, right = (10**6 if x is None else x for x in window)
    offset = offset_of(side, *shape[2:])
    expected = by_loop(shape, lambda z, i, j: i + offset - left <= j <= i + offset + right)
    assert torch.equal(Mask.window(*window, side).materialize(shape), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_prefix(shape: tuple, side: str) -> None:
    lengths, offset = torch.tensor([3, 0]).clamp(max=shape[3]), offset_of(side, *shape[2:])
    expected = by_loop(shape, lambda z, i, j: j < lengths[z] or j <= i + offset)
    assert torch.equal(Mask.prefix(lengths, side).materialize(shape), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_lengths(shape: tuple) -> None:
    kv, q = (torch.tensor(x).clamp(max=n) for x, n in (([4, 0], shape[3]), ([2, 30], shape[2])))
    assert torch.equal(Mask.lengths(kv).materialize(shape), by_loop(shape, lambda z, i, j: j < kv[z]))
    expected = by_loop(shape, lambda z, i, j: j < kv[z] and i < q[z])
    assert torch.equal(Mask.lengths(kv, q).materialize(shape), expected)


def test_segments() -> None:
    q_ids, kv_ids = torch.tensor([[0, 0, 1, 3, 3], [1, 2, 2, 2, 7]]), torch.tensor([0, 1, 1, 2, 3, 3, 4])
    shape = (2, 3, 5, 7)
    expected = by_loop(shape, lambda z, i, j: q_ids[z, i] == kv_ids[j])
    assert torch.equal(Mask.segments(q_ids, kv_ids).materialize(shape), expected)
    own = Mask.segments(q_ids).materialize((2, 3, 5, 5))
    assert torch.equal(own, by_loop((2, 3, 5, 5), lambda z, i, j: q_ids[z, i] == q_ids[z, j]))


def test_intersection_is_and() -> None:
    shape = (2, 2, 6, 8)
    tensor = torch.rand(2, 1, 6, 8) > 0.5
    parts = (
        Mask.causal("bottom_right"),
        Mask.window(3, 1, "top_left"),
        Mask.lengths(torch.tensor([5, 2])),
        Mask.segments(torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])),
        Mask.tensor(tensor),
    )
    for a, b in itertools.permutations(parts, 2):
        assert torch.equal((a & b).materialize(shape), a.materialize(shape) & b.materialize(shape))
    assert torch.equal((tensor & parts[0]).materialize(shape), (parts[0] & tensor).materialize(shape))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.masks and "large" not in case.tags])
def test_bounds_never_decrease(name: str) -> None:
    """What lets a tile of keys find its rows: neither bound of a span decreases from row to row."""
    p = make_inputs(name).problem()
    for bound in (p.span.lo, p.span.hi):
        if bound is not None:
            assert bound.dtype == torch.int32 and bound.shape[0] in (1, p.shape[0]) and bound.shape[1] == p.shape[2]
            assert (bound[:, 1:] >= bound[:, :-1]).all()


def test_columns_is_the_transpose_of_the_bounds() -> None:
    n = 9
    lo = torch.tensor([[0, 0, 2, 2, 5, 9], [0, 1, 1, 3, 3, 3]], dtype=torch.int32)
    hi = torch.tensor([[1, 3, 3, 6, 9, 9], [0, 0, 4, 4, 8, 9]], dtype=torch.int32)
    start, stop = Span(lo=lo, hi=hi).columns(n)
    i = torch.arange(6)[:, None]
    by_rows = (torch.arange(n) >= lo[..., None]) & (torch.arange(n) < hi[..., None])
    by_columns = (i >= start[:, None]) & (i < stop[:, None])
    assert torch.equal(by_rows, by_columns)
    assert Span().columns(n) == (None, None)


def test_diagonal_offset() -> None:
    assert diagonal_offset("top_left", 3, 8, "x") == 0
    assert diagonal_offset("bottom_right", 3, 8, "x") == 5
    assert diagonal_offset("bottom_right", 8, 3, "x") == -5
    assert diagonal_offset(None, 4, 4, "x") == 0


# --------------------------------------------------------------------------------------------------------- dropout


def philox_by_hand(seed: int, counter: tuple[int, int, int, int], rounds: int = 7) -> list[int]:
    """Philox 4x32 in Python's integers, from the paper."""
    low, (c0, c1, c2, c3) = 2**32 - 1, counter
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & low, (a >> 32) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def test_philox_known_answer() -> None:
    """Random123's published vector for philox4x32 with 7 rounds, all zero."""
    assert philox_by_hand(0, (0, 0, 0, 0)) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize(("seed", "offset"), ((0, 0), (1234, 7), (-1, 2**32 + 5), (2**63 - 1, 2**31)))
def test_dropout_is_philox(seed: int, offset: int) -> None:
    """The mask is the documented function of seed, offset, head and place, negative seeds included."""
    dropout = Dropout(0.4, torch.tensor([seed, offset]))
    rows, cols, heads = (
        torch.tensor([0, 3, 8, 15, 100, 2**20]),
        torch.tensor([0, 7, 8, 9, 31, 77]),
        torch.tensor([0, 5]),
    )
    got = dropout.materialize(heads, rows, cols)
    for (a, head), (b, i), (c, j) in itertools.product(*(list(enumerate(x.tolist())) for x in (heads, rows, cols))):
        words = philox_by_hand(seed % 2**64, (j & ~8, i & ~8, head, offset % 2**32))
        assert got[a, b, c].item() == (words[2 * (i >> 3 & 1) + (j >> 3 & 1)] >= round(0.4 * 2**32))


@pytest.mark.parametrize("p", (0.05, 0.5, 0.9))
def test_dropout_rate(p: float) -> None:
    n = 400
    kept = Dropout(p, torch.tensor([3, 0])).materialize(torch.arange(2), torch.arange(n), torch.arange(n))
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / (2 * n * n)) ** 0.5)


def test_dropout_extremes() -> None:
    rng = torch.tensor([3, 0])
    assert Dropout(1.0, rng).rescale == 0.0 and Dropout(1.0 - 2**-40, rng).rescale == 0.0
    assert Dropout(0.75, rng).rescale == 4.0
    assert Dropout(2**-40, rng).materialize(torch.arange(1), torch.arange(64), torch.arange(64)).all()


# ---------------------------------------------------------------------------------------------------- memory, state


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_out_follows_the_memory_order_of_q(order: tuple) -> None:
    sizes = (2, 3, 5, 8)
    q = torch.zeros([sizes[d] for d in order] + [8]).permute([*(order.index(d) for d in range(3)), 3])
    p = bind(q, torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 6), Options())
    assert memory_order(q)[0] == [*order, 3]
    for out in (p.empty_out(), p.in_order(torch.zeros(2, 3, 5, 6))):
        assert out.shape == (2, 3, 5, 6) and memory_order(out) == memory_order(q)
        assert out.permute(*order, 3).is_contiguous()


def test_broadcastable() -> None:
    shape = (2, 4, 5, 6)
    for fits in ((), (6,), (5, 1), (4, 1, 6), (2, 1, 1, 1), (2, 4, 5, 6)):
        x = check_broadcastable("bias", torch.zeros(fits), shape)
        assert x.ndim == 4 and x.numel() == torch.zeros(fits).numel()
    for wrong in ((5,), (2, 5, 6), (1, 2, 4, 5, 6), (3, 4, 5, 6)):
        with pytest.raises(ValueError, match="bias"):
            check_broadcastable("bias", torch.zeros(wrong), shape)


def test_merge_joins_disjoint_keys() -> None:
    torch.manual_seed(0)
    scores, v = torch.randn(2, 3, 9, dtype=torch.float64) * 8, torch.randn(2, 9, 4, dtype=torch.float64)
    scores[0, 1] = -torch.inf
    scores[0, 2, :5] = -torch.inf

    def part(where: slice, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        s = scores[:, :, where].to(dtype)
        return torch.nan_to_num(s.softmax(-1)) @ v[:, where].to(dtype), s.logsumexp(-1)

    whole, plain = part(slice(None)), part(slice(None), torch.float32)
    pieces = [part(slice(0, 2)), part(slice(2, 5)), part(slice(5, 9))]
    blank = state.empty(torch.full((2, 3, 4), torch.nan).double(), torch.full((2, 3), torch.nan).double())
    for states in (pieces, [blank, *pieces], [pieces[0], state.merge(*map(list, zip(*pieces[1:], strict=True)))]):
        out, lse = state.merge([x for x, _ in states], [x for _, x in states])
        within_budget("out", out, whole[0], plain[0])
        within_budget("lse", lse, whole[1], plain[1])


def test_merge_keeps_nan() -> None:
    out, lse = state.merge([torch.ones(1, 2), torch.ones(1, 2)], [torch.tensor([torch.nan]), torch.tensor([0.0])])
    assert out.isnan().all() and lse.isnan().all()
