"""The front end whole, in pieces along time: csrc/feature_encoder.cpp. Its products are those of packed_conv.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.feature_encoder import per_layer
from .. import Implementation
from . import extension, packed_conv, waveform_conv

_feature_encoder = extension.kernel(
    "feature_encoder(Tensor waveform, Tensor weight, Tensor[] packed, Tensor?[] biases, Tensor?[] norm_weights, "
    "Tensor?[] norm_biases, int[] taps, int[] strides, int[] channels, bool[] filtered, str norm, float eps, "
    f"str activation, {extension.RESIZED}) -> Tensor"
)


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
    *packed: Tensor | int | None,
) -> Tensor:
    """The op of that name; `packed` is offsets, out_offsets and out_frames."""
    wide, first = packed_conv.wide_and_packed(weights[0])
    taps = [weight.shape[2] for weight in weights]
    channels = [weight.shape[0] for weight in weights]
    filtered = [False, *map(packed_conv.can_filter, taps[1:], strides[1:])]
    further = [
        packed_conv.pack(weight, lambda weight=weight: weight.transpose(1, 2), kernel, is_filtered)
        for weight, kernel, is_filtered in zip(weights[1:], taps[1:], filtered[1:], strict=True)
    ]
    vectors = (per_layer(v, len(weights)) for v in (biases, norm_weights, norm_biases))
    layers = ([first, *further], *vectors, taps, strides, channels, filtered)
    out = _feature_encoder(waveform.float(), wide, *layers, norm, eps, activation, *packed)
    return out.to(waveform.dtype)


def why_not(
    waveform: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    strides: list[int],
    norm: str,
    *rest: object,
) -> str | None:
    """Why the front end cannot run as a whole; None when it can."""
    reason = packed_conv.why_not(waveform, weights[0])
    reason = reason or waveform_conv.why_not(waveform, weights[0], None, strides[0], norm)
    if reason is not None:
        return reason
    if packed_conv.in_onednn(waveform):
        return f"bfloat16 convolutions run in oneDNN here, layer by layer: {packed_conv.why_onednn()}"
    if any(w.numel() == 0 for w in weights):
        return "there is nothing to compute"
    if len(weights) < 2 or any(w.shape[2] < stride for w, stride in zip(weights[1:], strides[1:], strict=True)):
        return "the C++ feature_encoder takes two layers or more, and no stride beyond the kernel"
    if waveform.dtype == torch.bfloat16 and any(w.shape[1] % 2 for w in weights[1:]):
        return "the C++ feature_encoder multiplies pairs of bfloat16 channels, a layer has an odd number"
    return None


TABLE = {"feature_encoder": Implementation(feature_encoder, why_not)}
