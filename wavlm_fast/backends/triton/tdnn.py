"""Dilated convolution and activation: kernels/tdnn.py."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import launch


def why_not(x: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    return launch.why_not("tdnn", x)


def why_not_backward(grad: Tensor, x: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(x)


TABLE = {
    "tdnn": Implementation(launch.kernel("tdnn", "tdnn"), why_not),
    "tdnn_backward": Implementation(launch.kernel("tdnn", "tdnn_backward"), why_not_backward),
}
