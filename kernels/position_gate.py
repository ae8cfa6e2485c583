"""The gate on the relative position bias, forward and backward.

The sum over four commutes with the projection, so a head has two weight vectors; they are added up here, in registers.
A program takes the frames of one tile for some heads, one after the other: of long batches for all of them, of short
ones for so few that a GPU is filled.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._tuning import Config, tunable
from ._wanted import only

# Programs of the backward, each with its own part of the parameters' gradients.
PARTS = 256
# Programs of the forward where there are heads enough: several for each multiprocessor of any GPU.
PROGRAMS = 512


@triton.jit
def _folded(weight_ptr, bias_ptr, half, d, D):
    """The sum of four of the eight weight vectors, [BLOCK_D], and of their biases."""
    weight = tl.zeros(d.shape, dtype=tl.float32)
    bias = 0.0
    for row in tl.static_range(4):
        weight += tl.load(weight_ptr + (4 * half + row) * D + d, mask=d < D, other=0.0).to(tl.float32)
        bias += tl.load(bias_ptr + 4 * half + row).to(tl.float32)
    return weight, bias


@triton.jit
def _position_gate_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, const_ptr, gate_ptr, T, H, D, stride_b, stride_t, heads_per_program,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    weight_a, bias_a = _folded(weight_ptr, bias_ptr, 0, d, D)
    weight_b, bias_b = _folded(weight_ptr, bias_ptr, 1, d, D)
    rows = x_ptr + b * stride_b + frame[:, None].to(tl.int64) * stride_t + d[None, :]
    inside = (frame < T)[:, None] & (d < D)[None, :]
    first = tl.program_id(2) * heads_per_program
    for h in range(first, tl.minimum(first + heads_per_program, H)):
        x = tl.load(rows + h * D, mask=inside, other=0.0).to(tl.float32)
        a = tl.sigmoid(tl.sum(x * weight_a[None, :], axis=1) + bias_a)
        c = tl.sigmoid(tl.sum(x * weight_b[None, :], axis=1) + bias_b)
        const = tl.load(const_ptr + h).to(tl.float32)
        tl.store(gate_ptr + (b * H + h) * T + frame, a * (c * const - 1) + 2, mask=frame < T)


@triton.jit
def _position_gate_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, const_ptr, dx_ptr,
    dweight_ptr, dbias_ptr, dconst_ptr,  # [programs, 2, D], [programs, 2], [programs, H], fp32, or None
    B, T, H, D, stride_b, stride_t, heads_per_program,  # of its tiles of frames, head by head
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    head = tl.arange(0, BLOCK_H)
    weight_a, bias_a = _folded(weight_ptr, bias_ptr, 0, d, D)
    weight_b, bias_b = _folded(weight_ptr, bias_ptr, 1, d, D)
    dweight_a = tl.zeros([BLOCK_D], dtype=tl.float32)
    dweight_b = tl.zeros([BLOCK_D], dtype=tl.float32)
    dbias_a = 0.0
    dbias_b = 0.0
    dconst = tl.zeros([BLOCK_H], dtype=tl.float32)
    tiles = tl.cdiv(T, BLOCK_T)
    first = program * heads_per_program
    for index in range(first, tl.minimum(first + heads_per_program, B * tiles * H)):
        tile, h = index // H, index % H
        b = (tile // tiles).to(tl.int64)
        frame = tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (frame < T)[:, None] & (d < D)[None, :]
        x_at = x_ptr + b * stride_b + frame[:, None].to(tl.int64) * stride_t + h * D + d[None, :]
        x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + (b * H + h) * T + frame, mask=frame < T, other=0.0)
        const = tl.load(const_ptr + h).to(tl.float32)
        a = tl.sigmoid(tl.sum(x * weight_a[None, :], axis=1) + bias_a)
        c = tl.sigmoid(tl.sum(x * weight_b[None, :], axis=1) + bias_b)
        da = grad * (c * const - 1) * a * (1 - a)
        dc = grad * a * const * c * (1 - c)
        dx = da[:, None] * weight_a[None, :] + dc[:, None] * weight_b[None, :]
        dx_at = dx_ptr + (b * T + frame[:, None]) * (H * D) + h * D + d[None, :]
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dweight_ptr is not None:
            dweight_a += tl.sum(da[:, None] * x, axis=0)
            dweight_b += tl.sum(dc[:, None] * x, axis=0)
            dbias_a += tl.sum(da, axis=0)
            dbias_b += tl.sum(dc, axis=0)
            dconst += tl.where(head == h, tl.sum(grad * a * c, axis=0), 0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * 2 * D + d, dweight_a, mask=d < D)
        tl.store(dweight_ptr + (program * 2 + 1) * D + d, dweight_b, mask=d < D)
        tl.store(dbias_ptr + program * 2, dbias_a)
        tl.store(dbias_ptr + program * 2 + 1, dbias_b)
        tl.store(dconst_ptr + program * H + head, dconst, mask=head < H)


@tunable
def frame_configs(D: int, target: str) -> tuple[Config, ...]:
    """Frames and warps: 16 frames by 64 channels are 8 numbers in each thread of four warps. Short batches fill a GPU
    with smaller tiles, long ones read the parameters less often with larger ones.
    """
    default = {"BLOCK_T": 16, "BLOCK_D": triton.next_power_of_2(D), "num_warps": 4}
    return default, {**default, "BLOCK_T": 32}, {**default, "num_warps": 2}, {**default, "BLOCK_T": 8, "num_warps": 2}


def position_gate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, const: torch.Tensor) -> torch.Tensor:
    """The op `position_gate`: `[B, H, T]` fp32."""
    B, T, _ = x.shape
    H, D = const.shape[0], weight.shape[1]
    gate = torch.empty(B, H, T, dtype=torch.float32, device=x.device)
    if not gate.numel():
        return gate
    weight, bias, const = weight.contiguous(), bias.contiguous(), const.contiguous()

    def run(config: Config) -> None:
        tiles = triton.cdiv(T, config["BLOCK_T"])
        heads = triton.cdiv(H, max(1, min(H, PROGRAMS // (tiles * B))))
        _position_gate_fwd_kernel[(tiles, B, triton.cdiv(H, heads))](
            x, weight, bias, const, gate, T, H, D, x.stride(0), x.stride(1), heads, **config
        )

    frame_configs.launch(run, x.device, (D,), (T, B), ("forward", H, x.dtype))
    return gate


def position_gate_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    const: torch.Tensor,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The op `position_gate_backward`: gradients of x `[B, T, C]`, weight, bias and const, those wanted."""
    B, T, _ = x.shape
    H, D = const.shape[0], weight.shape[1]
    dx = x.new_empty(x.shape)
    summed = any(wanted[1:])
    if not x.numel():
        return only(wanted, dx, *map(torch.zeros_like, (weight, bias, const)))
    grad, weight, bias, const = (t.contiguous() for t in (grad, weight, bias, const))

    def run(config: Config) -> tuple[torch.Tensor, ...]:
        heads = B * triton.cdiv(T, config["BLOCK_T"]) * H
        per_program = triton.cdiv(heads, PARTS)
        programs = triton.cdiv(heads, per_program)
        parts = [
            torch.empty(programs, *shape, dtype=torch.float32, device=x.device) if summed else None
            for shape in ((2, D), (2,), (H,))
        ]
        _position_gate_bwd_kernel[(programs,)](
            grad, x, weight, bias, const, dx, *parts, B, T, H, D, x.stride(0), x.stride(1), per_program,
            BLOCK_H=triton.next_power_of_2(H), **config,
        )  # fmt: skip
        return tuple(part.sum(0) if w else None for part, w in zip(parts, wanted[1:], strict=True))

    dweight, dbias, dconst = frame_configs.launch(run, x.device, (D,), (T, B), ("backward", H, x.dtype, summed))
    # Each of the two sums of four gives its gradient to all four.
    dweight = dweight.repeat_interleave(4, 0).to(weight.dtype) if wanted[1] else None
    dbias = dbias.repeat_interleave(4).to(bias.dtype) if wanted[2] else None
    return only(wanted, dx, dweight, dbias, dconst.to(const.dtype) if wanted[3] else None)
