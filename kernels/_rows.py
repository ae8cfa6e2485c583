"""Tiles of rows of head_dim numbers, as attention reads and multiplies them.

Matrix instructions take whole tiles. Without them, for fp32 on NVIDIA, a thread holds whole rows of both operands of a
product in registers: 64 numbers each of several rows are more than it has, and so are wide heads in TF32. Such products
are made IN_PIECES: operands are pointers to rows, read a few columns at a time.
"""

import torch
import triton
import triton.language as tl

PIECE = tl.constexpr(16)  # columns; every head_dim is a multiple


def in_pieces(head_dim: int, dtype: torch.dtype, precision: str, target: str) -> bool:
    """Whether products of rows are made in pieces: fp32 on NVIDIA, unless it is TF32 and heads are not wide."""
    return dtype == torch.float32 and target != "cdna" and (precision == "ieee" or head_dim > 64)


@triton.jit
def row_at(base, start, stride):
    """The row that lies `start` rows behind `base`, in 64 bits."""
    return base + tl.cast(start, tl.int64) * stride


@triton.jit
def row_pointers(base, start, stride, rows, column):
    """Pointers [rows, columns] to the tile that begins `start` rows behind `base`.

    Sequences may be longer than 32-bit offsets reach, tiles are not: only one number a tile is computed in 64 bits.
    """
    return row_at(base, start, stride) + (rows[:, None] * stride + column[None, :])


@triton.jit
def row_starts(base, start, stride, rows, stop, EDGE: tl.constexpr):
    """Pointers [rows, 1] to the rows of such a tile, an operand IN_PIECES; with EDGE rows past `stop` repeat the last.

    They have to be left out of what is made of the product.
    """
    if EDGE:
        rows = tl.minimum(rows, tl.maximum(stop, 1) - 1 - start)
    return row_at(base, start, stride) + rows[:, None] * stride


@triton.jit
def load_tile(pointers, row, stop, column, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A [rows, BLOCK_D] tile, zero past `stop` (checked when MASKED) and past D."""
    if MASKED:
        return tl.load(pointers, mask=(row < stop)[:, None] & (column < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < D)[None, :], other=0.0)


@triton.jit
def operand(
    base, start, stride, rows, stop, column,
    EDGE: tl.constexpr, IN_PIECES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tile that begins `start` rows behind `base`, for `product_of_rows`."""
    if IN_PIECES:
        found = row_starts(base, start, stride, rows, stop, EDGE)
    else:
        found = load_tile(row_pointers(base, start, stride, rows, column), start + rows, stop, column, EDGE, D, BLOCK_D)
    return found


@triton.jit
def product_of_rows(a, b, D: tl.constexpr, PRECISION: tl.constexpr):
    """a · bᵀ [M, N] fp32 of two tiles, or of two tiles IN_PIECES."""
    if a.dtype.is_ptr():
        column = tl.arange(0, PIECE)[None, :]
        total = tl.zeros([a.shape[0], b.shape[0]], dtype=tl.float32)
        for start in tl.range(0, D, PIECE, loop_unroll_factor=1):
            left, right = tl.load(a + start + column), tl.load(b + start + column)
            total = tl.dot(left, right.T, total, input_precision=PRECISION)
    else:
        total = tl.dot(a, b.T, input_precision=PRECISION)
    return total
