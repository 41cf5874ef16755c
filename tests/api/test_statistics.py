"""attention_stats and attention_map: every case on every backend, ties, NaN, padding and errors."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from bench.harness import memory
from fused_attn import BackendError, Mask, attention_map, attention_stats, testing, tuning
from fused_attn.api.bind import bind
from fused_attn.backends import reference
from fused_attn.backends.tiled import tiles
from fused_attn.backends.tiled.statistics import leading
from fused_attn.backends.triton import statistics as triton_statistics
from fused_attn.runtime import ops
from fused_attn.spec.options import Options
from fused_attn.spec.problem import Statistics
from fused_attn.testing import statistics
from fused_attn.testing.cases import CASES, Case
from fused_attn.tuning import Config
from tests.backends.test_parity import varies_memory
from tests.parity import within_budget

BACKENDS = ("reference", "tiled", "triton")
ALL = {"key_mass": True, "entropy": True, "max_logit": True, "top_k": 3}
NAMES = ("key_mass", "entropy", "max_logit", "top_k_indices", "top_k_weights")
HALF = (torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qk(m: int = 35, n: int | None = None, h: int = 2, d: int = 16, b: int = 1) -> tuple[Tensor, Tensor]:
    return randn(b, h, m, d), randn(b, h, m if n is None else n, d, seed=1)


def available(backend: str, *q_and_k: Tensor, **words: Any) -> None:
    """Skips exactly where the backend says why it cannot."""
    q, k = q_and_k or qk()
    try:
        attention_stats(q[:, :, :1], k[:, :, :1], max_logit=True, backend=backend, **words)
    except BackendError as refusal:
        pytest.skip(str(refusal))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    available(request.param)
    return request.param


# ------------------------------------------------------------------------------------------------------- every case


def _dtypes(case: Case) -> list[torch.dtype]:
    wanted = [torch.float32, torch.float64] + [torch.bfloat16] * ("half" in case.tags)
    return [dtype for dtype in wanted if dtype in case.dtypes]


def _marks(name: str, dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    """Statistics read keys, masks and scores as the forward does, which runs on every case. Core cases run daily in
    float32 and each second one in bfloat16, of the others each third one."""
    core, number = "core" in CASES[name].tags, list(CASES).index(name)
    daily = core or number % 3 == 0 if dtype == torch.float32 else core and number % 2 == 0
    return [] if daily or dtype == torch.float64 else [pytest.mark.nightly]


JUDGED = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}", marks=_marks(name, dtype))
    for name, case in CASES.items()
    for dtype in _dtypes(case)
    if "large" not in case.tags
]


@pytest.mark.parametrize(("name", "dtype"), JUDGED)
def test_every_case(name: str, dtype: torch.dtype) -> None:
    """Each backend that takes the case; only float64 is refused. Most cases are interpreted in larger tiles.

    The reference is its own oracle: it is checked only where its inputs differ from the oracle's dense ones.
    """
    core, large = "core" in CASES[name].tags, Config(128, 128, 1, 1)
    check = statistics.StatisticsCheck(name, dtype, top_k=5 if core else 2)
    scope = {} if core else {"row_statistics": large, "key_mass": large, "map": Config(32, 128, 1, 1)}
    for backend in BACKENDS if varies_memory(CASES[name]) or dtype in HALF else BACKENDS[1:]:
        if reasons := testing.why_not(name, backend, dtype):
            with pytest.raises(BackendError, match=re.escape(reasons[0])):
                check.run(backend)
            assert backend == "triton"
        else:
            with tuning.override(**scope):
                check.run(backend)


@pytest.mark.parametrize("name", ("key_mass", "entropy", "max_logit", "top_k_indices", "top_k_weights", "map"))
def test_small_errors_exceed_the_budget(name: str) -> None:
    """One part in two thousand of one element, or one place next to the right one."""
    check = statistics.StatisticsCheck("plain")
    options = {x: y for x, y in check.inputs.kwargs.items() if x not in statistics.OUTPUT_OPTIONS} | {
        "backend": "reference"
    }
    q, k, _ = check.inputs.qkv
    got = attention_stats(q, k, **check.requested, **options)._asdict()
    got["map"] = attention_map(q, k, rows=check.rows, heads=check.heads, **options)
    flat = got[name].detach().clone().flatten()
    worst = flat.abs().argmax()
    flat[worst] += -1 if name == "top_k_indices" else flat[worst] * 5e-4
    got[name] = flat.view(got[name].shape)
    with pytest.raises(AssertionError, match=name):
        check.compare_map(got.pop("map")) if name == "map" else check.compare(Statistics(*list(got.values())[:5]))


def test_most_top_k_indices_are_unambiguous() -> None:
    assert statistics.check_statistics("plain", "tiled").rows["top_k_indices"].error < 0.01


# --------------------------------------------------------------------------------------------------- ties and places


@pytest.mark.parametrize("top_k", (1, 3, 8, 33))
@pytest.mark.parametrize("n", (40, 113, 600))
def test_ties_take_the_first_key(backend: str, n: int, top_k: int) -> None:
    """Small integers: every score is exact, and most of them have equals in other tiles."""
    if backend == "triton" and n > 113:
        pytest.skip("long for an interpreter")
    q, k = ((x * 1.5).round().clamp(-2, 2) for x in qk(17, n, d=4))
    words = {"top_k": top_k, "scale": 0.5, "causal": True, "alignment": "bottom_right"}
    got = attention_stats(q, k, backend=backend, **words)
    s = (0.5 * q.double() @ k.double().mT).masked_fill(~Mask.causal("bottom_right").materialize((1, 2, 17, n)), -INF)
    best, places = s.sort(dim=-1, descending=True, stable=True)
    assert (best[..., :top_k].diff(dim=-1) == 0).any(-1).double().mean() > 0.3 or top_k == 1
    assert torch.equal(got.top_k_indices, places[..., :top_k].masked_fill(best[..., :top_k] == -INF, -1))


@pytest.mark.parametrize("value", (0.0, -3.0))
def test_all_weights_equal(backend: str, value: float) -> None:
    """One score for all: the first keys, and equal weights. Zeros of both signs are alike."""
    q, k = torch.full((1, 1, 5, 16), value), torch.ones(1, 1, 70, 16)
    signs = torch.where(torch.arange(70) % 2 == 0, -0.0, 0.0)  # added to a product of 0 * -1
    got = attention_stats(q, k, top_k=9, entropy=True, scale=-1.0, bias=signs, backend=backend)
    assert torch.equal(got.top_k_indices, torch.arange(9).expand(1, 1, 5, 9))
    for name, x in (
        ("top_k_weights", torch.full((1, 1, 5, 9), 70.0).reciprocal()),
        ("entropy", torch.tensor(70.0).log()),
    ):
        found = getattr(got, name)
        within_budget(name, found, x.double().expand_as(found), x.expand_as(found))


def test_leading_is_a_stable_sort() -> None:
    generator = random.Random(0)
    for width, k in itertools.product((1, 2, 7, 40), (1, 2, 5, 64)):
        s = torch.tensor(
            [[generator.choice((-INF, -1.0, 0.0, -0.0, 2.0, INF, NAN)) for _ in range(width)] for _ in "x" * 50]
        )
        best, order = s.sort(dim=-1, descending=True, stable=True)
        values, places = leading(s, k)
        torch.testing.assert_close(values, best[:, :k], rtol=0, atol=0, equal_nan=True)
        seen = values != -INF  # among those no order is promised
        assert torch.equal(places[seen], order[:, :k][seen])


def test_top_k_beyond_the_number_of_keys(backend: str) -> None:
    """Row i of a causal mask sees i + 1 keys; the places that are left are -1, with weight 0."""
    q, k = qk(9)
    got = attention_stats(q, k, top_k=9, causal=True, backend=backend)
    missing = torch.arange(9) > torch.arange(9)[:, None]
    assert torch.equal(got.top_k_indices == -1, missing.expand(1, 2, 9, 9))
    assert torch.equal(got.top_k_weights == 0, missing.expand(1, 2, 9, 9))
    assert torch.equal(got.top_k_indices.sort(-1).values[:, :, -1], torch.arange(9).expand(1, 2, 9))


def test_long_rows(backend: str) -> None:
    """Several tiles of keys, the largest scores in the last ones: everything that came before is rescaled."""
    q, k = qk(5, 1200, d=8)
    k *= torch.linspace(0.1, 3, 1200)[:, None]
    words = {"key_mass": True, "entropy": True, "max_logit": True, "top_k": 40}
    got = attention_stats(q, k, **words, backend=backend)
    exact, plain = (attention_stats(*x, **words, backend="reference") for x in ((q.double(), k.double()), (q, k)))
    assert torch.equal(got.top_k_indices, exact.top_k_indices)
    for name in ("key_mass", "entropy", "max_logit", "top_k_weights"):
        within_budget(name, getattr(got, name), getattr(exact, name), getattr(plain, name))


def test_weights_are_those_of_the_map(backend: str) -> None:
    q, k = qk(21, 50)
    words = {"sink": torch.ones(2), "softcap": 3.0, "backend": backend}
    got, shown = attention_stats(q, k, **ALL, **words), attention_map(q, k, **words)
    torch.testing.assert_close(got.top_k_weights, shown.gather(-1, got.top_k_indices))
    torch.testing.assert_close(got.key_mass, shown.sum(2))
    assert (shown.sum(-1) < 1).all()


# ---------------------------------------------------------------------------------------- nothing, NaN, and infinity


def test_fully_masked_rows(backend: str) -> None:
    q, k = qk(40, 70)
    mask = torch.ones(40, 70, dtype=torch.bool)
    mask[::3] = False
    for words in ({}, {"sink": torch.zeros(2)}, {"normalizer": "softmax1"}):
        got = attention_stats(q, k, **ALL, mask=mask, backend=backend, **words)
        assert (got.entropy[:, :, ::3] == 0).all() and (got.entropy[:, :, 1::3] > 0).all()
        assert (got.max_logit[:, :, ::3] == -INF).all() and got.max_logit[:, :, 1::3].isfinite().all()
        assert (got.top_k_indices[:, :, ::3] == -1).all() and (got.top_k_weights[:, :, ::3] == 0).all()
        assert (attention_map(q, k, rows=[0, 3], mask=mask, backend=backend, **words) == 0).all()
    nothing = attention_stats(q, k, **ALL, mask=torch.zeros_like(mask), backend=backend)
    assert (nothing.key_mass == 0).all()


def test_padding_is_not_read(backend: str) -> None:
    """NaN in queries and keys past the lengths reaches no statistic: NaN times a weight of 0 would."""
    q, k = qk(50, 70, b=2)
    lengths, q_lengths = torch.tensor([70, 41]), torch.tensor([33, 50])
    q[0, :, 33:], k[1, :, 41:] = NAN, NAN
    words = {"mask": Mask.lengths(lengths, q_lengths), "backend": backend}
    got, shown = attention_stats(q, k, **ALL, **words), attention_map(q, k, **words)
    assert not any(x.isnan().any() for x in (*got, shown))
    torch.testing.assert_close(got.key_mass.sum(-1), q_lengths[:, None].expand(2, 2).float())
    assert (got.key_mass[1, :, 41:] == 0).all() and (shown[0, :, 33:] == 0).all()


def test_nan_propagates(backend: str) -> None:
    """One NaN query poisons its row and the mass of the keys that the row may see, and nothing else."""
    q, k = qk(40, 70)
    q[0, 0, 20, 3] = NAN
    words = {"window": (10, 2), "alignment": "top_left", "backend": backend}
    got, shown = attention_stats(q, k, **ALL, **words), attention_map(q, k, **words)
    row, seen = torch.zeros(1, 2, 40, dtype=torch.bool), torch.zeros(1, 2, 70, dtype=torch.bool)
    row[0, 0, 20], seen[0, 0, 10:23] = True, True
    assert torch.equal(got.max_logit.isnan(), row) and torch.equal(got.entropy.isnan(), row)
    assert torch.equal(got.key_mass.isnan(), seen)
    assert torch.equal(got.top_k_weights.isnan(), row[..., None].expand(1, 2, 40, 3))
    assert got.top_k_indices[0, 0, 20].tolist() == [10, 11, 12], "NaN ranks above all, and of NaNs the first is first"
    assert torch.equal(shown.isnan(), (row[..., None] & seen[:, :, None]))


def test_one_nan_score(backend: str) -> None:
    """It ranks first; the row's other weights are NaN and keep their places; where the mask forbids there is a 0."""
    q, k = qk(3, 70, h=1)
    bias = torch.zeros(3, 70)
    bias[1, 60], bias[1, 5] = NAN, -INF
    mask = torch.arange(70) > 3
    got = attention_stats(q, k, **ALL, bias=bias, mask=mask, backend=backend)
    clean = attention_stats(q, k, top_k=3, mask=mask & (torch.arange(70) != 60), backend=backend)
    assert got.top_k_indices[0, 0, 1].tolist() == [60, *clean.top_k_indices[0, 0, 1, :2].tolist()]
    assert got.top_k_weights[0, 0, 1].isnan().all() and not got.top_k_weights[0, 0, [0, 2]].isnan().any()
    shown = attention_map(q, k, rows=[1], bias=bias, mask=mask, backend=backend)[0, 0, 0]
    forbidden = torch.arange(70) < 4
    forbidden[5] = True
    assert torch.equal(shown.isnan(), ~forbidden) and (shown[forbidden] == 0).all()
    sigmoid = attention_stats(q, k, key_mass=True, top_k=3, bias=bias, normalizer="sigmoid", backend=backend)
    assert sigmoid.top_k_weights[0, 0, 1].isnan().tolist() == [True, False, False]
    assert sigmoid.key_mass.isnan().sum() == 1


@pytest.mark.parametrize("shape", ((0, 2, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7), (2, 3, 5, 0)))
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    """A batch, heads, queries or keys of 0: zeros and -inf."""
    b, h, m, n = shape
    q, k = randn(b, h, m, 16), randn(b, h, n, 16)
    got = attention_stats(q, k, **ALL | {"top_k": min(n, 3)}, backend=backend)
    assert got.key_mass.shape == (b, h, n) and (got.key_mass == 0).all()
    assert got.entropy.shape == (b, h, m) and (got.entropy == 0).all()
    assert got.max_logit.shape == (b, h, m) and (got.max_logit == -INF).all()
    if n:
        assert got.top_k_indices.shape == got.top_k_weights.shape == (b, h, m, 3)
    assert attention_map(q, k, backend=backend).shape == (b, h, m, n)


# --------------------------------------------------------------------------------------------- rows, heads, and words


def test_rows_and_heads_in_any_order(backend: str) -> None:
    """The full map, indexed as torch would: tensors and negative numbers, repeats, nothing at all."""
    q, k = randn(2, 4, 150, 16), randn(2, 2, 70, 16, seed=1)
    words = {"alibi_slopes": torch.rand(4), "causal": True, "alignment": "bottom_right", "backend": backend}
    whole = attention_map(q, k, **words)
    assert whole.shape == (2, 4, 150, 70)
    exact, plain = (attention_map(*x, **words | {"backend": "reference"}) for x in ((q.double(), k.double()), (q, k)))
    within_budget("map", whole, exact, plain)
    for rows, heads in (([149, 3, 3, -150, 140], [2]), (torch.tensor([7]), (3, 0, 3)), ([], None), (range(60, 90), []),
                        (None, torch.tensor([-1], dtype=torch.int32))):  # fmt: skip
        i = list(range(150)) if rows is None else [int(x) for x in rows]
        h = list(range(4)) if heads is None else [int(x) for x in heads]
        got = attention_map(q, k, rows=rows, heads=heads, **words)
        torch.testing.assert_close(got, whole[:, h][:, :, i])


def test_windows_hold_each_choice_once() -> None:
    generator = random.Random(1)
    for _ in range(50):
        rows = [generator.randrange(300) for _ in range(generator.randrange(60))]
        most, apart = generator.choice((1, 16, 128)), generator.choice((1, 16, 128))
        found = tiles.windows(rows, most, apart)
        placed = {slot: x.start + i for x in found for i, slot in zip(x.inside, x.slots, strict=True)}
        assert placed == dict(enumerate(rows)) and sum(len(x.slots) for x in found) == len(rows)
        assert all(0 < x.stop - x.start <= most for x in found)
        assert all(b.start > a.stop - 1 for a, b in itertools.pairwise(found))
        assert all(b - a <= apart for x in found for a, b in itertools.pairwise(sorted(x.inside)))


def test_only_requested_statistics_are_returned(backend: str) -> None:
    q, k = qk()
    every = attention_stats(q, k, **ALL, backend=backend)
    for name, value in ALL.items():
        got = attention_stats(q, k, **{name: value}, backend=backend)
        wanted = [x for x in NAMES if x.startswith(name)]
        assert [x for x in NAMES if getattr(got, x) is not None] == wanted
        assert all(torch.equal(getattr(got, x), getattr(every, x)) for x in wanted)
    assert attention_stats(q, k, backend=backend) == (None,) * 5


def test_layout_and_autocast(backend: str) -> None:
    q, k = qk(33, 20)
    got = attention_stats(q, k, **ALL, backend=backend)
    swapped = attention_stats(q.transpose(1, 2), k.transpose(1, 2), **ALL, layout="bshd", backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, swapped, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        cast = attention_stats(q, k, **ALL, backend=backend)
    rounded = attention_stats(q.bfloat16(), k.bfloat16(), **ALL, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(cast, rounded, strict=True))


def test_half_is_computed_in_float32(backend: str) -> None:
    """Nothing is rounded on the way but q and k themselves."""
    q, k = (x.half() for x in qk(33, 70))
    got, wide = (attention_stats(*x, **ALL, backend=backend) for x in ((q, k), (q.float(), k.float())))
    for name in ("key_mass", "entropy", "max_logit", "top_k_weights"):
        torch.testing.assert_close(getattr(got, name), getattr(wide, name))


# ------------------------------------------------------------------------------------------------- derivatives, errors


@pytest.mark.parametrize("leaf", ("q", "k", "sink", "w"))
def test_backward_raises(backend: str, leaf: str) -> None:
    q, k = qk()
    sink, w = torch.zeros(2), torch.eye(16)
    {"q": q, "k": k, "sink": sink, "w": w}[leaf].requires_grad_()
    words: Any = {"sink": sink, "score": fused_attn.scores.Bilinear(w), "backend": backend}
    got = attention_stats(q, k, **ALL, **words)
    for name in ("key_mass", "entropy", "max_logit", "top_k_weights"):
        with pytest.raises(NotImplementedError, match=r"attention_stats: .* no derivative"):
            getattr(got, name).sum().backward()
    assert not got.top_k_indices.requires_grad
    with pytest.raises(NotImplementedError, match=r"attention_map: .* no derivative"):
        attention_map(q, k, rows=[0], **words).sum().backward()
    with torch.no_grad():
        assert not attention_stats(q, k, entropy=True, **words).entropy.requires_grad


def test_no_graph_without_requires_grad() -> None:
    q, k = qk()
    assert not any(x.requires_grad for x in (*attention_stats(q, k, **ALL), attention_map(q, k)))


@pytest.mark.parametrize("name", ("tiled", "triton"))
def test_operators(name: str) -> None:
    """torch's own examination of both, and one compiled graph around them, for other lengths too."""
    available(name)
    q, k = qk(19, 23)
    p = bind(q, k, k[..., :1], Options(sink=torch.zeros(2)))
    for asked in ((True, True, True, 3), (False, True, False, 0)):
        torch.library.opcheck(torch.ops.fused_attn.statistics.default, (*ops.flatten(p, name), *asked))
    torch.library.opcheck(torch.ops.fused_attn.weights.default, (*ops.flatten(p, name), [5, 0, 5], [1]))

    def seen(q: Tensor, k: Tensor) -> tuple[Tensor | None, ...]:
        words = {"alibi_slopes": torch.ones(2), "alignment": "bottom_right", "backend": name}
        return *attention_stats(q * 2, k, **ALL, **words), attention_map(q * 2, k, rows=[-1, 0], **words)

    torch._dynamo.reset()
    compiled = torch.compile(seen, backend="aot_eager", fullgraph=True)
    for q, k in (qk(19, 23), qk(24, 31)):
        for x, y in zip(compiled(q, k), seen(q, k), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", ("hopper", "sdpa"))
def test_backends_without_statistics_raise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = qk()
    for call in (attention_stats, attention_map):
        with pytest.raises(BackendError, match=f"'{name}' .*computes no statistics"):
            call(q, k, backend=name)
    monkeypatch.setenv("FUSED_ATTN_BACKEND", name)
    with pytest.raises(BackendError, match="computes no statistics"):
        attention_map(q, k)


def test_tiled_is_chosen_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for other in (reference, triton_statistics):
        monkeypatch.setattr(other, "statistics", None)
    assert attention_stats(*qk(), entropy=True).entropy is not None


def test_float64_on_triton_is_refused() -> None:
    with pytest.raises(BackendError, match="float64"):
        attention_map(*(x.double() for x in qk()), backend="triton")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"top_k": 36}, ValueError, "top_k: expected at most the 35 keys, got 36"),
    ({"top_k": -1}, ValueError, "top_k: must be >= 0, got -1"),
    ({"top_k": 2.0}, TypeError, "top_k: expected an int, got float 2.0"),
    ({"top_k": True}, TypeError, "top_k: expected an int, got bool True"),
    ({"entropy": True, "normalizer": "sigmoid"}, ValueError, 'entropy: normalizer "sigmoid" has none'),
    ({"sink": torch.zeros(2), "normalizer": "sigmoid"}, ValueError, "sink: .*takes none"),
    ({"k": torch.zeros(1, 2, 35, 8)}, ValueError, r"k: expected q's head dim 16, got shape \(1, 2, 35, 8\)"),
    ({"k": [1]}, TypeError, "k: expected a tensor, got list"),
    ({"k": torch.zeros(1, 3, 35, 16)}, ValueError, "k: 3 key-value heads do not divide the 2 query heads"),
    ({"layout": "sbhd"}, ValueError, "layout: expected one of"),
    ({"backend": "fast"}, ValueError, "backend: expected None or one of"),
    ({"dropout_p": 0.1}, TypeError, "dropout_p"),
    ({"mask": torch.zeros(3)}, TypeError, "mask: expected a bool tensor"),
]


@pytest.mark.parametrize(("changed", "error", "words"), WRONG, ids=range(len(WRONG)))
def test_options_of_wrong_types(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    q, k = qk()
    with pytest.raises(error, match=words):
        attention_stats(**{"q": q, "k": k} | changed)


WRONG_CHOICES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rows": [35]}, ValueError, "rows: expected indices from -35 to 34, got 35"),
    ({"heads": [0, -3]}, ValueError, "heads: expected indices from -2 to 1, got -3"),
    ({"rows": 3}, TypeError, "rows: expected a sequence of ints or a tensor, got int 3"),
    ({"rows": [True]}, TypeError, "rows: expected a sequence of ints"),
    ({"rows": [1.0]}, TypeError, "rows: expected a sequence of ints"),
    ({"heads": torch.ones(2)}, TypeError, "heads: expected a 1-d integer tensor, got torch.float32"),
    ({"heads": torch.ones(2, dtype=torch.bool)}, TypeError, "heads: expected a 1-d integer tensor, got torch.bool"),
    ({"rows": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "rows: expected a 1-d integer tensor"),
    ({"rows": "all"}, TypeError, "rows: expected a sequence of ints"),
]


@pytest.mark.parametrize(("changed", "error", "words"), WRONG_CHOICES, ids=range(len(WRONG_CHOICES)))
def test_wrong_choices(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        attention_map(*qk(), **changed)


# ------------------------------------------------------------------------------------------------------------- memory

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is counted by Linux")


@linux
def test_statistics_are_linear_in_length() -> None:
    """All five of them: four times the length is about four times the memory."""
    peaks = {length: memory.peak("tiled", "statistics", length) for length in (2048, 8192)}
    assert peaks[8192] < 6 * peaks[2048]
    assert peaks[8192] < 0.1 * 4 * memory.HEADS[memory.CASE] * 8192**2


@linux
def test_memory_of_a_map_is_that_of_its_rows() -> None:
    """64 rows of one head of 8192 keys are 2 MiB; every row would be 256."""
    peak = memory.peak("tiled", "map", 8192)
    assert 4 * 64 * 8192 < peak < 4 * 4 * 64 * 8192
