"""Convolutional positional embedding: a wide grouped convolution with bias, activation and residual in its epilogue."""

from collections.abc import Sequence

import torch

from ._finish_backward import finish_backward
from ._frames_product import frames_product, frames_product_weight_gradient
from ._packed import in_memory


def _taps(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """`[C, C / groups, K]` as `[groups, K, in, out]`, a view."""
    return weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1)


def _in_order(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as a view of `[K, C / groups, C]`, as which the module hands it on in inference."""
    return weight.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def positional_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int,
    activation: str,
    residual: bool,
    save: bool,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The op `positional_conv`: `[B, T, C]`, and the convolution before its activation when `save` asks for it."""
    x, (offsets,) = x.contiguous(), in_memory(offsets)
    out = torch.empty_like(x)
    pre = torch.empty_like(x) if save and activation != "none" else None
    if out.numel():
        frames_product(
            x, _taps(_in_order(weight), groups), out, x.shape[1], bias=bias, activation=activation, pre=pre,
            residual=x if residual else None, first=-(weight.shape[2] // 2), padded=True, offsets=offsets,
            out_offsets=offsets,
        )  # fmt: skip
    return out, pre


def positional_conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pre: torch.Tensor,
    groups: int,
    activation: str,
    residual: bool,
    wanted: Sequence[bool],
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The op `positional_conv_backward`: gradients of x, weight and bias, those wanted."""
    x, grad, (offsets,) = x.contiguous(), grad.contiguous(), in_memory(offsets)
    taps, half = weight.shape[2], weight.shape[2] // 2
    dpre, sums = finish_backward(grad, pre, None, activation, wanted[2])
    dx = dweight = None
    if wanted[0]:
        dx = torch.empty_like(x)
        transposed = _taps(weight, groups).transpose(2, 3).contiguous()
        frames_product(
            dpre, transposed, dx, x.shape[1], residual=grad if residual else None, step=-1, first=half, padded=True,
            offsets=offsets, out_offsets=offsets,
        )  # fmt: skip
    if wanted[1]:
        dweight = frames_product_weight_gradient(
            x, dpre, taps, groups, first=-half, offsets=offsets, out_offsets=offsets
        )  # [G, K, in, out]
        dweight = dweight.permute(0, 3, 2, 1).flatten(0, 1).to(weight.dtype, memory_format=torch.contiguous_format)
    return dx, dweight, sums[0].to(bias.dtype) if wanted[2] else None
