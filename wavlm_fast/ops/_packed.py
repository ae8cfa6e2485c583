"""Packed frames: the utterances of a batch one behind the other, `[1, N, ...]`, beside `offsets`.

`offsets` is `[B + 1]` int32 on the device of the frames: utterance b is the frames `offsets[b]` to `offsets[b + 1]`. It
begins with 0, rises, and ends with N. What an op gives for packed frames is, utterance by utterance, what it gives for
the utterance alone. An op that changes the number of frames takes the offsets of its output and their last entry, a
Python int, as well: they are the caller's to compute once, and nothing waits for a device.

What is here are the references: one utterance after the other through the op's own form for a dense batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check as check


class Resized(NamedTuple):
    """The last arguments of an op that makes another number of frames; all None of a dense batch."""

    offsets: Tensor | None = None
    out_offsets: Tensor | None = None
    out_frames: int | None = None


DENSE = Resized()


def bounds(op: str, offsets: Tensor, frames: int, name: str = "offsets") -> list[tuple[int, int]]:
    """First frame and end of every utterance.

    Raises:
        ValueError: the offsets do not begin with 0, rise, and end with `frames`.
    """
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != frames or any(b <= a for a, b in pairwise(ends)):
        raise ValueError(f"{op} wants {name} that rise from 0 to the {frames} frames, got {ends}")
    return list(pairwise(ends))


def utterances(op: str, offsets: Tensor, *frames: Tensor | None, dim: int = 1) -> list[tuple[Tensor | None, ...]]:
    """Each utterance's part of every tensor; views. Vectors without elements and None, which are not read, stay."""

    def own(x: Tensor | None, first: int, end: int) -> Tensor | None:
        return x if x is None or x.dim() <= dim else x.narrow(dim, first, end - first)

    within = bounds(op, offsets, frames[0].shape[dim])
    return [tuple(own(x, first, end) for x in frames) for first, end in within]


def joined(parts: Sequence[Any], dim: int = 1) -> Any:
    """The utterances' outputs one behind the other: tensors, or tuples of tensors."""
    if isinstance(parts[0], tuple):
        return tuple(joined(column, dim) for column in zip(*parts, strict=True))
    return torch.cat(parts, dim) if parts[0].dim() > dim else parts[0]


def summed(parts: Sequence[Tensor]) -> Tensor:
    """What the utterances add to the gradient of something that all of them share."""
    wide = torch.stack([p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts])
    return wide.sum(0).to(parts[0].dtype)


def each(op: str, function: Callable[..., Any], offsets: Tensor, *frames: Tensor) -> Any:
    """`function` of every utterance's frames, its outputs joined."""
    return joined([function(*own) for own in utterances(op, offsets, *frames)])


def windows(size: int, stride: int = 1) -> Callable[[int], int]:
    """How many frames are made of so many by windows of `size`: none or less of too few."""
    return lambda frames: (frames - size) // stride + 1


def check_lengths(
    op: str, after: Callable[[int], int], offsets: Tensor, out_offsets: Tensor, frames: int, out_frames: int
) -> None:
    """Refuse offsets of an output that are not those of `after` so many frames; reads values.

    Raises:
        ValueError: they are not, or an utterance is too short for a frame.
    """
    lengths = [end - first for first, end in bounds(op, offsets, frames)]
    wanted = [after(length) for length in lengths]
    if min(wanted) < 1:
        raise ValueError(f"{op} wants offsets of utterances long enough for a frame, got lengths {lengths}")
    if [end - first for first, end in bounds(op, out_offsets, out_frames, "out_offsets")] != wanted:
        raise ValueError(f"{op} wants out_offsets of {wanted} frames for these offsets, got {out_offsets.tolist()}")


def each_resized(
    op: str, function: Callable[..., Tensor], after: Callable[[int], int], packed: Resized, frames: Tensor
) -> Tensor:
    """The same where `function` makes `after(T)` frames of T.

    Raises:
        ValueError: the offsets do not fit the frames, or each other.
    """
    check_lengths(op, after, packed.offsets, packed.out_offsets, frames.shape[1], packed.out_frames)
    return each(op, function, packed.offsets, frames)


def each_backward(
    op: str,
    function: Callable[..., tuple[Tensor, ...]],
    after: Callable[[int], int],
    packed: Resized,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """A backward utterance by utterance: `function(*inputs, *outputs)` of the frames of each gives the gradient of the
    first input, whose utterances are joined, and others, which are added up.
    """
    check_lengths(op, after, packed.offsets, packed.out_offsets, inputs[0].shape[1], outputs[0].shape[1])
    pairs = zip(utterances(op, packed.offsets, *inputs), utterances(op, packed.out_offsets, *outputs), strict=True)
    first, *others = zip(*(function(*own, *made) for own, made in pairs), strict=True)
    return joined(first), *map(summed, others)


def check_packed(op: str, name: str, x: Tensor, offsets: Tensor | None) -> None:
    """Refuse what cannot be the offsets of packed frames `x`; reads no values."""
    if offsets is None:
        return
    if x.shape[0] != 1:
        raise ValueError(f"{op} wants {name} packed, [1, N, ...], beside offsets, got {list(x.shape)}")
    check_offsets(op, "offsets", x, offsets)


def check_either(op: str, offsets: Tensor | None, **lengths: Tensor | None) -> None:
    """Refuse lengths, by their name, beside offsets."""
    for name, given in lengths.items():
        if offsets is not None and given is not None:
            raise ValueError(f"{op} wants {name} or offsets, got both")


def check_offsets(op: str, name: str, x: Tensor, offsets: Tensor) -> None:
    check.shape(op, name, offsets, ("B + 1",))
    if offsets.dtype != torch.int32:
        raise TypeError(f"{op} wants {name} of torch.int32, got {offsets.dtype}")
    if offsets.shape[0] < 2:
        raise ValueError(f"{op} wants {name} of one utterance or more, got {list(offsets.shape)}")
    check.same_device(op, "the frames", x, **{name: offsets})


def check_resized(op: str, name: str, x: Tensor, packed: Resized) -> None:
    """The same of an op that changes the number of frames."""
    offsets, out_offsets, out_frames = packed
    check_packed(op, name, x, offsets)
    given = [v is not None for v in packed]
    if any(given) and not all(given):
        raise ValueError(f"{op} wants offsets, out_offsets and out_frames together, or none of them")
    if offsets is None:
        return
    check_offsets(op, "out_offsets", x, out_offsets)
    if out_offsets.shape != offsets.shape:
        raise ValueError(f"{op} wants out_offsets of shape {list(offsets.shape)}, got {list(out_offsets.shape)}")
    if out_frames < offsets.shape[0] - 1:
        raise ValueError(f"{op} wants out_frames of one in each utterance or more, got {out_frames} in all")
    if out_frames > x.shape[1]:  # whatever the op: what it takes memory for is bounded by what it is given
        raise ValueError(f"{op} wants out_frames of {x.shape[1]}, the frames it is given, or less, got {out_frames}")


RESIZED = "Tensor? offsets=None, Tensor? out_offsets=None, SymInt? out_frames=None"
