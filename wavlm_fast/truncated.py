"""Models cut after a layer: what lies behind it is neither kept nor computed."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.wavlm import modeling_wavlm as hf

from . import families
from .swap import Module


def truncate(model: Module, layers: int) -> Module:
    """Cut a WavLM after some of its layers, in place.

    What each of the remaining layers gives, `hidden_states[k]` of transformers' for every k up to `layers`, is exactly
    what it was. Where the final layer norm stands behind the layers (as in WavLM-large), states before the last never
    saw it: of a model that loses layers it becomes an `nn.Identity`, so that the model's output is that of the last
    layer. A checkpoint that is saved afterwards has no such norm, and would be loaded with a fresh one.

    Args:
        model: `WavLMModel`, transformers' or ours, accelerated or not, or a Microsoft or torchaudio WavLM.
        layers: how many of the encoder's layers stay, 1 to all.

    Returns:
        The model. The number of layers in its configuration, if it has one, is `layers`.

    Raises:
        TypeError: no WavLM, or one with a head, whose output needs all layers.
        ValueError: the encoder has fewer layers, or `layers` is less than 1.
    """
    encoder: Any = model.encoder if isinstance(model, hf.WavLMModel) else families.transformer_of(model)
    if encoder is None:
        found = f"{type(model).__module__}.{type(model).__qualname__}"
        hint = ", whose head needs all layers: truncate its .wavlm" if hasattr(model, "wavlm") else ""
        raise TypeError(f"truncate wants a WavLMModel, got a {found}{hint}")
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= len(encoder.layers):
        raise ValueError(f"truncate wants 1 to {len(encoder.layers)} layers for this model, got {layers!r}")
    if layers == len(encoder.layers):
        return model
    del encoder.layers[layers:]
    without_final_norm(encoder)
    for config, name in (("config", "num_hidden_layers"), ("cfg", "encoder_layers")):
        if hasattr(getattr(model, config, None), name):
            setattr(getattr(model, config), name, layers)
    return model


def without_final_norm(encoder: nn.Module) -> None:
    """Take an encoder's layer norm away if it stands behind the layers."""
    if isinstance(encoder, hf.WavLMEncoderStableLayerNorm) or families.has_norm_behind(encoder):
        encoder.layer_norm = nn.Identity()
