"""The configuration, and the little language in which it lists its convolutions."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

DEFAULTS: dict[str, str | int | float | bool] = {
    # The front end. Mode "default": one group norm, after the first convolution; "layer_norm": one after each.
    "extractor_mode": "default",
    "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",  # channels, kernel, stride
    "conv_bias": False,
    "feature_grad_mult": 1.0,  # gradients into the front end times this; 0: none
    "normalize": False,  # whether the model was trained on waveforms of mean 0 and variance 1
    # The transformer.
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "conv_pos": 128,  # kernel of the positional convolution
    "conv_pos_groups": 16,
    "relative_position_embedding": False,
    "num_buckets": 320,
    "max_distance": 1280,  # frames
    "gru_rel_pos": False,  # whether the relative position bias is gated
    # Probabilities of dropping.
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "dropout_input": 0.0,
    "dropout_features": 0.0,
    # Masking of frames and of channels, see `compute_mask_indices`.
    "mask_length": 10,
    "mask_prob": 0.65,
    "mask_selection": "static",
    "mask_other": 0,
    "no_mask_overlap": False,
    "mask_min_space": 1,
    "mask_channel_length": 10,
    "mask_channel_prob": 0.0,
    "mask_channel_selection": "static",
    "mask_channel_other": 0,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
}


class WavLMConfig:
    """What a WavLM is built from: the entries of a checkpoint's `cfg` as attributes, else published defaults."""

    extractor_mode: str
    conv_feature_layers: str
    conv_bias: bool
    feature_grad_mult: float
    normalize: bool
    encoder_layers: int
    encoder_embed_dim: int
    encoder_ffn_embed_dim: int
    encoder_attention_heads: int
    activation_fn: str
    layer_norm_first: bool
    conv_pos: int
    conv_pos_groups: int
    relative_position_embedding: bool
    num_buckets: int
    max_distance: int
    gru_rel_pos: bool
    dropout: float
    attention_dropout: float
    activation_dropout: float
    encoder_layerdrop: float
    dropout_input: float
    dropout_features: float
    mask_length: int
    mask_prob: float
    mask_selection: str
    mask_other: float
    no_mask_overlap: bool
    mask_min_space: int
    mask_channel_length: int
    mask_channel_prob: float
    mask_channel_selection: str
    mask_channel_other: float
    no_mask_channel_overlap: bool
    mask_channel_min_space: int

    def __init__(self, cfg: Mapping[str, Any] | None = None) -> None:
        self.update(DEFAULTS)
        if cfg is not None:
            self.update(cfg)

    def update(self, cfg: Mapping[str, Any]) -> None:
        self.__dict__.update(cfg)


def conv_layers(text: str) -> list[tuple[int, int, int]]:
    """Channels, kernel and stride of each convolution, from a Python expression of lists, tuples, integers, + and *."""
    try:
        layers = _value(ast.parse(text, mode="eval").body)
        if layers and all(len(layer) == 3 and min(layer) > 0 for layer in layers):
            return list(layers)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        pass
    wanted = f"a list of (channels, kernel, stride) such as {DEFAULTS['conv_feature_layers']!r}"
    raise ValueError(f"conv_feature_layers is {wanted}, not {text!r:.200}")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.List(elts=elements):
            return [_value(element) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_value(element) for element in elements)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            left, right = _value(left), _value(right)
            count, items = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(items, int) or count * len(items) <= 1000:  # a list so long is no model's
                return count * items
    raise ValueError(ast.dump(node))
