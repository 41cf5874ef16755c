"""Kernels of additive scores: no overflow, and a one-pass backward for any order of programs."""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import scores, testing
from fused_attn.testing.cases import Case

pytest.importorskip("triton")

from triton.runtime import interpreter

from fused_attn.backends.triton import additive as launch
from fused_attn.backends.triton import settings
from fused_attn.tuning import Config, override

SMALL = {"score": "additive", "parameter": "hd", "d": 4, "m": 25, "n": 41}


class Turns:
    """Programs of one launch in threads, of which one runs at a time; another goes on at each atomic."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.waiting: dict[int, threading.Event] = {}
        self.failure: BaseException | None = None
        self.switches = 0
        self.local = threading.local()

    def run(self, programs: int, body: Any, enter: Any) -> None:
        done = threading.Event()
        self.enter = enter

        def work(program: int) -> None:
            self.local.program = program
            self.waiting[program].wait()
            try:
                enter(program)
                with np.errstate(all="ignore"):
                    body()
            except BaseException as error:
                self.failure = self.failure or error
            del self.waiting[program]
            if self.waiting:
                self.random.choice(list(self.waiting.values())).set()
            else:
                done.set()

        self.waiting = {i: threading.Event() for i in range(programs)}
        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(programs)]
        for thread in threads:
            thread.start()
        self.random.choice(list(self.waiting.values())).set()
        assert done.wait(60), "no program goes on"
        if self.failure is not None:
            raise self.failure

    def yield_(self) -> None:
        """Let another program run, or this one again."""
        program = getattr(self.local, "program", None)
        if program is None:
            return
        self.switches += 1
        assert self.switches < 20_000, "programs wait for each other"
        following = self.random.choice(list(self.waiting))
        if following != program:
            self.waiting[program].clear()
            self.waiting[following].set()
            self.waiting[program].wait()
            self.enter(program)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Turns]]:
    """Launches of the backward run their programs in turns while the list is not empty; its last entry takes them."""
    active: list[Turns] = []
    builder = interpreter.interpreter_builder
    atomic, grid = interpreter.InterpreterBuilder.create_atomic_rmw, interpreter.GridExecutor.__call__

    def create_atomic_rmw(self: Any, *args: Any) -> Any:
        if active:
            active[-1].yield_()
        return atomic(self, *args)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not active or self.fn.__name__ != "additive_backward_kernel":
            return grid(self, *args, **kwargs)
        programs, scheduler = self.grid[0], active[-1]
        started: list[bool] = []
        function = self.fn

        def once(**arguments: Any) -> None:
            # The executor walks the grid one by one; the first of them starts all, the others find it done.
            if not started:
                started.append(True)
                scheduler.run(programs, lambda: function(**arguments), lambda i: builder.set_grid_idx(i, 0, 0))

        once.__name__, once.__signature__ = function.__name__, inspect.signature(function)  # type: ignore[attr-defined]
        self.fn = once
        try:
            return grid(self, *args, **kwargs)
        finally:
            self.fn = function

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_atomic_rmw", create_atomic_rmw)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    yield active


def gradients(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """out and every gradient by the kernels, in tiles of 16."""
    tiles = Config(16, 16, 1, 1)
    with override(additive_forward=tiles, additive_backward=tiles):
        return testing.run_public(testing.make_inputs(case, seed=seed), "triton")


CASES = {
    "full": Case("full", **SMALL),
    "causal_gqa": Case("causal_gqa", **SMALL, hq=2, hkv=1, causal=True, alignment="bottom_right", bias="1h1n"),
    "segments": Case("segments", **SMALL | {"m": 41}, b=2, hq=1, masks=("segments_gap",), scale_tensor="h", alibi="h"),
    "ragged": Case(
        "ragged", **SMALL, lengths=((20, 17), (3, 40), (0, 5), (33, 18)), causal=True, alignment="bottom_right"
    ),
    "sigmoid_rows": Case("sigmoid_rows", **SMALL, hq=1, normalizer="sigmoid", bias="bhm1"),
}


@pytest.mark.parametrize("name", CASES)
def test_any_order_of_programs_gives_the_same_bits(
    name: str, turns: list[Turns], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: nothing waits for ever, and nothing is added before its turn."""
    expected = gradients(CASES[name])
    monkeypatch.setattr(settings, "multiprocessors", lambda device: 2)
    orders = set()
    for seed in range(2):
        turns.append(Turns(seed))
        found = gradients(CASES[name])
        orders.add(turns[-1].switches)
        for what, x in expected.items():
            assert torch.equal(found[what], x), f"{what} in order {seed}"
    assert len(orders) > 1, "every order was the same"


def test_persistent_programs_cover_all_tiles(turns: list[Turns], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(CASES["full"])
    monkeypatch.setattr(launch, "RESIDENT", 2)
    monkeypatch.setattr(settings, "multiprocessors", lambda device: 1)
    turns.append(Turns(0))
    assert all(torch.equal(found, expected[what]) for what, found in gradients(CASES["full"]).items())


def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """The log-sum-exp, in float32, where one bit of a score shows."""
    with override(additive_forward=Config(16, 16, 1, 1)):
        return fused_attn.attention(q, k, v, score=scores.Additive(w), return_lse=True, backend="triton")[1]


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 1, 32, 8), (1, 1, 48, 8), (1, 1, 48, 16), (8,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def test_float32_uses_tanh_and_half_precision_uses_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, same in ((torch.float32, True), (torch.float16, False)):
        found = attend(*inputs(dtype))
        with monkeypatch.context() as patch:
            patch.setattr(launch, "pairs", lambda p: False)
            direct = attend(*inputs(dtype))
        assert torch.equal(found, direct) == same


@pytest.mark.parametrize(("where", "rows"), ((0, slice(0, 16)), (1, slice(16, 32))))
def test_pairs_are_decided_tile_by_tile(where: int, rows: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """One feature of a query past the limit sends its tile of rows to tanh, and no other."""
    q, k, v, w = inputs(torch.float16)
    q[0, 0, 16 * where + 3, 5] = 11.5
    found = attend(q, k, v, w)
    monkeypatch.setattr(launch, "pairs", lambda p: False)
    same = (found == attend(q, k, v, w))[0, 0]
    assert same[rows].all()
    assert not same.all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_large_features_of_opposite_sign_are_not_clamped(dtype: torch.dtype) -> None:
    """tanh(15 - 14.5) is 0.462; a clamp at 11 would make it 0."""
    q = torch.full((1, 1, 1, 2), 15.0, dtype=dtype)
    k = torch.tensor([[-14.5, -14.5], [-20.0, -20.0]], dtype=dtype).view(1, 1, 2, 2)
    v = torch.eye(2, dtype=dtype).view(1, 1, 2, 2)
    weights = fused_attn.attention(q, k, v, score=scores.Additive(torch.ones(2, dtype=dtype)), backend="triton")
    expected = torch.softmax(2 * torch.tanh(torch.tensor([0.5, -5.0], dtype=torch.float64)), 0)
    plain = torch.softmax(2 * torch.tanh(torch.tensor([0.5, -5.0], dtype=dtype)), 0)
    testing.assert_within_budget("weights", weights.flatten(), expected, plain, expected, dtype)
