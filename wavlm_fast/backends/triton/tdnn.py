"""Dilated convolution and activation: kernels/tdnn.py."""

from __future__ import annotations

from torch import Tensor

from ...ops._define import only
from .. import Implementation
from . import launch

_gradients = launch.kernel("tdnn", "tdnn_backward")


def why_not(x: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    return launch.why_not("tdnn", x)


def tdnn_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    kernel_size: int,
    dilation: int,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> tuple[Tensor, ...]:
    """The op of that name; all gradients are computed."""
    found = _gradients(grad, x, weight, bias, out, kernel_size, dilation, activation, *packed)
    return only(wanted, *found, like=x)


def why_not_backward(grad: Tensor, x: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(x)


TABLE = {
    "tdnn": Implementation(launch.kernel("tdnn", "tdnn"), why_not),
    "tdnn_backward": Implementation(tdnn_backward, why_not_backward),
}
