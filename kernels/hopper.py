"""What the Gluon kernels for sm_90 share: names, barriers of a ring, who computes which tile, and inline assembly.

A partition is a group of warps that runs its own function; partitions meet only at mbarriers. Phases come from running
counts, which every partition keeps for itself and never resets, so that a persistent program's rings go on from one
tile to the next.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .memory import number


class Visit(NamedTuple):
    """The tiles that a program visits, from `origin` on: `head` partial ones, `full` full ones, and partial ones again,
    `total` in all, which is at least one."""

    origin: Any
    head: Any
    full: Any
    total: Any


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT mbarriers, whose phase ends with so many arrivals."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def fetch(descriptor, coordinates, full, slot):
    """Copy a box into shared memory; `full` ends its phase when all of it has landed."""
    mbarrier.expect(full, descriptor.block_type.nbytes)
    tma.async_copy_global_to_shared(descriptor, coordinates, full, slot)


@gluon.jit
def visit(span, first_row, last_row, limit, BLOCK: gl.constexpr):
    """The tiles of size BLOCK, below limit, that rows from the first to the last, both included, may see."""
    first = 0
    last = limit
    full_first = 0
    full_last = limit
    if span.left is not None:
        first = gl.maximum(first, first_row + number(span.left))
        full_first = gl.maximum(full_first, last_row + number(span.left))
    if span.right is not None:
        last = gl.minimum(last, last_row + number(span.right) + 1)
        full_last = gl.minimum(full_last, first_row + number(span.right) + 1)
    origin = gl.minimum(first, limit - 1) // BLOCK * BLOCK
    # Rows that see nothing visit one tile, of which they see nothing.
    total = gl.maximum(gl.cdiv(gl.maximum(last - origin, 0), BLOCK), 1)
    begin = gl.cdiv(full_first, BLOCK)
    full = gl.maximum(gl.maximum(full_last, 0) // BLOCK - begin, 0)
    head = total
    if full > 0:
        head = begin - origin // BLOCK
    return Visit(origin, head, full, total)


@gluon.jit
def tile_start(seen, i, BLOCK: gl.constexpr):
    """The first index of the i-th tile that is visited: the partial ones of both ends, then the full ones."""
    partial = seen.total - seen.full
    place = i + seen.full
    if i < seen.head:
        place = i
    if i >= partial:
        place = i - partial + seen.head
    return seen.origin + place * BLOCK


@gluon.jit
def pin(x):
    """x, known to the assembler to be needed here: it would else move what makes x behind the next wait for a product.

    The sleep is never taken: no sum of weights is +inf where the weights are at most 1.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.f32 p, $1, 0f7f800000; @p nanosleep.u32 1; mov.b32 $0, $1; }",
        "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip
