"""Strided convolution, norm and activation. Engines: packed_conv.py and norm_act.py, matmul.py for the gradient."""

from __future__ import annotations

from torch import Tensor

from ...ops._activation import activate
from ...ops._define import only, or_empty
from ...ops._packed import Resized
from ...ops.strided_conv import finish_backward
from .. import Implementation
from . import extension, matmul, packed_conv
from .grid import resized_bounds
from .norm_act import norm_act, through_activation


def strided_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    save: bool,
    *packed: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    """The op of that name; `packed` is offsets, out_offsets and out_frames."""
    apart = save or norm_weight is not None
    fused = "none" if apart else activation
    taps = weight.shape[2]
    filtered = packed_conv.can_filter(taps, stride) and not save
    filters = lambda: weight.transpose(1, 2)  # noqa: E731
    out = pre = packed_conv.convolve(
        x, weight, filters, taps, bias, stride, 1, fused, filtered, Resized(*packed), learns=save
    )
    if norm_weight is not None:
        out = norm_act(pre, norm_weight, norm_bias, eps, activation)
    elif apart:
        out = activate(activation, out)
    return out, or_empty(pre if save and out is not pre else None, x)


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, norm_weight: Tensor | None, *rest: object
) -> str | None:
    """Why this op cannot run here."""
    # The norm is the extension's in both dtypes.
    return packed_conv.why_not(x, weight) or (None if norm_weight is None else extension.problem())


def strided_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> tuple[Tensor, ...]:
    """The op of that name."""
    x, stride = x.contiguous(), min(stride, x.shape[1])  # beyond the frames a stride leaves one, whatever it is
    if norm_weight is None:
        dpre, dnorm_weight, dnorm_bias = through_activation(activation, grad, pre), None, None
    else:
        dpre, dnorm_weight, dnorm_bias = finish_backward(grad, pre, norm_weight, norm_bias, eps, activation)
    dpre, taps = dpre.to(x.dtype).contiguous(), weight.permute(2, 0, 1)  # [K, C', C]
    places = out_places = None
    packed = Resized(*packed)
    if packed.offsets is not None:
        places, out_places = resized_bounds("strided_conv_backward", packed, x.shape[1], len(taps), stride)
    runs = matmul.runs(dpre, out_places)
    dx = matmul.of_input(runs, taps, x, places, stride, 1) if wanted[0] else None
    dweight = None
    if wanted[1]:
        filters = matmul.of_filters(runs, matmul.runs(x, places), len(taps), stride, 1)
        dweight = filters.transpose(1, 2).contiguous()
    dbias = dpre.sum((0, 1)) if wanted[2] else None
    return only(wanted, dx, dweight, dbias, dnorm_weight, dnorm_bias, like=x)


TABLE = {
    "strided_conv": Implementation(strided_conv, why_not),
    "strided_conv_backward": Implementation(strided_conv_backward, matmul.why_not),
}
