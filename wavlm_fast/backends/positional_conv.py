"""The positional convolution of the cpu backend by transforms along time, and its gradient.

Frames are transformed in windows of twice the block length, the least power of two that is no less than the kernel, and
no window has frames of two utterances: packed frames give the very bits that each utterance gives alone. The rounding
error of a frame is relative to the loudest frames of its window. Where a window holds a NaN or an infinity, or
numbers so large that transforms leave the range, its block is summed directly, tap by tap: that takes some tens of
times as long, and spreads them over as many frames as the kernel has taps and no further.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..derived import derived
from ..ops._define import only

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
    native = torch.ops.wavlm_fast_cpu
    # A weight that learns is another one at each step: its spectra are made group by group and not kept.
    spectra = derived(
        "positional spectra", (weight,), lambda: native.positional_spectra(weight), if_met_before=save
    )
    save = save and activation != "none"
    return native.positional_conv(x, weight, spectra, bias, activation, residual, save, offsets)


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
    native = torch.ops.wavlm_fast_cpu
    dpre = grad if activation == "none" else native.activation_backward(grad, pre, activation)
    dx, dweight = native.positional_conv_backward(dpre, grad if residual else None, x, weight, wanted[:2], offsets)
    return only(wanted, dx, dweight, dpre.sum((0, 1)) if wanted[2] else None, like=x)


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """Why these cannot run; None when they can."""
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype:
        return f"the C++ positional_conv takes float32 or bfloat16, x is {x.dtype} and the weight {weight.dtype}"
    if x.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    block = max(16, 1 << (weight.shape[2] - 1).bit_length())
    size = weight.shape[1] * max(weight.shape[1], _LEAST_CHANNELS) * block * 8
    if size > _MOST_BYTES:
        return f"the C++ positional_conv would take {size >> 20} MB for the spectra of a group, more than 64 MB"
    return None
