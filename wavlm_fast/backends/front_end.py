"""The convolutional front end of the cpu backend: the first convolution, and all of them in pieces along time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..derived import derived
from ..ops._define import only
from ..ops.feature_encoder import per_layer
from . import gradients, products

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
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> Tensor:
    """The op of that name, in float32 inside."""
    fused = "none" if norm == "layer" else activation
    native = torch.ops.wavlm_fast_cpu
    wide, packed = derived("packed waveform conv", (weight,), lambda: _wide_and_packed(weight))
    to_bf16 = waveform.dtype == torch.bfloat16 and norm != "layer"
    out = native.waveform_conv(
        waveform.float(), wide, packed, bias, stride, norm == "group", norm_weight, norm_bias, eps, fused, to_bf16,
        offsets, out_offsets, out_frames,
    )  # fmt: skip
    if norm == "layer":
        out = products.norm_act(out, norm_weight, norm_bias, eps, activation)
    return out.to(waveform.dtype)


def why_not_waveform_conv(
    extension_problem: str | None, waveform: Tensor, weight: Tensor, bias: Tensor | None, stride: int, norm: str,
    *rest: object,
) -> str | None:  # fmt: skip
    """Why the first convolution cannot run here; None when it can."""
    if waveform.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ waveform_conv takes float32 or bfloat16 samples, got {waveform.dtype}"
    if waveform.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    if norm == "group" and weight.shape[2] > _MOST_NORMED_TAPS:
        return f"the C++ waveform_conv takes up to {_MOST_NORMED_TAPS} taps before a group norm, got {weight.shape[2]}"
    return extension_problem


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
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> tuple[Tensor, ...]:
    """The op of that name."""
    packed = (offsets, out_offsets, out_frames)
    if norm != "group":  # a convolution like the others, of one channel; what comes before its norm is computed again
        x, affine = waveform[..., None], (norm_weight, norm_bias) if norm == "layer" else (None, None)
        pre = waveform_conv(waveform, weight, bias, stride, "none", None, None, eps, "none", *packed)
        gradient = gradients.strided_conv_backward
        dx, *rest = gradient(grad, x, weight, bias, pre, stride, *affine, eps, activation, wanted, *packed)
        return dx.view(waveform.shape) if wanted[0] else dx, *rest
    gain = torch.ones(weight.shape[0]) if norm_weight is None else norm_weight.float()
    shift = torch.zeros(weight.shape[0]) if norm_bias is None else norm_bias.float()
    wide = weight.float()
    if bias is not None:  # the norm takes it out, unless it is not finite
        wide = wide + (bias.float() * 0)[:, None, None]
    dwaveform, dweight, dgain, dshift = torch.ops.wavlm_fast_cpu.waveform_conv_backward(
        grad.to(waveform.dtype), waveform.float(), wide, stride, gain, shift, eps, activation, wanted[0], *packed
    )
    # That of the bias is zero where anything is finite.
    dbias = (dweight * 0).sum((1, 2))
    found = (dwaveform, dweight, dbias, dgain, dshift)
    likes = (waveform, weight, bias, norm_weight, norm_bias)
    pairs = zip(found, likes, strict=True)
    return only(wanted, *(None if g is None or like is None else g.to(like.dtype) for g, like in pairs), like=waveform)


def why_not_waveform_conv_backward(
    extension_problem: str | None,
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
    if waveform.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ gradient of waveform_conv takes float32 or bfloat16 samples, got {waveform.dtype}"
    if grad.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    return extension_problem


def feature_encoder(
    waveform: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    strides: list[int],
    norm: str,
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    eps: float,
    activation: str,
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> Tensor:
    """The op of that name."""
    wide, first = derived("packed waveform conv", (weights[0],), lambda: _wide_and_packed(weights[0]))
    taps = [weight.shape[2] for weight in weights]
    channels = [weight.shape[0] for weight in weights]
    filtered = [False, *map(products.can_filter, taps[1:], strides[1:])]
    further = [
        products.pack(weight, lambda weight=weight: weight.transpose(1, 2), kernel, is_filtered)
        for weight, kernel, is_filtered in zip(weights[1:], taps[1:], filtered[1:], strict=True)
    ]
    vectors = (per_layer(v, len(weights)) for v in (biases, norm_weights, norm_biases))
    out = torch.ops.wavlm_fast_cpu.feature_encoder(
        waveform.float(), wide, [first, *further], *vectors, taps, strides, channels, filtered, norm, eps, activation,
        offsets, out_offsets, out_frames,
    )  # fmt: skip
    return out.to(waveform.dtype)


def why_not_feature_encoder(
    extension_problem: str | None,
    waveform: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    strides: list[int],
    norm: str,
    *rest: object,
) -> str | None:
    """Why the front end cannot run as a whole; None when it can."""
    reason = products.why_not(extension_problem, waveform, weights[0])
    reason = reason or why_not_waveform_conv(None, waveform, weights[0], None, strides[0], norm)
    if reason is not None:
        return reason
    if products.in_onednn(waveform):
        return "bfloat16 convolutions run in oneDNN here, layer by layer"
    if any(w.numel() == 0 for w in weights):
        return "there is nothing to compute"
    if len(weights) < 2 or any(w.shape[2] < stride for w, stride in zip(weights[1:], strides[1:], strict=True)):
        return "the C++ feature_encoder takes two layers or more, and no stride beyond the kernel"
    if waveform.dtype == torch.bfloat16 and any(w.shape[1] % 2 for w in weights[1:]):
        return "the C++ feature_encoder multiplies pairs of bfloat16 channels, a layer has an odd number"
    return None


def _wide_and_packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = weight.detach().float()  # never the weight itself: what is derived of one must not keep it
    return wide, torch.ops.wavlm_fast_cpu.pack_conv([wide], False)
