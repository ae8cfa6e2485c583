"""Every weight of a WavLM by its names in the three houses: transformers', Microsoft's and torchaudio's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor
from transformers import WavLMConfig

from .errors import UserError

State = Mapping[str, Tensor]
PROJECTION = "feature_projection.projection."
NORMS = ("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v")


class Name(NamedTuple):
    """What the three houses call one weight."""

    transformers: str
    microsoft: str
    torchaudio: str
    shape: tuple[int, ...]
    third: int | None = None  # torchaudio keeps query, key and value in one: which third of its rows this is


def names(config: WavLMConfig) -> Iterator[Name]:
    """The weights of a model, but for the embedding of what is masked.

    Raises:
        UserError: there is no such model.
    """
    channels, heads, wide = config.hidden_size, config.num_attention_heads, config.intermediate_size
    if heads < 1 or channels % heads:
        raise UserError(f"a number of heads that divides the {channels} channels is wanted, got {heads}")
    exact = config.num_buckets // 4  # distances that have a bucket of their own, in each direction
    if not 0 < exact < config.max_bucket_distance:
        raise UserError(
            f"four buckets or more, and a distance above a quarter of their number, are wanted for the position bias, "
            f"got {config.num_buckets} buckets up to a distance of {config.max_bucket_distance}"
        )
    yield from _convolutions(config)
    last = config.conv_dim[-1]
    norm = ("layer_norm", "layer_norm", "encoder.feature_projection.layer_norm")
    yield from _with_bias(("feature_projection.layer_norm", *norm[1:]), (last,))
    projection = (PROJECTION[:-1], "post_extract_proj", "encoder.feature_projection.projection")
    yield from _with_bias(projection, (channels, last))
    conv = ("encoder.pos_conv_embed.conv", "encoder.pos_conv.0", "encoder.transformer.pos_conv_embed.conv")
    kernel = config.num_conv_pos_embeddings
    yield _named(conv, ("bias",) * 3, (channels,))
    shapes = (1, 1, kernel), (channels, channels // max(1, config.num_conv_pos_embedding_groups), kernel)
    for (ours, theirs), shape in zip(NORMS, shapes, strict=True):
        yield _named(conv, (ours, theirs, ours), shape)
    yield from _with_bias(("encoder.layer_norm", "encoder.layer_norm", "encoder.transformer.layer_norm"), (channels,))
    for index in range(config.num_hidden_layers):
        yield from _layer(index, channels, heads, wide, config.num_buckets)


def _convolutions(config: WavLMConfig) -> Iterator[Name]:
    before = 1
    for index, (channels, kernel) in enumerate(zip(config.conv_dim, config.conv_kernel, strict=True)):
        layer = f"feature_extractor.conv_layers.{index}"
        conv = (f"{layer}.conv", f"{layer}.0", f"{layer}.conv")
        yield _named(conv, ("weight",) * 3, (channels, before, kernel))
        if config.conv_bias:
            yield _named(conv, ("bias",) * 3, (channels,))
        if config.feat_extract_norm == "layer" or index == 0:
            place = "2.1" if config.feat_extract_norm == "layer" else "2"
            norm = (f"{layer}.layer_norm", f"{layer}.{place}", f"{layer}.layer_norm")
            yield from _with_bias(norm, (channels,))
        before = channels


def _layer(index: int, channels: int, heads: int, wide: int, buckets: int) -> Iterator[Name]:
    layer = f"encoder.layers.{index}", f"encoder.layers.{index}", f"encoder.transformer.layers.{index}"
    for third, part in enumerate("qkv"):
        for ending, shape in (("weight", (channels, channels)), ("bias", (channels,))):
            own = f"attention.{part}_proj.{ending}", f"self_attn.{part}_proj.{ending}"
            yield _named(layer, (*own, f"attention.attention.in_proj_{ending}"), shape, third)
    for ours, theirs, elsewhere, size in (
        ("attention.out_proj", "self_attn.out_proj", "attention.attention.out_proj", (channels, channels)),
        ("attention.gru_rel_pos_linear", "self_attn.grep_linear", None, (8, channels // heads)),
        ("layer_norm", "self_attn_layer_norm", None, (channels,)),
        ("feed_forward.intermediate_dense", "fc1", None, (wide, channels)),
        ("feed_forward.output_dense", "fc2", None, (channels, wide)),
        ("final_layer_norm", "final_layer_norm", None, (channels,)),
    ):
        places = zip(layer, (ours, theirs, elsewhere or ours), strict=True)
        yield from _with_bias(tuple(f"{place}.{name}" for place, name in places), size)
    constant = "attention.gru_rel_pos_const"
    yield _named(layer, (constant, "self_attn.grep_a", constant), (1, heads, 1, 1))
    if index == 0:
        table = "attention.rel_attn_embed.weight"
        yield _named(layer, (table, "self_attn.relative_attention_bias.weight", table), (buckets, heads))


def _named(places: tuple[str, ...], endings: tuple[str, ...], shape: tuple[int, ...], third: int | None = None) -> Name:
    transformers, microsoft, torchaudio = (f"{p}.{ending}" for p, ending in zip(places, endings, strict=True))
    return Name(transformers, microsoft, torchaudio, shape, third)


def _with_bias(places: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[Name]:
    yield _named(places, ("weight",) * 3, shape)
    yield _named(places, ("bias",) * 3, shape[:1])


def spelt(state: State, new: bool) -> dict[str, Tensor]:
    """The weights with weight norm in torch's new or old spelling."""
    found = {}
    for key, value in state.items():
        for spellings in NORMS:
            given, kept = reversed(spellings) if new else spellings
            if key.endswith(f".{given}"):
                key = key.removesuffix(given) + kept
        found[key] = value
    return found


def check(state: State, wanted: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Refuse weights that are not exactly those wanted: (name, shape) each."""
    shapes = dict(wanted)
    for key, shape in shapes.items():
        if key not in state:
            raise UserError(f"{key} is missing from the weights")
        if tuple(state[key].shape) != shape:
            raise UserError(f"{key} of shape {list(shape)} is wanted, got {list(state[key].shape)}")
        if not state[key].is_floating_point():
            raise UserError(f"floating-point weights are wanted, but {key} is {state[key].dtype}")
    if other := [key for key in state if key not in shapes]:
        raise UserError(f"{other[0]} among the weights is none of WavLM's")
