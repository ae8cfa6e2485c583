"""Packed frames in tiles: which tile of which utterance a program has.

A grid has to be known without the offsets' values: nobody waits for a device. Tiles therefore have places. Utterance b
has those from offsets[b] // BLOCK + b up to the next one's, never fewer than it has tiles and at most one more,
N // BLOCK + B in all. A program whose place is left over has nothing to do. Places are in the order of the utterances:
who puts long ones first has them computed first, and short ones fill what they leave idle.

A kernel cannot refuse offsets that are wrong. It reads and writes no frames but the N, and takes no more frames of an
utterance than the bias is for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._packed import places

# Offsets that a program looks at together.
LANES = tl.constexpr(128)


@triton.jit
def utterance_at(offsets_ptr, utterances, place, BLOCK: tl.constexpr):
    """The utterance that a place belongs to: the last that begins at it or before."""
    found = tl.full([], -1, tl.int32)
    for first in range(0, utterances, LANES):
        b = first + tl.arange(0, LANES)
        offset = tl.load(offsets_ptr + b, mask=b < utterances, other=2**31 - 1)
        found += tl.sum((offset // BLOCK + b <= place).to(tl.int32), axis=0)
    return tl.maximum(found, 0)


@triton.jit
def frames_of(offsets_ptr, b, N, L):
    """First frame of an utterance, and how many it has."""
    begin = tl.maximum(tl.load(offsets_ptr + b), 0)
    end = tl.minimum(tl.load(offsets_ptr + b + 1), N)
    return begin, tl.minimum(end - begin, L)


@triton.jit
def own_tile(
    offsets_ptr, utterances, L, T, H, BLOCK: tl.constexpr, PACKED: tl.constexpr, DIVIDED: tl.constexpr = False
):
    """What a program of `grid` has: utterance, head, its first frame, the utterance's frames, and the bias's L.

    PACKED, T comes as N, the utterance goes by its first frame, as `strides` wants it, and a tile past its frames is
    to be left out. DIVIDED finds the same head the long way, by which registers are allotted otherwise.
    """
    if PACKED:
        h = tl.program_id(1) % H if DIVIDED else tl.program_id(1)
        b = utterance_at(offsets_ptr, utterances, tl.program_id(0), BLOCK)
        begin, frames = frames_of(offsets_ptr, b, T, L)
        return begin, h, tl.maximum(tl.program_id(0) - begin // BLOCK - b, 0) * BLOCK, frames, L
    else:
        first = tl.program_id(0) * BLOCK
        return tl.program_id(1) // H, tl.program_id(1) % H, first, T, T


@triton.jit
def frames_before(b, T, PACKED: tl.constexpr):
    """Frames in front of utterance b of a contiguous `[B, T, H, D]`; PACKED it goes by them."""
    return b.to(tl.int64) if PACKED else b.to(tl.int64) * T


@triton.jit
def numbers_before(b, h, N, PACKED: tl.constexpr):
    """The numbers in front of a program's utterance and head in a contiguous `[B, H, N]`."""
    return h.to(tl.int64) * N + b if PACKED else tl.program_id(1).to(tl.int64) * N


def grid(q: torch.Tensor, offsets: torch.Tensor | None, block: int) -> tuple[int, int]:
    """Tiles of the frames of q `[B, T, H, D]`, and heads."""
    B, T, H, _ = q.shape
    tiles = triton.cdiv(T, block) if offsets is None else places(T, offsets.shape[0] - 1, block)
    return tiles, B * H


def strides(offsets: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[int, ...]:
    """Of each tensor, from one utterance, frame and head to the next. Packed, an utterance goes by its first frame."""
    found = []
    for x in tensors:
        utterance, frame, head = x.stride()[:3]
        found += utterance if offsets is None else frame, frame, head
    return tuple(found)


def arguments(
    offsets: torch.Tensor | None, rel_bias: torch.Tensor
) -> tuple[torch.Tensor | None, int | None, int | None]:
    """offsets_ptr, utterances and L of a kernel; nothing for a dense batch."""
    if offsets is None:
        return None, None, None
    return offsets.contiguous(), offsets.shape[0] - 1, (rel_bias.shape[1] + 1) // 2


def sizes(q: torch.Tensor, offsets: torch.Tensor | None) -> tuple[int, int]:
    """What configurations are chosen for: the frames of an utterance, on average, and utterances times heads."""
    B, T, H, _ = q.shape
    if offsets is None:
        return T, B * H
    utterances = offsets.shape[0] - 1
    return triton.cdiv(T, utterances), utterances * H
