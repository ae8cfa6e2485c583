"""Spans to mask in pre-training and fine-tuning, drawn as fairseq and Microsoft's WavLM draw them."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def compute_mask_indices(
    shape: tuple[int, int],
    padding_mask: Tensor | None,
    mask_prob: float,
    mask_length: int,
    mask_type: str = "static",
    mask_other: float = 0.0,
    min_masks: int = 0,
    no_overlap: bool = False,
    min_space: int = 0,
) -> np.ndarray:
    """Where to mask, from numpy's global generator, with the very draws of the original.

    Args:
        shape: rows and columns: utterances and frames, or utterances and channels.
        padding_mask: `[rows, columns]`, True at the padded end of a row, which stays unmasked.
        mask_prob: about which share of a row to mask; spans that overlap mask less.
        mask_length: length of a span, in columns; what the random lengths are drawn around.
        mask_type: how lengths are drawn: static, uniform (mask_other to 2 mask_length), normal (with deviation
            mask_other) or poisson.
        mask_other: see mask_type.
        min_masks: how many spans a row has at least.
        no_overlap: whether spans keep apart.
        min_space: how many columns between spans stay free with no_overlap.

    Returns:
        bool, `shape`; every row has the same number of True, that of the row which drew fewest.

    Raises:
        ValueError: mask_type is none of the four.
    """
    rows, columns = shape

    def spans_of(size: int) -> int:
        return max(min_masks, int(mask_prob * size / mask_length + np.random.rand()))  # rounded by chance

    spans = spans_of(columns)  # drawn in any case: the generator goes on from here
    masked = []
    for row in range(rows):
        size = columns
        if padding_mask is not None:
            size -= int(padding_mask[row].sum())
            spans = spans_of(size)
        lengths = _lengths(spans, mask_length, mask_type, mask_other)
        if spans and not lengths.any():
            lengths[0] = min(mask_length, size - 1)
        place = _starts_apart if no_overlap else _starts
        starts = place(size, lengths, min_space) if spans else []
        ends = [np.arange(start, start + length) for start, length in starts]
        found = np.unique(np.concatenate(ends)) if ends else np.empty(0, int)
        masked.append(found[found < size])

    fewest = min(map(len, masked))
    mask = np.zeros(shape, bool)
    for marks, found in zip(mask, masked, strict=True):
        marks[found if len(found) == fewest else np.random.choice(found, fewest, replace=False)] = True
    return mask


def _lengths(spans: int, mask_length: int, mask_type: str, other: float) -> np.ndarray:
    if mask_type == "static":
        return np.full(spans, mask_length)
    if mask_type == "uniform":
        return np.random.randint(other, mask_length * 2 + 1, size=spans)  # type: ignore[call-overload]
    if mask_type == "normal":
        return np.maximum(1, np.rint(np.random.normal(mask_length, other, size=spans)).astype(int))
    if mask_type == "poisson":
        return np.random.poisson(mask_length, size=spans)
    raise ValueError(f"the mask's lengths are drawn static, uniform, normal or poisson, not {mask_type!r}")


def _starts(size: int, lengths: np.ndarray, min_space: int) -> list[tuple[int, int]]:
    """Each span's start and length, anywhere in the row."""
    spans, shortest = len(lengths), int(lengths.min())
    if size - shortest <= spans:  # a row so short: starts up to its end, so that there are enough of them
        shortest = size - spans - 1
    return list(zip(np.random.choice(size - shortest, spans, replace=False), lengths, strict=True))


def _starts_apart(size: int, lengths: np.ndarray, min_space: int) -> list[tuple[int, int]]:
    """Each span's start and length, longest first, none closer to another than min_space; what has no room is left."""
    free, shortest, placed = [(0, size)], int(lengths.min()), []
    for length in sorted(lengths.tolist(), reverse=True):
        room = np.array([end - start if end - start >= length + min_space else 0 for start, end in free], int)
        if not room.any():
            break
        start, end = free.pop(np.random.choice(len(free), p=room / room.sum()))
        at = np.random.randint(start, max(start + 1, end - length))
        placed.append((at, length))
        if at - start - min_space >= shortest:
            free.append((start, at - min_space + 1))
        if end - at - shortest - min_space > shortest:
            free.append((at + length + min_space, end))
    return placed
