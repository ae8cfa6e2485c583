"""The positional convolution by transforms along time, and its gradient: csrc/positional_conv.cpp.

Frames are transformed in windows of twice the block length, the least power of two that is no less than the kernel, and
no window has frames of two utterances: packed frames give the very bits that each utterance gives alone. The rounding
error of a frame is relative to the loudest frames of its window. Where a window holds a NaN or an infinity, or
numbers so large that transforms leave the range, its block is summed directly, tap by tap: that takes some tens of
times as long, and spreads them over as many frames as the kernel has taps and no further.
"""

from __future__ import annotations

from torch import Tensor

from ...derived import derived
from ...ops._define import only
from .. import Implementation
from . import extension
from .norm_act import through_activation

_positional_spectra = extension.kernel("positional_spectra(Tensor weight) -> Tensor")
_forward = extension.kernel(
    "positional_conv(Tensor x, Tensor weight, Tensor? spectra, Tensor? bias, str activation, bool residual, bool save, "
    "Tensor? offsets=None) -> (Tensor, Tensor)"
)
_backward = extension.kernel(
    "positional_conv_backward(Tensor grad, Tensor? residual, Tensor x, Tensor weight, bool[] wanted, "
    "Tensor? offsets=None) -> (Tensor, Tensor)"
)
# Each thread keeps the spectra of one group while the weight learns. 256 channels a group with 128 taps come to this.
_MOST_BYTES = 2**26  # kMostBytes of csrc/positional_conv.cpp
_LEAST_CHANNELS = 16  # so many are computed at least


def positional_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    activation: str,
    residual: bool,
    save: bool,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op of that name."""
    # A weight that learns is another one at each step: its spectra are made group by group and not kept.
    spectra = derived("positional spectra", (weight,), lambda: _positional_spectra(weight), if_met_before=save)
    save = save and activation != "none"
    return _forward(x, weight, spectra, bias, activation, residual, save, offsets)


def positional_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    groups: int,
    activation: str,
    residual: bool,
    wanted: list[bool],
    offsets: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The op of that name."""
    dpre = through_activation(activation, grad, pre)
    dx, dweight = _backward(dpre, grad if residual else None, x, weight, wanted[:2], offsets)
    return only(wanted, dx, dweight, dpre.sum((0, 1)) if wanted[2] else None, like=x)


def why_not(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    """Why these cannot run; None when they can."""
    if x.dtype not in extension.DTYPES or weight.dtype != x.dtype:
        return f"the C++ positional_conv takes float32 or bfloat16, x is {x.dtype} and the weight {weight.dtype}"
    if x.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    block = max(16, 1 << (weight.shape[2] - 1).bit_length())
    size = weight.shape[1] * max(weight.shape[1], _LEAST_CHANNELS) * block * 8
    if size > _MOST_BYTES:
        return f"the C++ positional_conv would take {size >> 20} MB for the spectra of a group, more than 64 MB"
    return extension.problem()


def why_not_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(x, weight)


TABLE = {
    "positional_conv": Implementation(positional_conv, why_not),
    "positional_conv_backward": Implementation(positional_conv_backward, why_not_backward),
}
