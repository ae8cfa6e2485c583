"""Whole models of copied houses: exact batches, and lists of waveforms.

Their own code runs on packed samples as on a batch of one. Whether that is right, whether between the stages every
frame is worked on alone, is tried once; where it is not, utterances run one at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..inputs import receptive_field
from ..modules import EncoderLayer, FeatureEncoder, PositionalConv, Signal, Step, steps_of_children
from ..modules._originals import StandIn, why_original
from ..modules._packing import Packing, in_front_end, packings, padded_rows
from ..modules._position_bias import handing_on_as_it_is
from ..modules.encoder_layer import why_layer_not_packed
from ._copies import Call, Copy, base_of, why_not_trusted

Run = Callable[[Tensor], Any]


def with_bias_of_graphs(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a model that runs its layers. In a graph they hand on the compact position bias, if all are ours."""

    @functools.wraps(method)
    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() or not all(isinstance(m, EncoderLayer) for m in self.layers_of_model()):
            return method(self, *args, **kwargs)
        with handing_on_as_it_is():
            return method(self, *args, **kwargs)

    return chosen


class Model(Copy):
    """What the models of copied houses share. `feature_extractor` is their front end."""

    tried_first = False  # it only does something of its own where batches are exact
    cut = ("layers",)

    @staticmethod
    def run(model: nn.Module, waveforms: Tensor, **options: Any) -> Any:
        """The model's own outputs for waveforms `[B, S]`, without padding."""
        raise NotImplementedError

    @staticmethod
    def map_frames(function: Callable[..., Tensor], *outputs: Any) -> Any:
        """The function of every tensor of frames `[B, T, ...]` in outputs, or of those at the same place in several."""
        raise NotImplementedError

    def steps(self, signal: Signal) -> Iterator[Step]:
        """What `report` tells of."""
        return steps_of_children(self, signal)

    def layers_of_model(self) -> nn.ModuleList:
        """The transformer's layers."""
        raise NotImplementedError

    @classmethod
    def trials(cls, module: nn.Module) -> Iterator[Call]:
        rows = [torch.randn(n, dtype=torch.float64) for n in (1500, 900)]

        def packed_or_alone(own: nn.Module) -> Any:
            run = lambda waveforms: cls.run(own, waveforms)  # noqa: E731
            return own.run_together(rows, run) if isinstance(own, Model) else [run(row[None]) for row in rows]

        yield packed_or_alone

    def convolutions(self) -> list[tuple[int, int]]:
        """Width and stride of each of the front end's."""
        convs = [layer.conv for layer in self.feature_extractor.layers]
        return [(conv.kernel_size[0], conv.stride[0]) for conv in convs]

    def samples_needed(self) -> int:
        """The fewest samples of an utterance of which the model makes a frame."""
        if not isinstance(self.feature_extractor, FeatureEncoder):
            return 1
        return receptive_field(*zip(*self.convolutions(), strict=True))

    def frames_of(self, outputs: Any) -> int:
        """How many frames there are in every row of outputs."""
        found = []

        def look_at(x: Tensor) -> Tensor:
            found.append(x.shape[1])
            return x

        self.map_frames(look_at, outputs)
        return found[0]

    def why_alone(self) -> str | None:
        """Why utterances run one at a time, a sentence; None when they can run packed."""
        if not isinstance(self.feature_extractor, FeatureEncoder):
            return f"feature_extractor is called: it is a {type(self.feature_extractor).__name__}"
        fast = [module for module in self.modules() if isinstance(module, StandIn)]
        reason = next((reason for reason in map(why_original, fast) if reason is not None), None)
        reason = reason or self.feature_extractor.why_not_packed()
        if reason is None and not any(isinstance(module, PositionalConv) for module in fast):
            reason = "the positional convolution is called"
        for index, layer in enumerate(self.layers_of_model()):
            found = why_layer_not_packed(layer)
            reason = reason or (None if found is None else f"layer {index}: {found}")
        return reason or why_not_trusted(base_of(type(self)), self)

    def packings_of(self, waveforms: Sequence[Tensor]) -> list[Packing]:
        """Of the samples of waveforms `[S]`, and of the frames after each of the front end's convolutions."""
        return packings([len(w) for w in waveforms], self.convolutions(), waveforms[0].device)

    def run_packed(self, waveforms: Sequence[Tensor], stages: list[Packing], run: Run) -> Any:
        """The outputs for waveforms, their frames packed."""
        with in_front_end(stages):
            return run(torch.cat(list(waveforms))[None])

    def run_together(self, waveforms: Sequence[Tensor], run: Run) -> list[Any]:
        """The outputs for each waveform, views of packed ones."""
        stages = self.packings_of(waveforms)
        outputs, found, first = self.run_packed(waveforms, stages, run), [], 0
        for count in stages[-1].lengths:
            found.append(self.map_frames(lambda x, a=first, n=count: x.narrow(1, a, n), outputs))
            first += count
        return found

    def run_each(self, waveforms: Sequence[Tensor], run: Run) -> list[Any]:
        """The outputs for each waveform `[S]`."""
        if self.why_alone() is None:
            return self.run_together(waveforms, run)
        return [run(waveform[None]) for waveform in waveforms]

    def run_exact(
        self, waveforms: Tensor, lengths: Sequence[int], run: Run, alone: bool = False
    ) -> tuple[Any, Sequence[int]]:
        """The outputs for rows `[B, S]` with so many valid samples, each as if alone, zeros past the ends; and how many
        frames each row has.

        With `alone` they run one at a time.
        """
        width = waveforms.shape[1]
        if set(lengths) <= {width} and not alone:
            outputs = run(waveforms)
            return outputs, [self.frames_of(outputs)] * len(lengths)
        rows = [row[:length] for row, length in zip(waveforms, lengths, strict=True)]
        known = isinstance(self.feature_extractor, FeatureEncoder)
        frames = self.packings_of(waveforms[:1])[-1].longest if known else 0
        if not alone and self.why_alone() is None:
            stages = self.packings_of(rows)
            packed = self.run_packed(rows, stages, run)
            return self.map_frames(stages[-1].padding(frames), packed), stages[-1].lengths
        each = [run(row[None]) for row in rows]
        outputs = self.map_frames(lambda *own: padded_rows(frames, *own), *each)
        return outputs, [self.frames_of(own) for own in each]
