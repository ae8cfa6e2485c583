"""The relative position bias as attention kernels read it: aligned rows, and where it no longer changes.

A score tile needs bias[i, j] = rel_bias[j - i + T - 1]: neighbouring rows start one entry apart, so at most one row in
four could be loaded in 16-byte vectors. Four copies of the vector, each shifted by one entry more, hold every row at an
aligned address. Matrix instructions of NVIDIA leave pairs of neighbouring columns in a thread; pairs are aligned in two
of the copies. Beyond the largest distance that the model tells apart the bias is one constant per direction: the
first and last entries that differ from their end are found here, on the device, and tiles beyond need no loads.
"""

import torch
import triton
import triton.language as tl

from ._rows import product_of_rows

SHIFTS = tl.constexpr(4)
# Entries in front of and behind each copy, so that tiles which overhang the sequence load without masks. No tile
# is larger.
MARGIN = 128
# One program copies this many entries, and looks for the ends among so many at a time: their loads do not wait for each
# other.
BLOCK, MOST_SEARCHED = 1024, 8192


@triton.jit
def _toeplitz_kernel(
    rel_bias_ptr,  # [H, 2T - 1]
    copies_ptr,  # [2 or 1, H, SHIFTS, W], reversed in the second half
    ends_ptr,  # [H, 2]
    E,  # 2T - 1
    H,
    W,
    MARGIN: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCHED: tl.constexpr,
):
    block, head, reverse = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rel_bias_ptr += head * E
    place = block * BLOCK + tl.arange(0, BLOCK)
    for shift in tl.static_range(SHIFTS):
        entry = place + shift - MARGIN
        entry = tl.where(reverse == 1, E - 1 - entry, entry)
        value = tl.load(rel_bias_ptr + entry, mask=(entry >= 0) & (entry < E), other=0.0)
        row = ((reverse * H + head) * SHIFTS + shift).to(tl.int64) * W
        tl.store(copies_ptr + row + place, value, mask=place < W)
    if (block == 0) & (reverse == 0):
        first = tl.load(rel_bias_ptr)
        last = tl.load(rel_bias_ptr + E - 1)
        low = E  # the first entry that differs from entry 0
        high = -1  # the last entry that differs from entry E - 1
        for start in range(0, E, SEARCHED):
            sought = start + tl.arange(0, SEARCHED)
            found = tl.load(rel_bias_ptr + sought, mask=sought < E, other=0.0)
            low = tl.minimum(low, tl.min(tl.where((sought < E) & (found != first), sought, E), axis=0))
            high = tl.maximum(high, tl.max(tl.where((sought < E) & (found != last), sought, -1), axis=0))
        tl.store(ends_ptr + head * 2, low - 1)
        tl.store(ends_ptr + head * 2 + 1, high + 1)


def toeplitz(rel_bias: torch.Tensor, both: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Shifted copies of `rel_bias` `[H, 2T - 1]`, and the ends of its constant ranges.

    Args:
        rel_bias: `[H, 2T - 1]` fp32, contiguous.
        both: whether a reversed set is wanted too, for tiles whose rows are keys.

    Returns:
        Copies `[1 or 2, H, SHIFTS, W]` fp32, with `copies[0, h, s, z] == rel_bias[h, z + s - MARGIN]` and zeros
        outside; and `[H, 2]` int32: entries up to the first number equal entry 0, those from the second on the last.
    """
    H, E = rel_bias.shape
    W = triton.cdiv(E + 2 * MARGIN, 16) * 16
    copies = rel_bias.new_empty(2 if both else 1, H, SHIFTS.value, W)
    ends = torch.empty(H, 2, dtype=torch.int32, device=rel_bias.device)
    grid = (triton.cdiv(W, BLOCK), H, copies.shape[0])
    searched = min(max(BLOCK, triton.next_power_of_2(E)), MOST_SEARCHED)
    _toeplitz_kernel[grid](rel_bias, copies, ends, E, H, W, MARGIN=MARGIN, BLOCK=BLOCK, SEARCHED=searched)
    return copies, ends


@triton.jit
def row_places(row, T, W, MARGIN: tl.constexpr):
    """Where in the copies the rows `row` begin: entry for column j is at this place + j, in 16-byte vectors."""
    start = T - 1 - row + MARGIN
    return (start % SHIFTS) * W + (start // SHIFTS) * SHIFTS


@triton.jit
def _fragment_tile(
    copies, first, start, T, W,
    MARGIN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The bias of a tile, loaded by the threads that hold its scores: no exchange through shared memory.

    A warp has 16 rows. Each thread has rows r and r + 8 and, of every eight columns, pair c. Row r + 8 of column j has
    the bias of row r and column j - 8, at the same address, so that the compiler loads half as much.
    """
    tl.static_assert(BLOCK_ROWS == 16 * WARPS)
    # [columns / 8, half, WARPS, r, c, 2]: threads run along r and c, the rest are registers of a thread.
    eight = tl.arange(0, BLOCK_COLUMNS // 8)[:, None, None, None, None, None]
    half = tl.arange(0, 2)[None, :, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None, None]
    r = tl.arange(0, 8)[None, None, None, :, None, None]
    pair = tl.arange(0, 4)[None, None, None, None, :, None]
    one = tl.arange(0, 2)[None, None, None, None, None, :]
    row = T - 1 + MARGIN - first - (warp * 16 + r)
    place = (row % 2) * W + (row // 2) * 2 - half * 8 + (eight * 8 + pair * 2 + one)
    return tl.load(copies + place + start).permute(2, 1, 3, 0, 4, 5).reshape(BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def biased_scores(
    a, b, gate, copies, first, start, T, W,
    MARGIN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """product_of_rows(a, b) + gate · bias, and the bias; `copies` are those of the head, `gate` broadcasts to the tile.

    With WARPS, sums of the product begin with the gated bias: only operands a and b of a product are staged in shared
    memory by the compiler, and this way its loads stay where they are needed. 0 is for layouts other than theirs;
    sums of products IN_PIECES begin with nothing.
    """
    if WARPS and not a.dtype.is_ptr():
        bias = _fragment_tile(copies, first, start, T, W, MARGIN, BLOCK_ROWS, BLOCK_COLUMNS, WARPS)
        scores = tl.dot(a, b.T, gate * bias, input_precision=PRECISION)
    else:
        scores = product_of_rows(a, b, D, PRECISION)
        rows = copies + row_places(first + tl.arange(0, BLOCK_ROWS), T, W, MARGIN)
        bias = tl.load(rows[:, None] + (start + tl.arange(0, BLOCK_COLUMNS))[None, :])
        scores = tl.fma(tl.broadcast_to(gate, bias.shape), bias, scores)
    return scores, bias


def fragment_warps(rows: int, warps: int, dtype: torch.dtype, precision: str, target: str) -> int:
    """WARPS of `biased_scores`: `warps` where scores lie as its loads do, else 0."""
    by_matrix_unit = target != "cdna" and (dtype != torch.float32 or precision == "tf32")
    return warps if by_matrix_unit and rows == 16 * warps else 0


@triton.jit
def far_tiles(row, low, high, T, count, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Of `count` column tiles: how many from the left lie in the constant range, and the first that does again.

    `row` is the first of BLOCK_ROWS rows; `low` and `high` end the constant ranges.
    """
    left = tl.minimum(tl.maximum(low + row - T + 2, 0) // BLOCK_COLUMNS, count)
    right = tl.cdiv(tl.maximum(high + row + BLOCK_ROWS - T, 0), BLOCK_COLUMNS)
    return left, tl.minimum(tl.maximum(right, left), count)
