"""Where row n lives: pointers to tiles of a View, loads and stores that never leave it, and which tile is whose."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

BITS: tl.constexpr = tl.constexpr(22)  # of a sequence's number, and of a tile's, in the key of a turn
NONE: tl.constexpr = tl.constexpr(2**22 - 1)  # no tile


class Place(NamedTuple):
    """Whose tile a program owns: that of a head h of a sequence b, which is one of a batch, or one of several that lie
    behind one another in one batch.

    head: b * heads + h. M, N: the sequence's lengths; shift: how much further right its diagonal lies than is said.
    In memory it has batch `batch`, head `home` of all, and rows from `row` and keys from `key` on, of the `rows` and
    `keys` that each head has there.
    """

    b: Any
    h: Any
    head: Any
    tile: Any
    M: Any
    N: Any
    shift: Any
    batch: Any
    home: Any
    row: Any
    key: Any
    rows: Any
    keys: Any


@triton.jit
def number(code):
    """The integer behind a code; see types.py."""
    return code >> 2


@triton.jit
def read_scalar(x, b, h):
    """A Scalar as a float32 tensor ()."""
    if x.pointer:
        return tl.load(x.value + b * number(x.strides[0]) + h * number(x.strides[1])).to(tl.float32)
    else:
        return x.value


@triton.jit
def stride(view, dim: tl.constexpr):
    """In elements."""
    if view.wide:
        return number(view.strides[dim]).to(tl.int64) * view.unit
    else:
        return number(view.strides[dim]) * view.unit


@triton.jit
def head_pointer(view, b, h):
    """To row 0 of one batch and head; int64 before the first multiply."""
    return view.ptr + (b.to(tl.int64) * number(view.strides[0]) + h.to(tl.int64) * number(view.strides[1])) * view.unit


@triton.jit
def start_pointer(view, at, h, start):
    """To the first row of a sequence, its own of q or of k, in one head of packed or batched rows."""
    return head_pointer(view, at.batch, h) + start.to(tl.int64) * stride(view, 2)


@triton.jit
def pointers(view, head, row, col, rows, cols):
    """To elements (row + rows, col + cols): row and col are scalars and may be far, rows and cols shaped and near."""
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
    """To whole rows [ROWS, COLS] from row `start`."""
    return pointers(view, head, start, start * 0, tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :])


@triton.jit
def load_rows(view, head, start, live, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D] from row `start`; zeros past D and where live [ROWS] is false. live None: every row lives."""
    return load_whole(row_pointers(view, head, start, ROWS, BLOCK_D), live, D, BLOCK_D)


@triton.jit
def load_whole(ptrs, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """What load_rows loads, from pointers to whole rows."""
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
def load_tile(view, head, box, pages, at, h, start, live, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """load_rows of keys; a tile whose every row lives comes by the descriptor of its boxes, unless that is None. Keys
    that lie in pages, unless those are None, are looked up, and head points to row 0 of page 0."""
    if pages is not None:
        return load_paged(view, head, pages, at, start, live, ROWS, D, BLOCK_D)
    elif (live is None) and (box is not None):
        return tl.reshape(box.load([at.batch, h, at.key + start, 0]), (ROWS, BLOCK_D))
    else:
        return load_rows(view, head, start, live, ROWS, D, BLOCK_D)


@triton.jit
def load_paged(view, head, pages, at, start, live, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of keys from their pages, of which none but those of live keys are asked for. `start` is a multiple of
    ROWS, so a page of as many keys or a multiple of it holds the tile whole."""
    if pages.size % ROWS == 0:
        page = tl.load(pages.ptr + at.key + start // pages.size)
        return load_rows(view, head + page_offset(view, page), start % pages.size, live, ROWS, D, BLOCK_D)
    else:
        offsets = row_offsets(view, pages, at.key, start + tl.arange(0, ROWS), live)
        return load_whole(whole_rows(view, head, offsets, BLOCK_D), live, D, BLOCK_D)


@triton.jit
def page_offset(view, page):
    """In elements, int64."""
    return page.to(tl.int64) * number(view.strides[0]) * view.unit


@triton.jit
def row_offsets(view, pages, entry, rows, live):
    """int64 [len(rows)]: from row 0 of the head to rows of a sequence, wherever they are; entry: of its first page in
    the table, where there is one. Only live rows are looked up; live None: all are."""
    if pages is None:
        return rows.to(tl.int64) * stride(view, 2)
    else:
        ptrs = pages.ptr + entry + rows // pages.size
        if live is None:
            page = tl.load(ptrs)
        else:
            page = tl.load(ptrs, mask=live, other=0)
        return page_offset(view, page) + (rows % pages.size).to(tl.int64) * stride(view, 2)


@triton.jit
def whole_rows(view, head, offsets, COLS: tl.constexpr):
    """Pointers [len(offsets), COLS] to rows that lie anywhere; head may be one pointer or a row of its own for each."""
    if view.columns == 2:
        cols = tl.arange(0, COLS).to(tl.int64) * stride(view, 3)
    else:
        cols = tl.arange(0, COLS)
    return (head + offsets)[:, None] + cols[None, :]


@triton.jit
def packed_rows(view, b, h, rows, GROUP: tl.constexpr, COLS: tl.constexpr):
    """Pointers [len(rows), COLS] to rows in which heads are packed: r is index r // GROUP of head h + r % GROUP."""
    of_head = (rows % GROUP).to(tl.int64) * number(view.strides[1]) * view.unit
    of_index = (rows // GROUP).to(tl.int64) * number(view.strides[2]) * view.unit
    return whole_rows(view, head_pointer(view, b, h), of_head + of_index, COLS)


@triton.jit
def store_rows(view, head, start, live, x, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x [ROWS, BLOCK_D] to the live rows from `start`, columns below D."""
    mask = live[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(row_pointers(view, head, start, ROWS, BLOCK_D), x.to(view.ptr.dtype.element_ty), mask=mask)


@triton.jit
def pair_pointers(view, head, m, n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """To a tile of something (M, N), from (m, n): [BLOCK_M, BLOCK_N], or its transpose.

    Beyond the edge they repeat the last row and key, so that a load needs no mask; those scores are never used.
    """
    rows = tl.minimum(tl.arange(0, BLOCK_M), tl.maximum(M - 1, 0) - m)
    cols = tl.minimum(tl.arange(0, BLOCK_N), tl.maximum(N - 1, 0) - n)
    if TRANSPOSED:
        return pointers(view, head, m, n, rows[None, :], cols[:, None])
    else:
        return pointers(view, head, m, n, rows[:, None], cols[None, :])


@triton.jit
def schedule(turn, tiles, heads, WAVE):
    """(tile, head) of a turn: waves of WAVE heads, whose keys fit the cache together, and within a wave every head's
    tile 0 before any head's tile 1, so that the longest tiles can be started first."""
    wave = turn // (WAVE * tiles)
    width = tl.minimum(WAVE, heads - wave * WAVE)
    rest = turn - wave * WAVE * tiles
    return rest // width, wave * WAVE + rest % width


@triton.jit
def place(ragged, b, h, tile, M, N, HEADS):
    """The Place of a tile of head h of sequence b. M, N: of a batch, or of all sequences together. The tile
    NONE is that of a sequence without rows and keys."""
    head = b * HEADS + h
    zero = tile * 0
    if ragged is None:
        return Place(b, h, head, tile, M, N, zero, b, head, zero, zero, M, N)
    else:
        row = tl.load(ragged.q + b)
        key = tl.load(ragged.k + b)
        m = tl.where(tile == NONE, 0, tl.load(ragged.q + b + 1) - row)
        n = tl.where(tile == NONE, 0, tl.load(ragged.k + b + 1) - key)
        tile = tl.where(tile == NONE, 0, tile)
        shift = (n - m) * number(ragged.aligned)
        return Place(b, h, head, tile, m, n, shift, zero, h, row, key, M, N)


@triton.jit
def owner(ragged, turn, tiles, M, N, HEADS, BATCHED_HEADS, WAVE, LAST_FIRST: tl.constexpr):
    """The Place of a program, by its turn. tiles: how many a batch has; LAST_FIRST: from the last one on.

    Turns of sequences stand in a table; see turns.py.
    """
    if ragged is None:
        tile, head = schedule(turn, tiles, BATCHED_HEADS, WAVE)
        if LAST_FIRST:
            tile = tiles - 1 - tile
        return place(ragged, head // HEADS, head % HEADS, tile, M, N, HEADS)
    else:
        key = tl.load(ragged.turns + turn // HEADS)
        b = (key >> BITS).to(tl.int32) & NONE
        return place(ragged, b, turn % HEADS, key.to(tl.int32) & NONE, M, N, HEADS)


@triton.jit
def member(at, index, GROUP: tl.constexpr):
    """The Place of one of the query heads of a key-value head's group."""
    return Place(
        at.b, at.h * GROUP + index, at.head * GROUP + index, at.tile, at.M, at.N, at.shift,
        at.batch, at.home * GROUP + index, at.row, at.key, at.rows, at.keys,
    )  # fmt: skip


@triton.jit
def row_base(at):
    """Where row 0 of the sequence lies in what is laid out (batch, head, row); computed where it is used, because two
    registers are more than the multiplication."""
    return at.home.to(tl.int64) * at.rows + at.row


@triton.jit
def key_base(at):
    """Where key 0 of the sequence lies in what is laid out (batch, head, key)."""
    return at.home.to(tl.int64) * at.keys + at.key
