"""Masks over frames `[B, T]`, True or 1 where a frame is valid, and the lengths that fused ops take instead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .._private import version
from ._packing import Packing


class _Made(threading.local):
    """The last mask that a model made of one over samples in this thread. Such a mask is ones followed by zeros.

    Nothing is kept on a mask itself: it is the user's as soon as somebody asks for it, and may be written to.
    """

    mask: Tensor | None = None
    version: object = 0


_made = _Made()


def made(mask: Tensor) -> Tensor:
    """The mask, known to be ones followed by zeros until somebody writes to it or `forget_made` is called."""
    if torch.compiler.is_compiling():
        _made.mask = mask
        return mask
    if mask.is_inference():
        with torch.inference_mode(False):
            mask = mask.clone()  # one that counts what is written to it
    _made.mask, _made.version = mask, version(mask)
    return mask


def forget_made() -> None:
    """The forward is over."""
    _made.mask = None


def prefix_lengths(mask: Tensor) -> Tensor | None:
    """Number of valid frames `[B]` int64; None when the mask `[B, T]` is not, or may not be, ones followed by zeros.

    On the CPU the values say. Elsewhere looking at them would wait for the device: a mask that the model itself has
    just made is taken at its word there. In a graph (torch.compile, torch.export) no values can be looked at, and
    nothing is known of masks that come from outside.
    """
    valid = mask.eq(1)
    in_graph = torch.compiler.is_compiling()
    if mask.device.type != "cpu" or in_graph:
        if _made.mask is mask and (in_graph or _made.version == version(mask)):
            return valid.sum(-1)
        if in_graph:
            return None
    return valid.sum(-1) if is_prefix(valid) else None


def is_prefix(valid: Tensor) -> bool:
    """Whether rows are True first and then False: looks at the values."""
    return not bool((valid[:, 1:] & ~valid[:, :-1]).any())


class _Turned(threading.local):
    """The padding mask of a model's present forward in this thread, and the mask that was made of it."""

    def __init__(self) -> None:  # once in every thread
        self.kept = False
        self.padding: Tensor | None = None
        self.mask: Tensor | None = None


_turned = _Turned()


@contextmanager
def looked_at_once() -> Iterator[None]:
    """Within, a forward: all layers get the same padding mask, and off the CPU only the first waits to look at it."""
    before = vars(_turned).copy()
    vars(_turned).update(kept=True, padding=None, mask=None)
    try:
        yield
    finally:
        vars(_turned).update(before)
        forget_made()


def valid_of(padding: Tensor) -> Tensor:
    """The mask `[B, T]`, True where valid, of one that is True where padded."""
    if padding.device.type == "cpu" or torch.compiler.is_compiling() or not _turned.kept:
        return ~padding.bool()
    if _turned.padding is not padding:
        mask = ~padding.bool()
        _turned.padding, _turned.mask = padding, mask if prefix_lengths(mask) is None else made(mask)
    return _turned.mask


@dataclass(frozen=True)
class Keys:
    """Which frames count as keys, as the fused ops take it: lengths of padded rows, or offsets of packed ones."""

    lengths: Tensor | None = None
    offsets: Tensor | None = None


def keys_of(mask: Tensor | Packing | None) -> Keys | None:
    """What a mask or packing says to the fused ops; None when no lengths can say it."""
    if isinstance(mask, Packing):
        return Keys(offsets=mask.offsets)
    lengths = None if mask is None else prefix_lengths(mask)
    return Keys(lengths) if mask is None or lengths is not None else None


def zero_padding(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """`hidden_states` `[B, T, C]` with zeros at the frames that the mask rules out."""
    return hidden_states if mask is None else hidden_states.masked_fill(~mask.bool()[..., None], 0)
