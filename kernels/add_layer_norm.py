"""Residual add and layer norm, forward and backward.

A program holds whole rows in registers, so a row is read once and its statistics are those of all its channels at
once. Several rows share what is read of weight and bias. Arithmetic is fp32 whatever the inputs are.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._tuning import Config, tunable
from ._wanted import only

# A row of this many channels still fits the registers of one program, in fp32.
MAX_CHANNELS = 16384
# Programs of the backward, each with its own part of the weight's and bias's gradients: enough to fill a GPU, few
# enough that adding up the parts costs nothing. Not the number of processors: sums would differ between GPUs.
PARTS = 256
# Programs of the forward, below which they take fewer rows: two for each multiprocessor of an A100 or H100.
FEW = 256


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, normed_ptr, rows, C, eps,
    KEEP_SUM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    inside_c = channel < C
    inside = (row < rows)[:, None] & inside_c[None, :]
    at = row[:, None].to(tl.int64) * C + channel[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # The norm is of the sum as it was rounded, which is what the next layer sees.
    rounded = (x + residual).to(normed_ptr.dtype.element_ty)
    if KEEP_SUM:
        tl.store(sum_ptr + at, rounded, mask=inside)
    total = rounded.to(tl.float32)
    centred = tl.where(inside, total - tl.sum(total, axis=1)[:, None] / C, 0.0)
    hat = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps))[:, None]
    weight = tl.load(weight_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)
    normed = hat * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_layer_norm_bwd_kernel(
    grad_sum_ptr,  # or None
    grad_normed_ptr,
    sum_ptr,
    weight_ptr,
    dx_ptr,
    parts_ptr,  # of weight and bias, [2, programs, C] fp32, or None
    rows,
    rows_per_program,
    C,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_C)
    inside_c = channel < C
    weight = tl.load(weight_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        at = row[:, None].to(tl.int64) * C + channel[None, :]
        inside = (row < last)[:, None] & inside_c[None, :]
        total = tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, total - tl.sum(total, axis=1)[:, None] / C, 0.0)
        rstd = (1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps))[:, None]
        hat = centred * rstd
        grad = tl.load(grad_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if parts_ptr is not None:
            dweight += grad * hat
            dbias += grad
        g = grad * weight[None, :]
        dx = rstd * (g - tl.sum(g, axis=1)[:, None] / C - hat * (tl.sum(g * hat, axis=1)[:, None] / C))
        if grad_sum_ptr is not None:
            dx += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if parts_ptr is not None:
        tl.store(parts_ptr + program * C + channel, tl.sum(dweight, axis=0), mask=inside_c)
        tl.store(parts_ptr + (tl.num_programs(0) + program) * C + channel, tl.sum(dbias, axis=0), mask=inside_c)


@tunable
def forward_configs(C: int, few: bool, target: str) -> tuple[Config, ...]:
    """Rows of a program, and warps: 8192 numbers are 32 in each thread of eight warps. `few` says that programs of so
    many rows would leave a GPU without work.
    """
    block = triton.next_power_of_2(C)
    rows = max(1, min(8, (2048 if few else 8192) // block))
    warps = min(max(rows * block // 1024, 1), 16)
    default = {"BLOCK_R": rows, "BLOCK_C": block, "num_warps": warps}
    fewer = {**default, "BLOCK_R": max(rows // 2, 1), "num_warps": max(warps // 2, 1) if rows > 1 else warps}
    return default, fewer, {**default, "num_warps": min(2 * warps, 16)}


@tunable
def backward_configs(C: int, target: str) -> tuple[Config, ...]:
    """Rows of a step, and warps: 2048 numbers are 16 in each thread of four warps, of each of six tiles. The loads of
    several rows are under way at a time; fewer threads reduce faster.
    """
    block = triton.next_power_of_2(C)
    rows = max(1, min(8, 2048 // block))
    warps = min(max(rows * block // 512, 1), 16)
    default = {"BLOCK_R": rows, "BLOCK_C": block, "num_warps": warps}
    one = {**default, "BLOCK_R": 1, "num_warps": max(warps // rows, 1)}
    return default, {**default, "num_warps": min(2 * warps, 16)}, one


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, keep_sum: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The op `add_layer_norm`: two tensors `[..., C]` in the dtype of `x`, or None and one without `keep_sum`."""
    x, residual, weight, bias = (t.contiguous() for t in (x, residual, weight, bias))
    C = x.shape[-1]
    total, normed = torch.empty_like(x) if keep_sum else None, torch.empty_like(x)
    if not x.numel():
        return total, normed
    rows = x.numel() // C

    def run(config: Config) -> None:
        _add_layer_norm_fwd_kernel[(triton.cdiv(rows, config["BLOCK_R"]),)](
            x, residual, weight, bias, total, normed, rows, C, eps, KEEP_SUM=keep_sum, **config
        )

    few = rows * triton.next_power_of_2(C) < FEW * 8192
    forward_configs.launch(run, x.device, (C, few), (rows,), (x.dtype, keep_sum))
    return total, normed


def add_layer_norm_backward(
    grad_sum: torch.Tensor,
    grad_normed: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The op `add_layer_norm_backward`: gradients of `x` `[..., C]`, of weight and of bias `[C]`, those wanted.

    `grad_sum` may be empty, for zeros.
    """
    grad_sum, grad_normed, total, weight = (t.contiguous() for t in (grad_sum, grad_normed, total, weight))
    C = total.shape[-1]
    rows = total.numel() // C
    dx = torch.empty_like(total)
    flowing = grad_sum if grad_sum.numel() else None
    if rows == 0:
        return only(wanted, dx, torch.zeros_like(weight), torch.zeros_like(weight))
    summed = any(wanted[1:])

    def run(config: Config) -> torch.Tensor | tuple[None, None]:
        rows_per_program = triton.cdiv(triton.cdiv(rows, PARTS), config["BLOCK_R"]) * config["BLOCK_R"]
        programs = triton.cdiv(rows, rows_per_program)
        parts = torch.empty(2, programs, C, dtype=torch.float32, device=total.device) if summed else None
        _add_layer_norm_bwd_kernel[(programs,)](
            flowing, grad_normed, total, weight, dx, parts, rows, rows_per_program, C, eps, **config
        )
        return parts.sum(1).to(weight.dtype) if summed else (None, None)

    sums = backward_configs.launch(run, total.device, (C,), (rows,), (total.dtype, summed))
    return only(wanted, dx, *sums)
