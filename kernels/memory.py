"""Where row n lives: pointers to tiles of a View, loads and stores that never leave it, and which tile is whose."""

import triton
import triton.language as tl


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
    ptrs = row_pointers(view, head, start, ROWS, BLOCK_D)
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
def load_tile(view, head, box, b, h, start, live, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """load_rows; a tile whose every row lives comes by the descriptor of its boxes, unless that is None."""
    if (live is None) and (box is not None):
        return tl.reshape(box.load([b, h, start, 0]), (ROWS, BLOCK_D))
    else:
        return load_rows(view, head, start, live, ROWS, D, BLOCK_D)


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
    rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - m)
    cols = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n)
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
