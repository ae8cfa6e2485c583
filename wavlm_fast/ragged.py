"""Utterances of any lengths in, one output for each out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    CausalLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
    Wav2Vec2BaseModelOutput,
    XVectorOutput,
)
from transformers.models.wavlm import modeling_wavlm as hf

from .families.models import Model
from .inputs import check_waveform
from .losses import with_loss
from .modules import FeatureEncoder
from .modules._originals import StandIn
from .packed_batch import PackedBatch, run_alone, run_packed, samples_needed, split, wavlm_of, why_alone
from .padding import asks_for_attentions, frames_after

Waveforms = Sequence[Tensor]


# What a list holds where neither `return_dict` nor the model's config wants tuples.
@overload
def forward_ragged(
    model: PreTrainedModel, waveforms: Waveforms, *, return_dict: Literal[False], **kwargs: Any
) -> list[tuple[Any, ...]]: ...
@overload
def forward_ragged(model: hf.WavLMModel, waveforms: Waveforms, **kwargs: Any) -> list[Wav2Vec2BaseModelOutput]: ...
@overload
def forward_ragged(model: hf.WavLMForCTC, waveforms: Waveforms, **kwargs: Any) -> list[CausalLMOutput]: ...
@overload
def forward_ragged(
    model: hf.WavLMForSequenceClassification, waveforms: Waveforms, **kwargs: Any
) -> list[SequenceClassifierOutput]: ...
@overload
def forward_ragged(
    model: hf.WavLMForAudioFrameClassification, waveforms: Waveforms, **kwargs: Any
) -> list[TokenClassifierOutput]: ...
@overload
def forward_ragged(model: hf.WavLMForXVector, waveforms: Waveforms, **kwargs: Any) -> list[XVectorOutput]: ...
@overload
def forward_ragged(model: nn.Module, waveforms: Waveforms, **kwargs: Any) -> list[Any]: ...
def forward_ragged(model: nn.Module, waveforms: Waveforms, **kwargs: Any) -> list[Any]:
    """Run a model on waveforms of any lengths without padding: the outputs of each are those of the waveform alone.

    All of them go through the model at once, one behind the other; where a module cannot take them so (`report` says
    why), one at a time. The model's padding mode does not matter.

    Args:
        model: a WavLM of ours: one of the classes, or what `accelerate` has made fast. Of a Microsoft WavLM
            `extract_features` runs, without its padding mask.
        waveforms: `[S]` each, on one device and of one dtype, as `input_values` of the model are.
        kwargs: as the model takes them. `labels` is a list, one entry for each waveform without a batch dimension, or a
            tensor of such entries; losses are those of each waveform alone.

    Returns:
        For each waveform, in order, what the model returns for a batch of one; a ModelOutput of transformers' classes.
        Tensors may share memory.

    Raises:
        TypeError: `model` is none of ours, or a waveform is no tensor, holds integers, or has another dtype or device
            than the first.
        ValueError: no waveforms; one of another number of dimensions, or with fewer samples than a frame needs; an
            attention mask; another number of labels.
    """
    _check(model, waveforms, kwargs)
    if isinstance(model, Model):
        return model.run_each(waveforms, functools.partial(model.run, model, **kwargs))
    assert isinstance(model, PreTrainedModel)
    labels = kwargs.pop("labels", None)
    in_dict = kwargs.pop("return_dict", None)
    labels = None if labels is None else _labels(model, labels, len(waveforms))
    if why_alone(model, asks_for_attentions(model, kwargs)) is None:
        batch = PackedBatch(model, [len(w) for w in waveforms], waveforms[0].device)
        outputs = split(model, run_packed(model, batch, waveforms, kwargs), batch.frames)
    else:
        outputs = run_alone(model, waveforms, kwargs)
    if labels is not None:
        frames = [frames_after(model, len(w), None) for w in waveforms]
        outputs = [
            with_loss(model, out, own, [count]) for out, own, count in zip(outputs, labels, frames, strict=True)
        ]
    return outputs if (model.config.return_dict if in_dict is None else in_dict) else [o.to_tuple() for o in outputs]


def _check(model: nn.Module, waveforms: Sequence[Tensor], kwargs: dict[str, Any]) -> None:
    if not isinstance(model, StandIn) or not isinstance(model, (PreTrainedModel, Model)):
        raise TypeError(
            f"forward_ragged wants a WavLM that accelerate has made fast, got a {type(model).__module__}."
            f"{type(model).__qualname__}"
        )
    if kwargs.get("attention_mask") is not None:
        raise ValueError("forward_ragged wants no attention_mask, its waveforms have no padding, got one")
    if not isinstance(waveforms, (list, tuple)):
        raise TypeError(f"forward_ragged wants a list of waveforms, got a {type(waveforms).__name__}")
    if not waveforms:
        raise ValueError("forward_ragged wants at least one waveform, got an empty list")
    front_end: Any = wavlm_of(model).feature_extractor
    first = waveforms[0]
    needed = model.samples_needed() if isinstance(model, Model) else samples_needed(model)
    known = isinstance(front_end, FeatureEncoder)  # else somebody's own, which says itself what it wants
    convs: list[Any] | None = [layer.conv for layer in front_end.layers] if known else None
    for index, waveform in enumerate(waveforms):
        if not isinstance(waveform, Tensor):
            raise TypeError(f"forward_ragged wants tensors, waveform {index} is a {type(waveform).__name__}")
        shape = list(waveform.shape)
        if convs is not None and len(shape) != 1:
            raise ValueError(f"forward_ragged wants waveforms of shape [samples], waveform {index} has {shape}")
        if len(waveform) < needed:
            raise ValueError(
                f"forward_ragged wants at least {needed} samples in every waveform, what the model needs, waveform "
                f"{index} has {len(waveform)}"
            )
        if (waveform.dtype, waveform.device) != (first.dtype, first.device):
            raise TypeError(
                f"forward_ragged wants waveforms of one dtype on one device, {first.dtype} on {first.device}, waveform "
                f"{index} is {waveform.dtype} on {waveform.device}"
            )
    if convs is not None:
        check_waveform(first[None], convs)


def _labels(model: Any, labels: Any, utterances: int) -> list[Tensor]:
    """The labels of each waveform, with a batch dimension."""
    if not isinstance(labels, (list, tuple, Tensor)) or len(labels) != utterances:
        found = len(labels) if isinstance(labels, (list, tuple, Tensor)) else f"a {type(labels).__name__}"
        raise ValueError(f"forward_ragged wants labels for each of {utterances} waveforms, got {found}")
    device = next(model.parameters()).device
    own = [torch.as_tensor(entry, device=device)[None] for entry in labels]
    for entry in own:
        model.check_labels(entry, 1)
    return own
