"""Residual add and layer norm: csrc/add_layer_norm.cpp."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import extension

_forward = extension.kernel_of_op("add_layer_norm")
_backward = extension.kernel_of_op("add_layer_norm_backward")


def why_not(x: Tensor, residual: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    if x.dtype not in extension.DTYPES or residual.dtype != x.dtype:
        return f"the C++ add_layer_norm takes float32 or bfloat16, x is {x.dtype} and residual {residual.dtype}"
    if x.size(-1) == 0:
        return "the C++ add_layer_norm needs at least one channel"
    return extension.problem()


def why_not_backward(grad_sum: Tensor, grad_normed: Tensor, total: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(total, grad_normed)


TABLE = {
    "add_layer_norm": Implementation(_forward, why_not),
    "add_layer_norm_backward": Implementation(_backward, why_not_backward),
}
