"""Mean and deviation over valid frames: kernels/stats_pool.py."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import launch


def why_not(x: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    return launch.why_not("stats_pool", x)


def why_not_backward(grad: Tensor, x: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(x)


TABLE = {
    "stats_pool": Implementation(launch.kernel("stats_pool", "stats_pool"), why_not),
    "stats_pool_backward": Implementation(launch.kernel("stats_pool", "stats_pool_backward"), why_not_backward),
}
