"""The six classes: transformers' own, accelerated at construction, with inputs checked.

Heads, losses, loading and saving are transformers'. What a class adds here is what its own forward does slowly or
leaves to fail late.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WavLMConfig
from transformers.modeling_outputs import SequenceClassifierOutput, XVectorOutput
from transformers.models.wavlm import modeling_wavlm as hf

from . import ops
from ._private import FRAME_MASK, compute_mask_indices, frame_lengths, tdnn_lengths
from .freed import MayBeFreed
from .inputs import check_checkpoint, check_ctc_labels, check_labels, check_lengths, check_mask
from .leaving import leaving
from .modules import FeatureEncoder, Signal, Step, pool_statistics, steps_of_children
from .modules._masks import forget_made, made
from .modules._originals import StandIn, or_original, own_methods, stands_in_for
from .modules._packing import Packing, in_front_end, packings, valid_samples
from .modules._versions import ENCODER_COLLECTS
from .packed_batch import PackedBatch
from .padding import Padding, by_name, check_mode, set_mode, with_padding


def _named(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the forward of a class here by name; the order of positional ones differs between transformers
    4 and 5.
    """
    return by_name(_PARAMETERS[cls.__name__], args) | kwargs


# Read now: `install` puts our classes under these names.
_PARAMETERS = {
    cls.__name__: tuple(inspect.signature(cls.forward).parameters)[1:]
    for cls in (hf.WavLMForCTC, hf.WavLMForSequenceClassification, hf.WavLMForXVector)
}


def _classes(config: Any) -> int:
    return config.num_labels


_OWN_MASK = dict(own_methods(hf.WavLMPreTrainedModel)).get(FRAME_MASK)


if TYPE_CHECKING:
    _Mixin = hf.WavLMPreTrainedModel  # what _FastModel is mixed into
    _Model = TypeVar("_Model", bound="_FastModel")
else:
    _Mixin = object


class _FastModel(StandIn, MayBeFreed, _Mixin):
    """Construction and loading, in front of each transformers class."""

    if TYPE_CHECKING:  # transformers' own does not say what it returns

        def eval(self: _Model) -> _Model: ...

    def check_labels(self, labels: Tensor, utterances: int) -> None:
        """Raise TypeError or ValueError for labels that the class's loss cannot take."""

    def __init__(self, config: WavLMConfig, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, WavLMConfig):  # what is none, transformers refuses
            check_lengths(config, "conv_dim", "conv_stride", "conv_kernel")
        super().__init__(config, *args, **kwargs)
        from .swap import accelerate_new  # which puts the classes of this file in the place of transformers'

        if type(self).twin.__base__ is type(self):
            self.__class__ = self.twin  # type: ignore[assignment]
        accelerate_new(self)

    def steps(self, signal: Signal) -> Iterator[Step]:
        """What `report` tells of."""
        return steps_of_children(self, signal)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Our classes initialize as transformers' own; transformers 5 treats modules that are not its own otherwise."""
        return cls.__module__ != __name__ and super().is_custom_code()

    @overload
    @classmethod
    def from_pretrained(
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        output_loading_info: Literal[True],
        padding: Padding | None = None,
        **kwargs: Any,
    ) -> tuple[_Model, dict[str, Any]]: ...

    @overload
    @classmethod
    def from_pretrained(
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        padding: Padding | None = None,
        **kwargs: Any,
    ) -> _Model: ...

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, padding: Padding | None = None, **kwargs: Any
    ) -> Any:
        """Load a checkpoint as transformers does.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            padding: as `accelerate` takes it.
            args, kwargs: as transformers takes them.

        Raises:
            FileNotFoundError: a path at which nothing is.
            ValueError: a checkpoint of another architecture, unless a config is given with it; an unknown `padding`.
        """
        if padding is not None:
            check_mode(padding)
        if kwargs.get("config") is None:
            check_checkpoint(pretrained_model_name_or_path, kwargs)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if padding is not None:  # with `output_loading_info` the model is not all that comes
            set_mode(loaded[0] if isinstance(loaded, tuple) else loaded, padding)
        return loaded

    def _get_feature_vector_attention_mask(
        self, feature_vector_length: int, attention_mask: Any, add_adapter: bool | None = None
    ) -> Any:
        """The mask `[B, T]` over frames, True where valid, from one `[B, S]` over samples.

        transformers writes a one at the last valid frame, which on a GPU copies the number there; no graph can capture
        that. On the CPU, where it refuses lengths past the end, it is asked itself.
        """
        if isinstance(attention_mask, PackedBatch):
            return attention_mask.frames
        if attention_mask.device.type == "cpu" or not self._makes_own_masks():
            return super()._get_feature_vector_attention_mask(feature_vector_length, attention_mask, add_adapter)
        samples = attention_mask.cumsum(-1)[:, -1]
        last = frame_lengths(self, samples, add_adapter).to(torch.long)[:, None] - 1
        last = torch.where(last < 0, last + feature_vector_length, last)  # an index from the end, there
        return torch.arange(feature_vector_length, device=last.device) <= last

    def _makes_own_masks(self) -> bool:
        """Whether nobody has put a method of his own in the place of transformers', whose masks have no holes, and no
        graph is to hold what transformers does.
        """
        return getattr(self.original, FRAME_MASK, None) is _OWN_MASK and leaving() is None


@stands_in_for(hf.WavLMModel, public=True)
class WavLMModel(_FastModel, hf.WavLMModel):
    """transformers' `WavLMModel`, fast."""

    @with_padding
    @or_original
    @functools.wraps(hf.WavLMModel.forward)
    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(attention_mask, PackedBatch):
            with in_front_end(attention_mask.stages):
                return super().forward(input_values, attention_mask, *args, **kwargs)
        # Somebody's own front end has inputs and masks of its own shapes.
        if attention_mask is not None and isinstance(self.feature_extractor, FeatureEncoder):
            check_mask(attention_mask, input_values)
        try:
            return super().forward(input_values, attention_mask, *args, **kwargs)
        finally:
            forget_made()

    def _get_feature_vector_attention_mask(self, *args: Any, **kwargs: Any) -> Tensor | Packing:
        mask = super()._get_feature_vector_attention_mask(*args, **kwargs)
        return made(mask) if isinstance(mask, Tensor) and self._makes_own_masks() else mask

    def _mask_hidden_states(
        self, hidden_states: Tensor, mask_time_indices: Any = None, attention_mask: Any = None
    ) -> Tensor:
        """SpecAugment. transformers 5 reads a config entry that its config class lacks (`mask_feature_min_masks`)."""
        if isinstance(attention_mask, Packing):
            return self._mask_packed(hidden_states, mask_time_indices, attention_mask)
        config = self.config
        masks_features = config.apply_spec_augment and config.mask_feature_prob > 0 and self.training
        if hasattr(config, "mask_feature_min_masks") or not masks_features or compute_mask_indices is None:
            return super()._mask_hidden_states(hidden_states, mask_time_indices, attention_mask)
        batch, frames, channels = hidden_states.shape
        if mask_time_indices is None and config.mask_time_prob > 0:
            options = (config.mask_time_prob, config.mask_time_length, attention_mask, config.mask_time_min_masks)
            mask_time_indices = self._spans((batch, frames), *options)
        if mask_time_indices is not None:
            mask_time_indices = mask_time_indices.to(hidden_states.device)[..., None]
            embedding = self.masked_spec_embed.to(hidden_states.dtype)
            hidden_states = torch.where(mask_time_indices, embedding, hidden_states)
        masked = self._spans((batch, channels), config.mask_feature_prob, config.mask_feature_length, None, 0)
        return hidden_states.masked_fill(masked.to(hidden_states.device)[:, None], 0)

    def _mask_packed(self, hidden_states: Tensor, spans: Tensor | None, packing: Packing) -> Tensor:
        """SpecAugment of packed frames `[1, N, C]`, in spans drawn as for padded rows; given ones are `[B, T]`."""
        config, batch, channels = self.config, len(packing.lengths), hidden_states.shape[2]
        drawn = self.training and compute_mask_indices is not None
        if not getattr(config, "apply_spec_augment", True):
            return hidden_states
        if spans is None and config.mask_time_prob > 0 and drawn:
            valid = torch.arange(packing.longest) < torch.tensor(packing.lengths)[:, None]
            options = (config.mask_time_prob, config.mask_time_length, valid.long(), config.mask_time_min_masks)
            spans = self._spans(valid.shape, *options)
        if spans is not None:
            places = packing.places(spans.shape[1]).to(spans.device)
            masked = spans.flatten()[places].to(hidden_states.device)[None, :, None]
            hidden_states = torch.where(masked, self.masked_spec_embed.to(hidden_states.dtype), hidden_states)
        if config.mask_feature_prob > 0 and drawn:
            least = getattr(config, "mask_feature_min_masks", 0)
            masked = self._spans((batch, channels), config.mask_feature_prob, config.mask_feature_length, None, least)
            rows = torch.arange(batch).repeat_interleave(torch.tensor(packing.lengths))
            hidden_states = hidden_states.masked_fill(masked[rows].to(hidden_states.device)[None], 0)
        return hidden_states

    @staticmethod
    def _spans(
        shape: Sequence[int], prob: float, length: int, attention_mask: Tensor | None, min_masks: int
    ) -> Tensor:
        found: np.ndarray[Any, Any] = compute_mask_indices(shape, prob, length, attention_mask, min_masks)
        return torch.from_numpy(found)


@stands_in_for(hf.WavLMForCTC, public=True)
class WavLMForCTC(_FastModel, hf.WavLMForCTC):
    """transformers' `WavLMForCTC`, fast."""

    def check_labels(self, labels: Tensor, utterances: int) -> None:
        check_ctc_labels(labels, self.config.vocab_size)

    @with_padding
    @or_original
    @functools.wraps(hf.WavLMForCTC.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = _named(WavLMForCTC, args, kwargs)
        labels = arguments.get("labels")
        if labels is not None:
            self.check_labels(labels, len(arguments["input_values"]))
        return super().forward(**arguments)


@stands_in_for(hf.WavLMForSequenceClassification, public=True)
class WavLMForSequenceClassification(_FastModel, hf.WavLMForSequenceClassification):
    """transformers' `WavLMForSequenceClassification`, fast."""

    def check_labels(self, labels: Tensor, utterances: int) -> None:
        check_labels(labels, _classes(self.config), utterances)

    @with_padding
    @or_original
    @functools.wraps(hf.WavLMForSequenceClassification.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = _named(WavLMForSequenceClassification, args, kwargs)
        if arguments.get("labels") is not None:
            self.check_labels(arguments["labels"], len(arguments["input_values"]))
        if isinstance(arguments.get("attention_mask"), PackedBatch):
            return self._of_packed(arguments)
        return super().forward(**arguments)

    def _of_packed(self, arguments: dict[str, Any]) -> SequenceClassifierOutput:
        """transformers' forward, with the mean over each utterance's frames."""
        outputs, hidden_states, returned = _frames_for_head(self, arguments)
        hidden_states = self.projector(hidden_states)
        packing = arguments["attention_mask"].frames
        pooled = torch.cat([own.mean(dim=1) for own in packing.utterances(hidden_states)])
        return SequenceClassifierOutput(
            logits=self.classifier(pooled),
            hidden_states=_selected(outputs.hidden_states, returned),
            attentions=outputs.attentions,
        )


@stands_in_for(hf.WavLMForAudioFrameClassification, public=True)
class WavLMForAudioFrameClassification(_FastModel, hf.WavLMForAudioFrameClassification):
    """transformers' `WavLMForAudioFrameClassification`, fast."""

    @with_padding
    @or_original
    @functools.wraps(hf.WavLMForAudioFrameClassification.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def _selected(hidden_states: Any, wanted: bool | int | list[int] | None) -> Any:
    """The hidden states asked for: all, none, or (transformers 5) those at some indices, None standing for the rest."""
    if isinstance(wanted, bool) or wanted is None:
        return hidden_states if wanted else None
    count = len(hidden_states)
    kept = {i % count for i in ([wanted] if isinstance(wanted, int) else wanted) if -count <= i < count}
    return [state if i in kept else None for i, state in enumerate(hidden_states)]


def _frames_for_head(model: Any, arguments: dict[str, Any]) -> tuple[Any, Tensor, Any]:
    """Outputs of the WavLM in a model, the frames `[B, T, C]` that its head takes, and which hidden states the caller
    wants; what he leaves open, the config says.
    """
    config = model.config
    wishes = {k: arguments.get(k) for k in ("output_hidden_states", "output_attentions")}
    wishes = {k: getattr(config, k) if v is None else v for k, v in wishes.items()}
    returned = wishes["output_hidden_states"]
    if config.use_weighted_layer_sum and ENCODER_COLLECTS:
        returned = True  # transformers 4 returns what it needs, asked for or not
    outputs = model.wavlm(
        **{k: v for k, v in arguments.items() if k not in ("labels", "return_dict", *wishes)},
        output_attentions=wishes["output_attentions"],
        output_hidden_states=True if config.use_weighted_layer_sum else returned,
        return_dict=True,
    )
    if not config.use_weighted_layer_sum:
        return outputs, outputs.last_hidden_state, returned
    weights = nn.functional.softmax(model.layer_weights, dim=-1)
    hidden_states = (torch.stack(outputs.hidden_states, dim=1) * weights.view(-1, 1, 1)).sum(dim=1)
    return outputs, hidden_states, returned


@stands_in_for(hf.WavLMForXVector, public=True)
class WavLMForXVector(_FastModel, hf.WavLMForXVector):
    """transformers' `WavLMForXVector`, fast: pooling does not loop over the batch."""

    def __init__(self, config: WavLMConfig, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, WavLMConfig):
            check_lengths(config, "tdnn_dim", "tdnn_kernel", "tdnn_dilation")
        super().__init__(config, *args, **kwargs)

    def check_labels(self, labels: Tensor, utterances: int) -> None:
        check_labels(labels, _classes(self.config), utterances)

    def steps(self, signal: Signal) -> Iterator[Step]:
        yield from super().steps(signal)
        frames = signal.frames(self, self.config.tdnn_dim[-1])
        yield Step("stats_pool", None, lambda: pool_statistics(frames, None))

    def run_original(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' forward; in a graph of rows that are to be as if alone ours, as theirs pools padding."""
        return super().run_original(*args, **kwargs) if valid_samples() is None else self._forward(*args, **kwargs)

    @with_padding
    @or_original
    @functools.wraps(hf.WavLMForXVector.forward)
    def forward(self, *args: Any, **kwargs: Any) -> XVectorOutput | tuple[Any, ...]:
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> XVectorOutput | tuple[Any, ...]:
        arguments = _named(WavLMForXVector, args, kwargs)
        labels, in_dict = arguments.pop("labels", None), arguments.pop("return_dict", None)
        if labels is not None:
            self.check_labels(labels, len(arguments["input_values"]))
        outputs, hidden_states, returned = _frames_for_head(self, arguments)
        embeddings = self.feature_extractor(self._pooled(hidden_states, arguments.get("attention_mask")))
        logits = self.classifier(embeddings)
        result = XVectorOutput(
            loss=None if labels is None else self.objective(logits, labels),
            logits=logits,
            embeddings=embeddings,
            hidden_states=_selected(outputs.hidden_states, returned),
            attentions=outputs.attentions,
        )
        return result if (self.config.return_dict if in_dict is None else in_dict) else result.to_tuple()

    def _pooled(self, hidden_states: Tensor, attention_mask: Tensor | PackedBatch | None) -> Tensor:
        """Statistics `[B, 2C]` of the frames after the time-delay layers."""
        hidden_states = self.projector(hidden_states)
        if isinstance(attention_mask, PackedBatch):
            return self._pooled_packed(hidden_states, attention_mask.frames)
        layers: Any = self.tdnn  # time-delay layers, transformers' or ours
        for layer in layers:
            hidden_states = layer(hidden_states)
        lengths = None
        if attention_mask is not None:
            frames = frame_lengths(self, attention_mask.sum(dim=1))
            if valid_samples() is None:
                lengths = tdnn_lengths(self, frames)
            else:
                lengths = frames - sum((layer.kernel_size - 1) * layer.dilation for layer in layers)
        return pool_statistics(hidden_states, lengths)

    def _pooled_packed(self, hidden_states: Tensor, packing: Packing) -> Tensor:
        layers: Any = self.tdnn  # ours
        stages = packings(packing.lengths, [(layer.span, 1) for layer in layers], hidden_states.device)
        for index, layer in enumerate(layers):
            hidden_states = layer(hidden_states, *stages[index : index + 2])
        return ops.stats_pool(hidden_states, offsets=stages[-1].offsets)


# Each stands in for transformers' of the same name.
MODELS = (
    WavLMModel,
    WavLMForCTC,
    WavLMForSequenceClassification,
    WavLMForAudioFrameClassification,
    WavLMForXVector,
)
