"""Backward of what follows a product: activation, layer norm over channels when there is one, and bias.

One pass over the rows: from the gradient and the saved product to the product's gradient, with the sums over rows that
are the gradients of the vectors as parts of each program, added in order.
"""

import torch
import triton
import triton.language as tl

from ._activation import activate_slope
from ._tuning import Config, tunable

# Programs, each with its own part of the sums: enough to fill a GPU. Not the number of processors: sums would differ.
PARTS = 512


@triton.jit
def _finish_bwd_kernel(
    grad_ptr, pre_ptr, norm_weight_ptr, norm_bias_ptr, dpre_ptr, parts_ptr,  # [1 or 3, programs, C] fp32, or None
    rows, rows_per_program, C, eps,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = channel < C
    if NORM:
        gain = tl.load(norm_weight_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)
        shift = tl.zeros([BLOCK_C], dtype=tl.float32)
        if norm_bias_ptr is not None:
            shift = tl.load(norm_bias_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)
    dgain = tl.zeros([BLOCK_C], dtype=tl.float32)
    dshift = tl.zeros([BLOCK_C], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_C], dtype=tl.float32)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        at = row[:, None].to(tl.int64) * C + channel[None, :]
        inside = (row < last)[:, None] & inside_c[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
            centred = tl.where(inside, pre - tl.sum(pre, axis=1)[:, None] / C, 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
            hat = centred * rstd[:, None]
            grad *= activate_slope(hat * gain[None, :] + shift[None, :], ACTIVATION)
            if parts_ptr is not None:
                dgain += tl.sum(grad * hat, axis=0)
                dshift += tl.sum(grad, axis=0)
            g = grad * gain[None, :]
            along = tl.sum(g * hat, axis=1) / C
            dpre = rstd[:, None] * (g - tl.sum(g, axis=1)[:, None] / C - hat * along[:, None])
        elif ACTIVATION == "none":
            dpre = grad
        else:
            pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dpre = grad * activate_slope(pre, ACTIVATION)
        if parts_ptr is not None:
            dbias += tl.sum(tl.where(inside, dpre, 0.0), axis=0)
        tl.store(dpre_ptr + at, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
    if parts_ptr is not None:
        part = program * C + channel
        size = tl.num_programs(0) * C
        tl.store(parts_ptr + part, dbias, mask=inside_c)
        if NORM:
            tl.store(parts_ptr + size + part, dgain, mask=inside_c)
            tl.store(parts_ptr + 2 * size + part, dshift, mask=inside_c)


@tunable
def finish_configs(C: int, norm: bool, target: str) -> tuple[Config, ...]:
    """Tiles and warps. 4096 numbers in four warps are 32 registers for each of the few tiles that live at once. A norm
    needs whole rows, and has more of them: 8 registers for each.
    """
    block = triton.next_power_of_2(C) if norm else min(triton.next_power_of_2(C), 256)
    if norm:
        default = {"BLOCK_T": max(1, 2048 // block), "BLOCK_C": block, "num_warps": 8}
        smaller = {**default, "BLOCK_T": max(1, 1024 // block), "num_warps": 4 if block <= 1024 else 8}
        return (smaller, default) if target == "hopper" else (default, smaller)  # the larger spills registers there
    default = {"BLOCK_T": max(1, 4096 // block), "BLOCK_C": block, "num_warps": 4}
    return default, {**default, "BLOCK_T": max(1, 2048 // block)}, {**default, "num_warps": 8}


def finish_backward(
    grad: torch.Tensor,
    pre: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor | None, float] | None,
    activation: str,
    summed: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of the product, `[..., C]` in the dtype of `grad`, and if `summed` its sums over rows, `[3, C]` fp32: of
    bias, gain and shift, or without a norm `[1, C]`, of bias.

    `grad` is contiguous, and so is `pre` unless there is neither a norm nor an activation: without sums either, it is
    the gradient itself that is returned.
    """
    if norm is None and activation == "none" and not summed:
        return grad, None
    C = grad.shape[-1]
    rows = grad.numel() // C
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    dpre = torch.empty_like(grad)

    def run(config: Config) -> torch.Tensor | None:
        rows_per_program = triton.cdiv(triton.cdiv(rows, PARTS), config["BLOCK_T"]) * config["BLOCK_T"]
        programs = triton.cdiv(rows, rows_per_program)
        parts = None
        if summed:
            parts = torch.empty(1 if norm is None else 3, programs, C, dtype=torch.float32, device=grad.device)
        _finish_bwd_kernel[(programs, triton.cdiv(C, config["BLOCK_C"]))](
            grad, pre, norm_weight, norm_bias, dpre, parts, rows, rows_per_program, C, eps,
            NORM=norm is not None, ACTIVATION=activation, **config,
        )  # fmt: skip
        return None if parts is None else parts.sum(1)

    also = (grad.dtype, activation, summed)
    sums = finish_configs.launch(run, grad.device, (C, norm is not None), (rows,), also)
    return dpre, sums
