"""Where the utterances of packed frames lie, in every stage of a model.

A packed batch runs through the modules as a batch of one, `[1, N, C]`: what knows no boundaries takes it as it is. What
knows them is handed a `Packing` in the place of the mask over frames. The front end, to which transformers hands on
nothing but samples, reads the packing of the present forward (`in_front_end`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Utterances of these lengths, in frames or samples, one behind the other; `offsets` is `[B + 1]` int32 on the
    device.
    """

    lengths: tuple[int, ...]
    offsets: Tensor

    @property
    def frames(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def utterances(self, x: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """The frames of each utterance, views of packed frames."""
        return x.split(self.lengths, dim)

    def each(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` of each utterance's frames `[1, T, C]`, packed: for what cannot take them packed."""
        return torch.cat([function(own) for own in self.utterances(x)], 1)

    def places(self, frames: int) -> Tensor:
        """Where packed frames are in a batch of rows of so many, counted through all rows, `[N]` int64."""
        starts = [b * frames - first for b, first in enumerate(accumulate(self.lengths[:-1], initial=0))]
        places = torch.arange(self.frames) + torch.tensor(starts).repeat_interleave(torch.tensor(self.lengths))
        return upload(places, self.offsets.device)

    def padding(self, frames: int) -> Callable[[Tensor], Tensor]:
        """What makes rows of so many frames, `[B, frames, ...]` with zeros past the ends, of packed `[1, N, ...]`."""
        places, batch = self.places(frames), len(self.lengths)

        def pad(x: Tensor) -> Tensor:
            rows = x.new_zeros((batch * frames, *x.shape[2:])).index_copy(0, places, x[0])
            return rows.unflatten(0, (batch, frames))

        return pad


def padded_rows(frames: int, *own: Tensor) -> Tensor:
    """`[1, T, ...]` of each utterance as rows of so many frames or more, `[B, frames, ...]`, zeros past the ends."""
    rows = torch.nn.utils.rnn.pad_sequence([x[0] for x in own], batch_first=True)
    short = frames - rows.shape[1]
    return torch.cat([rows, rows.new_zeros(rows.shape[0], short, *rows.shape[2:])], 1) if short > 0 else rows


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without waiting for what the device is doing."""
    return values.to(device) if device.type != "cuda" else values.pin_memory().to(device, non_blocking=True)


def packings(lengths: Sequence[int], convolutions: Iterable[tuple[int, int]], device: torch.device) -> list[Packing]:
    """The packing of the frames before, between and after convolutions of some width and stride."""
    stages = [tuple(lengths)]
    for width, stride in convolutions:
        stages.append(tuple((length - width) // stride + 1 for length in stages[-1]))
    ends = upload(torch.tensor([[0, *accumulate(stage)] for stage in stages], dtype=torch.int32), device)
    return [Packing(stage, own) for stage, own in zip(stages, ends.unbind(), strict=True)]


def resized(packing: Packing, after: Packing) -> dict[str, object]:
    """What ops that change the number of frames take."""
    return {"offsets": packing.offsets, "out_offsets": after.offsets, "out_frames": after.frames}


class _Present(threading.local):
    def __init__(self) -> None:  # once in every thread
        self.stages: list[Packing] | None = None
        self.valid_samples: Tensor | None = None


_present = _Present()


@contextmanager
def in_front_end(stages: list[Packing]) -> Iterator[None]:
    """Within, this thread's model gets packed samples: for its front end, and what else has no other way to know."""
    _present.stages = stages
    try:
        yield
    finally:
        _present.stages = None


def stages_of(samples: Tensor) -> list[Packing] | None:
    """The packing of the samples that come into the front end, and of the frames after each of its convolutions."""
    stages = _present.stages
    return stages if stages is not None and samples.shape[1] == stages[0].frames else None


def frames_of(hidden_states: Tensor) -> Packing | None:
    """The packing of the frames `[1, N, C]` behind the front end; None of frames that are not packed."""
    stages = _present.stages
    return stages[-1] if stages is not None and hidden_states.shape[:2] == (1, stages[-1].frames) else None


@contextmanager
def with_valid_samples(lengths: Tensor) -> Iterator[None]:
    """Within, norms over time of this thread's front ends count so many samples of each row, `[B]`, and no more."""
    before, _present.valid_samples = _present.valid_samples, lengths
    try:
        yield
    finally:
        _present.valid_samples = before


def valid_samples() -> Tensor | None:
    return _present.valid_samples
