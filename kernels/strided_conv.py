"""Strided convolution over time-major frames, with bias, layer norm over channels and activation in its epilogue."""

from collections.abc import Sequence

import torch

from ._finish_backward import finish_backward
from ._frames_product import frames_product, frames_product_weight_gradient
from ._packed import in_memory


def strided_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    activation: str,
    save: bool,
    offsets: torch.Tensor | None = None,
    out_offsets: torch.Tensor | None = None,
    out_frames: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The op `strided_conv`: `[B, T', C']`, and the same before norm and activation when `save` asks for it."""
    x, (offsets, out_offsets) = x.contiguous(), in_memory(offsets, out_offsets)
    frames = (x.shape[1] - weight.shape[2]) // stride + 1 if out_frames is None else out_frames
    out = x.new_empty(x.shape[0], frames, weight.shape[0])
    distinct = norm_weight is not None or activation != "none"
    pre = torch.empty_like(out) if save and distinct else None
    if out.numel():
        frames_product(
            x, weight.permute(2, 1, 0).contiguous()[None], out, frames, bias=bias, activation=activation, pre=pre,
            norm=None if norm_weight is None else (norm_weight, norm_bias, eps), stride=stride,
            offsets=offsets, out_offsets=out_offsets,
        )  # fmt: skip
    return out, pre


def strided_conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pre: torch.Tensor,
    stride: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    activation: str,
    wanted: Sequence[bool],
    offsets: torch.Tensor | None = None,
    out_offsets: torch.Tensor | None = None,
    out_frames: int | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The op `strided_conv_backward`: gradients of x, weight, bias, norm_weight and norm_bias, those wanted."""
    x, grad = x.contiguous(), grad.contiguous()
    offsets, out_offsets = in_memory(offsets, out_offsets)
    norm = None if norm_weight is None else (norm_weight, norm_bias, eps)
    dpre, sums = finish_backward(grad, pre, norm, activation, any(wanted[2:]))
    dx = dweight = None
    if wanted[0]:
        dx = input_gradient(dpre, weight, x, stride, offsets, out_offsets)
    if wanted[1]:
        dweight = frames_product_weight_gradient(
            x, dpre, weight.shape[2], 1, stride=stride, offsets=offsets, out_offsets=out_offsets
        )[0]
        dweight = dweight.permute(2, 1, 0).to(weight.dtype, memory_format=torch.contiguous_format)
    vectors = zip((bias, norm_weight, norm_bias), wanted[2:], strict=True)
    return dx, dweight, *(sums[i].to(v.dtype) if wants else None for i, (v, wants) in enumerate(vectors))


def input_gradient(
    dpre: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    stride: int,
    offsets: torch.Tensor | None = None,
    out_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx `[B, T, C]`, one product per phase: frame u · stride + r was read by the taps r, r + stride, ... alone."""
    taps = weight.permute(2, 0, 1)  # [K, C', C]
    frames = x.shape[1]
    # Where frames lie between the windows, only a kernel finds those of packed frames.
    dx = torch.zeros_like(x) if offsets is not None and taps.shape[0] < stride else torch.empty_like(x)
    for phase in range(min(stride, frames)):
        units = (frames - phase - 1) // stride + 1
        if phase < taps.shape[0]:
            frames_product(
                dpre, taps[phase::stride].contiguous()[None], dx, units,
                step=-1, out_stride=stride, phase=phase, padded=True, offsets=out_offsets, out_offsets=offsets,
            )  # fmt: skip
        elif offsets is None:  # frames between the windows
            dx[:, phase::stride] = 0
    return dx
