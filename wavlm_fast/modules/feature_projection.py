"""Frames of the front end to the encoder's width."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ._steps import Signal, Step, linear_step


class FeatureProjection:
    """Layer norm, linear layer, dropout. Made of `layer_norm`, `projection`, `dropout`."""

    def _project(self, normed: Tensor) -> Step:
        return linear_step("projection", self.projection, normed)

    def steps(self, signal: Signal) -> Iterator[Step]:
        yield self._project(signal.frames(self, getattr(self.projection, "in_features", 0)))

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, C]` to the projected frames `[B, T, C']` and the normed ones `[B, T, C]`."""
        normed = self.layer_norm(hidden_states)
        return self.dropout(self._project(normed).run()), normed
