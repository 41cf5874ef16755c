"""Shared by the Gluon kernels for sm_90: mbarriers, TMA copies, tile ranges, and inline assembly.

A partition is a group of warps with its own function. Partitions synchronise through mbarriers only. Each partition
counts the stages that it has used and never resets its count, so the phases of a ring of buffers continue from one tile
of a persistent program to the next: use number `count` is stage count % STAGES, phase count // STAGES & 1.
"""

from typing import Any, NamedTuple

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .memory import decode_int


class Visit(NamedTuple):
    """The tiles that a program visits, from `origin` on: `leading` partial ones, `full` full ones, then the other
    partial ones; `total` in all, at least one."""

    origin: Any
    leading: Any
    full: Any
    total: Any


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT mbarriers whose phase completes after ARRIVALS arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def fetch(descriptor, coordinates, full, buffer):
    """Copy a box to shared memory with TMA; the phase of `full` completes when all of it has arrived."""
    mbarrier.expect(full, descriptor.block_type.nbytes)
    tma.async_copy_global_to_shared(descriptor, coordinates, full, buffer)


@gluon.jit
def visit(span, first_row, last_row, limit, BLOCK: gl.constexpr):
    """The tiles of BLOCK, below limit, that rows first_row to last_row, both included, may see."""
    first = 0
    last = limit
    full_first = 0
    full_last = limit
    if span.left is not None:
        first = gl.maximum(first, first_row + decode_int(span.left))
        full_first = gl.maximum(full_first, last_row + decode_int(span.left))
    if span.right is not None:
        last = gl.minimum(last, last_row + decode_int(span.right) + 1)
        full_last = gl.minimum(full_last, first_row + decode_int(span.right) + 1)
    origin = gl.minimum(first, limit - 1) // BLOCK * BLOCK
    # Fully masked rows visit one tile, fully masked.
    total = gl.maximum(gl.cdiv(gl.maximum(last - origin, 0), BLOCK), 1)
    begin = gl.cdiv(full_first, BLOCK)
    full = gl.maximum(gl.maximum(full_last, 0) // BLOCK - begin, 0)
    leading = total
    if full > 0:
        leading = begin - origin // BLOCK
    return Visit(origin, leading, full, total)


@gluon.jit
def tile_start(visited, i, BLOCK: gl.constexpr):
    """The first index of the i-th visited tile: the partial ones of both ends come first, then the full ones."""
    partial = visited.total - visited.full
    ordinal = i + visited.full
    if i < visited.leading:
        ordinal = i
    if i >= partial:
        ordinal = i - partial + visited.leading
    return visited.origin + ordinal * BLOCK


@gluon.jit
def pin(x):
    """x, forced to be computed before this point: the assembler would otherwise move its computation after the next
    wait for a matrix product.

    The sleep never runs: a sum of weights that are at most 1 is not +inf.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.f32 p, $1, 0f7f800000; @p nanosleep.u32 1; mov.b32 $0, $1; }",
        "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


def _look(n):
    """Assembly that reads n registers and moves each to itself, and its operand constraints."""
    look = f"or.b32 t, ${n}, ${n + 1}; " + " ".join(
        f"lop3.b32 t, t, ${i}, ${i + 1}, 0xfe;" for i in range(n + 2, 2 * n, 2)
    )
    moves = " ".join(f"mov.b32 ${i}, ${n + i};" for i in range(n))
    body = f"{look} setp.eq.u32 p, t, 0xffffffff; @p nanosleep.u32 1; {moves}"
    return "{ .reg .pred p; .reg .b32 t; " + body + " }", ",".join(["=r"] * n + ["r"] * n)


LOOK_16: gl.constexpr = gl.constexpr(_look(16)[0])
LOOK_16_OPERANDS: gl.constexpr = gl.constexpr(_look(16)[1])
LOOK_32: gl.constexpr = gl.constexpr(_look(32)[0])
LOOK_32_OPERANDS: gl.constexpr = gl.constexpr(_look(32)[1])


@gluon.jit
def pin_all(x):
    """The same for every element of x, 32 at a time; half an instruction per register."""
    if x.dtype == gl.float32:
        return gl.inline_asm_elementwise(LOOK_32, LOOK_32_OPERANDS, [x], dtype=x.dtype, is_pure=False, pack=32)
    else:
        return gl.inline_asm_elementwise(LOOK_16, LOOK_16_OPERANDS, [x], dtype=x.dtype, is_pure=False, pack=32)


@builtin
def reduce_add(descriptor, coordinates, buffer, _semantic=None):
    """Add a box in shared memory to global memory, asynchronously. Gluon has no function for this yet."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    add = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(add, descriptor.handle, coordinates, buffer.handle)


@gluon.jit
def bulk_wait():
    """Wait until the global writes of this thread's copies and additions are visible; tma.store_wait waits only until
    they have read shared memory."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def store_release(pointer, value):
    """Store value with release semantics, from the thread that issues the copies of a one-warp partition: all that this
    thread has waited for is visible to a thread that acquires value."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; elect.sync _|p, 0xffffffff; @p st.release.gpu.global.u32 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [pointer, value], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_for(pointer, value):
    """Spin until memory holds value, with acquire semantics. For a partition of one warp."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 t;
        AGAIN: ld.acquire.gpu.global.u32 t, [$1]; setp.ne.u32 p, t, $2; @p bra.uni AGAIN;
        fence.proxy.async.global; mov.u32 $0, 0; }""",
        "=r,l,r", [pointer, value], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
