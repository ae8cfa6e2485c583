"""A transformer layer whole: csrc/encoder_layer.cpp. Its products are those of the engine packed_conv.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...derived import concatenated
from ...ops.encoder_layer import MERGED
from .. import Implementation
from . import extension, packed_conv, tiles

_encoder_layer = extension.kernel(
    "encoder_layer(Tensor x, Tensor rel_bias, Tensor? key_lengths, Tensor[] packed, Tensor[] biases, Tensor[] gate, "
    "Tensor[] norms, float[] eps, float scale, str activation, bool norm_first, Tensor? offsets=None) -> Tensor"
)


# Frames of an utterance from which on packing takes less than a hundredth of what the layer takes: all layers' packed
# weights, a second copy of the model, are then not kept for it. What shorter ones have packed is used.
_LONG = 4096


def encoder_layer(
    x: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    *rest: object,
) -> Tensor:
    """The op of that name."""
    keep = rel_bias.shape[1] < 2 * _LONG - 1
    if len(weights) == MERGED:
        qkv, qkv_bias = _pack(weights[0], keep), biases[0]
    else:
        qkv = packed_conv.pack_together("packed qkv", weights[:3], keep)
        qkv_bias = concatenated("qkv bias", biases[:3])
    tiles.decide_attention(x)
    packed = [qkv, *(_pack(weight, keep) for weight in weights[-3:])]
    return _encoder_layer(x, rel_bias, key_lengths, packed, [qkv_bias, *biases[-3:]], *rest)


def _pack(weight: Tensor, keep: bool) -> Tensor:
    return packed_conv.pack(weight, lambda: weight[:, None], 1, keep=keep)


def why_not(
    x: Tensor, rel_bias: Tensor, key_lengths: Tensor | None, weights: list[Tensor], *rest: object
) -> str | None:
    """Why a layer cannot run as a whole; None when it can."""
    reason = packed_conv.why_not(x, weights[0])
    if any(weight.numel() == 0 for weight in weights):
        return "there is nothing to compute"
    if reason is not None or x.dtype == torch.float32:
        return reason
    if packed_conv.in_onednn(x):
        return f"bfloat16 products run in oneDNN here, one by one: {packed_conv.why_onednn()}"
    if packed_conv.multiplies_pairs() and not all(map(packed_conv.multiplies, weights)):
        return "the C++ encoder_layer multiplies pairs of bfloat16 channels, a layer has an odd number"
    return None


TABLE = {"encoder_layer": Implementation(encoder_layer, why_not)}
