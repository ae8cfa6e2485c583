"""Mean and deviation over valid frames: csrc/stats_pool.cpp."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import extension

_forward = extension.kernel_of_op("stats_pool")
_backward = extension.kernel_of_op("stats_pool_backward")


def why_not(x: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    if x.dtype not in extension.DTYPES:
        return f"the C++ stats_pool takes float32 or bfloat16, x is {x.dtype}"
    return "there is nothing to compute" if x.numel() == 0 else extension.problem()


def why_not_backward(grad: Tensor, x: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(x)


TABLE = {
    "stats_pool": Implementation(_forward, why_not),
    "stats_pool_backward": Implementation(_backward, why_not_backward),
}
