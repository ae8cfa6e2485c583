"""Packed frames on a grid: utterances so far apart that the windows of all are windows of one sequence.

With a stride every utterance begins at a multiple of it. Windows that span a boundary are nobody's: forward they are
left out, backward they have a gradient of zero. One product then serves all utterances where its library takes no
offsets, or where a product of each would be a small one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor

from ...ops._packed import Resized, bounds

Bounds = list[tuple[int, int]]


def resized_bounds(op: str, packed: Resized, frames: int, span: int, stride: int) -> tuple[Bounds, Bounds]:
    """First frame and end of every utterance before and after windows of `span` frames.

    Raises:
        ValueError: offsets that cannot be, or out_offsets and out_frames of others.
    """
    found = bounds(op, packed.offsets, frames)
    lengths = [(end - first - span) // stride + 1 for first, end in found]
    if min(lengths) < 1:
        shortest = min(end - first for first, end in found)
        raise ValueError(f"{op} wants offsets of utterances of {span} frames or more, got one of {shortest}")
    out = bounds(op, packed.out_offsets, packed.out_frames, "out_offsets")
    if lengths != [end - first for first, end in out]:
        raise ValueError(
            f"{op} wants out_offsets of {lengths} frames for these offsets, got {packed.out_offsets.tolist()}"
        )
    return found, out


@dataclass(frozen=True)
class Grid:
    """Where utterances, and what becomes of them at a stride, lie packed and on the grid."""

    bounds: Bounds
    out_bounds: Bounds
    stride: int

    def _starts(self) -> list[int]:
        """First window of every utterance, and where another one would begin."""
        return [0, *accumulate(-((first - end) // self.stride) for first, end in self.bounds)]

    def place(self, x: Tensor) -> Tensor:
        """Packed frames `[1, N, C]` on the grid, zeros between; themselves where they lie so."""
        starts = [self.stride * n for n in self._starts()]
        if starts == [first for first, _ in self.bounds] + [x.shape[1]]:
            return x
        return _spread(x, self.bounds, starts)

    def place_out(self, y: Tensor, span: int) -> Tensor:
        """Packed outputs `[1, N', C']` on the grid of windows of `span` frames, zeros where no utterance has any."""
        starts = self._starts()
        starts[-1] = (starts[-1] * self.stride - span) // self.stride + 1
        return _spread(y, self.out_bounds, starts)

    def pick_out(self, y: Tensor) -> Tensor:
        """Outputs of all windows on the grid -> those of utterances, packed."""
        packed = y.new_empty(y.shape[0], self.out_bounds[-1][1], y.shape[2])
        for (first, end), start in zip(self.out_bounds, self._starts(), strict=False):
            packed[:, first:end] = y[:, start : start + end - first]
        return packed


def _spread(x: Tensor, bounds: Bounds, starts: list[int]) -> Tensor:
    wide = x.new_empty(x.shape[0], starts[-1], x.shape[2])
    for (first, end), (start, after) in zip(bounds, pairwise(starts), strict=True):
        wide[:, start : start + end - first] = x[:, first:end]
        wide[:, start + end - first : after] = 0
    return wide
