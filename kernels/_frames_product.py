"""Matrix products over frames of a time-major tensor: every convolution and linear layer here is one.

    out[b, u · OUT_STRIDE + phase, n] = finish(sum over tap j and channel c of
                                        x[b, u · STRIDE + j · STEP + first, c] · weight[j, c, n])

No im2col buffer exists: a tile of rows is read where it lies. A convolution's gradient with respect to its input is the
same sum, once per phase of its stride, and so gathers instead of adding atomically. The gradient with respect to the
weight splits its long sum over utterances and frames into parts that are added in order.
"""

import torch
import triton
import triton.language as tl

from ._activation import activate
from ._precision import dot_precision
from ._tuning import Config, tunable


@triton.jit
def _frames_product_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, out_ptr, pre_ptr,
    frames_in, frames_out, units, taps, first, phase, eps,
    GROUPS: tl.constexpr, C: tl.constexpr, N: tl.constexpr,  # channels of one group, in and out
    STRIDE: tl.constexpr, STEP: tl.constexpr, OUT_STRIDE: tl.constexpr,
    PADDED: tl.constexpr,  # whether rows can begin before or end after the input
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    group, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    b = tl.program_id(2).to(tl.int64)
    unit = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    # Rows past the end repeat the last one, and stores leave them out.
    frame = tl.minimum(unit, units - 1) * STRIDE + first
    channel = tl.arange(0, BLOCK_C)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + b * frames_in * (GROUPS * C) + group * C + channel[None, :]
    weight_tile = weight_ptr + group.to(tl.int64) * taps * C * N + channel[:, None] * N + n[None, :]

    acc = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for index in range(taps * BLOCKS):
        tap, start = index // BLOCKS, (index % BLOCKS) * BLOCK_C
        at = frame + tap * STEP
        x_at = x_rows + at[:, None].to(tl.int64) * (GROUPS * C) + start
        x_mask = (start + channel < C)[None, :]
        if PADDED:
            x_mask = x_mask & ((at >= 0) & (at < frames_in))[:, None]
        x = tl.load(x_at, mask=x_mask, other=0.0) if PADDED or C % BLOCK_C != 0 else tl.load(x_at)
        weight_at = weight_tile + (tap * C + start) * N
        if C % BLOCK_C != 0 or N % BLOCK_N != 0:
            inside = (start + channel < C)[:, None] & (n < N)[None, :]
            weight = tl.load(weight_at, mask=inside, other=0.0)
        else:
            weight = tl.load(weight_at)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    inside_n = n < N
    column = group * N + n
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    out_row = (b * frames_out + unit[:, None] * OUT_STRIDE + phase) * (GROUPS * N)
    at = out_row + column[None, :]
    inside = (unit < units)[:, None] & inside_n[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + at, acc.to(pre_ptr.dtype.element_ty), mask=inside)
    if NORM:  # the tile holds whole rows
        centred = tl.where(inside_n[None, :], acc - tl.sum(acc, axis=1)[:, None] / N, 0.0)
        acc = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / N + eps))[:, None]
        acc *= tl.load(norm_weight_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        if norm_bias_ptr is not None:
            acc += tl.load(norm_bias_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _frames_product_bwd_weight_kernel(
    x_ptr, grad_ptr, parts_ptr,  # [splits, GROUPS, taps, C, N] fp32
    frames_in, frames_out, batch, taps, first, splits,
    GROUPS: tl.constexpr, C: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile, tap, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = tile // (N_TILES * C_TILES)
    channel = (tile // N_TILES % C_TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (tile % N_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_T)
    blocks = tl.cdiv(frames_out, BLOCK_T)

    acc = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    for index in range(split, batch * blocks, splits):
        b = (index // blocks).to(tl.int64)
        frame = index % blocks * BLOCK_T + row
        at = frame * STRIDE + tap * STEP + first
        x_mask = (frame < frames_out)[:, None] & (channel < C)[None, :]
        if PADDED:
            x_mask = x_mask & ((at >= 0) & (at < frames_in))[:, None]
        x_at = x_ptr + (b * frames_in + at[:, None]) * (GROUPS * C) + group * C + channel[None, :]
        x = tl.load(x_at, mask=x_mask, other=0.0)
        grad_at = grad_ptr + (b * frames_out + frame[:, None]) * (GROUPS * N) + group * N + n[None, :]
        grad = tl.load(grad_at, mask=(frame < frames_out)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(x.T, grad, acc, input_precision=PRECISION)
    part = ((split * GROUPS + group).to(tl.int64) * taps + tap) * C + channel[:, None]
    inside = (channel < C)[:, None] & (n < N)[None, :]
    tl.store(parts_ptr + part * N + n[None, :], acc, mask=inside)


@tunable
def product_configs(C: int, N: int, dtype: torch.dtype, norm: bool, target: str) -> tuple[Config, ...]:
    """Tiles and warps. A norm needs whole rows in a tile: 32 frames of 512 channels, since twice as many spill where
    the norm and the activation hold several numbers for each sum.
    """
    whole = max(16, triton.next_power_of_2(N))
    if norm:
        frames = max(16, min(64, 16384 // whole))
        warps, channels = 8 if frames * whole >= 8192 else 4, 16 if C < 32 else 32
        default = {"BLOCK_T": frames, "BLOCK_N": whole, "BLOCK_C": channels, "num_warps": warps, "num_stages": 2}
        return default, {**default, "BLOCK_T": 16, "num_warps": 4}, {**default, "num_stages": 1}
    columns = min(whole, 64 if dtype == torch.float32 else 128)
    channels = 16 if C % 32 else 32
    warps = 8 if columns == 128 else 4
    stages = 2 if dtype == torch.float32 else 3
    default = {"BLOCK_T": 128, "BLOCK_N": columns, "BLOCK_C": channels, "num_warps": warps, "num_stages": stages}
    # Twice the programs for short batches, and fewer trips through the loop.
    small = {**default, "BLOCK_T": 64, "num_warps": 4}
    if C % 64 or dtype == torch.float32:
        return default, small
    return default, small, {**default, "BLOCK_C": 64, "num_stages": 2}


def frames_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    units: int,
    *,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, torch.Tensor | None, float] | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    pre: torch.Tensor | None = None,
    stride: int = 1,
    step: int = 1,
    first: int = 0,
    out_stride: int = 1,
    phase: int = 0,
    padded: bool = False,
) -> None:
    """Write `units` frames of `out` `[B, T', G·N]` from `x` `[B, T, G·C]` and `weight` `[G, taps, C, N]`."""
    G, taps, C, N = weight.shape
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    precision = dot_precision(x.dtype)

    def run(config: Config) -> None:
        grid = (G * triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(units, config["BLOCK_T"]), x.shape[0])
        _frames_product_kernel[grid](
            x, weight, bias, norm_weight, norm_bias, residual, out, pre,
            x.shape[1], out.shape[1], units, taps, first, phase, eps,
            GROUPS=G, C=C, N=N, STRIDE=stride, STEP=step, OUT_STRIDE=out_stride, PADDED=padded,
            NORM=norm is not None, ACTIVATION=activation, PRECISION=precision, **config,
        )  # fmt: skip

    also = (G, taps, stride, step, out_stride, padded, activation, pre is None, residual is None, precision)
    product_configs.launch(run, x.device, (C, N, x.dtype, norm is not None), (units, x.shape[0]), also)


@tunable
def weight_gradient_configs(C: int, N: int, dtype: torch.dtype, target: str) -> tuple[Config, ...]:
    """Tiles and warps. A step adds 32 frames to a tile of the weight, which fp32 products make half as large."""
    default = {
        "BLOCK_T": 32,
        "BLOCK_C": min(max(16, triton.next_power_of_2(C)), 64 if dtype == torch.float32 else 128),
        "BLOCK_N": min(max(16, triton.next_power_of_2(N)), 64),
        "num_warps": 4,
        "num_stages": 2,
    }
    if dtype == torch.float32:
        return default, {**default, "num_stages": 1}
    return default, {**default, "BLOCK_T": 64}, {**default, "num_stages": 3}


def frames_product_weight_gradient(
    x: torch.Tensor, grad: torch.Tensor, taps: int, groups: int, *, stride: int = 1, step: int = 1, first: int = 0
) -> torch.Tensor:
    """Gradient `[G, taps, C, N]` fp32 of the weight, from `x` `[B, T, G·C]` and the out's gradient `[B, T', G·N]`."""
    B, frames_out, N = grad.shape
    C, N = x.shape[2] // groups, N // groups
    precision = dot_precision(x.dtype)

    def run(config: Config) -> torch.Tensor:
        tiles = groups * triton.cdiv(C, config["BLOCK_C"]) * triton.cdiv(N, config["BLOCK_N"])
        # Enough programs to fill a GPU, whichever it is, but sums of at least eight blocks each.
        splits = max(1, min(triton.cdiv(512, tiles * taps), B * triton.cdiv(frames_out, config["BLOCK_T"]) // 8))
        parts = torch.empty(splits, groups, taps, C, N, dtype=torch.float32, device=x.device)
        _frames_product_bwd_weight_kernel[(tiles, taps, splits)](
            x, grad, parts, x.shape[1], frames_out, B, taps, first, splits,
            GROUPS=groups, C=C, N=N, STRIDE=stride, STEP=step, PADDED=first != 0, PRECISION=precision, **config,
        )  # fmt: skip
        return parts.sum(0) if splits > 1 else parts[0]

    also = (groups, taps, stride, step, first != 0, precision)
    return weight_gradient_configs.launch(run, x.device, (C, N, x.dtype), (frames_out, B), also)
