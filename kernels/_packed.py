"""Packed frames: which utterance a program's rows belong to, found in the offsets on the device.

The host knows how many frames and utterances there are, and no offsets: it never waits for them. So a grid is over
places: blocks of `size` frames, of which utterance b has those from `offsets[b] // size + b` on. No two utterances
share a place, a place or two of each may be empty, and `places` of them are enough. Blocks of one frame are the packed
frames themselves, and none is empty.
"""

import torch
import triton
import triton.language as tl


def places(frames: int, utterances: int, size: int) -> int:
    """How many there are of `frames` packed frames."""
    return frames if size == 1 else frames // size + utterances


def in_memory(*offsets: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Offsets as kernels read them: one behind the other."""
    return tuple(None if o is None else o.contiguous() for o in offsets)


def apart(offsets: torch.Tensor | None) -> tuple[str, ...]:
    """What tells launches on packed frames apart from others of their kernels."""
    return () if offsets is None else ("packed",)


@triton.jit
def first_place(offsets_ptr, b, size):
    """The place at which each utterance `b` begins."""
    start = tl.load(offsets_ptr + b)
    return start if size == 1 else start // size + b


@triton.jit
def utterance_at(place, offsets_ptr, utterances, size):
    """The utterance that each `place`, a number or a block of them, belongs to: by bisection."""
    b = place * 0
    left = tl.full([], utterances, tl.int32)
    while left > 1:
        half = left // 2
        b = tl.where(first_place(offsets_ptr, b + half, size) <= place, b + half, b)
        left -= half
    return b


@triton.jit
def following(place, b, offsets_ptr, size):
    """The utterance of the place behind `place`, which is one of utterance `b`; behind the last, one that is not."""
    ends = place + 1 == first_place(offsets_ptr, b + 1, size)
    return b + ends.to(tl.int32)


@triton.jit
def extent(offsets_ptr, b):
    """The first packed frame of each utterance `b`, in 64 bits, and how many it has."""
    first = tl.load(offsets_ptr + b)
    return first.to(tl.int64), tl.load(offsets_ptr + b + 1) - first


@triton.jit
def _sum_places_kernel(
    parts_ptr, offsets_ptr, sums_ptr, size, M, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr  # parts [places, M]
):  # fmt: skip
    b = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = first_place(offsets_ptr, b, size).to(tl.int64)
    _, frames = extent(offsets_ptr, b)
    count = tl.cdiv(frames, size)
    total = tl.zeros([BLOCK_P, BLOCK_M], dtype=sums_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = (part < count)[:, None] & (column < M)[None, :]
        total += tl.load(parts_ptr + (first + part)[:, None] * M + column[None, :], mask=inside, other=0.0)
    tl.store(sums_ptr + b.to(tl.int64) * M + column, tl.sum(total, axis=0), mask=column < M)


def sum_places(parts: torch.Tensor, offsets: torch.Tensor, size: int) -> torch.Tensor:
    """`[B, ...]`, each utterance's part of `[places, ...]` added up in order. What is at empty places is not read."""
    utterances = offsets.shape[0] - 1
    sums = parts.new_empty(utterances, *parts.shape[1:])
    M = parts[0].numel()
    _sum_places_kernel[(triton.cdiv(M, 32), utterances)](parts, offsets, sums, size, M, BLOCK_P=32, BLOCK_M=32)
    return sums
