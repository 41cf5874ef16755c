"""Faults that other attention implementations have had, tested on every backend.

What a tolerance cannot see is asserted exactly: zeros, bits, NaN, writes outside of a tensor. Operators are tested in
runtime/test_operators.py, wrong arguments in api/test_errors.py. Every test here has a mutation in tests/mutants.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_attn
from fused_attn import attention, testing
from fused_attn.testing.cases import CASES, Case
from tests import ROOT
from tests.parity import within_budget

LINEAR = ("triton", "tiled")  # backends of linear memory
JUDGED = (*LINEAR, "sdpa")  # the backends that the reference judges; it cannot judge itself
FUSED = (*LINEAR, "reference")
ALL = (*FUSED, "sdpa")
HALF = (torch.float16, torch.bfloat16)
SIDES = ("top_left", "bottom_right")
SMALL = {"hq": 1, "m": 35, "d": 16}


def parity(backend: str, dtype: torch.dtype = torch.float32, **fields: Any) -> None:
    """check_parity of a case made on the spot; skipped exactly where why_not speaks."""
    case = Case("here", **SMALL | fields)
    reasons = testing.why_not(case, backend, dtype)
    if reasons:
        pytest.skip(reasons[0])
    testing.check_parity(case, backend, dtype)


def available(backend: str) -> None:
    reasons = testing.why_not(Case("here", **SMALL), backend)
    if reasons:
        pytest.skip(reasons[0])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(m: int = 35, n: int | None = None, h: int = 2, d: int = 16) -> list[Tensor]:
    n = m if n is None else n
    return [randn(1, h, s, d, seed=i).requires_grad_() for i, s in enumerate((m, n, n))]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, int]]]:
    """Memory that a backend allocates has a guard on either side, which must come back as it was."""
    made: list[tuple[Tensor, int]] = []
    width = 256

    def guard(allocate: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            if x.dtype == torch.bool or not x.numel() or not x.is_contiguous():
                return x
            flat = torch.full((x.numel() + 2 * width,), 77, dtype=x.dtype, device=x.device)
            made.append((flat, x.numel()))
            return flat[width : width + x.numel()].view(x.shape)

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, guard(getattr(owner, name)))
    yield made
    for flat, count in made:
        assert (flat[:width] == 77).all() and (flat[width + count :] == 77).all(), "a store left its tensor"


# ---------------------------------------------------------------------------------------------------- masks and rows


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("how", ("bool", "bias", "span"))
def test_masked_rows(backend: str, how: str) -> None:
    """A fully masked row, by bool, by -inf and by an interval: out 0, LSE -inf, gradients finite and 0."""
    available(backend)
    q, k, v = qkv(70, 50)
    dark = torch.zeros(70, dtype=torch.bool)
    if how == "span":
        options: dict[str, Any] = {"causal": True, "alignment": "bottom_right"}
        dark[:20] = True
    else:
        dark[::3] = True
        dark[32:64] = True
        allowed = ~dark[:, None].expand(70, 50)
        bias = torch.zeros(70, 50).masked_fill(~allowed, -torch.inf).requires_grad_()
        options = {"mask": allowed} if how == "bool" else {"bias": bias}
    out, lse = attention(q, k, v, **options, return_lse=True, backend=backend)
    assert (out[:, :, dark] == 0).all() and (lse[:, :, dark] == -torch.inf).all()
    assert lse[:, :, ~dark].isfinite().all()
    leaves = [q, k, v, *([bias] if how == "bias" else [])]
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, dark] == 0).all() and grads[0][:, :, ~dark].abs().sum() > 0
    assert how != "bias" or (grads[3][dark] == 0).all()


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize(
    "how", ({"masks": ("after_70",)}, {"bias": "1hmn", "bias_mask": "after_70"}), ids=("bool", "bias")
)
def test_first_tile_masked(backend: str, how: dict) -> None:
    """The first tile of keys is masked and later ones are not: no -inf minus -inf."""
    parity(backend, **how, m=33, n=113)


@pytest.mark.parametrize("backend", LINEAR)
def test_first_tile_masked_for_some_rows(backend: str) -> None:
    """Some rows have seen keys when others have not."""
    parity(backend, m=113, window=(20, 0), masks=("random_11mn",))


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("values", ("negative", "very_negative"))
def test_negative_logits_after_a_masked_tile(backend: str, values: str) -> None:
    """A masked first tile and then very negative logits: a running maximum that starts at 0 gives zeros."""
    parity(backend, masks=("after_70",), values=values, m=33, n=113, backward=False, return_lse=True)


@pytest.mark.parametrize("backend", JUDGED)
def test_logits_below_a_finite_sentinel(backend: str) -> None:
    """Every logit below -5e4."""
    parity(backend, values="very_negative", m=33, n=70, backward=False)
    inputs = testing.make_inputs(Case("low", values="very_negative", **SMALL))
    q, k = inputs.clean["q"], inputs.clean["k"]
    assert (q @ k.mT * 16**-0.5).max() < -5e4


@pytest.mark.parametrize("backend", JUDGED)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_huge_equal_logits(backend: str, dtype: torch.dtype) -> None:
    """Q = k = v = 133120: all keys are equal, so out is v."""
    parity(backend, dtype, values="huge_equal", m=70, hq=1, d=16, backward=False)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "fields",
    (
        {"b": 3, "masks": ("lengths_q",)},
        {"b": 2, "masks": ("segments_cross",), "n": 70},
        {"n": 70, "window": (3, 4), "alignment": "top_left"},
        {"n": 70, "causal": True, "alignment": "top_left", "return_lse": True},
    ),
    ids=("lengths", "segments", "window", "causal"),
)
def test_garbage_in_invisible_keys(backend: str, fields: dict, dtype: torch.dtype) -> None:
    """NaN in padding, in unseen keys, in stride gaps and past the end."""
    parity(backend, dtype, unseen_nan=True, **fields)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", ("k", "v"))
def test_garbage_under_a_tensor_mask(backend: str, name: str) -> None:
    """Under a bool tensor a NaN key has no score and a NaN value a weight of 0, which is NaN: as in torch."""
    available(backend)
    x = dict(zip("qkv", (t.detach() for t in qkv(35, 70)), strict=True))
    x[name][:, :, 50] = torch.nan
    allowed = torch.arange(70)[None] != 50
    out = attention(x["q"], x["k"], x["v"], mask=allowed, backend=backend)
    assert out.isfinite().all() if name == "k" else out.isnan().all()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("bad", (torch.nan, torch.inf), ids=("nan", "inf"))
@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_nan_and_infinity_propagate(backend: str, name: str, bad: float, dtype: torch.dtype) -> None:
    """NaN and Inf in q, k or v must not come out clean."""
    available(backend)
    x = dict(zip("qkv", (t.detach().to(dtype) for t in qkv(35, 70)), strict=True))
    x[name][0, 0, 20, 3] = bad
    out = attention(x["q"], x["k"], x["v"], backend=backend)
    touched = {"q": (0, 0, 20), "k": (0, 0), "v": (0, 0, slice(None), 3)}[name]
    hit = ~out[touched].isfinite()
    assert hit.any() if (name, bad) == ("k", torch.inf) else hit.all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("backend", JUDGED)
@pytest.mark.parametrize("scale", (0.0, -0.7, 1e-30, 1.0))
def test_scale(backend: str, scale: float) -> None:
    """Scale 0, negative, tiny, large, with and without a mask."""
    parity(backend, scale=scale, m=33, n=70)
    parity(backend, scale=scale, m=70, causal=True)


@pytest.mark.parametrize("backend", FUSED)
def test_scale_inf(backend: str) -> None:
    """An infinite scale: inf - inf is NaN, and is not hidden."""
    available(backend)
    q, k, v = (x.detach() for x in qkv())
    out = attention(q, k, v, scale=torch.inf, backend=backend)
    assert out.isnan().all()


LENGTHS = ((1, 1), (1, 65), (31, 33), (33, 31), (65, 1), (63, 65), (64, 64), (65, 129))


@pytest.mark.parametrize("backend", JUDGED)
@pytest.mark.parametrize(("m", "n"), LENGTHS)
def test_lengths_around_the_tile_size(backend: str, m: int, n: int, guarded: list) -> None:
    """Lengths around a tile's multiple: the tail is masked in forward and in every gradient."""
    parity(backend, m=m, n=n)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("empty")])
def test_zero_sizes(backend: str, name: str) -> None:
    """B, H, M or N of 0; with N = 0 out is 0 and the LSE is -inf, or the sink's logit."""
    reasons = testing.why_not(name, backend)
    if reasons:
        pytest.skip(reasons[0])
    testing.check_parity(name, backend)
    inputs = testing.make_inputs(name)
    if inputs.case.return_lse:
        got = testing.run_public(inputs, backend)
        sink = inputs.tensors.get("sink")
        expected = torch.full_like(got["lse"], -torch.inf) if sink is None else sink[:, None].expand_as(got["lse"])
        assert torch.equal(got["lse"], expected)
        assert (got["out"] == 0).all()


@pytest.mark.parametrize("backend", JUDGED)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("m", "n"), ((33, 70), (70, 33), (1, 40), (40, 1)))
def test_causal_with_unequal_lengths(backend: str, side: str, m: int, n: int) -> None:
    """M != N under both alignments, values and gradients."""
    parity(backend, causal=True, alignment=side, m=m, n=n)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("m", "n"), ((33, 70), (70, 33)))
def test_position_of_the_diagonal(backend: str, side: str, m: int, n: int) -> None:
    """A key above the diagonal has no weight at all, and every other one has some."""
    available(backend)
    q, k, _ = qkv(m, n, h=1, d=8)
    weights = attention(q, k, torch.eye(n)[None, None], causal=True, alignment=side, backend=backend)
    offset = 0 if side == "top_left" else n - m
    above = torch.arange(n) > torch.arange(m)[:, None] + offset
    assert (weights[0, 0][above] == 0).all() and (weights[0, 0][~above] > 0).all()


# ------------------------------------------------------------------------------------------------ memory and layout


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dout", ("ones", "transposed", "strided", "bshd"))
def test_strides_of_dout(backend: str, dout: str) -> None:
    """Dout not contiguous, or of stride 0 as out.sum() makes it."""
    parity(backend, dout=dout, b=2, hq=2)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("memory", ("expanded_heads", "expanded_batch"))
def test_expanded_keys(backend: str, memory: str) -> None:
    """Keys and values of stride 0, with N % 32 == 1."""
    parity(backend, memory=memory, b=2, hq=2, n=65)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("memory", ("unaligned", "odd_rows", "strided", "transposed", "corrupt"))
@pytest.mark.parametrize("d", (16, 40))
def test_unaligned(backend: str, memory: str, d: int, guarded: list) -> None:
    """An unaligned base or stride, and no store past the inner extent."""
    parity(backend, memory=memory, d=d, dv=d, causal=True)


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("d", (1, 5, 40, 72, 80, 96, 160, 512))
def test_head_dims(backend: str, d: int, guarded: list) -> None:
    """The default scale is that of the unpadded head dim, and no store passes it."""
    parity(backend, d=d, m=17, n=19)
    x = randn(1, 1, 9, d)
    options = {"return_lse": True, "backend": backend}
    assert torch.equal(attention(x, x, x, **options)[1], attention(x, x, x, scale=d**-0.5, **options)[1])


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("group", (1, 3, 5, 8))
@pytest.mark.parametrize("dv", (8, 40))
def test_groups_and_value_dims(backend: str, group: int, dv: int) -> None:
    """Dv != D, and groups of 1, 3, 5 and 8 query heads in dk and dv."""
    parity(backend, hq=2 * group, hkv=2, dv=dv, m=19, n=35)


TILES = ((16, 16), (16, 64), (64, 16), (32, 64), (128, 32))
FLAGS = {"plain": (), "overlap": ("overlap",), "descriptors": ("overlap", "descriptors")}


@pytest.mark.parametrize(
    ("flags", "tile"),
    [pytest.param(flags, tile, id=f"{name}-{tile[0]}x{tile[1]}",
                  marks=[] if name == "plain" or tile in ((16, 64), (128, 32)) else pytest.mark.nightly)
     for name, flags in FLAGS.items() for tile in TILES],
)  # fmt: skip
def test_every_tile(flags: tuple[str, ...], tile: tuple[int, int]) -> None:
    """Forward and gradients for tiles other than the chosen ones, with every modifier and with none."""
    available("triton")
    from fused_attn.tuning import Config, override
    from fused_attn.tuning.select import KERNELS

    pinned = Config(*tile, num_warps=1, num_stages=1, **dict.fromkeys(flags, True))
    with override(**dict.fromkeys(KERNELS, pinned)):
        testing.check_parity(replace(CASES["everything"], b=1, hq=2, hkv=1, m=33, n=70, window=(40, None)), "triton")
        testing.check_parity(replace(CASES["window"], b=2, hq=2, m=70, window=(25, 30)), "triton")


# ------------------------------------------------------------------------------------------- gradients and modifiers


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("only_")])
def test_single_gradients(backend: str, name: str) -> None:
    """Only one tensor needs a gradient: it is the same bits as when all do."""
    available(backend)
    case = replace(CASES[name], m=35, hq=2)
    one = testing.run_public(testing.make_inputs(case), backend)
    every = testing.run_public(testing.make_inputs(replace(case, needs=fused_attn.testing.cases.LEAVES)), backend)
    assert {"out", case.needs[0]} == one.keys()
    assert torch.equal(one[case.needs[0]], every[case.needs[0]])


@pytest.mark.parametrize("backend", FUSED)
def test_softcap_comes_before_the_mask(backend: str) -> None:
    """A capped mask would leave masked keys some weight; and the bias is added after the cap."""
    available(backend)
    q, k, _ = qkv(35, 40, h=1, d=8)
    allowed = randn(35, 40, seed=5) > 0
    weights = attention(q, k, torch.eye(40)[None, None], mask=allowed, softcap=0.5, backend=backend)
    assert (weights[0, 0][~allowed] == 0).all() and (weights[0, 0][allowed] > 0).all()
    parity(backend, softcap=0.5, bias="1hmn", alibi="h", masks=("random_11mn",))


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("fields", ({}, {"return_lse": True}, {"return_lse": True, "dout": None}),
                         ids=("out", "both", "lse"))  # fmt: skip
def test_sink(backend: str, fields: dict) -> None:
    """The sink's gradient, through out and through the LSE."""
    parity(backend, sink=True, hq=4, hkv=2, m=35, n=70, causal=True, alignment="bottom_right", **fields)


def by_formula(q: Tensor, k: Tensor) -> list[Tensor]:
    """The log-sum-exp of q k / 4 over the keys, and the gradients of its sum."""
    scores = q @ k.mT / 4
    weights = scores.softmax(-1)
    return [scores.logsumexp(-1), weights @ k / 4, weights.mT @ q / 4]


@pytest.mark.parametrize("backend", FUSED)
def test_gradient_of_lse_only(backend: str) -> None:
    """Dv is 0, dq is the weighted mean of the keys, and the LSE is a natural logarithm."""
    available(backend)
    q, k, v = qkv(35, 70)
    _, lse = attention(q, k, v, return_lse=True, backend=backend)
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), torch.ones_like(lse), allow_unused=True)
    assert dv is None or (dv == 0).all()
    oracle, plain = (by_formula(q.detach().to(x), k.detach().to(x)) for x in (torch.float64, torch.float32))
    for name, *columns in zip(("lse", "dq", "dk"), (lse, dq, dk), oracle, plain, strict=True):
        within_budget(name, *columns)


# ---------------------------------------------------------------------------------------------------------- dropout


def dropped(backend: str, p: float = 0.4, m: int = 35, n: int = 70, **options: Any) -> Tensor:
    """The weights that dropout lets through, as bool (B, H, M, N): values are the identity."""
    q, k = torch.zeros(2, 3, m, 8), torch.zeros(2, 3, n, 8)
    return attention(q, k, torch.eye(n).expand(2, 3, n, n), dropout_p=p, backend=backend, **options) > 0


@pytest.mark.parametrize("backend", ("triton", "tiled"))
@pytest.mark.parametrize("seed", (0, 1234, -5, 2**63 - 1))
def test_dropout_mask_is_the_same_on_every_backend(backend: str, seed: int) -> None:
    """Bit for bit the reference's mask, whatever the tile; a constant seed is a constant mask."""
    available(backend)
    expected = dropped("reference", seed=seed)
    assert torch.equal(dropped(backend, seed=seed), expected)
    assert torch.equal(dropped(backend, seed=torch.tensor(seed)), expected)
    assert not torch.equal(dropped(backend, seed=seed ^ 1), expected)
    assert torch.equal(dropped(backend, n=33, seed=seed), expected[..., :33])
    assert expected.float().mean().item() == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("backend", FUSED)
def test_dropout_from_the_generator(backend: str) -> None:
    """Without a seed each call draws one, manual_seed brings it back; a large offset does not overflow."""
    available(backend)
    torch.manual_seed(7)
    first, second = dropped(backend), dropped(backend)
    torch.manual_seed(7)
    assert torch.equal(dropped(backend), first) and not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(dropped("reference"), first)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint_replays_the_mask(backend: str, reentrant: bool) -> None:
    """Activation checkpointing computes the same forward twice, mask included."""
    available(backend)

    def run(wrapped: bool) -> list[Tensor]:
        torch.manual_seed(3)
        leaves = qkv()
        call = lambda q, k, v: attention(q, k, v, dropout_p=0.5, backend=backend)  # noqa: E731
        out = checkpoint(call, *leaves, use_reentrant=reentrant) if wrapped else call(*leaves)
        out.square().sum().backward()
        return [out, *(x.grad for x in leaves)]

    for plain, replayed in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, replayed)


@pytest.mark.parametrize("backend", FUSED)
def test_backward_uses_the_forward_mask(backend: str) -> None:
    """Dv of the identity is the dropped weights themselves, transposed."""
    available(backend)
    q, k, _ = qkv(35, 40, h=1, d=8)
    v = torch.eye(40)[None, None].requires_grad_()
    out = attention(q, k, v, dropout_p=0.5, seed=11, backend=backend)
    (dv,) = torch.autograd.grad(out, v, torch.eye(35, 40)[None, None])
    assert torch.equal(dv[0, 0, :, :35] > 0, out[0, 0].mT > 0) and (out > 0).float().mean() < 0.7


# --------------------------------------------------------------------------------------------------- numbers, extents


@pytest.mark.parametrize("backend", JUDGED)
@pytest.mark.parametrize("values", ("small_integers", "one_hot", "constant", "ramps"))
def test_not_gaussian(backend: str, values: str) -> None:
    """Sparse small integers, one-hot vectors, constants and ramps."""
    parity(backend, values=values, m=33, n=70, scale=0.25)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_exact_result(backend: str, dtype: torch.dtype) -> None:
    """64 equal scores and integer values: the answer is exact, and so are its bits."""
    q = torch.zeros(1, 1, 9, 16, dtype=dtype)
    available(backend)
    v = randn(1, 1, 64, 16).mul(2).round().clamp(-4, 4)
    out = attention(q, torch.ones(1, 1, 64, 16, dtype=dtype), v.to(dtype), backend=backend)
    assert torch.equal(out, v.mean(2, keepdim=True).expand(1, 1, 9, 16).to(dtype))


def test_many_heads() -> None:
    """B * H above 65535, the limit of a grid's second and third axis: programs count along the first."""
    available("triton")
    from fused_attn.backends.triton import launcher, portable

    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            grids.append(grid)
            return lambda *args, **options: None

    real = launcher.launch
    q = torch.zeros(3, 30000, 2, 16)
    p = testing.Inputs(Case("wide"), {"q": q, "k": q, "v": q}, {}, {}, None, None).problem()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "launch", lambda kernel, *args, **options: real(Recorder(), *args, **options))
        out, lse, *normaliser = portable.forward(p)
        portable.backward(p, out, *normaliser, q, lse, frozenset("qkv"))
    assert len(grids) >= 3
    for grid in grids:
        assert grid[0] >= 90000 and all(n <= 65535 for n in grid[1:])


def test_many_heads_in_pytorch() -> None:
    """Where no grid is."""
    testing.check_parity("many_heads", "tiled")


FAR = """
import mmap
from dataclasses import replace
import torch
from fused_attn import testing
from fused_attn.testing.cases import Case

def far(x, dim):
    # x again, its rows along one dim 2**30 elements apart, in memory that is committed only where it is touched.
    count = (x.shape[dim] - 1) * 2**30 + x.numel() + 64
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python does not name
    pages = mmap.mmap(-1, count * x.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    stride = list(x.contiguous().stride())
    stride[dim] = 2**30
    home = torch.frombuffer(pages, dtype=torch.uint8).view(x.dtype).as_strided(x.shape, stride)
    return home.copy_(x)

for name in ("q", "k", "v", "bias", "mask", "dout"):
    for dim, size in enumerate(({"b": 3}, {"hq": 3}, {})):
        print("next:", name, "dim", dim, flush=True)
        fields = {"bias": "bhmn"} if name == "bias" else {"masks": ("random_bhmn",)} if name == "mask" else {}
        case = Case("far", **{"hq": 1, "m": 3, "n": 3, "d": 16, "causal": True} | fields | size)
        inputs = testing.make_inputs(case, torch.float16)
        tensors, options, dout = dict(inputs.tensors), dict(inputs.options), inputs.dout
        if name == "mask":
            options["mask"] = far(options["mask"], dim)
        elif name == "dout":
            dout = far(dout, dim)
        else:
            tensors[name] = far(inputs.clean[name], dim).requires_grad_()
        moved = replace(inputs, tensors=tensors, options=options, dout=dout)
        testing.compare(inputs, testing.run_public(moved, "triton"), testing.expect(inputs), f"{name} along {dim}")
print("all right")
"""


def test_offsets_beyond_int32() -> None:
    """Strides of 2**30 elements: an offset that is not widened before its first multiply leaves the memory."""
    available("triton")
    program = "from tests import interpreter\ninterpreter.install()\n" + FAR
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "all right" in done.stdout, f"exit {done.returncode}, {done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"


STOCK = """
import torch, fused_attn
for dtype in (torch.float16, torch.bfloat16):
    ones = torch.ones(1, 1, 16, 16, dtype=dtype)
    refused = fused_attn.explain(ones, ones, ones, backend="triton").reasons
    assert not refused or (dtype == torch.bfloat16 and "interpreter computes bfloat16 wrongly" in str(refused)), refused
    assert refused or torch.equal(fused_attn.attention(ones, ones, ones, backend="triton"), ones), dtype
print("all right")
"""


def test_bfloat16_in_an_unrepaired_interpreter() -> None:
    """It is refused by an interpreter that multiplies bit patterns as integers, and otherwise right."""
    available("triton")
    done = subprocess.run([sys.executable, "-c", STOCK], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "all right" in done.stdout, done.stderr[-2000:]
