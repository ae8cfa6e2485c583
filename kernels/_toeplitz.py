"""The relative position bias as attention kernels read it: aligned rows, and where it no longer changes.

A score tile needs bias[i, j] = rel_bias[j - i + T - 1]: neighbouring rows start one entry apart, so at most one row in
four could be loaded in 16-byte vectors. Four copies of the vector, each shifted by one entry more, hold every row at an
aligned address. Beyond the largest distance that the model tells apart the bias is one constant per direction: the
first and last entries that differ from their end are found here, on the device, and tiles beyond need no loads.
"""

import torch
import triton
import triton.language as tl

SHIFTS = tl.constexpr(4)
# Entries in front of and behind each copy, so that tiles which overhang the sequence load without masks. No tile
# is larger.
MARGIN = 128
# One program copies this many entries.
BLOCK = 1024


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
        for start in range(0, E, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            value = tl.load(rel_bias_ptr + entry, mask=entry < E, other=0.0)
            low = tl.minimum(low, tl.min(tl.where((entry < E) & (value != first), entry, E), axis=0))
            high = tl.maximum(high, tl.max(tl.where((entry < E) & (value != last), entry, -1), axis=0))
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
    _toeplitz_kernel[grid](rel_bias, copies, ends, E, H, W, MARGIN=MARGIN, BLOCK=BLOCK)
    return copies, ends


@triton.jit
def row_places(row, T, W, MARGIN: tl.constexpr):
    """Where in the copies the rows `row` begin: entry for column j is at this place + j, in 16-byte vectors."""
    start = T - 1 - row + MARGIN
    return (start % SHIFTS) * W + (start // SHIFTS) * SHIFTS


@triton.jit
def far_tiles(row, low, high, T, count, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Of `count` column tiles: how many from the left lie in the constant range, and the first that does again.

    `row` is the first of BLOCK_ROWS rows; `low` and `high` end the constant ranges.
    """
    left = tl.minimum(tl.maximum(low + row - T + 2, 0) // BLOCK_COLUMNS, count)
    right = tl.cdiv(tl.maximum(high + row + BLOCK_ROWS - T, 0), BLOCK_COLUMNS)
    return left, tl.minimum(tl.maximum(right, left), count)
