"""Where row n lives: pointers into a View, loads and stores that stay inside it, and the tile of each program."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

BITS: tl.constexpr = tl.constexpr(22)  # of the sequence and of the tile in a schedule's entry; see tile_scheduler.py
NONE: tl.constexpr = tl.constexpr(2**22 - 1)  # no tile


class WorkTile(NamedTuple):
    """The tile a program works on: head h of sequence b, in a dense batch or a packed (varlen) one.

    head: b * heads + h. M, N: lengths of the sequence. shift: added to the span's offsets, to move the diagonal right.
    In memory the sequence lies at batch entry `batch`, at head `memory_head` = batch * heads + h, from row `row` and
    key `key` on; `rows` and `keys` are the extents of a head in memory. In a dense batch row and key are 0, rows is
    M and keys is N. In a paged cache `key` is instead the offset of the sequence's row in the page table.
    """

    b: Any
    h: Any
    head: Any
    index: Any
    M: Any
    N: Any
    shift: Any
    batch: Any
    memory_head: Any
    row: Any
    key: Any
    rows: Any
    keys: Any


@triton.jit
def decode_int(x):
    """Decode an integer; see types.py."""
    return x >> 2


@triton.jit
def read_scalar(x, b, h):
    """A Scalar as float32."""
    if x.pointer:
        return tl.load(x.value + b * decode_int(x.strides[0]) + h * decode_int(x.strides[1])).to(tl.float32)
    else:
        return x.value


@triton.jit
def stride(view, dim: tl.constexpr):
    """The stride of a dimension, in elements."""
    if view.wide:
        return decode_int(view.strides[dim]).to(tl.int64) * view.unit
    else:
        return decode_int(view.strides[dim]) * view.unit


@triton.jit
def head_pointer(view, b, h):
    """Pointer to row 0 of head (b, h). int64 before the first multiply."""
    return (
        view.ptr
        + (b.to(tl.int64) * decode_int(view.strides[0]) + h.to(tl.int64) * decode_int(view.strides[1])) * view.unit
    )


@triton.jit
def start_pointer(view, tile, h, start):
    """Pointer to row `start` of head h in the tile's batch entry: tile.row for the sequence's first query, tile.key
    for its first key."""
    return head_pointer(view, tile.batch, h) + start.to(tl.int64) * stride(view, 2)


@triton.jit
def pointers(view, head, row, col, rows, cols):
    """Pointers to elements (row + rows, col + cols). row, col: scalars of any size. rows, cols: tensors of small
    offsets, whose shapes broadcast to the result's."""
    ptr = head
    if view.wide:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    if view.rows == 0:
        rows = rows * 0
    else:
        ptr += row.to(tl.int64) * stride(view, 2)
        rows = rows * stride(view, 2)
    if view.columns == 0:
        cols = cols * 0
    elif view.columns == 1:
        ptr += col
    else:
        ptr += col.to(tl.int64) * stride(view, 3)
        cols = cols * stride(view, 3)
    return ptr + (rows + cols)


@triton.jit
def row_pointers(view, head, start, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers [ROWS, COLS] to the rows from `start` on."""
    # [ROWS, COLS]
    return pointers(view, head, start, start * 0, tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :])


@triton.jit
def load_rows(view, head, start, live, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D] from row `start`; zeros past D and where live [ROWS] is false. live None: all rows are live."""
    return load_whole(row_pointers(view, head, start, ROWS, BLOCK_D), live, D, BLOCK_D)


@triton.jit
def load_whole(ptrs, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same from pointers [ROWS, BLOCK_D]."""
    if live is None:
        if D == BLOCK_D:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(ptrs, mask=live[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=live[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)


@triton.jit
def load_tile(
    view, head, desc, pages, tile, h, start, live, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[ROWS, BLOCK_D] of keys or values from `start`. A paged cache is read through its page table, and head points to
    row 0 of page 0; a full tile is read with TMA if there is a descriptor."""
    if pages is not None:
        return load_paged(view, head, pages, tile, start, live, ROWS, D, BLOCK_D)
    elif (live is None) and (desc is not None):
        return tl.reshape(desc.load([tile.batch, h, tile.key + start, 0]), (ROWS, BLOCK_D))  # [ROWS, BLOCK_D]
    else:
        return load_rows(view, head, start, live, ROWS, D, BLOCK_D)


@triton.jit
def load_paged(view, head, pages, tile, start, live, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D] of keys or values from pages; only pages of live keys are read. `start` is a multiple of ROWS, so
    a page whose size is a multiple of ROWS too holds the whole tile."""
    if pages.size % ROWS == 0:
        page = tl.load(pages.ptr + tile.key + start // pages.size)
        return load_rows(view, head + page_offset(view, page), start % pages.size, live, ROWS, D, BLOCK_D)
    else:
        offsets = row_offsets(view, pages, tile.key, start + tl.arange(0, ROWS), live)  # [ROWS]
        return load_whole(whole_rows(view, head, offsets, BLOCK_D), live, D, BLOCK_D)


@triton.jit
def page_offset(view, page):
    """The offset of a page, int64, in elements."""
    return page.to(tl.int64) * decode_int(view.strides[0]) * view.unit


@triton.jit
def row_offsets(view, pages, entry, rows, live):
    """Offsets [len(rows)], int64, in elements, of rows of a sequence from row 0 of the head. entry: offset of the
    sequence's row in the page table. Only the pages of live rows are looked up; live None: all rows are live."""
    if pages is None:
        return rows.to(tl.int64) * stride(view, 2)
    else:
        ptrs = pages.ptr + entry + rows // pages.size
        if live is None:
            page = tl.load(ptrs)  # [len(rows)]
        else:
            page = tl.load(ptrs, mask=live, other=0)  # [len(rows)]
        return page_offset(view, page) + (rows % pages.size).to(tl.int64) * stride(view, 2)


@triton.jit
def whole_rows(view, head, offsets, COLS: tl.constexpr):
    """Pointers [len(offsets), COLS] to rows at any offsets. head: one pointer, or one per row."""
    if view.columns == 2:
        cols = tl.arange(0, COLS).to(tl.int64) * stride(view, 3)  # [COLS]
    else:
        cols = tl.arange(0, COLS)  # [COLS]
    return (head + offsets)[:, None] + cols[None, :]


@triton.jit
def packed_rows(view, b, h, rows, GROUP: tl.constexpr, COLS: tl.constexpr):
    """Pointers [len(rows), COLS] to rows into which a group's query heads are packed: r is query r // GROUP of head h +
    r % GROUP."""
    of_head = (rows % GROUP).to(tl.int64) * decode_int(view.strides[1]) * view.unit  # [len(rows)]
    of_index = (rows // GROUP).to(tl.int64) * decode_int(view.strides[2]) * view.unit  # [len(rows)]
    return whole_rows(view, head_pointer(view, b, h), of_head + of_index, COLS)


@triton.jit
def store_rows(view, head, start, live, x, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store x [ROWS, BLOCK_D] to the live rows from `start`, columns below D."""
    # [ROWS, BLOCK_D]
    mask = live[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(row_pointers(view, head, start, ROWS, BLOCK_D), x.to(view.ptr.dtype.element_ty), mask=mask)


@triton.jit
def pair_pointers(view, head, m, n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointers to the tile at (m, n) of a View of (M, N): [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M] if TRANSPOSED.

    Beyond the edge they repeat the last row and key, so that a load needs no mask; those scores are never used.
    """
    rows = tl.minimum(tl.arange(0, BLOCK_M), tl.maximum(M - 1, 0) - m)  # [BLOCK_M]
    cols = tl.minimum(tl.arange(0, BLOCK_N), tl.maximum(N - 1, 0) - n)  # [BLOCK_N]
    if TRANSPOSED:
        return pointers(view, head, m, n, rows[None, :], cols[:, None])
    else:
        return pointers(view, head, m, n, rows[:, None], cols[None, :])


@triton.jit
def schedule(slot, tiles, heads, WAVE):
    """(tile, head) of a slot. Slots go through waves of WAVE heads, whose keys fit the L2 cache together, and within a
    wave through tile 0 of every head before tile 1 of any, so that the longest tiles can be started first."""
    wave = slot // (WAVE * tiles)
    width = tl.minimum(WAVE, heads - wave * WAVE)
    rest = slot - wave * WAVE * tiles
    return rest // width, wave * WAVE + rest % width


@triton.jit
def work_tile(ragged, b, h, index, M, N, HEADS):
    """The WorkTile of head h of sequence b. M, N: the lengths, or the totals of a packed batch. Tile NONE gives
    an empty sequence."""
    head = b * HEADS + h
    zero = index * 0
    if ragged is None:
        return WorkTile(b, h, head, index, M, N, zero, b, head, zero, zero, M, N)
    else:
        row = tl.load(ragged.q + b)
        key = tl.load(ragged.k + b)
        m = tl.where(index == NONE, 0, tl.load(ragged.q + b + 1) - row)
        n = tl.where(index == NONE, 0, tl.load(ragged.k + b + 1) - key)
        index = tl.where(index == NONE, 0, index)
        shift = (n - m) * decode_int(ragged.aligned)
        return WorkTile(b, h, head, index, m, n, shift, zero, h, row, key, M, N)


@triton.jit
def scheduled_tile(ragged, slot, tiles, M, N, HEADS, BATCHED_HEADS, WAVE, LAST_FIRST: tl.constexpr):
    """The WorkTile of a slot. tiles: per head of a dense batch. LAST_FIRST: start with the last tile.

    In a packed batch the schedule says which tile a slot holds; see tile_scheduler.py.
    """
    if ragged is None:
        index, head = schedule(slot, tiles, BATCHED_HEADS, WAVE)
        if LAST_FIRST:
            index = tiles - 1 - index
        return work_tile(ragged, head // HEADS, head % HEADS, index, M, N, HEADS)
    else:
        entry = tl.load(ragged.schedule + slot // HEADS)
        b = (entry >> BITS).to(tl.int32) & NONE
        return work_tile(ragged, b, slot % HEADS, entry.to(tl.int32) & NONE, M, N, HEADS)


@triton.jit
def member(tile, i, GROUP: tl.constexpr):
    """The WorkTile of query head `i` of a key-value head's group, from that of the key-value head."""
    return WorkTile(
        tile.b, tile.h * GROUP + i, tile.head * GROUP + i, tile.index, tile.M, tile.N, tile.shift,
        tile.batch, tile.memory_head * GROUP + i, tile.row, tile.key, tile.rows, tile.keys,
    )  # fmt: skip


@triton.jit
def row_base(tile):
    """Offset of the sequence's row 0 in tensors (batch, head, row). Call it where it is used: keeping the int64 costs
    two registers, and computing it again one multiplication."""
    return tile.memory_head.to(tl.int64) * tile.rows + tile.row


@triton.jit
def key_base(tile):
    """Offset of the sequence's key 0 in tensors (batch, head, key)."""
    return tile.memory_head.to(tl.int64) * tile.keys + tile.key
