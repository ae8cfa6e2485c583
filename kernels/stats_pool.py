"""Mean and unbiased standard deviation over valid frames, forward and backward.

Each program reduces one piece of an utterance to a count, a mean and a sum of squares around that mean; a second kernel
merges the pieces (Chan, Golub and LeVeque 1983). Frames are read once and large means cost no precision. Of packed
frames a piece is a place of _packed.py: all frames decide how many programs there are, not the longest utterance.
"""

import torch
import triton
import triton.language as tl

from ._packed import apart, extent, first_place, in_memory, places, utterance_at
from ._tuning import Config, tunable

# Frames of one piece: a few tiles, so that short batches still fill a GPU.
PIECE = 128
# Channels of one program that merges pieces.
MERGED_CHANNELS = 64


@triton.jit
def _merge(count, mean, squares, count_b, mean_b, squares_b):
    """Count, mean and sum of squares around the mean of two sets together."""
    total = count + count_b
    share = count_b / tl.maximum(total, 1.0)
    delta = mean_b - mean
    return total, mean + delta * share, squares + squares_b + delta * delta * (count * share)


@triton.jit
def _own_piece(offsets_ptr, utterances, PIECE: tl.constexpr):
    """The utterance and the piece of this program, and where that is among the pieces of all."""
    place = tl.program_id(1)
    if offsets_ptr is None:
        b = tl.program_id(2).to(tl.int64)
        return b, place, b * tl.num_programs(1) + place
    else:
        b = utterance_at(place, offsets_ptr, utterances, PIECE)
        return b.to(tl.int64), place - first_place(offsets_ptr, b, PIECE), place.to(tl.int64)


@triton.jit
def _own_frames(offsets_ptr, lengths_ptr, b, T, LENGTHS: tl.constexpr):
    """First frame of an utterance among those of all, how many it has, and how many of them count."""
    if offsets_ptr is None:
        return b * T, T, tl.minimum(tl.load(lengths_ptr + b), T).to(tl.int32) if LENGTHS else T
    else:
        first, frames = extent(offsets_ptr, b)
        return first, frames, frames


@triton.jit
def _own_parts(offsets_ptr, b, length, pieces, PIECE: tl.constexpr):
    """Where an utterance's pieces are among those of all, and how many there are."""
    if offsets_ptr is None:
        return b * pieces, pieces
    else:
        return first_place(offsets_ptr, b, PIECE), tl.cdiv(length, PIECE)


@triton.jit
def _stats_pool_piece_kernel(
    x_ptr, lengths_ptr, offsets_ptr, parts_ptr,  # [all pieces, 2, C] fp32
    utterances, T, C, LENGTHS: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, own_piece, own_place = _own_piece(offsets_ptr, utterances, PIECE)
    own_first, _, length = _own_frames(offsets_ptr, lengths_ptr, b, T, LENGTHS)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = 0.0
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    squares = tl.zeros([BLOCK_C], dtype=tl.float32)
    first = own_piece * PIECE
    for start in range(first, tl.minimum(first + PIECE, length), BLOCK_T):
        frame = start + tl.arange(0, BLOCK_T)
        valid = (frame < length)[:, None] & (channel < C)[None, :]
        x = tl.load(x_ptr + (own_first + frame[:, None]) * C + channel[None, :], mask=valid, other=0.0).to(tl.float32)
        here = tl.minimum(length - start, BLOCK_T).to(tl.float32)
        middle = tl.sum(x, axis=0) / here
        centred = tl.where(valid, x - middle[None, :], 0.0)
        count, mean, squares = _merge(count, mean, squares, here, middle, tl.sum(centred * centred, axis=0))
    part = parts_ptr + own_place * 2 * C + channel
    tl.store(part, mean, mask=channel < C)
    tl.store(part + C, squares, mask=channel < C)


@triton.jit
def _stats_pool_merge_kernel(
    parts_ptr, lengths_ptr, offsets_ptr, out_ptr, T, C, pieces,
    LENGTHS: tl.constexpr, PIECE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    _, _, length = _own_frames(offsets_ptr, lengths_ptr, b, T, LENGTHS)
    own_part, own_parts = _own_parts(offsets_ptr, b, length, pieces, PIECE)
    count = 0.0
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    squares = tl.zeros([BLOCK_C], dtype=tl.float32)
    for piece in range(own_parts):
        here = tl.minimum(tl.maximum(length - piece * PIECE, 0), PIECE).to(tl.float32)
        part = parts_ptr + (own_part + piece).to(tl.int64) * 2 * C + channel
        other = tl.load(part, mask=channel < C, other=0.0)
        other_squares = tl.load(part + C, mask=channel < C, other=0.0)
        count, mean, squares = _merge(count, mean, squares, here, other, other_squares)
    # No frame has no mean, and one frame no deviation.
    mean = tl.where(length > 0, mean, float("nan"))
    std = tl.where(length > 1, tl.sqrt(squares / tl.maximum(count - 1, 1.0)), float("nan"))
    tl.store(out_ptr + b * 2 * C + channel, mean.to(out_ptr.dtype.element_ty), mask=channel < C)
    tl.store(out_ptr + b * 2 * C + C + channel, std.to(out_ptr.dtype.element_ty), mask=channel < C)


@triton.jit
def _stats_pool_bwd_kernel(
    grad_ptr, x_ptr, parts_ptr, lengths_ptr, offsets_ptr, out_ptr, dx_ptr, utterances, T, C, pieces,
    LENGTHS: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, own_piece, own_place = _own_piece(offsets_ptr, utterances, PIECE)
    own_first, frames, length = _own_frames(offsets_ptr, lengths_ptr, b, T, LENGTHS)
    own_part, own_parts = _own_parts(offsets_ptr, b, length, pieces, PIECE)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    # The mean again from the pieces: that in `out` is rounded to its dtype.
    count = 0.0
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    for piece in range(own_parts):
        here = tl.minimum(tl.maximum(length - piece * PIECE, 0), PIECE).to(tl.float32)
        other = tl.load(parts_ptr + (own_part + piece).to(tl.int64) * 2 * C + channel, mask=inside, other=0.0)
        count, mean, _ = _merge(count, mean, mean, here, other, mean)
    dmean = tl.load(grad_ptr + b * 2 * C + channel, mask=inside, other=0.0).to(tl.float32)
    dstd = tl.load(grad_ptr + b * 2 * C + C + channel, mask=inside, other=0.0).to(tl.float32)
    std = tl.load(out_ptr + b * 2 * C + C + channel, mask=inside, other=0.0).to(tl.float32)
    # d std / d x is centred / ((n - 1) std), and 0 where all frames are equal, as torch.std has it.
    slope = tl.where(std == 0, 0.0, dstd / ((count - 1) * std))
    for step in tl.static_range(PIECE // BLOCK_T):
        frame = own_piece * PIECE + step * BLOCK_T + tl.arange(0, BLOCK_T)
        valid = (frame < length)[:, None] & inside[None, :]
        at = (own_first + frame[:, None]) * C + channel[None, :]
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        centred = x - mean[None, :]
        dx = tl.where(centred == 0, 0.0, slope[None, :] * centred) + (dmean / count)[None, :]
        dx = tl.where(valid, dx, 0.0).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + at, dx, mask=(frame < frames)[:, None] & inside[None, :])


@tunable
def tile_configs(target: str) -> tuple[Config, ...]:
    """Tiles and warps: 32 frames by 64 channels are 16 numbers in each thread of four warps. Frames divide PIECE."""
    default = {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 4}
    return default, {**default, "BLOCK_T": 16}, {**default, "BLOCK_C": 128}, {**default, "BLOCK_T": 64, "num_warps": 8}


def _places(x: torch.Tensor, offsets: torch.Tensor | None) -> tuple[int, int]:
    """Pieces of a row of `x`, and rows, in a grid."""
    B, T, _ = x.shape
    return (triton.cdiv(T, PIECE), B) if offsets is None else (places(T, offsets.shape[0] - 1, PIECE), 1)


def _utterances(x: torch.Tensor, offsets: torch.Tensor | None) -> int:
    return x.shape[0] if offsets is None else offsets.shape[0] - 1


def _pieces(x: torch.Tensor, lengths: torch.Tensor | None, offsets: torch.Tensor | None) -> torch.Tensor:
    (B, T, C), (pieces, rows) = x.shape, _places(x, offsets)
    parts = torch.empty(rows * pieces, 2, C, dtype=torch.float32, device=x.device)

    def run(config: Config) -> None:
        _stats_pool_piece_kernel[(triton.cdiv(C, config["BLOCK_C"]), pieces, rows)](
            x, lengths, offsets, parts, _utterances(x, offsets), T, C,
            LENGTHS=lengths is not None, PIECE=PIECE, **config,
        )  # fmt: skip

    tile_configs.launch(run, x.device, (), (T, B, C), ("pieces", x.dtype, *apart(offsets)))
    return parts


def stats_pool(
    x: torch.Tensor, lengths: torch.Tensor | None, offsets: torch.Tensor | None = None
) -> torch.Tensor:
    """The op `stats_pool`: `[B, 2C]`, means and deviations."""
    x, (offsets,) = x.contiguous(), in_memory(offsets)
    utterances, T, C = _utterances(x, offsets), *x.shape[1:]
    out = x.new_empty(utterances, 2 * C)
    parts = _pieces(x, lengths, offsets)
    _stats_pool_merge_kernel[(triton.cdiv(C, MERGED_CHANNELS), utterances)](
        parts, lengths, offsets, out, T, C, _places(x, offsets)[0],
        LENGTHS=lengths is not None, PIECE=PIECE, BLOCK_C=MERGED_CHANNELS, num_warps=2,
    )  # fmt: skip
    return out


def stats_pool_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """The op `stats_pool_backward`: dx `[B, T, C]`."""
    grad, x, out, (offsets,) = grad.contiguous(), x.contiguous(), out.contiguous(), in_memory(offsets)
    (B, T, C), (pieces, rows) = x.shape, _places(x, offsets)
    dx = torch.empty_like(x)
    parts = _pieces(x, lengths, offsets)

    def run(config: Config) -> None:
        _stats_pool_bwd_kernel[(triton.cdiv(C, config["BLOCK_C"]), pieces, rows)](
            grad, x, parts, lengths, offsets, out, dx, _utterances(x, offsets), T, C, pieces,
            LENGTHS=lengths is not None, PIECE=PIECE, **config,
        )  # fmt: skip

    tile_configs.launch(run, x.device, (), (T, B, C), ("backward", x.dtype, *apart(offsets)))
    return dx
