"""Weights and configurations between the three houses of WavLM: transformers', Microsoft's and torchaudio's.

The models are the same to the last parameter; names, spelling and what a configuration says differ. transformers' is
the one in the middle: from Microsoft's to torchaudio's one passes through it. The functions load and save nothing, and
share tensors where they can. Each weight is accounted for: one that is missing, too much or of another shape is refused
by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import WavLMConfig

from .errors import UserError, first_line
from .original.config import DEFAULTS, conv_layers
from .weight_names import NORMS, PROJECTION, Name, State, check, names, spelt


class Converted(NamedTuple):
    """A model of another house."""

    config: Any  # transformers' WavLMConfig, Microsoft's cfg or the arguments of torchaudio.models.wavlm_model
    state: dict[str, Tensor]
    said: list[str]  # what has no counterpart and stays behind, or was assumed


# transformers', Microsoft's, torchaudio's; of masking torchaudio knows nothing.
_FIELDS = (
    ("num_hidden_layers", "encoder_layers", "encoder_num_layers"),
    ("hidden_size", "encoder_embed_dim", "encoder_embed_dim"),
    ("intermediate_size", "encoder_ffn_embed_dim", "encoder_ff_interm_features"),
    ("num_attention_heads", "encoder_attention_heads", "encoder_num_heads"),
    ("do_stable_layer_norm", "layer_norm_first", "encoder_layer_norm_first"),
    ("conv_bias", "conv_bias", "extractor_conv_bias"),
    ("num_conv_pos_embeddings", "conv_pos", "encoder_pos_conv_kernel"),
    ("num_conv_pos_embedding_groups", "conv_pos_groups", "encoder_pos_conv_groups"),
    ("num_buckets", "num_buckets", "encoder_num_buckets"),
    ("max_bucket_distance", "max_distance", "encoder_max_distance"),
    ("feat_proj_dropout", "dropout_input", "encoder_projection_dropout"),
    ("hidden_dropout", "dropout", "encoder_dropout"),
    ("attention_dropout", "attention_dropout", "encoder_attention_dropout"),
    ("activation_dropout", "activation_dropout", "encoder_ff_interm_dropout"),
    ("layerdrop", "encoder_layerdrop", "encoder_layer_drop"),
    ("mask_time_prob", "mask_prob", None),
    ("mask_time_length", "mask_length", None),
    ("mask_feature_prob", "mask_channel_prob", None),
    ("mask_feature_length", "mask_channel_length", None),
)
_STACK = tuple(zip((512,) * 7, (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True))  # of every published WavLM
# Of the feed-forward layer, by Microsoft's name; transformers has several names for a function.
_ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_accurate": ("gelu_accurate", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    "relu": ("relu",),
    "tanh": ("tanh",),
    "linear": ("linear",),
}
_EPS = 1e-5  # of every layer norm of Microsoft's and torchaudio's
_EXTRACTOR_MODES = {"group": ("default", "group_norm"), "layer": ("layer_norm", "layer_norm")}
_OTHERWISE = ("extractor_mode", "activation_fn", "conv_feature_layers", "normalize")
_SWITCHES = ("relative_position_embedding", "gru_rel_pos")
# These touch training only: gradients that reach the convolutions, and how masks are drawn where a call asks for them.
_MICROSOFT_ALONE = [k for k in DEFAULTS if k not in (*_OTHERWISE, *_SWITCHES, *(theirs for _, theirs, _ in _FIELDS))]
# These change outputs, and the weights of torchaudio's model do not say them.
_UNSAID = ("extractor_conv_layer_config", "encoder_max_distance", "encoder_layer_norm_first")


def to_microsoft(config: WavLMConfig, state: State, normalise: bool) -> Converted:
    """transformers' WavLMModel to Microsoft's cfg and weights.

    Args:
        config, state: the model and its `state_dict()`.
        normalise: whether utterances are to be normalised first, which transformers' configuration does not say.

    Raises:
        UserError: the model has something that changes its outputs and that Microsoft's class lacks, or the weights are
            not those of the configuration.
    """
    _refuse_what_others_lack(config, "Microsoft's class")
    activation = next((name for name, same in _ACTIVATIONS.items() if config.hidden_act in same), None)
    if activation is None:
        raise UserError(f"Microsoft's class has the activations {', '.join(_ACTIVATIONS)}, got {config.hidden_act!r}")
    cfg = {theirs: getattr(config, ours) for ours, theirs, _ in _FIELDS}
    cfg |= {
        "extractor_mode": _EXTRACTOR_MODES[config.feat_extract_norm][0],
        "activation_fn": activation,
        "conv_feature_layers": str(list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))),
        "normalize": normalise,
        **dict.fromkeys(_SWITCHES, True),
    }
    state, said = _of_transformers(config, state), []
    found = {name.microsoft: state[name.transformers] for name in names(config)}
    if config.conv_dim[-1] == config.hidden_size:  # Microsoft's class projects only where the widths differ
        _refuse_a_projection(found.pop("post_extract_proj.weight"), found.pop("post_extract_proj.bias"))
    if "masked_spec_embed" not in state:
        said.append("mask_emb is zeros: the source does not mask, and has no embedding of what is masked")
    found["mask_emb"] = state.get("masked_spec_embed", torch.zeros_like(found["encoder.layer_norm.bias"]))
    if config.apply_spec_augment and _masks(config):
        said.append("apply_spec_augment stays behind: Microsoft's class masks in extract_features(mask=True)")
    return Converted(DEFAULTS | cfg, found, said)


def from_microsoft(cfg: Mapping[str, Any], state: State) -> Converted:
    """Microsoft's cfg and weights to transformers' WavLMModel. `cfg["normalize"]` is for the feature extractor.

    Raises:
        UserError: cfg is none of a WavLM, has something that transformers lacks, or the weights are not those of it.
    """
    cfg = _whole(cfg)
    for switch in _SWITCHES:
        if not cfg[switch]:
            raise UserError(f"a cfg of a WavLM has {switch} true, got {cfg[switch]}: it is of another model")
    if cfg["encoder_layers"] > len(state):
        raise UserError(
            f"weights of {cfg['encoder_layers']} layers are wanted, as cfg says, but there are {len(state)} weights"
        )
    if cfg["activation_fn"] == "gelu_fast":  # as Microsoft's class has it
        cfg["activation_fn"] = "gelu_accurate"
    if cfg["activation_fn"] not in _ACTIVATIONS:
        raise UserError(f"transformers has no feed-forward layer with the activation_fn {cfg['activation_fn']!r}")
    try:
        dims, kernels, strides = zip(*conv_layers(cfg["conv_feature_layers"]), strict=True)
    except ValueError as error:
        raise UserError(str(error)) from error
    config = _config(
        feat_extract_norm=_extractor(cfg["extractor_mode"], 0),
        hidden_act=cfg["activation_fn"],
        conv_dim=dims,
        conv_kernel=kernels,
        conv_stride=strides,
        apply_spec_augment=False,
        **{ours: cfg[theirs] for ours, theirs, _ in _FIELDS},
    )
    said = ["apply_spec_augment is false: Microsoft's class masks only where a call says so"]
    alone = [key for key in _MICROSOFT_ALONE if cfg[key] != DEFAULTS[key]]
    said += [f"{key}={cfg[key]!r} stays behind: it is of training, and transformers lacks it" for key in alone]
    said += [f"{key} of the cfg stays behind: Microsoft's class does not read it" for key in cfg if key not in DEFAULTS]
    projects = dims[-1] != config.hidden_size
    wanted = [n for n in names(config) if projects or not n.transformers.startswith(PROJECTION)]
    wanted.append(Name("masked_spec_embed", "mask_emb", "", (config.hidden_size,)))
    state = spelt(state, new=False)
    check(state, ((name.microsoft, name.shape) for name in wanted))
    found = {name.transformers: state[name.microsoft] for name in wanted}
    if not projects:  # what is not projected is projected by the identity in transformers
        like = found["encoder.layer_norm.bias"]
        found[f"{PROJECTION}weight"] = torch.eye(config.hidden_size, dtype=like.dtype)
        found[f"{PROJECTION}bias"] = torch.zeros_like(like)
    if not _masks(config):
        said.append("mask_emb stays behind: with mask_prob 0 transformers has no place for it")
        del found["masked_spec_embed"]
    return Converted(config, found, said)


def to_torchaudio(config: WavLMConfig, state: State) -> Converted:
    """transformers' WavLMModel to the arguments of `torchaudio.models.wavlm_model` and its weights.

    Raises:
        UserError: the model has something that changes its outputs and that torchaudio's lacks, or the weights are not
            those of the configuration.
    """
    _refuse_what_others_lack(config, "torchaudio's class")
    if config.hidden_act not in _ACTIVATIONS["gelu"]:
        raise UserError(f"torchaudio's feed-forward layers have gelu only, but this model has {config.hidden_act!r}")
    state = _of_transformers(config, state)
    arguments = {theirs: getattr(config, ours) for ours, _, theirs in _FIELDS if theirs is not None}
    arguments |= {
        "extractor_mode": _EXTRACTOR_MODES[config.feat_extract_norm][1],
        "extractor_conv_layer_config": list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)),
        "aux_num_out": None,
    }
    found: dict[str, Any] = {}
    for name in names(config):
        if name.third is None:
            found[name.torchaudio] = state[name.transformers]
        else:
            found.setdefault(name.torchaudio, []).append(state[name.transformers])
    found = {key: torch.cat(value) if isinstance(value, list) else value for key, value in found.items()}
    said = ["masked_spec_embed stays behind: torchaudio's class does not mask"] if "masked_spec_embed" in state else []
    assumed, _ = torchaudio_arguments(found)
    if unsaid := [f"{key}={arguments[key]}" for key in _UNSAID if arguments[key] != assumed[key]]:
        said.append(
            f"the weights do not say {', '.join(unsaid)}: whoever builds the model has to, it is as in none published"
        )
    return Converted(arguments, found, said)


def from_torchaudio(arguments: Mapping[str, Any], state: State) -> Converted:
    """The arguments of `torchaudio.models.wavlm_model` and its weights to transformers' WavLMModel.

    Raises:
        UserError: the weights are not those of the arguments.
    """
    dims, kernels, strides = zip(*(arguments["extractor_conv_layer_config"] or _STACK), strict=True)
    config = _config(
        feat_extract_norm=_extractor(arguments["extractor_mode"], 1),
        conv_dim=dims,
        conv_kernel=kernels,
        conv_stride=strides,
        apply_spec_augment=False,
        mask_time_prob=0.0,  # without masks there is no embedding of them, which torchaudio lacks
        mask_feature_prob=0.0,
        **{ours: arguments[theirs] for ours, _, theirs in _FIELDS if theirs is not None},
    )
    said = ["nothing is masked in training (mask_time_prob 0): torchaudio's class does not mask"]
    state = spelt(state, new=True)
    if aux := [key for key in state if key.startswith("aux.")]:
        said.append(f"the linear layer on top (aux, {len(state[aux[0]])} outputs) stays behind")
        state = {key: value for key, value in state.items() if key not in aux}
    check(state, ((n.torchaudio, _times(n.shape, 1 if n.third is None else 3)) for n in names(config)))
    found = {}
    for name in names(config):
        value = state[name.torchaudio]
        found[name.transformers] = value if name.third is None else value.chunk(3)[name.third].clone()
    return Converted(config, found, said)


def torchaudio_arguments(state: State) -> tuple[dict[str, Any], list[str]]:
    """What the weights alone say of the arguments of `torchaudio.models.wavlm_model`, and what was assumed.

    Raises:
        UserError: there is too little to go by.
    """
    state = spelt(state, new=True)
    front, transformer = "feature_extractor.conv_layers", "encoder.transformer"
    count = next(i for i in range(len(state) + 1) if f"{front}.{i}.conv.weight" not in state)
    sizes = [_sizes(state, f"{front}.{i}.conv.weight", 3) for i in range(max(1, count))]
    dims, _, kernels = zip(*sizes, strict=True)
    published = kernels == tuple(kernel for _, kernel, _ in _STACK)
    strides = [stride for _, _, stride in _STACK] if published else [5] + [2] * (len(kernels) - 1)
    large = f"{front}.{len(kernels) - 1}.layer_norm.weight" in state and len(kernels) > 1
    channels, grouped, kernel = _sizes(state, f"{transformer}.pos_conv_embed.conv.{NORMS[1][0]}", 3)
    buckets, heads = _sizes(state, f"{transformer}.layers.0.attention.rel_attn_embed.weight", 2)
    arguments = {
        "extractor_mode": "layer_norm" if large else "group_norm",
        "extractor_conv_layer_config": list(zip(dims, kernels, strides, strict=True)),
        "extractor_conv_bias": f"{front}.0.conv.bias" in state,
        "encoder_embed_dim": channels,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": kernel,
        "encoder_pos_conv_groups": channels // max(1, grouped),
        "encoder_num_layers": next(
            i for i in range(len(state) + 1) if f"{transformer}.layers.{i}.layer_norm.weight" not in state
        ),
        "encoder_num_heads": heads,
        "encoder_num_buckets": buckets,
        "encoder_max_distance": 800,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": _sizes(
            state, f"{transformer}.layers.0.feed_forward.intermediate_dense.weight", 2
        )[0],
        "encoder_ff_interm_dropout": 0.0 if large else 0.1,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": large,
        "encoder_layer_drop": 0.1,
        "aux_num_out": len(state["aux.weight"]) if "aux.weight" in state else None,
    }
    form = "norms before attention and feed-forward" if large else "norms after attention and feed-forward"
    assumed = "the dropouts of torchaudio's wavlm_" + ("large" if large else "base")
    said = [f"not in the file, as published: {form}, encoder_max_distance=800, {assumed}"]
    if not published:
        said.append(f"not in the file, as in no published model: strides {', '.join(map(str, strides))}")
    return arguments, said


def _config(**fields: Any) -> WavLMConfig:
    for key, value in fields.items():
        if key.endswith(("dropout", "layerdrop", "_prob")) and not 0.0 <= value <= 1.0:
            raise UserError(f"a probability is wanted for what transformers calls {key}, got {value}")
    try:
        return WavLMConfig(**fields)
    except Exception as error:  # whatever this version of transformers checks
        raise UserError(f"transformers takes no such configuration: {first_line(error)}") from error


def _whole(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A cfg with Microsoft's defaults, each entry of its kind."""
    for key, default in DEFAULTS.items():
        value = cfg.get(key, default)
        number = isinstance(default, float) or key in ("mask_other", "mask_channel_other")
        kinds = (int, float) if number else (type(default),)
        if type(value) not in kinds:
            raise UserError(f"{key} of a cfg is {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
    return DEFAULTS | dict(cfg)


def _extractor(mode: str, house: int) -> str:
    for ours, theirs in _EXTRACTOR_MODES.items():
        if theirs[house] == mode:
            return ours
    wanted = " or ".join(theirs[house] for theirs in _EXTRACTOR_MODES.values())
    raise UserError(f"an extractor_mode of {wanted} is wanted, got {mode!r}")


def _refuse_what_others_lack(config: WavLMConfig, house: str) -> None:
    if config.add_adapter:
        raise UserError(f"{house} has no adapter on top of the encoder, but this model has one (add_adapter)")
    if config.feat_extract_activation not in _ACTIVATIONS["gelu"]:
        raise UserError(f"{house} has gelu after convolutions, but this model has {config.feat_extract_activation!r}")
    if config.layer_norm_eps != _EPS:
        raise UserError(f"{house} has layer norms of epsilon {_EPS}, but this model's have {config.layer_norm_eps}")


def _refuse_a_projection(weight: Tensor, bias: Tensor) -> None:
    if not torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) or bias.any():
        raise UserError(
            f"Microsoft's class has no feature projection where the convolutions give as many channels as the encoder "
            f"has, {len(weight)}, but this model has one that is not the identity"
        )


def _times(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    return (rows * shape[0], *shape[1:])


def _masks(config: WavLMConfig) -> bool:
    """Whether transformers' model has an embedding of what is masked."""
    return config.mask_time_prob > 0.0 or config.mask_feature_prob > 0.0


def _of_transformers(config: WavLMConfig, state: State) -> dict[str, Tensor]:
    state = spelt(state, new=True)
    wanted = [(name.transformers, name.shape) for name in names(config)]
    if "masked_spec_embed" in state:
        wanted.append(("masked_spec_embed", (config.hidden_size,)))
    check(state, wanted)
    return state


def _sizes(state: State, key: str, dims: int) -> tuple[int, ...]:
    if key not in state:
        raise UserError(f"{key} is missing from the weights")
    if state[key].ndim != dims:
        raise UserError(f"{key} of {dims} dimensions is wanted, got shape {list(state[key].shape)}")
    return tuple(state[key].shape)
