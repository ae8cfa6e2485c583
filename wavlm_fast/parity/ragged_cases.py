"""What ops are tried on that take packed frames: batches of utterances of any lengths, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .alone import RESIZED, lengths_after, offsets_of
from .builders import Case, case_of
from .drawn import named
from .values import Build, Leaves

_WAVEFORMS = ("waveform_conv", "feature_encoder")


def ragged(
    op: str, name: str, lengths: Sequence[int], *sizes: Any,
    quick: bool = False, differentiate: bool = True, **options: Any,
) -> Case:  # fmt: skip
    """A case of packed frames.

    Args:
        op, name: identify it.
        lengths: of the utterances, in frames, or samples.
        sizes, options: what the builder of the op's cases takes after batch and frames; `longest`, the frames that a
            bias is for where they are more than those of the longest utterance.
    """
    longest = options.pop("longest", max(lengths))
    dense = case_of(op, f"ragged, {name}", 1, sum(lengths), *sizes, **options)
    return replace(
        dense,
        build=_packed(op, dense.build, tuple(lengths), longest),
        quick=quick,
        ragged=True,
        differentiate=dense.differentiate and differentiate,
    )


def _packed(op: str, build: Build, lengths: tuple[int, ...], longest: int) -> Build:
    def packed(g: torch.Generator) -> Leaves:
        leaves = build(g)
        if op in (*_WAVEFORMS, "stats_pool"):
            # Utterances are not equally loud: their statistics differ.
            first = next(iter(leaves))
            leaves[first] = leaves[first] * _levels(lengths).view(1, -1, *[1] * (leaves[first].dim() - 2))
        if "rel_bias" in leaves:
            leaves["rel_bias"] = leaves["rel_bias"][:, : 2 * longest - 1]
        leaves["offsets"] = offsets_of(lengths)
        if op in RESIZED:
            out = lengths_after(op, named(op, leaves), lengths)
            leaves |= {"out_offsets": offsets_of(out), "out_frames": sum(out)}
        return leaves

    return packed


def _levels(lengths: tuple[int, ...]) -> Tensor:
    levels = torch.tensor([0.4 + 0.7 * (i % 5) for i in range(len(lengths))], dtype=torch.float64)
    return levels.repeat_interleave(torch.tensor(lengths))


def _many(least: int, most: int) -> list[int]:
    """64 lengths in no order, `least` and `most` among them."""
    return [least + (19 * i) % 64 * (most - least) // 63 for i in range(64)]


_STACK = ((16, 10, 5), (16, 3, 2), (12, 3, 2), (16, 2, 2))

RAGGED: tuple[Case, ...] = (
    ragged("waveform_conv", "group norm", (203, 31, 408, 15, 96), 24, quick=True),
    ragged("waveform_conv", "group norm, bias, sorted", (30, 32, 40, 90, 333), 16, bias=True, activation="gelu_tanh"),
    ragged("waveform_conv", "group norm, long among short", (21, 36, 5011, 18), 16),
    ragged("waveform_conv", "group norm, one utterance", (203,), 16),
    ragged("waveform_conv", "group norm, 64 utterances", _many(15, 99), 12),
    ragged("waveform_conv", "layer norm, one frame among others", (57, 10, 14, 211), 24, norm="layer", bias=True,
           quick=True),
    ragged("waveform_conv", "no norm, equal lengths, odd kernel", (61, 61, 61), 12, 7, 3, norm="none",
           activation="relu"),
    ragged("feature_encoder", "group norm", (403, 150, 707, 111), *_STACK, quick=True),
    ragged("feature_encoder", "layer norm, biases, sorted", (110, 131, 222, 603), *_STACK, norm="layer", bias=True,
           quick=True),
    ragged("feature_encoder", "no norm, one frame among others", (250, 75, 75, 310), *_STACK, norm="none", bias=True),
    ragged("feature_encoder", "several pieces", (96, 9000, 120), (16, 10, 5), (32, 3, 2), (8, 3, 2)),
    ragged("feature_encoder", "64 utterances", _many(76, 200), (8, 10, 5), (8, 3, 2), (12, 3, 2)),
    ragged("feature_encoder", "equal lengths, one layer", (101, 101, 101), (16, 10, 5)),
    ragged("feature_encoder", "one utterance", (333,), (16, 10, 5), (16, 3, 2), norm="layer"),
    ragged("strided_conv", "k3 s2, gelu", (17, 41, 3, 12, 6, 30), 16, 24, 3, 2, quick=True),
    ragged("strided_conv", "layer norm, bias, sorted", (3, 4, 5, 12, 37), 16, 24, 3, 2, norm=True, bias=True,
           quick=True),
    ragged("strided_conv", "k2 s2, equal lengths", (14, 14, 14), 24, 16, 2, 2, activation="gelu_tanh"),
    ragged("strided_conv", "k2 s2, 64 utterances", _many(2, 23), 16, 16, 2, 2, bias=True),
    ragged("strided_conv", "k5 s3, long among short", (9, 5, 2003, 8), 8, 12, 5, 3, activation="none", bias=True),
    ragged("strided_conv", "one utterance", (41,), 16, 16, 3, 2, norm=True),
    ragged("positional_conv", "even kernel", (19, 1, 37, 4), 32, 16, 4, quick=True),
    ragged("positional_conv", "odd kernel, sorted", (1, 2, 9, 40), 32, 15, 4, activation="relu"),
    ragged("positional_conv", "k128", (60, 3, 149), 32, 128, 2),
    ragged("positional_conv", "64 utterances", _many(1, 20), 16, 8, 2, residual=False),
    ragged("positional_conv", "equal lengths", (21, 21, 21), 16, 6, 1, bias=False),
    ragged("positional_conv", "one utterance", (50,), 24, 8, 2),
    ragged("positional_conv", "long among short", (5, 1301, 7), 16, 32, 2),
    ragged("gated_attention", "D 32", (19, 1, 37, 8), 2, 32, quick=True),
    ragged("gated_attention", "D 64, bias of more, one product", (17, 30, 2, 70), 2, 64, layout="packed", longest=83),
    ragged("gated_attention", "dropout", (23, 41, 1, 9), 2, 32, dropout=0.25, quick=True),
    ragged("gated_attention", "dropout, bias of more", (5, 70, 33), 2, 16, dropout=0.5, longest=90),
    ragged("gated_attention", "64 utterances", _many(1, 20), 2, 16),
    ragged("gated_attention", "equal lengths, sorted", (27, 27, 27), 2, 80, layout="window"),
    ragged("gated_attention", "one utterance", (45,), 2, 32, layout="heads first"),
    ragged("gated_attention", "sorted, outliers", (1, 2, 3, 5, 8, 13, 64, 65), 1, 64, outliers=True),
    ragged("gated_attention", "long among short", (3, 1100, 64, 1), 1, 16),
    ragged("encoder_layer", "norms after", (19, 37, 1, 8), 3, 32, 100, quick=True),
    ragged("encoder_layer", "norms first, bias of more", (30, 2, 44), 2, 32, 48, norm_first=True, longest=60,
           quick=True),
    ragged("encoder_layer", "64 utterances", _many(1, 20), 2, 16, 24),
    ragged("encoder_layer", "equal lengths, norms first, relu", (21, 21, 21), 2, 16, 24, norm_first=True,
           activation="relu"),
    ragged("encoder_layer", "sorted", (1, 2, 5, 33, 90), 2, 16, 40, activation="gelu_tanh"),
    ragged("encoder_layer", "one utterance", (37,), 2, 16, 24, norm_first=True),
    ragged("encoder_layer", "long among short", (12, 1101, 3), 1, 16, 24),
    ragged("tdnn", "k5", (23, 5, 12, 31), 16, 24, 5, 1, quick=True),
    ragged("tdnn", "k3, dilation 2, sorted", (5, 6, 21, 40), 24, 16, 3, 2),
    ragged("tdnn", "k3, dilation 3, no bias, none, equal lengths", (19, 19, 19), 16, 12, 3, 3, bias=False,
           activation="none"),
    ragged("tdnn", "k1", (7, 1, 20), 16, 40, 1, 1),
    ragged("tdnn", "64 utterances", _many(5, 30), 16, 16, 3, 2),
    ragged("tdnn", "one utterance", (23,), 16, 24, 5, 1),
    ragged("tdnn", "long among short", (8, 1502, 5), 8, 8, 3, 2),
    ragged("stats_pool", "any lengths", (23, 3, 11, 37), 16, quick=True),
    ragged("stats_pool", "one frame among others", (9, 1, 4), 8, differentiate=False),
    ragged("stats_pool", "64 utterances", _many(2, 30), 24),
    ragged("stats_pool", "equal lengths", (17, 17, 17), 40),
    ragged("stats_pool", "one utterance", (23,), 16),
    ragged("stats_pool", "sorted, long among short", (2, 3, 30, 3000), 8),
)  # fmt: skip
