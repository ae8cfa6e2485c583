"""Attention: kernels/gated_attention.py and kernels/gated_attention_backward.py."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import launch

_MOST_HEAD_DIM = 128


def _why_not(q: Tensor, scale: float) -> str | None:
    head_dim = q.shape[-1]
    if head_dim % 16 or not 0 < head_dim <= _MOST_HEAD_DIM:
        wanted = f"a head_dim that is a multiple of 16 up to {_MOST_HEAD_DIM}"
        return f"the Triton gated_attention takes {wanted}, q has {head_dim}"
    if not scale > 0:
        return f"the Triton gated_attention takes a positive scale, got {scale}"
    return launch.why_not("gated_attention", q, name="q")


def why_not(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rel_bias: Tensor, key_lengths: Tensor | None, dropout_p: float,
    seed: Tensor | None, scale: float, *packed: Tensor | None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take this call."""
    return _why_not(q, scale)


def why_not_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rel_bias: Tensor, key_lengths: Tensor | None,
    out: Tensor, lse: Tensor, dropout_p: float, seed: Tensor | None, scale: float, *packed: Tensor | None,
) -> str | None:  # fmt: skip
    """The same of the gradient."""
    return _why_not(q, scale)


TABLE = {
    "gated_attention": Implementation(launch.kernel("gated_attention", "gated_attention"), why_not),
    "gated_attention_backward": Implementation(
        launch.kernel("gated_attention_backward", "gated_attention_backward"), why_not_backward
    ),
}
