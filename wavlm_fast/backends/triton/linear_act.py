"""Linear layer and activation: kernels/linear_act.py."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import launch


def why_not(x: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    return launch.why_not("linear_act", x)


def why_not_backward(grad: Tensor, x: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(x)


TABLE = {
    "linear_act": Implementation(launch.kernel("linear_act", "linear_act"), why_not),
    "linear_act_backward": Implementation(launch.kernel("linear_act", "linear_act_backward"), why_not_backward),
}
