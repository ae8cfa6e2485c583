"""What the tests of `wavlm_fast.original` share: its WavLM from transformers' models, the weights under its names."""

from __future__ import annotations

import re

import pytest
import torch
from wavlm_cases import FORMS, SAMPLES, plain_model, ragged_mask, small_config, waveforms

from wavlm_fast import restore
from wavlm_fast.original import WavLM, WavLMConfig

every_form = pytest.mark.parametrize("form", FORMS)
both_forms = pytest.mark.parametrize("form", ["base", "large"])

VALID = 15  # frames of the padded utterance: with a sample in the 15th 20; transformers counts whole receptive fields
PADDED = torch.arange(SAMPLES) >= torch.tensor([[SAMPLES], [20 * VALID - 5]])  # [B, S]
SAME_FRAMES = ragged_mask(SAMPLES, 20 * VALID + 10)

_NAMES = (
    (r"^masked_spec_embed$", "mask_emb"),
    (r"^feature_projection\.layer_norm\.", "layer_norm."),
    (r"^feature_projection\.projection\.", "post_extract_proj."),
    (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0$", "encoder.pos_conv.0.weight_g"),
    (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1$", "encoder.pos_conv.0.weight_v"),
    (r"^encoder\.pos_conv_embed\.conv\.", "encoder.pos_conv.0."),
    (r"\.attention\.rel_attn_embed\.", ".self_attn.relative_attention_bias."),
    (r"\.attention\.gru_rel_pos_linear\.", ".self_attn.grep_linear."),
    (r"\.attention\.gru_rel_pos_const$", ".self_attn.grep_a"),
    (r"\.attention\.", ".self_attn."),
    (r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"\.feed_forward\.intermediate_dense\.", ".fc1."),
    (r"\.feed_forward\.output_dense\.", ".fc2."),
    (r"(conv_layers\.\d+)\.conv\.", r"\1.0."),
)
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_accurate"}


def original_name(name: str, layer_norms: bool) -> str:
    """The original's name of a parameter. layer_norms: whether the front end has those, or a group norm."""
    name = re.sub(
        r"^(feature_extractor\.conv_layers\.\d+)\.layer_norm\.", r"\1.2.1." if layer_norms else r"\1.2.", name
    )
    for pattern, replacement in _NAMES:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


def original_config(config, **changes) -> WavLMConfig:
    """The original's configuration of a transformers one."""
    convolutions = zip(config.conv_dim, config.conv_kernel, config.conv_stride)
    values = {
        "extractor_mode": {"group": "default", "layer": "layer_norm"}[config.feat_extract_norm],
        "conv_feature_layers": " + ".join(f"[{layer}]" for layer in convolutions),
        "conv_bias": config.conv_bias,
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": _ACTIVATIONS.get(config.hidden_act, config.hidden_act),
        "layer_norm_first": config.do_stable_layer_norm,
        "conv_pos": config.num_conv_pos_embeddings,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
        "relative_position_embedding": True,
        "gru_rel_pos": True,
        "num_buckets": config.num_buckets,
        "max_distance": config.max_bucket_distance,
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "dropout_input": config.feat_proj_dropout,
        "encoder_layerdrop": config.layerdrop,
        "mask_prob": config.mask_time_prob,
    }
    return WavLMConfig({**values, **changes})


def original_like(plain: torch.nn.Module, **changes) -> WavLM:
    """The original's class with a transformers model's weights, dtype and mode; changes are to its configuration."""
    model = restore(WavLM(original_config(plain.config, **changes)))
    layer_norms = plain.config.feat_extract_norm == "layer"
    state = {original_name(name, layer_norms): value for name, value in plain.state_dict().items()}
    model.load_state_dict({"mask_emb": model.mask_emb, **state})  # transformers has none where nothing is masked
    return model.to(plain.dtype).train(plain.training)


def pair(form: str = "base", dtype: torch.dtype = torch.float64, **changes) -> tuple[torch.nn.Module, WavLM]:
    """transformers' model with sensitive weights, and the same as the original's class."""
    plain = plain_model("WavLMModel", small_config(form)).to(dtype)
    return plain, original_like(plain, **changes)


def double(seed=0):
    return waveforms(seed=seed, dtype=torch.float64)


def assert_equal_but_rounding(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype == torch.float64
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


def gradients(model, source, **kwargs):
    model.zero_grad()
    model.extract_features(source, **kwargs)[0].square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
