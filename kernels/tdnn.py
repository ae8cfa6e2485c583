"""Dilated convolution of the x-vector head, with bias and activation in its epilogue."""

from collections.abc import Sequence

import torch

from ._finish_backward import finish_backward
from ._frames_product import frames_product, frames_product_weight_gradient
from ._packed import in_memory


def tdnn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: int,
    dilation: int,
    activation: str,
    offsets: torch.Tensor | None = None,
    out_offsets: torch.Tensor | None = None,
    out_frames: int | None = None,
) -> torch.Tensor:
    """The op `tdnn`: `[B, T', C']`."""
    x, (offsets, out_offsets) = x.contiguous(), in_memory(offsets, out_offsets)
    frames = x.shape[1] - (kernel_size - 1) * dilation if out_frames is None else out_frames
    out = x.new_empty(x.shape[0], frames, weight.shape[0])
    if out.numel():
        taps = weight.contiguous().unflatten(1, (kernel_size, -1)).permute(1, 2, 0)  # [K, C, C'], a view
        frames_product(
            x, taps[None], out, frames, bias=bias, activation=activation, step=dilation, offsets=offsets,
            out_offsets=out_offsets,
        )  # fmt: skip
    return out


def tdnn_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    kernel_size: int,
    dilation: int,
    activation: str,
    wanted: Sequence[bool],
    offsets: torch.Tensor | None = None,
    out_offsets: torch.Tensor | None = None,
    out_frames: int | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The op `tdnn_backward`: gradients of x, weight and bias, those wanted. Where relu let a value through, `out` is
    it.
    """
    x, grad, out = x.contiguous(), grad.contiguous(), out.contiguous()
    offsets, out_offsets = in_memory(offsets, out_offsets)
    dpre, sums = finish_backward(grad, out, None, activation, wanted[2])
    dx = dweight = None
    if wanted[0]:
        dx = torch.empty_like(x)
        taps = weight.unflatten(1, (kernel_size, -1)).transpose(0, 1).contiguous()  # [K, C', C]
        frames_product(
            dpre, taps[None], dx, x.shape[1], step=-dilation, padded=True, offsets=out_offsets, out_offsets=offsets
        )
    if wanted[1]:
        dweight = frames_product_weight_gradient(
            x, dpre, kernel_size, 1, step=dilation, offsets=offsets, out_offsets=out_offsets
        )[0]  # [K, C, C']
        dweight = dweight.flatten(0, 1).t().to(weight.dtype, memory_format=torch.contiguous_format)
    return dx, dweight, sums[0].to(bias.dtype) if wanted[2] else None
