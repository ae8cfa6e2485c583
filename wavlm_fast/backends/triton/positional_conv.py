"""The positional convolution: kernels/positional_conv.py."""

from __future__ import annotations

from torch import Tensor

from ...ops._define import only
from .. import Implementation
from . import launch

_gradients = launch.kernel("positional_conv", "positional_conv_backward")


def why_not(x: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    return launch.why_not("positional_conv", x)


def positional_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    groups: int,
    activation: str,
    residual: bool,
    wanted: list[bool],
    *packed: Tensor | None,
) -> tuple[Tensor, ...]:
    """The op of that name; all gradients are computed."""
    found = _gradients(grad, x, weight, bias, pre, groups, activation, residual, *packed)
    return only(wanted, *found, like=x)


def why_not_backward(grad: Tensor, x: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(x)


TABLE = {
    "positional_conv": Implementation(launch.kernel("positional_conv", "positional_conv"), why_not),
    "positional_conv_backward": Implementation(positional_conv_backward, why_not_backward),
}
