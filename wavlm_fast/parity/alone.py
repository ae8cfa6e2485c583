"""What an op means for packed frames: the op on each utterance alone.

Knows nothing of our own way with packed frames (`ops/_packed.py`): offsets are turned into numbers, frames are cut, and
what comes of them is put one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ops import OPS


@dataclass(frozen=True)
class _Shape:
    """How an op's arguments and outputs lie.

    Attributes:
        frames: position of an argument that has frames -> its dimension of frames.
        bias: the position of the bias `[H, 2L - 1]`, of which an utterance has what lies around its centre.
        outputs: the dimension along which the utterances' outputs lie, for each of them.
    """

    frames: tuple[tuple[int, int], ...] = ((0, 1),)
    bias: int | None = None
    outputs: tuple[int, ...] = (1,)


_SHAPES = {
    "waveform_conv": _Shape(),
    "feature_encoder": _Shape(),
    "strided_conv": _Shape(),
    "positional_conv": _Shape(),
    "gated_attention": _Shape(frames=((0, 1), (1, 1), (2, 1), (3, 2)), bias=4, outputs=(1, 2)),
    "encoder_layer": _Shape(bias=1),
    "tdnn": _Shape(),
    "stats_pool": _Shape(outputs=(0,)),
}
PACKED = tuple(_SHAPES)

# What an op of another number of frames is made of: windows of so many frames, and so many from one to the next.
_WINDOWS: dict[str, Callable[[dict[str, Any]], list[tuple[int, int]]]] = {
    "waveform_conv": lambda v: [(v["weight"].shape[2], v["stride"])],
    "strided_conv": lambda v: [(v["weight"].shape[2], v["stride"])],
    "feature_encoder": lambda v: [(w.shape[2], s) for w, s in zip(v["weights"], v["strides"], strict=True)],
    "tdnn": lambda v: [((v["kernel_size"] - 1) * v["dilation"] + 1, 1)],
}
RESIZED = tuple(_WINDOWS)


def lengths_after(op: str, values: dict[str, Any], lengths: Sequence[int]) -> list[int]:
    """How many frames an op makes of utterances of `lengths`, by its arguments' names."""
    found = list(lengths)
    for size, stride in _WINDOWS[op](values) if op in _WINDOWS else ():
        found = [(length - size) // stride + 1 for length in found]
    return found


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def each(op: str, dense: Callable[..., Any]) -> Callable[..., Any]:
    """`dense`, which takes the arguments of `op` for dense batches, for packed frames too."""
    if op not in _SHAPES:
        return dense
    shape, count = _SHAPES[op], list(OPS[op].arguments).index("offsets")

    def run(*args: Any) -> Any:
        own, packed = args[:count], args[count:]
        if not packed or packed[0] is None:
            return dense(*own)
        ends = packed[0].tolist()
        parts = [dense(*_of(shape, own, first, end), **_rows(op, first, ends[-1])) for first, end in pairwise(ends)]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, shape.outputs[0])
        return tuple(torch.cat(out, dim) for out, dim in zip(zip(*parts, strict=True), shape.outputs, strict=True))

    return run


def _of(shape: _Shape, args: tuple, first: int, end: int) -> list[Any]:
    """The arguments of one utterance."""
    own = list(args)
    for at, dim in shape.frames:
        own[at] = own[at].narrow(dim, first, end - first)
    if shape.bias is not None:
        own[shape.bias] = around_centre(own[shape.bias], end - first)
    return own


def around_centre(rel_bias: Tensor, frames: int) -> Tensor:
    """Of a bias `[H, 2L - 1]` what an utterance of so many frames has of it, `[H, 2T - 1]`."""
    centre = rel_bias.shape[1] // 2
    return rel_bias[:, centre - frames + 1 : centre + frames]


def _rows(op: str, first: int, frames: int) -> dict[str, Any]:
    """The one thing that depends on an utterance's place: which random numbers its dropout draws."""
    return {"rows": (first, frames)} if op == "gated_attention" else {}
