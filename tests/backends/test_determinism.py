"""Two runs give the same bits, parameter gradients included, in any order of programs and threads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fused_attn import testing
from fused_attn.testing.cases import LEAVES, SCORE_CASES, Case

ALL: dict[str, Any] = {
    "b": 2, "hq": 2, "hkv": 1, "m": 70, "n": 40, "causal": True, "alignment": "bottom_right", "dropout_p": 0.2,
    "scale_tensor": "h", "alibi": "h", "softcap": 2.0, "softcap_tensor": True, "sink": True, "return_lse": True,
}  # fmt: skip
CASES = (
    Case("dot, a dense bias", **ALL, bias="bhmn"),
    Case("dot, one bias, one scale", **ALL | {"scale_tensor": "", "alibi": "bh"}, bias="11mn"),
    Case("bilinear, a bias for each head", **ALL, **SCORE_CASES["bilinear"], score="bilinear", bias="1hmn"),
    Case("cosine, a bias of keys", **ALL, **SCORE_CASES["cosine"], score="cosine", bias="b11n"),
    Case("distance, a bias of rows", **ALL | {"softcap": None, "softcap_tensor": False}, **SCORE_CASES["distance"],
         score="distance", bias="bhm1"),
    Case("additive, a bias for all heads", **ALL | {"d": 20}, score="additive", parameter="d", bias="11mn"),
    Case("a sigmoid", **ALL | {"sink": False, "return_lse": False}, normalizer="sigmoid", bias="1h1n"),
)  # fmt: skip


def test_every_gradient_is_requested() -> None:
    asked = {name for case in CASES for name in testing.make_inputs(case).leaves}
    assert asked == set(LEAVES)


def assert_same_bits(case: Case, backend: str, repeats: int) -> None:
    inputs = testing.make_inputs(case)
    first = testing.run_public(inputs, backend)
    for _ in range(repeats):
        again = testing.run_public(inputs, backend)
        assert [name for name, x in first.items() if not torch.equal(x, again[name])] == []


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", (1, 2), indirect=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("threads")
def test_tiled(case: Case) -> None:
    assert_same_bits(case, "tiled", 4)


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter runs the programs of a launch in another order each time."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import interpreter_builder as builder

    size, place = builder.set_grid_dim, builder.set_grid_idx
    order: list[int] = []

    def begin(*grid: int) -> None:
        order[:] = random.sample(range(grid[0]), grid[0])
        size(*grid)

    monkeypatch.setattr(builder, "set_grid_dim", begin)
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: place(order[x], y, z))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("shuffled")
def test_triton(case: Case) -> None:
    if reasons := testing.why_not(case, "triton"):
        pytest.skip(reasons[0])
    assert_same_bits(case, "triton", 1)


def test_unordered_sums_are_detected(shuffled: None) -> None:
    """What an atomic would do to a gradient."""
    import triton
    import triton.language as tl

    def added(x, total):  # type: ignore[no-untyped-def]
        tl.atomic_add(total, tl.load(x + tl.program_id(0)))

    kernel: Callable[..., Any] = triton.jit(added)
    x = torch.randn(64) * 10.0 ** torch.randint(-3, 4, (64,))
    found = set()
    for _ in range(5):
        total = torch.zeros(1)
        kernel[(64,)](x, total)
        found.add(total.item())
    assert len(found) > 1
