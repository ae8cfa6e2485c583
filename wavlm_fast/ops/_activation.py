"""The activations that ops can fuse, by name, with their derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(name: str, x: Tensor) -> Tensor:
    """The activation `name` of `x`, elementwise."""
    if name == "none":
        return x
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def activate_backward(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `activate(name, x)` with respect to `x`."""
    if name == "none":
        return grad
    if name == "relu":
        return torch.where(x > 0, grad, 0)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if name == "gelu_tanh" else "none")
