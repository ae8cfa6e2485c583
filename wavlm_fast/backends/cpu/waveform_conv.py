"""The first convolution: csrc/waveform_conv.cpp and csrc/waveform_conv_backward.cpp.

Its layer norm and the gradient of what has no group norm are those of strided_conv.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops._define import only
from .. import Implementation
from . import extension
from .norm_act import norm_act
from .packed_conv import wide_and_packed
from .strided_conv import strided_conv_backward

_forward = extension.kernel(
    "waveform_conv(Tensor waveform, Tensor weight, Tensor packed, Tensor? bias, int stride, bool group_norm, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, str activation, bool to_bf16, "
    f"{extension.RESIZED}) -> Tensor"
)
_backward = extension.kernel(
    "waveform_conv_backward(Tensor grad, Tensor waveform, Tensor weight, int stride, Tensor norm_weight, "
    f"Tensor norm_bias, float eps, str activation, bool wants_waveform, {extension.RESIZED}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)

_MOST_TAPS = 16  # of csrc/waveform_conv_backward_kernel.cpp
_MOST_NORMED_TAPS = 128  # kMostTaps of csrc/waveform_conv.cpp


def waveform_conv(
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    *packed: Tensor | int | None,
) -> Tensor:
    """The op of that name, in float32 inside; `packed` is offsets, out_offsets and out_frames."""
    fused = "none" if norm == "layer" else activation
    wide, ready = wide_and_packed(weight)
    to_bf16 = waveform.dtype == torch.bfloat16 and norm != "layer"
    norm_and_activation = (norm == "group", norm_weight, norm_bias, eps, fused)
    out = _forward(waveform.float(), wide, ready, bias, stride, *norm_and_activation, to_bf16, *packed)
    if norm == "layer":
        out = norm_act(out, norm_weight, norm_bias, eps, activation)
    return out.to(waveform.dtype)


def why_not(waveform: Tensor, weight: Tensor, bias: Tensor | None, stride: int, norm: str, *rest: object) -> str | None:
    """Why the first convolution cannot run here; None when it can."""
    if waveform.dtype not in extension.DTYPES:
        return f"the C++ waveform_conv takes float32 or bfloat16 samples, got {waveform.dtype}"
    if waveform.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    if norm == "group" and weight.shape[2] > _MOST_NORMED_TAPS:
        return f"the C++ waveform_conv takes up to {_MOST_NORMED_TAPS} taps before a group norm, got {weight.shape[2]}"
    return extension.problem()


def waveform_conv_backward(
    grad: Tensor,
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> tuple[Tensor, ...]:
    """The op of that name."""
    if norm != "group":  # a convolution like the others, of one channel; what comes before its norm is computed again
        x, affine = waveform[..., None], (norm_weight, norm_bias) if norm == "layer" else (None, None)
        pre = waveform_conv(waveform, weight, bias, stride, "none", None, None, eps, "none", *packed)
        tail = (stride, *affine, eps, activation, wanted, *packed)
        dx, *rest = strided_conv_backward(grad, x, weight, bias, pre, *tail)
        return dx.view(waveform.shape) if wanted[0] else dx, *rest
    gain = torch.ones(weight.shape[0]) if norm_weight is None else norm_weight.float()
    shift = torch.zeros(weight.shape[0]) if norm_bias is None else norm_bias.float()
    wide = weight.float()
    if bias is not None:  # the norm takes it out, unless it is not finite
        wide = wide + (bias.float() * 0)[:, None, None]
    dwaveform, dweight, dgain, dshift = _backward(
        grad.to(waveform.dtype), waveform.float(), wide, stride, gain, shift, eps, activation, wanted[0], *packed
    )
    # That of the bias is zero where anything is finite.
    dbias = (dweight * 0).sum((1, 2))
    found = (dwaveform, dweight, dbias, dgain, dshift)
    likes = (waveform, weight, bias, norm_weight, norm_bias)
    pairs = zip(found, likes, strict=True)
    return only(wanted, *(None if g is None or like is None else g.to(like.dtype) for g, like in pairs), like=waveform)


def why_not_backward(
    grad: Tensor,
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm: str,
    norm_weight: Tensor | None,
    *rest: object,
) -> str | None:
    """Why the gradient cannot be computed here; None when it can."""
    if norm == "layer" and norm_weight is None:
        return "the C++ gradient of a layer-normed waveform_conv needs the norm's weight"
    if norm == "group" and weight.shape[2] > _MOST_TAPS:
        return f"the C++ gradient of waveform_conv takes up to {_MOST_TAPS} taps, weight has {weight.shape[2]}"
    if waveform.dtype not in extension.DTYPES:
        return f"the C++ gradient of waveform_conv takes float32 or bfloat16 samples, got {waveform.dtype}"
    if grad.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    return extension.problem()


TABLE = {
    "waveform_conv": Implementation(waveform_conv, why_not),
    "waveform_conv_backward": Implementation(waveform_conv_backward, why_not_backward),
}
