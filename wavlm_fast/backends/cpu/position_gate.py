"""The gate of the relative position bias: csrc/position_gate.cpp."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import extension

_forward = extension.kernel_of_op("position_gate")
_backward = extension.kernel_of_op("position_gate_backward")


def why_not(x: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    if x.dtype not in extension.DTYPES:
        return f"the C++ position_gate takes float32 or bfloat16, x is {x.dtype}"
    return "there is nothing to compute" if x.numel() == 0 else extension.problem()


def why_not_backward(grad: Tensor, x: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(x)


TABLE = {
    "position_gate": Implementation(_forward, why_not),
    "position_gate_backward": Implementation(_backward, why_not_backward),
}
