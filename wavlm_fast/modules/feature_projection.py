"""Frames of the front end to the encoder's width."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers.models.wavlm import modeling_wavlm as hf

from ._originals import or_original, stands_in_for
from ._steps import FastModule, Plan, linear, plan_linear


@stands_in_for(hf.WavLMFeatureProjection)
class FastWavLMFeatureProjection(FastModule, hf.WavLMFeatureProjection):
    """Layer norm, linear layer, dropout."""

    def plan(self) -> Iterator[Plan]:
        yield plan_linear("projection", self.projection)

    @or_original
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, C]` to the projected frames `[B, T, C']` and the normed ones `[B, T, C]`."""
        normed = self.layer_norm(hidden_states)
        return self.dropout(linear(self.projection, normed)), normed
