"""A model's forward of utterances of any lengths: packed, or where a module cannot, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.models.wavlm import modeling_wavlm as hf

from .families.transformers import FastWavLMEncoder, FastWavLMEncoderStableLayerNorm
from .inputs import receptive_field
from .modules import FeatureEncoder, FeatureProjection, TimeDelayLayer
from .modules._originals import StandIn, why_original
from .modules._packing import Packing, packings, padded_rows

Forward = Callable[..., Any]

# Outputs whose second dimension is frames; logits are of frames in two of the classes.
_OF_FRAMES = ("last_hidden_state", "extract_features", "hidden_states")
_PARTS: dict[str, Any] = {
    "feature_extractor": FeatureEncoder,
    "feature_projection": FeatureProjection,
    "encoder": (FastWavLMEncoder, FastWavLMEncoderStableLayerNorm),
}
_LOGITS_OF_FRAMES = (hf.WavLMForCTC, hf.WavLMForAudioFrameClassification)


class PackedBatch:
    """What stands in the place of the mask in the forward of packed samples `[1, S]`: where the utterances lie in the
    samples and in the frames of every stage of the front end.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[int], device: torch.device) -> None:
        convs = [layer.conv for layer in wavlm_of(model).feature_extractor.conv_layers]
        self.stages = packings(lengths, [(c.kernel_size[0], c.stride[0]) for c in convs], device)

    @property
    def frames(self) -> Packing:
        """The packing of the frames that the encoder gets."""
        return self.stages[-1]


def wavlm_of(model: nn.Module) -> Any:
    """The WavLM in a model with a head, or the model itself."""
    return getattr(model, "wavlm", model)


def samples_needed(model: nn.Module) -> int:
    """The fewest samples of an utterance of which the model, alone with it, makes anything."""
    front_end = wavlm_of(model).feature_extractor
    if not isinstance(front_end, FeatureEncoder):
        return 1  # somebody's own: it says itself
    convs = [layer.conv for layer in front_end.conv_layers]  # type: ignore[attr-defined]
    stages = [(c.kernel_size[0], c.stride[0]) for c in convs if isinstance(c, nn.Conv1d)]
    stages += [(layer.span, 1) for layer in getattr(model, "tdnn", ()) if isinstance(layer, TimeDelayLayer)]
    return receptive_field([width for width, _ in stages], [stride for _, stride in stages])


def why_alone(model: nn.Module, output_attentions: bool) -> str | None:
    """Why utterances run one at a time, a sentence; None when they can run packed."""
    if output_attentions:
        return "attention weights are asked for"
    patched = (why_original(module) for module in model.modules() if isinstance(module, StandIn))
    return next((reason for reason in patched if reason is not None), None) or _why_not_packed(model)


def _why_not_packed(model: nn.Module) -> str | None:
    wavlm = wavlm_of(model)
    if wavlm.adapter is not None:
        return "adapter is called: its convolutions know no boundaries"
    for name, cls in _PARTS.items():
        if not isinstance(getattr(wavlm, name), cls):
            return f"{name} is called: it is a {type(getattr(wavlm, name)).__name__}"
    for index, layer in enumerate(getattr(model, "tdnn", ())):
        if not isinstance(layer, TimeDelayLayer):
            return f"tdnn layer {index} is called: it is a {type(layer).__name__}"
    return wavlm.feature_extractor.why_not_packed() or wavlm.encoder.why_not_packed()


def run_packed(forward: Forward, batch: PackedBatch, waveforms: Sequence[Tensor], given: dict[str, Any]) -> ModelOutput:
    """The outputs for waveforms `[S]` each, those that have frames packed `[1, N, ...]`."""
    samples = torch.cat(list(waveforms))[None]
    return forward(**{**given, "input_values": samples, "attention_mask": batch, "return_dict": True})


def run_alone(forward: Forward, waveforms: Sequence[Tensor], given: dict[str, Any]) -> list[ModelOutput]:
    """The outputs for each waveform, `[S, ...]` each."""
    spans = given.get("mask_time_indices")
    own = ({} if spans is None else {"mask_time_indices": spans[i : i + 1]} for i in range(len(waveforms)))
    rest = {**given, "attention_mask": None, "return_dict": True}
    return [forward(**{**rest, **more, "input_values": w[None]}) for w, more in zip(waveforms, own, strict=True)]


def _parts(model: nn.Module, outputs: ModelOutput) -> Iterator[tuple[str, Any, bool]]:
    """Each output by name, and whether it is of frames."""
    for name, value in outputs.items():
        yield name, value, name in _OF_FRAMES or (name == "logits" and isinstance(model, _LOGITS_OF_FRAMES))


def _mapped(function: Callable[..., Any], *values: Any) -> Any:
    """The function of tensors, or of those at the same place in tuples and lists; None stays."""
    if isinstance(values[0], (tuple, list)):
        return type(values[0])(_mapped(function, *own) for own in zip(*values, strict=True))
    return None if values[0] is None else function(*values)


def padded(model: nn.Module, outputs: ModelOutput, packing: Packing, frames: int) -> ModelOutput:
    """Packed outputs as those of a batch of rows of so many frames, zeros past the ends."""
    pad = packing.padding(frames)
    return type(outputs)(
        **{name: _mapped(pad, value) if of_frames else value for name, value, of_frames in _parts(model, outputs)}
    )


def zero_past(model: nn.Module, outputs: ModelOutput, lengths: Tensor) -> ModelOutput:
    """The outputs of a padded batch with zeros past so many valid frames `[B]`."""

    def zeroed(x: Tensor) -> Tensor:
        past = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        return x.masked_fill(past[..., None], 0)

    return type(outputs)(
        **{name: _mapped(zeroed, value) if of_frames else value for name, value, of_frames in _parts(model, outputs)}
    )


def split(model: nn.Module, outputs: ModelOutput, packing: Packing) -> list[ModelOutput]:
    """Packed outputs as those of each utterance, views."""
    found: list[dict[str, Any]] = [{} for _ in packing.lengths]
    first = 0
    for i, length in enumerate(packing.lengths):
        for name, value, of_frames in _parts(model, outputs):
            start, count = (first, length) if of_frames else (i, 1)
            found[i][name] = _mapped(lambda x, a=start, n=count, dim=int(of_frames): x.narrow(dim, a, n), value)
        first += length
    return [type(outputs)(**own) for own in found]


def stacked(model: nn.Module, outputs: Sequence[ModelOutput], frames: Callable[[str], int]) -> ModelOutput:
    """The outputs of each utterance as those of a batch, zeros past the ends.

    Args:
        model: whose outputs they are.
        outputs: one for each utterance.
        frames: from the name of an output to the frames that it has in the batch.
    """
    joined = {}
    for name, first, of_frames in _parts(model, outputs[0]):
        values = [first, *(own[name] for own in outputs[1:])]
        join = _square if name == "attentions" else padded_rows if of_frames else _joined
        joined[name] = _mapped(functools.partial(join, frames(name)), *values)
    return type(outputs[0])(**joined)


def _joined(frames: int, *own: Tensor) -> Tensor:
    return torch.cat(own)


def _square(frames: int, *own: Tensor) -> Tensor:
    """Attention weights `[1, H, T, T]` of each utterance as `[B, H, frames, frames]`."""
    return torch.cat([nn.functional.pad(x, (0, frames - x.shape[3], 0, frames - x.shape[2])) for x in own])
