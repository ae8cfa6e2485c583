"""The gate of the relative position bias: kernels/position_gate.py."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import launch


def why_not(x: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    return launch.why_not("position_gate", x)


def why_not_backward(grad: Tensor, x: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(x)


TABLE = {
    "position_gate": Implementation(launch.kernel("position_gate", "position_gate"), why_not),
    "position_gate_backward": Implementation(
        launch.kernel("position_gate", "position_gate_backward"), why_not_backward
    ),
}
