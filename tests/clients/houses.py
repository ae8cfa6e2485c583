"""The same small WavLM of sensitive weights in every house: transformers', Microsoft's (s3prl's copy), torchaudio's."""

from __future__ import annotations

import re

import s3prl.upstream.wavlm.WavLM
import torch
import torchaudio
from wavlm_cases import FORMS, plain_model, small_config

LAYERS = 3
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": LAYERS}

# Names in transformers' model -> in Microsoft's.
_MICROSOFT = (
    (r"^masked_spec_embed$", "mask_emb"),
    (r"^feature_extractor\.conv_layers\.(\d+)\.conv\.", r"feature_extractor.conv_layers.\1.0."),
    (r"^feature_projection\.layer_norm\.", "layer_norm."),
    (r"^feature_projection\.projection\.", "post_extract_proj."),
    (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0$", "encoder.pos_conv.0.weight_g"),
    (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1$", "encoder.pos_conv.0.weight_v"),
    (r"^encoder\.pos_conv_embed\.conv\.bias$", "encoder.pos_conv.0.bias"),
    (r"\.attention\.(\w+)_proj\.", r".self_attn.\1_proj."),
    (r"\.attention\.gru_rel_pos_linear\.", ".self_attn.grep_linear."),
    (r"\.attention\.gru_rel_pos_const$", ".self_attn.grep_a"),
    (r"\.attention\.rel_attn_embed\.", ".self_attn.relative_attention_bias."),
    (r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"\.feed_forward\.intermediate_dense\.", ".fc1."),
    (r"\.feed_forward\.output_dense\.", ".fc2."),
)
# -> in torchaudio's, where in addition the three projections of attention are one parameter.
_TORCHAUDIO = (
    (r"^encoder\.", "encoder.transformer."),
    (r"^feature_projection\.", "encoder.feature_projection."),
    (r"\.attention\.out_proj\.", ".attention.attention.out_proj."),
)


def config(form, **changes):
    return small_config(form, **SIZES, **changes)


def _renamed(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def microsoft_name(name, form):
    norm = r".2.1." if FORMS[form]["feat_extract_norm"] == "layer" else ".2."
    name = re.sub(r"(feature_extractor\.conv_layers\.\d+)\.layer_norm\.", rf"\1{norm}", name)
    return _renamed(name, _MICROSOFT)


def microsoft_config(form, **changes):
    conf = config(form)
    shapes = list(zip(conf.conv_dim, conf.conv_kernel, conf.conv_stride))
    return {
        "extractor_mode": "layer_norm" if conf.feat_extract_norm == "layer" else "default",
        "encoder_layers": conf.num_hidden_layers,
        "encoder_embed_dim": conf.hidden_size,
        "encoder_ffn_embed_dim": conf.intermediate_size,
        "encoder_attention_heads": conf.num_attention_heads,
        "layer_norm_first": conf.do_stable_layer_norm,
        "normalize": conf.feat_extract_norm == "layer",
        "conv_feature_layers": str(shapes),
        "conv_pos": conf.num_conv_pos_embeddings,
        "conv_pos_groups": conf.num_conv_pos_embedding_groups,
        "relative_position_embedding": True,
        "num_buckets": conf.num_buckets,
        "max_distance": conf.max_bucket_distance,
        "gru_rel_pos": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "mask_length": 3,
        **changes,
    }


def microsoft_state(form, seed=0):
    # With masking there is an embedding for what is masked.
    state = plain_model("WavLMModel", config(form, mask_time_prob=0.1), seed).state_dict()
    return {microsoft_name(name, form): value for name, value in state.items()}


MICROSOFT = s3prl.upstream.wavlm.WavLM


def microsoft_model(form, house=MICROSOFT, seed=0, **changes):
    """Microsoft's class in eval mode, of `house`, a module that has it; parameters that others lack stay as drawn."""
    torch.manual_seed(seed)
    model = house.WavLM(house.WavLMConfig(microsoft_config(form, **changes)))
    own = model.state_dict()
    state = {n: v for n, v in microsoft_state(form, seed).items() if n in own and own[n].shape == v.shape}
    assert changes or state.keys() == own.keys(), state.keys() ^ own.keys()
    model.load_state_dict(state, strict=False)
    return model.eval()


def torchaudio_config(form, **changes):
    conf = config(form)
    return {
        "extractor_mode": f"{conf.feat_extract_norm}_norm",
        "extractor_conv_layer_config": list(zip(conf.conv_dim, conf.conv_kernel, conf.conv_stride)),
        "extractor_conv_bias": False,
        "encoder_embed_dim": conf.hidden_size,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": conf.num_conv_pos_embeddings,
        "encoder_pos_conv_groups": conf.num_conv_pos_embedding_groups,
        "encoder_num_layers": conf.num_hidden_layers,
        "encoder_num_heads": conf.num_attention_heads,
        "encoder_num_buckets": conf.num_buckets,
        "encoder_max_distance": conf.max_bucket_distance,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": conf.intermediate_size,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": conf.do_stable_layer_norm,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
        **changes,
    }


def torchaudio_state(state):
    """transformers' state dict by torchaudio's names."""
    found = {}
    for name, value in state.items():
        if ".attention.q_proj." in name:
            parts = [state[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            name, value = name.replace("q_proj.", "attention.in_proj_"), torch.cat(parts)
        if not re.search(r"\.[kv]_proj\.|^masked_spec_embed$", name):
            found[_renamed(name, _TORCHAUDIO)] = value
    return found


def torchaudio_model(form, aux=None, seed=0):
    """torchaudio's model in eval mode, with a linear head of `aux` outputs."""
    torch.manual_seed(seed)
    model = torchaudio.models.wavlm_model(**torchaudio_config(form, aux_num_out=aux))
    state = torchaudio_state(plain_model("WavLMModel", config(form), seed).state_dict())
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"aux.weight", "aux.bias"}
    return model.eval()
