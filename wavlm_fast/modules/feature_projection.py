"""Frames of the front end to the encoder's width."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers.models.wavlm import modeling_wavlm as hf

from ._originals import or_original, stands_in_for
from ._steps import FastModule, Signal, Step, linear_step


@stands_in_for(hf.WavLMFeatureProjection)
class FastWavLMFeatureProjection(FastModule, hf.WavLMFeatureProjection):
    """Layer norm, linear layer, dropout."""

    def _project(self, normed: Tensor) -> Step:
        return linear_step("projection", self.projection, normed)

    def steps(self, signal: Signal) -> Iterator[Step]:
        yield self._project(signal.frames(self, getattr(self.projection, "in_features", 0)))

    @or_original
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, C]` to the projected frames `[B, T, C']` and the normed ones `[B, T, C]`."""
        normed = self.layer_norm(hidden_states)
        return self.dropout(self._project(normed).run()), normed
