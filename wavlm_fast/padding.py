"""What padding means to a model: transformers' numbers, or every utterance as if it were alone ("exact").

In the exact mode a padded batch goes through the model packed, one utterance behind the other, and comes out padded
again: nothing is computed on padding. Where a module cannot take packed frames, utterances run one at a time. In a
graph, which cannot depend on lengths, rows stay padded, and what padding would reach is masked.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.wavlm import modeling_wavlm as hf

from ._private import frame_lengths
from .families._copies import MODE
from .families.models import Model
from .inputs import check_mask, valid_lengths
from .leaving import in_graph
from .losses import with_loss
from .modules import FeatureEncoder
from .modules._packing import with_valid_samples
from .packed_batch import (
    PackedBatch,
    padded,
    run_alone,
    run_packed,
    samples_needed,
    stacked,
    wavlm_of,
    why_alone,
    zero_past,
)

# What padding means to a model.
Padding = Literal["transformers", "exact"]
MODES = get_args(Padding)


def check_mode(padding: object) -> None:
    """Raise ValueError unless it is one of the modes."""
    if padding not in MODES:
        raise ValueError(f"padding must be one of {', '.join(map(repr, MODES))}, got {padding!r}")


def mode_of(model: nn.Module) -> Padding:
    """What padding means to a WavLM."""
    return model.__dict__.get(MODE, "transformers")


def set_mode(model: nn.Module, padding: Padding) -> None:
    """Say what padding means to every WavLM in a module. It is kept on them, and so copied and pickled with them."""
    for module in model.modules():
        if isinstance(module, (hf.WavLMPreTrainedModel, Model)):
            module.__dict__.pop(MODE, None)
            if padding != "transformers":
                module.__dict__[MODE] = padding


def by_name(names: tuple[str, ...], args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments by their names, which are the first of these.

    Raises:
        TypeError: there are more arguments than names.
    """
    if len(args) > len(names):
        raise TypeError(f"forward takes at most {len(names)} positional arguments, got {len(args)}")
    # Not by `zip`: torch.compile before torch 2.11 takes its `strict=False` for True.
    return {names[i]: value for i, value in enumerate(args)}


def with_padding(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a model class, in the mode of the model."""
    names = tuple(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if MODE not in self.__dict__:
            return forward(self, *args, **kwargs)
        given = by_name(names, args) | kwargs
        if given.get("attention_mask") is None or isinstance(given["attention_mask"], PackedBatch):
            return forward(self, **given)
        return _exact(functools.partial(forward, self), self, given)

    chosen.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    del chosen.__wrapped__  # as `or_original`
    return chosen


def _exact(forward: Callable[..., Any], model: Any, given: dict[str, Any]) -> Any:
    """A padded batch, every row as if it were alone."""
    labels, in_dict = given.pop("labels", None), given.pop("return_dict", None)
    lengths: Sequence[int] | Tensor
    waveforms, mask = given["input_values"], given["attention_mask"]
    if labels is not None:
        model.check_labels(labels, len(waveforms))
    if in_graph(waveforms):
        outputs, lengths = _masked(forward, model, given)
    else:
        outputs, lengths = _unpadded(forward, model, given, _lengths_of(model, mask, waveforms))
    outputs = with_loss(model, outputs, labels, lengths)
    return outputs if (model.config.return_dict if in_dict is None else in_dict) else outputs.to_tuple()


def _unpadded(
    forward: Callable[..., Any], model: PreTrainedModel, given: dict[str, Any], samples: list[int]
) -> tuple[ModelOutput, Sequence[int]]:
    """The outputs of a padded batch with so many valid samples in its rows, and the valid frames of the last."""
    waveforms = given["input_values"]
    width = waveforms.shape[1]
    lengths = frame_lengths(wavlm_of(model), torch.tensor(samples), None).tolist()
    if set(samples) == {width}:
        return forward(**{**given, "attention_mask": None, "return_dict": True}), lengths
    rows = [row[:n] for row, n in zip(waveforms, samples, strict=True)]
    if why_alone(model, asks_for_attentions(model, given)) is None:
        batch = PackedBatch(model, samples, waveforms.device)
        packed = run_packed(forward, batch, rows, given)
        return padded(model, packed, batch.frames, frames_after(model, width, False)), lengths
    parts, after_adapter = run_alone(forward, rows, given), ("last_hidden_state", "logits")
    outputs = stacked(model, parts, lambda name: frames_after(model, width, None if name in after_adapter else False))
    return outputs, lengths


def asks_for_attentions(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether a call with these arguments returns attention weights."""
    asked = given.get("output_attentions")
    return bool(model.config.output_attentions if asked is None else asked)


def frames_after(model: PreTrainedModel, samples: int, add_adapter: bool | None) -> int:
    """Frames of a waveform of so many samples; with `add_adapter` None after the adapter, where the model has one."""
    return int(frame_lengths(wavlm_of(model), torch.tensor([samples]), add_adapter))


def _masked(forward: Callable[..., Any], model: PreTrainedModel, given: dict[str, Any]) -> tuple[ModelOutput, Tensor]:
    """The outputs of a padded batch whose lengths cannot be looked at, and the valid frames `[B]`."""
    samples = given["attention_mask"].ne(0).sum(-1)
    lengths = frame_lengths(wavlm_of(model), samples, None).to(torch.long)
    if wavlm_of(model).adapter is not None:
        warnings.warn("in a graph padding is transformers': an adapter's convolutions see it", stacklevel=2)
        return forward(**{**given, "return_dict": True}), lengths
    with with_valid_samples(samples):
        outputs = forward(**{**given, "return_dict": True})
    return zero_past(model, outputs, lengths), lengths


def _lengths_of(model: PreTrainedModel, mask: Tensor, waveforms: Tensor) -> list[int]:
    """The valid samples of every row.

    Raises:
        ValueError: a row that is not ones followed by zeros, or holds too few samples for a frame.
    """
    needed = samples_needed(model)
    if isinstance(wavlm_of(model).feature_extractor, FeatureEncoder):
        check_mask(mask, waveforms)
    elif mask.shape != waveforms.shape[:2]:
        raise ValueError(
            f"padding 'exact' wants a mask over the second dimension of input_values, {list(waveforms.shape[:2])}, got "
            f"{list(mask.shape)}"
        )
    return valid_lengths(mask.ne(0), needed, "an attention_mask of ones followed by zeros")
