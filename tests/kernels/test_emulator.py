"""The emulator detects each kind of error: small kernels, correct under every seed, broken in one place."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fused_attn.backends.triton import launcher
from tests.emulator import Fault, emulated
from tests.emulator.language import bulk_wait, load_acquire, reduce_add, store_release, wait_for
from tests.emulator.mutations import mutations
from tests.emulator.values import rounded
from tests.parity import within_budget

SEEDS = range(30)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def descriptor(x: torch.Tensor, *box: int) -> Any:
    return TensorDescriptor(
        x, list(x.shape), list(x.stride()), list(box), gl.NVMMASharedLayout.get_default_for(list(box), DTYPES[x.dtype])
    )


def launch(
    kernel: Any, grid: int, *args: Any, seed: int = 0, deadline: int = 20000, ordered: bool = False, **constants: Any
) -> Any:
    with emulated(seed, deadline=deadline, ordered=ordered) as emulation:
        launcher.launch(kernel, grid, *args, **constants)
    return emulation.machines[0]


def fails(message: str, kernel: Any, grid: int, *args: Any, **constants: Any) -> None:
    """Under some of the seeds, with this message."""
    for seed in SEEDS:
        try:
            launch(kernel, grid, *args, seed=seed, **constants)
        except Fault as fault:
            assert re.search(message, str(fault)), str(fault)
            return
    pytest.fail(f"nothing was caught under {len(SEEDS)} seeds")


# ------------------------------------------------------------------------ a pipeline: out = sum of x_i @ y_i over tiles


@gluon.jit
def produce(x, y, xs, ys, full, empty, tiles, BREAK: gl.constexpr):
    for i in range(tiles):
        s = i % 2
        phase = i // 2 & 1
        if BREAK == "phase of room":
            phase = phase ^ 1
        if BREAK != "room":
            mbarrier.wait(empty.index(s), phase ^ 1)
        if BREAK == "bytes":
            mbarrier.expect(full.index(s), x.block_type.nbytes)
        elif BREAK != "expect":
            mbarrier.expect(full.index(s), x.block_type.nbytes + y.block_type.nbytes)
        tma.async_copy_global_to_shared(x, [0, i * 16], full.index(s), xs.index(s))
        tma.async_copy_global_to_shared(y, [i * 16, 0], full.index(s), ys.index(s))


@gluon.jit
def consume(out, xs, ys, full, empty, stage, tiles, BREAK: gl.constexpr):
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    acc = gl.zeros((16, 16), gl.float32, L)
    for i in range(tiles):
        s = i % 2
        phase = i // 2 & 1
        if BREAK == "phase of data":
            phase = phase ^ 1
        if BREAK != "data":
            mbarrier.wait(full.index(s), phase)
        if BREAK == "registers":
            a = xs.index(s).load(gl.DotOperandLayout(0, L, 2))
            token = warpgroup_mma(a, ys.index(s), acc, is_async=True)
            other = warpgroup_mma(a, ys.index(s), gl.zeros((16, 16), gl.float32, L), is_async=True)
            acc, other = warpgroup_mma_wait(1, deps=(token, other))
            acc = acc + gl.sum(a.to(gl.float32), 1)[:, None] * 0.0  # the second product still reads a
            other = warpgroup_mma_wait(0, deps=(other,))
        else:
            token = warpgroup_mma(xs.index(s), ys.index(s), acc, is_async=True)
            if BREAK == "release":
                mbarrier.arrive(empty.index(s), count=1)
            acc = warpgroup_mma_wait(1 if BREAK == "product" else 0, deps=(token,))
        if BREAK == "product":
            acc = acc + 0.0
        if BREAK == "arrivals":
            mbarrier.arrive(empty.index(s), count=2)
        elif BREAK != "arrive" and BREAK != "release":
            mbarrier.arrive(empty.index(s), count=1)
    stage.store(acc.to(gl.bfloat16))
    if BREAK != "fence":
        fence_async_shared()
    tma.async_copy_shared_to_global(out, [0, 0], stage)
    if BREAK == "overwrite":
        stage.store(acc.to(gl.bfloat16))
    if BREAK != "store":
        tma.store_wait(0)


@gluon.jit
def pipeline(x, y, out, tiles, BREAK: gl.constexpr):
    xs = gl.allocate_shared_memory(gl.bfloat16, [2, 16, 16], x.layout)
    ys = gl.allocate_shared_memory(gl.bfloat16, [2, 16, 16], y.layout)
    stage = gl.allocate_shared_memory(gl.bfloat16, [16, 16], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        if BREAK != "init":
            mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    if BREAK != "fence of init":
        fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (out, xs, ys, full, empty, stage, tiles, BREAK)),
            (produce, (x, y, xs, ys, full, empty, tiles, BREAK)),
        ],
        [1], [24],
    )  # fmt: skip


def operands(tiles: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 16 * tiles, generator=generator).bfloat16()
    y = torch.randn(16 * tiles, 16, generator=generator).bfloat16()
    return x, y, torch.full((16, 16), torch.nan).bfloat16()


def run_pipeline(seed: int, **constants: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    x, y, out = operands()
    machine = launch(pipeline, 1, *(descriptor(t, 16, 16) for t in (x, y, out)), 5, seed=seed, **constants)
    return out, (x.double() @ y.double(), x @ y), machine


@pytest.mark.parametrize("seed", SEEDS)
def test_correct_pipeline(seed: int) -> None:
    out, expected, _ = run_pipeline(seed, BREAK="")
    within_budget("product", out, *expected)


@pytest.mark.parametrize(
    ("what", "message"),
    (
        ("room", "race in shared memory|1 arrivals at barriers"),
        ("phase of room", "deadlock"),
        ("data", "race in shared memory|nobody has written"),
        ("phase of data", ""),
        ("release", "race in shared memory"),
        ("product", "registers of a product are read before a wait retires it"),
        ("registers", "registers of a product are read before a wait retires it"),
        ("arrive", "waits for barriers"),
        ("arrivals", "2 arrivals at barriers"),
        ("expect", "deadlock"),
        ("bytes", "race in shared memory"),
        ("fence", "no fence between a store"),
        ("fence of init", "no fence between the initialisation"),
        ("init", "used before it is initialised"),
        ("overwrite", "race in shared memory: a store"),
        ("store", "ended before its store had read shared memory"),
    ),
)
def test_incorrect_pipeline(what: str, message: str) -> None:
    x, y, out = operands()
    fails(message, pipeline, 1, *(descriptor(t, 16, 16) for t in (x, y, out)), 5, BREAK=what)


def test_deadlocks_name_the_waiting_partitions() -> None:
    with pytest.raises(Fault) as found:
        run_pipeline(0, BREAK="arrive")
    text = str(found.value)
    assert "deadlock" in text and "partition 1 (produce) waits for barriers 5[0], parity 0" in text
    assert "partition 0 (consume) waits for barriers 4" in text


def test_a_fault_names_both_lines() -> None:
    with pytest.raises(Fault, match=r"in produce, test_emulator.py:\d+ not ordered after .* in consume, test_emulator"):
        for seed in SEEDS:
            run_pipeline(seed, BREAK="release")


def test_seeds() -> None:
    """One seed is one run; among many are different ones."""

    def steps(seed: int) -> tuple:
        machine = run_pipeline(seed, BREAK="")[2]
        return machine.steps, tuple(machine.labels[i][0] + str(machine.labels[i][1]) for i in range(20))

    assert [steps(seed) for seed in range(5)] == [steps(seed) for seed in range(5)]
    assert len({steps(seed) for seed in SEEDS}) > 10


def test_mutations_of_a_pipeline() -> None:
    """They are found in the source, and what they change is what runs."""
    found = [m for m in mutations(Path(__file__)) if m.function in ("produce", "consume")]
    assert {m.kind for m in found} == {"left out", "phase flipped", "one less waited for", "waits for nothing"}
    x, y, out = operands()
    args = [descriptor(t, 16, 16) for t in (x, y, out)]
    survivors = []
    for mutation in found:
        try:
            for seed in range(8):
                with emulated(seed, deadline=20000, codes=mutation.codes()):
                    launcher.launch(pipeline, 1, *args, 5, BREAK="")
        except Fault:
            continue
        survivors.append(mutation.text)
    # In the branches that BREAK="" never takes.
    assert sorted(set(survivors)) == [
        "mbarrier.arrive(empty.index(s), count=1)",
        "mbarrier.arrive(empty.index(s), count=2)",
        "mbarrier.expect(full.index(s), x.block_type.nbytes)",
        "warpgroup_mma_wait(0, deps=(other,))",
        "warpgroup_mma_wait(1, deps=(token, other))",
    ]


# ------------------------------------------------------------------------------------------------ barriers and phases


@gluon.jit
def phases(COMPLETED: gl.constexpr, PARITY: gl.constexpr):
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    for _ in gl.static_range(COMPLETED):
        mbarrier.arrive(barrier, count=1)
    mbarrier.wait(barrier, PARITY)


@pytest.mark.parametrize(("completed", "parity"), ((0, 1), (1, 0), (2, 1), (3, 0)))
def test_wait_on_a_completed_phase_passes(completed: int, parity: int) -> None:
    """The phase before the first has parity 1, and one two behind looks like the latest."""
    launch(phases, 1, COMPLETED=completed, PARITY=parity)


@pytest.mark.parametrize(("completed", "parity"), ((0, 0), (1, 1), (2, 0), (3, 1)))
def test_wait_on_an_open_phase_blocks(completed: int, parity: int) -> None:
    with pytest.raises(Fault, match="deadlock"):
        launch(phases, 1, COMPLETED=completed, PARITY=parity)


def test_parity_is_one_bit() -> None:
    with pytest.raises(Fault, match="parity is 0 or 1"):
        launch(phases, 1, COMPLETED=2, PARITY=2)


@gluon.jit
def exchange_worker(cell, ready, BARRIER: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    cell.store(gl.arange(0, 16, L))
    if BARRIER:
        mbarrier.arrive(ready, count=1)


@gluon.jit
def exchange_first(out, cell, ready, BARRIER: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    if BARRIER:
        mbarrier.wait(ready, 0)
    gl.store(out + gl.arange(0, 16, L), cell.load(L))


@gluon.jit
def exchange(out, BARRIER: gl.constexpr):
    cell = gl.allocate_shared_memory(gl.int32, [16], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    gl.warp_specialize(
        [(exchange_first, (out, cell, ready, BARRIER)), (exchange_worker, (cell, ready, BARRIER))], [1], [24]
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_partitions_exchange_values(seed: int) -> None:
    out = torch.full((16,), -1, dtype=torch.int32)
    launch(exchange, 1, out, BARRIER=True, seed=seed)
    assert out.tolist() == list(range(16))


@pytest.mark.parametrize("seed", range(4))
def test_partitions_race(seed: int) -> None:
    """Under every seed: what raises is the missing order, not the unlucky moment."""
    with pytest.raises(Fault, match=r"race in shared memory|nobody has written"):
        launch(exchange, 1, torch.zeros(16, dtype=torch.int32), BARRIER=False, seed=seed)


# ------------------------------------------------------------------------------------------------------------- copies


@gluon.jit
def copy(x, y, row, column, WAIT: gl.constexpr):
    slot = gl.allocate_shared_memory(x.dtype, [16, 16], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    fence_async_shared()
    mbarrier.expect(full, x.block_type.nbytes)
    tma.async_copy_global_to_shared(x, [row, column], full, slot)
    if WAIT:
        mbarrier.wait(full, 0)
        tma.async_copy_shared_to_global(y, [row + 3, column], slot)
        tma.store_wait(0)


@pytest.mark.parametrize(("row", "column"), ((0, 0), (10, 0), (24, 16), (-5, -8), (40, 0), (0, 40)))
def test_tma_boxes_beyond_the_tensor(row: int, column: int) -> None:
    """Zeros come in and nothing goes out."""
    x, y = torch.randn(27, 24), torch.full((27, 24), 7.0)
    launch(copy, 1, descriptor(x, 16, 16), descriptor(y, 16, 16), row, column, WAIT=True)
    wide = torch.zeros(200, 200)
    wide[60:87, 60:84] = x
    box = wide[60 + row : 76 + row, 60 + column : 76 + column]
    expected = torch.full((200, 200), 7.0)
    expected[63 + row : 79 + row, 60 + column : 76 + column] = box
    assert torch.equal(y, expected[60:87, 60:84])


def test_copies_without_a_wait_are_detected() -> None:
    x = torch.randn(16, 16)
    with pytest.raises(Fault, match="copy that nobody waited for"):
        launch(copy, 1, descriptor(x, 16, 16), descriptor(x.clone(), 16, 16), 0, 0, WAIT=False)


def test_descriptors_are_checked() -> None:
    x = torch.randn(512, 16)
    with pytest.raises(Fault, match="at most 256 a side"):
        launch(copy, 1, descriptor(x, 512, 16), descriptor(x, 16, 16), 0, 0, WAIT=True)
    with pytest.raises(Fault, match="a box of"):
        launch(copy, 1, descriptor(x, 32, 16), descriptor(x, 16, 16), 0, 0, WAIT=True)
    far = TensorDescriptor(x, [513, 16], [16, 1], [16, 16], gl.NVMMASharedLayout.get_default_for([16, 16], gl.float32))
    with pytest.raises(Fault, match="reaches past its tensor"):
        launch(copy, 1, far, descriptor(x, 16, 16), 0, 0, WAIT=True)


# --------------------------------------------------------------------------------- programs that meet in global memory


@gluon.jit
def ordered(ticket, turn, total, out, BULK: gl.constexpr, ORDER: gl.constexpr):
    """Programs add 1 to `total`, one after the other; each then writes what it found to its row of `out`."""
    L: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    stage = gl.allocate_shared_memory(gl.float32, [16, 16], total.layout)
    mine = gl.atomic_add(ticket, 1)
    stage.store(gl.full((16, 16), 1.0, gl.float32, L))
    fence_async_shared()
    if ORDER:
        wait_for(turn, mine)
    reduce_add(total, [0, 0], stage)
    if BULK:
        bulk_wait()
    else:
        tma.store_wait(0)
    if ORDER:
        full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(full, count=1)
        fence_async_shared()
        mbarrier.expect(full, total.block_type.nbytes)
        tma.async_copy_global_to_shared(total, [0, 0], full, stage)
        mbarrier.wait(full, 0)
        rows = gl.arange(0, 16, gl.SliceLayout(1, L))[:, None] * 16
        gl.store(out + mine * 256 + rows + gl.arange(0, 16, gl.SliceLayout(0, L))[None, :], stage.load(L))
        store_release(turn, mine + 1)


def run_ordered(seed: int, **constants: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ticket, turn = torch.zeros(2, 1, dtype=torch.int32)
    total, out = torch.zeros(16, 16), torch.zeros(6, 16, 16)
    launch(ordered, 6, ticket, turn, descriptor(total, 16, 16), out, seed=seed, **constants)
    return total, out


@pytest.mark.parametrize("seed", SEEDS)
def test_programs_in_order(seed: int) -> None:
    total, out = run_ordered(seed, BULK=True, ORDER=True)
    assert (total == 6).all()
    assert torch.equal(out, torch.arange(1.0, 7)[:, None, None].expand(6, 16, 16))


@pytest.mark.parametrize("seed", range(8))
def test_unordered_sums(seed: int) -> None:
    """Asynchronous additions may overlap, and all arrive by the end of the launch."""
    assert (run_ordered(seed, BULK=False, ORDER=False)[0] == 6).all()


@pytest.mark.parametrize("seed", range(4))
def test_sums_that_must_be_ordered(seed: int) -> None:
    run_ordered(seed, ordered=True, BULK=True, ORDER=True)
    with pytest.raises(Fault, match="race in global memory: an asynchronous addition"):
        run_ordered(seed, ordered=True, BULK=False, ORDER=False)


def test_wait_for_read_does_not_finish_the_write() -> None:
    with pytest.raises(Fault, match=r"global memory: a copy from global memory .* not ordered after an asynchr"):
        for seed in SEEDS:
            run_ordered(seed, BULK=False, ORDER=True)


@gluon.jit
def spins(flag):
    while load_acquire(flag) == 0:
        pass


def test_step_limit() -> None:
    with pytest.raises(Fault, match="still running after 500 steps"):
        launch(spins, 1, torch.zeros(1, dtype=torch.int32), deadline=500)


@gluon.jit
def overlapping(out, SHIFT: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    x = gl.arange(0, 16, L)
    gl.store(out + gl.program_id(0) * SHIFT + x, x.to(gl.float32))


def test_programs_that_write_the_same() -> None:
    launch(overlapping, 3, torch.zeros(48), SHIFT=16)
    fails("race in global memory", overlapping, 3, torch.zeros(48), SHIFT=15)


@gluon.jit
def passes_on(cells, sums, flag, ORDER: gl.constexpr):
    """Program 0 reads what program 1 then writes."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    x = gl.arange(0, 16, L)
    if gl.program_id(0) == 0:
        gl.store(sums, gl.sum(gl.load(cells + x), 0))
        if ORDER:
            store_release(flag, 1)
    else:
        if ORDER:
            wait_for(flag, 1)
        gl.store(cells + x, 0.0)


@pytest.mark.parametrize("seed", range(8))
def test_reads_before_writes(seed: int) -> None:
    sums = torch.zeros(1)
    flag = torch.zeros(1, dtype=torch.int32)
    with emulated(seed):
        launcher.launch(passes_on, 2, torch.ones(16), sums, flag, ORDER=True)
    assert sums == 16


def test_write_after_read_races() -> None:
    flag = torch.zeros(1, dtype=torch.int32)
    fails("race in global memory", passes_on, 2, torch.ones(16), torch.zeros(1), flag, ORDER=False)


# --------------------------------------------------------------------------------------------------- values and bounds


@gluon.jit
def values(x, out, n, factor, OVER: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offs = gl.arange(0, 16, L)
    v = gl.load(x + offs, mask=offs < n, other=0.0)
    y = gl.where(offs % 2 == 0, gl.exp2(v.to(gl.float32) * factor), -gl.abs(v.to(gl.float32)))
    y += (-n // 2).to(gl.float32)  # towards zero
    gl.store(out + (offs if not OVER else offs + 1), y.to(gl.bfloat16), mask=offs < 16)


def test_values() -> None:
    x, out = torch.randn(11).half(), torch.zeros(16).bfloat16()
    launch(values, 1, x, out, 11, 0.5, OVER=False)
    padded = torch.zeros(16)
    padded[:11] = x.float()
    expected = torch.where(torch.arange(16) % 2 == 0, torch.exp2(padded * 0.5), -padded.abs()) - 5
    assert torch.equal(out, expected.bfloat16())


def test_a_store_past_the_end() -> None:
    with pytest.raises(Fault, match="a store outside of its tensor"):
        launch(values, 1, torch.randn(11).half(), torch.zeros(16).bfloat16(), 11, 0.5, OVER=True)


def test_a_load_past_the_end() -> None:
    with pytest.raises(Fault, match="a load outside of its tensor"):
        launch(values, 1, torch.randn(11).half(), torch.zeros(16).bfloat16(), 12, 0.5, OVER=False)


@gluon.jit
def far(out, n):
    gl.store(out + n * 65536, 1.0)


def test_int32_overflows() -> None:
    with pytest.raises(Fault, match="overflows int32"):
        launch(far, 1, torch.zeros(1), 32768)


@gluon.jit
def nothing(x):
    pass


@gluon.jit
def hands_tensors():
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    x = gl.arange(0, 16, L)
    gl.warp_specialize([(nothing, (x,)), (nothing, (x,))], [1], [24])


def test_partitions_accept_no_tensors() -> None:
    with pytest.raises(Fault, match="only the first partition takes tensors"):
        launch(hands_tensors, 1)


@gluon.jit
def unwritten(out):
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    cell = gl.allocate_shared_memory(gl.float32, [16], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.store(out + gl.arange(0, 16, L), cell.load(L))


def test_uninitialized_memory_is_detected() -> None:
    with pytest.raises(Fault, match="nobody has written"):
        launch(unwritten, 1, torch.zeros(16))


@gluon.jit
def large(x, ROWS: gl.constexpr):
    gl.allocate_shared_memory(gl.bfloat16, [ROWS, 128], x.layout)


def test_shared_memory_limit() -> None:
    x = descriptor(torch.zeros(16, 128).bfloat16(), 16, 128)
    launch(large, 1, x, ROWS=227 * 4)
    with pytest.raises(Fault, match="bytes of shared memory"):
        launch(large, 1, x, ROWS=228 * 4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rounding(dtype: torch.dtype) -> None:
    """To nearest, ties to even, as torch rounds."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 4096)
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11])])
    with np.errstate(all="ignore"):
        found = torch.from_numpy(rounded(x.numpy(), DTYPES[dtype]))
    torch.testing.assert_close(found, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def plain(out):
    tl.store(out + tl.arange(0, 16), tl.arange(0, 16))


def test_emulation_leaves_other_kernels_alone() -> None:
    out = torch.zeros(16, dtype=torch.int32)
    before = launcher.launch
    with emulated() as emulation:
        launcher.launch(plain, 1, out)
    assert out.tolist() == list(range(16)) and not emulation.machines and launcher.launch is before
