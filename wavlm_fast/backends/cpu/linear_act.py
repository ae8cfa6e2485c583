"""Linear layer and activation, one tap of a convolution. Engines: packed_conv.py, and matmul.py for the gradient."""

from __future__ import annotations

from torch import Tensor

from ...derived import derived
from ...ops._activation import activate
from ...ops._define import only, or_empty
from .. import Implementation
from . import matmul, onednn, packed_conv
from .norm_act import through_activation


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """The op of that name."""
    rows = x.reshape(-1, x.shape[-1])
    apart = save and activation != "none"
    fused = "none" if apart else activation
    if packed_conv.in_onednn(x):
        packed = derived("onednn linear", (weight,), lambda: onednn.pack_linear(weight), replaces=True)
        out = onednn.linear(rows, packed, bias, fused)
    else:
        out = packed_conv.convolve(rows[None], weight, lambda: weight[:, None], 1, bias, 1, 1, fused, learns=save)
    out = out.view(*x.shape[:-1], weight.shape[0])
    return (activate(activation, out), out) if apart else (out, or_empty(None, x))


def linear_act_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, activation: str, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """The op of that name."""
    dpre = through_activation(activation, grad, pre).contiguous().view(-1, weight.shape[0])
    x, weight = x.contiguous(), weight.contiguous()
    dx = matmul.product(dpre, weight).view(x.shape) if wanted[0] else None
    dweight = matmul.product(dpre.t(), x.view(-1, weight.shape[1])) if wanted[1] else None
    return only(wanted, dx, dweight, dpre.sum(0) if wanted[2] else None, like=x)


TABLE = {
    "linear_act": Implementation(linear_act, packed_conv.why_not),
    "linear_act_backward": Implementation(linear_act_backward, matmul.why_not),
}
