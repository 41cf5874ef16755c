"""The Gluon kernels in the emulator: results within the budget, and every barrier, wait and fence is necessary.

Tiles are small and programs few, so that every ring wraps around, every program computes several tiles, and a proof
takes a twentieth of a second.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby, pairwise

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from fused_attn import testing
from fused_attn.backends.triton import hopper
from fused_attn.testing import CASES, Case
from fused_attn.tuning import Config, override
from fused_attn.tuning.select import table
from tests import KERNELS
from tests.emulator import Emulation, Fault, emulated
from tests.emulator.language import HELPERS
from tests.emulator.machine import Machine
from tests.emulator.mutations import Mutation, mutations

FILES = sorted(path.name for path in KERNELS.glob("hopper*.py"))
HALF = (torch.bfloat16, torch.float16)
FORWARD = (
    Config(16, 16, 4, 2, consumers=2, pingpong=True),
    Config(16, 32, 4, 2, consumers=2),
    Config(16, 16, 4, 3, consumers=3, pingpong=True),
    Config(16, 16, 4, 1, consumers=2, pingpong=True),
)
# Larger tiles, for the cases.
ROOMY = (
    Config(32, 32, 4, 2, consumers=2, pingpong=True),
    Config(16, 32, 4, 3, consumers=3),
    Config(32, 16, 4, 2, consumers=2),
)


def pretend(patch: pytest.MonkeyPatch) -> None:
    """A machine of three multiprocessors, and head dims that are cheap to emulate."""
    patch.setattr(hopper, "_machine", lambda device: [])
    patch.setattr(hopper, "_multiprocessors", lambda device: 3)
    patch.setattr(hopper, "HEAD_DIMS", (16, 32, 64, 128))
    patch.setattr(hopper, "WASTE", 2)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def _accepted() -> list[tuple[str, torch.dtype]]:
    """Every case that the backend takes, apart from the device and the size of its tiles."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        for name, case in CASES.items():
            for dtype in HALF if "half" in case.tags else HALF[:1]:
                if dtype in case.dtypes and "large" not in case.tags and 0 not in case.shape("bhmn"):
                    problem = testing.make_inputs(replace(case, backward=False), dtype).problem().lower()
                    found += [] if hopper.why_not(problem) else [(name, dtype)]
    return found


ACCEPTED = _accepted()


def compared(case: Case, dtype: torch.dtype, seed: int, codes: Mapping | None = None) -> Emulation:
    """A case's forward, held to its budget."""
    inputs, expected = _prepared(case, dtype)
    with torch.no_grad(), emulated(seed, codes=codes, deadline=200_000) as emulation:
        out, lse, *_ = hopper.forward(inputs.problem().lower())
    inputs.check_untouched()
    testing.compare(inputs, {"out": out, "lse": lse}, expected, case.name)
    return emulation


@functools.lru_cache(32)
def _prepared(case: Case, dtype: torch.dtype) -> tuple[testing.Inputs, testing.Expected]:
    inputs = testing.make_inputs(replace(case, backward=False), dtype)
    return inputs, testing.expect(inputs)


@pytest.mark.parametrize(("name", "dtype"), ACCEPTED, ids=lambda x: str(x).removeprefix("torch."))
def test_forward(name: str, dtype: torch.dtype) -> None:
    seed = list(CASES).index(name)
    with override(hopper_forward=ROOMY[seed % len(ROOMY)]):
        compared(CASES[name], dtype, seed)


def test_most_cases_are_supported() -> None:
    """A backend that refuses everything would pass everything."""
    assert len({name for name, _ in ACCEPTED}) > 90


SHIPPED = [key for key in table("sm_90") if key.startswith("hopper_forward/")]


@pytest.mark.parametrize("key", SHIPPED)
def test_shipped_configuration(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in the table: it fits the shared memory, and its tiles, tails and padding come out right."""
    monkeypatch.undo()
    monkeypatch.setattr(hopper, "_machine", lambda device: [])
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 2)
    row, d = table("sm_90")[key], int(key.split("/")[2])
    modifiers = {"softcap": 5.0, "alibi": "h"} if key.endswith("/with_modifiers") else {}
    m, n = 2 * row["BLOCK_M"] * row["consumers"] + 17, (row["num_stages"] + 1) * row["BLOCK_N"] + 9
    case = Case(
        "shipped", hq=2, hkv=1, m=m, n=n, d=d - 8, alignment="bottom_right", causal=True, return_lse=True, **modifiers
    )
    assert hopper.why_not(testing.make_inputs(case, torch.bfloat16).problem()) == []
    assert len(compared(case, torch.bfloat16, 0).machines) == 1


@pytest.mark.parametrize("programs", range(1, 8))
def test_every_number_of_programs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile is computed once, however many programs share them and whatever remains for the last round."""
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: programs)
    case = Case("shared_out", hq=3, m=100, n=40, d=16, causal=True, alignment="top_left")
    with override(hopper_forward=FORWARD[1]):
        compared(case, torch.bfloat16, programs)


# --------------------------------------------------------------------------------------------------------- the protocol

PERSISTENT = (
    Case("persistent", hq=2, hkv=1, m=40, n=70, d=16, return_lse=True),
    Case("persistent_causal", b=2, hq=2, hkv=1, m=70, d=16, causal=True, return_lse=True),
    Case("persistent_window", hq=2, m=70, n=90, d=16, window=(20, 5), alignment="bottom_right", return_lse=True),
)


def prove(seed: int, codes: Mapping | None = None) -> None:
    """One problem under one configuration and one schedule, all of the seed's choosing."""
    config = FORWARD[seed % len(FORWARD)]
    memory = 0 if seed % 3 == 1 else hopper.TILE_MEMORY  # without memory for out, it reuses that of q
    with pytest.MonkeyPatch.context() as patch, override(hopper_forward=config):
        patch.setattr(hopper, "TILE_MEMORY", memory)
        patch.setattr(hopper, "_multiprocessors", lambda device: 1 + seed % 2)
        emulation = compared(PERSISTENT[seed % len(PERSISTENT)], HALF[seed % 2], seed, codes)
    if config.pingpong:
        take_turns(emulation.machines[0], config.consumers)


def take_turns(machine: Machine, consumers: int) -> None:
    """Consumers issue both products of a step without another's between them, one consumer after the other."""
    for program in range(machine.grid):
        issued = [s.strand for s in machine.trace if s.program == program and "step" in s.within]
        order = [name for name, run in groupby(issued) for _ in range(len(list(run)) // 2)]
        assert len(issued) == 2 * len(order)
        assert all(a != b for a, b in pairwise(order)), "a consumer went twice"
        assert order == order[:consumers] * (len(order) // consumers), "the consumers do not take turns"


@pytest.mark.parametrize("seed", range(48))
def test_protocol(seed: int) -> None:
    prove(seed)


@pytest.mark.parametrize("config", FORWARD, ids=str)
def test_same_bits(config: Config) -> None:
    """Whoever runs first, the result has the same bits."""
    problem = _prepared(PERSISTENT[1], torch.bfloat16)[0].problem()
    found = []
    for seed in range(6):
        with torch.no_grad(), override(hopper_forward=config), emulated(seed):
            found.append(hopper.forward(problem))
    assert all(torch.equal(x, y) for one in found[1:] for x, y in zip(found[0], one, strict=True))


# -------------------------------------------------------------------------------------------------------- the mutations

MUTATIONS = [m for name in ("hopper_common.py", "hopper_forward.py") for m in mutations(KERNELS / name)]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation(mutation: Mutation) -> None:
    """Leaving it out, or flipping its phase, makes the proof fail under one of the seeds."""
    codes = mutation.codes()
    for seed in range(24):
        try:
            prove(seed, codes)
        except (Fault, AssertionError):
            return
    pytest.fail("nothing notices")


@pytest.mark.parametrize("name", FILES)
def test_mutations_include_every_synchronization(name: str) -> None:
    """Nothing that synchronises hides from the mutations: calls of these names, counted in another way."""
    text = (KERNELS / name).read_text()
    found = mutations(KERNELS / name)
    for call in ("mbarrier.init(", "mbarrier.wait(", "mbarrier.arrive(", "mbarrier.expect(", "store_wait(",
                 "fence_async_shared(", "bulk_wait(", "wait_for(", "store_release("):  # fmt: skip
        calls = text.count(call) - text.count(f"def {call}")
        assert calls == sum(m.kind == "left out" and call in m.text for m in found), call
    assert text.count("warpgroup_mma_wait(") == sum(m.kind == "waits for nothing" for m in found)


def _assembled(name: str) -> set[str]:
    """The device functions of a file that the emulator cannot read: inline assembly, and calls of the builder."""
    found = set()
    for node in ast.parse((KERNELS / name).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            text = ast.unparse(node)
            if "inline_asm" in text or "_semantic" in text:
                found.add(node.name)
    return found


def test_every_gluon_helper_is_emulated() -> None:
    assert set().union(*map(_assembled, FILES)) == set(HELPERS)
