"""Mean and unbiased standard deviation over valid frames, forward and backward.

Each program reduces one piece of an utterance to a count, a mean and a sum of squares around that mean; a second kernel
merges the pieces (Chan, Golub and LeVeque 1983). Frames are read once and large means cost no precision.
"""

import torch
import triton
import triton.language as tl

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
def _stats_pool_piece_kernel(
    x_ptr, lengths_ptr, parts_ptr,  # [B, pieces, 2, C] fp32
    T, C, LENGTHS: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    piece, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    length = tl.minimum(tl.load(lengths_ptr + b), T).to(tl.int32) if LENGTHS else T
    count = 0.0
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    squares = tl.zeros([BLOCK_C], dtype=tl.float32)
    first = piece * PIECE
    for start in range(first, tl.minimum(first + PIECE, length), BLOCK_T):
        frame = start + tl.arange(0, BLOCK_T)
        valid = (frame < length)[:, None] & (channel < C)[None, :]
        x = tl.load(x_ptr + (b * T + frame[:, None]) * C + channel[None, :], mask=valid, other=0.0).to(tl.float32)
        here = tl.minimum(length - start, BLOCK_T).to(tl.float32)
        middle = tl.sum(x, axis=0) / here
        centred = tl.where(valid, x - middle[None, :], 0.0)
        count, mean, squares = _merge(count, mean, squares, here, middle, tl.sum(centred * centred, axis=0))
    part = parts_ptr + (b * tl.num_programs(1) + piece) * 2 * C + channel
    tl.store(part, mean, mask=channel < C)
    tl.store(part + C, squares, mask=channel < C)


@triton.jit
def _stats_pool_merge_kernel(
    parts_ptr, lengths_ptr, out_ptr, T, C, pieces,
    LENGTHS: tl.constexpr, PIECE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    length = tl.minimum(tl.load(lengths_ptr + b), T).to(tl.int32) if LENGTHS else T
    count = 0.0
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    squares = tl.zeros([BLOCK_C], dtype=tl.float32)
    for piece in range(pieces):
        here = tl.minimum(tl.maximum(length - piece * PIECE, 0), PIECE).to(tl.float32)
        part = parts_ptr + (b * pieces + piece) * 2 * C + channel
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
    grad_ptr, x_ptr, parts_ptr, lengths_ptr, out_ptr, dx_ptr, T, C, pieces,
    LENGTHS: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    length = tl.minimum(tl.load(lengths_ptr + b), T).to(tl.int32) if LENGTHS else T
    # The mean again from the pieces: that in `out` is rounded to its dtype.
    count = 0.0
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    for piece in range(pieces):
        here = tl.minimum(tl.maximum(length - piece * PIECE, 0), PIECE).to(tl.float32)
        other = tl.load(parts_ptr + (b * pieces + piece) * 2 * C + channel, mask=inside, other=0.0)
        count, mean, _ = _merge(count, mean, mean, here, other, mean)
    dmean = tl.load(grad_ptr + b * 2 * C + channel, mask=inside, other=0.0).to(tl.float32)
    dstd = tl.load(grad_ptr + b * 2 * C + C + channel, mask=inside, other=0.0).to(tl.float32)
    std = tl.load(out_ptr + b * 2 * C + C + channel, mask=inside, other=0.0).to(tl.float32)
    # d std / d x is centred / ((n - 1) std), and 0 where all frames are equal, as torch.std has it.
    slope = tl.where(std == 0, 0.0, dstd / ((count - 1) * std))
    for step in tl.static_range(PIECE // BLOCK_T):
        frame = tl.program_id(1) * PIECE + step * BLOCK_T + tl.arange(0, BLOCK_T)
        valid = (frame < length)[:, None] & inside[None, :]
        at = (b * T + frame[:, None]) * C + channel[None, :]
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        centred = x - mean[None, :]
        dx = tl.where(centred == 0, 0.0, slope[None, :] * centred) + (dmean / count)[None, :]
        dx = tl.where(valid, dx, 0.0).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + at, dx, mask=(frame < T)[:, None] & inside[None, :])


@tunable
def tile_configs(target: str) -> tuple[Config, ...]:
    """Tiles and warps: 32 frames by 64 channels are 16 numbers in each thread of four warps. Frames divide PIECE."""
    default = {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 4}
    return default, {**default, "BLOCK_T": 16}, {**default, "BLOCK_C": 128}, {**default, "BLOCK_T": 64, "num_warps": 8}


def _pieces(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    B, T, C = x.shape
    parts = torch.empty(B, triton.cdiv(T, PIECE), 2, C, dtype=torch.float32, device=x.device)

    def run(config: Config) -> None:
        _stats_pool_piece_kernel[(triton.cdiv(C, config["BLOCK_C"]), parts.shape[1], B)](
            x, lengths, parts, T, C, LENGTHS=lengths is not None, PIECE=PIECE, **config
        )

    tile_configs.launch(run, x.device, (), (T, B, C), ("pieces", x.dtype))
    return parts


def stats_pool(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """The op `stats_pool`: `[B, 2C]`, means and deviations."""
    x = x.contiguous()
    B, T, C = x.shape
    out = x.new_empty(B, 2 * C)
    parts = _pieces(x, lengths)
    _stats_pool_merge_kernel[(triton.cdiv(C, MERGED_CHANNELS), B)](
        parts, lengths, out, T, C, parts.shape[1],
        LENGTHS=lengths is not None, PIECE=PIECE, BLOCK_C=MERGED_CHANNELS, num_warps=2,
    )  # fmt: skip
    return out


def stats_pool_backward(
    grad: torch.Tensor, x: torch.Tensor, lengths: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """The op `stats_pool_backward`: dx `[B, T, C]`."""
    grad, x, out = grad.contiguous(), x.contiguous(), out.contiguous()
    B, T, C = x.shape
    dx = torch.empty_like(x)
    parts = _pieces(x, lengths)

    def run(config: Config) -> None:
        _stats_pool_bwd_kernel[(triton.cdiv(C, config["BLOCK_C"]), parts.shape[1], B)](
            grad, x, parts, lengths, out, dx, T, C, parts.shape[1],
            LENGTHS=lengths is not None, PIECE=PIECE, **config,
        )  # fmt: skip

    tile_configs.launch(run, x.device, (), (T, B, C), ("backward", x.dtype))
    return dx
