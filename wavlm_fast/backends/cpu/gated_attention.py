"""Attention: csrc/gated_attention.cpp and csrc/gated_attention_backward.cpp."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import extension, tiles

_forward = extension.kernel_of_op("gated_attention")
_backward = extension.kernel_of_op("gated_attention_backward")


def gated_attention(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """The op of that name."""
    tiles.decide_attention(q)
    return _forward(q, *rest)


def why_not(q: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take this call."""
    if q.dtype not in extension.DTYPES:
        return f"the C++ gated_attention takes float32 or bfloat16, q is {q.dtype}"
    return "there is nothing to compute" if q.numel() == 0 else extension.problem()


def why_not_backward(grad: Tensor, q: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(q)


TABLE = {
    "gated_attention": Implementation(gated_attention, why_not),
    "gated_attention_backward": Implementation(_backward, why_not_backward),
}
