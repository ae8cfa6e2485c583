"""Strided convolution, norm and activation: kernels/strided_conv.py."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import launch


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, norm_weight: Tensor | None, *rest: object
) -> str | None:
    """Why the kernel cannot take this call."""
    if norm_weight is not None and weight.shape[0] > launch.MOST_NORMED_CHANNELS:
        most = launch.MOST_NORMED_CHANNELS
        return f"the Triton strided_conv norms up to {most} channels, weight has {weight.shape[0]}"
    return launch.why_not("strided_conv", x, norm_weight)


def why_not_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, *rest: object
) -> str | None:
    """The same of the gradient."""
    return why_not(x, weight, bias, *rest)


TABLE = {
    "strided_conv": Implementation(launch.kernel("strided_conv", "strided_conv"), why_not),
    "strided_conv_backward": Implementation(launch.kernel("strided_conv", "strided_conv_backward"), why_not_backward),
}
