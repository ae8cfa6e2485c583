"""Residual add and layer norm: kernels/add_layer_norm.py."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import launch

_MOST_CHANNELS = 16384  # MAX_CHANNELS of kernels/add_layer_norm.py, known without importing it


def why_not(x: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    if not 0 < x.shape[-1] <= _MOST_CHANNELS:
        return f"the Triton add_layer_norm takes 1 to {_MOST_CHANNELS} channels, x has {x.shape[-1]}"
    return launch.why_not("add_layer_norm", x)


def why_not_backward(grad_sum: Tensor, grad_normed: Tensor, total: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(total)


TABLE = {
    "add_layer_norm": Implementation(launch.kernel("add_layer_norm", "add_layer_norm"), why_not),
    "add_layer_norm_backward": Implementation(
        launch.kernel("add_layer_norm", "add_layer_norm_backward"), why_not_backward
    ),
}
