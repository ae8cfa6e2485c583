"""The positional convolution: kernels/positional_conv.py."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import launch


def why_not(x: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    return launch.why_not("positional_conv", x)


def why_not_backward(grad: Tensor, x: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(x)


TABLE = {
    "positional_conv": Implementation(launch.kernel("positional_conv", "positional_conv"), why_not),
    "positional_conv_backward": Implementation(
        launch.kernel("positional_conv", "positional_conv_backward"), why_not_backward
    ),
}
