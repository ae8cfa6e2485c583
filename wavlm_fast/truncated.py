"""Models cut after a layer: what lies behind it is neither kept nor computed."""

from __future__ import annotations

from torch import nn
from transformers.models.wavlm import modeling_wavlm as hf


def truncate(model: nn.Module, layers: int) -> nn.Module:
    """Cut a WavLM after some of its layers, in place.

    `hidden_states[k]` of what remains is exactly what it was, for every k up to `layers`. Where the encoder has its
    final layer norm behind the layers (`do_stable_layer_norm`, as WavLM-large), states before the last never saw it: of
    a model that loses layers it becomes an `nn.Identity`, so that `last_hidden_state` is `hidden_states[layers]`. A
    checkpoint that is saved afterwards has no such norm, and transformers would load it with a fresh one.

    Args:
        model: transformers' `WavLMModel` or ours, accelerated or not.
        layers: how many of the encoder's layers stay, 1 to all.

    Returns:
        The model. Its `config.num_hidden_layers` is `layers`.

    Raises:
        TypeError: no WavLM, or one with a head, whose output needs all layers.
        ValueError: the encoder has fewer layers, or `layers` is less than 1.
    """
    if not isinstance(model, hf.WavLMModel):
        found = f"{type(model).__module__}.{type(model).__qualname__}"
        hint = ", whose head needs all layers: truncate its .wavlm" if hasattr(model, "wavlm") else ""
        raise TypeError(f"truncate wants a WavLMModel, got a {found}{hint}")
    encoder = model.encoder
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= len(encoder.layers):
        raise ValueError(f"truncate wants 1 to {len(encoder.layers)} layers for this model, got {layers!r}")
    if layers == len(encoder.layers):
        return model
    del encoder.layers[layers:]
    without_final_norm(encoder)
    model.config.num_hidden_layers = layers
    return model


def without_final_norm(encoder: nn.Module) -> None:
    """Take an encoder's layer norm away if it stands behind the layers."""
    if isinstance(encoder, hf.WavLMEncoderStableLayerNorm):
        encoder.layer_norm = nn.Identity()
