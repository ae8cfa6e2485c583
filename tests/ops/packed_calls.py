"""Calls of ops on packed frames, and what they must equal: the same ops on each utterance alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from op_contract import randn
from torch import Tensor

from wavlm_fast import ops

HEADS, WIDTH = 2, 8
CHANNELS = HEADS * WIDTH


def offsets_of(lengths) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@dataclass(frozen=True)
class PackedCall:
    """An op on packed frames.

    Attributes:
        name: op.
        least: frames (samples) that an utterance needs.
        lengths: out frames of an utterance of so many.
        shared: what all utterances share, from a dtype: differentiated.
        frames: shapes of the packed inputs, N for the packed dimension.
        call: from the packed inputs, the shared ones, offsets (None: a dense batch of one), out_offsets and out_frames.
    """

    name: str
    least: int
    lengths: Callable[[int], int | None]
    shared: Callable[[torch.dtype], tuple[Tensor | None, ...]]
    frames: Callable[[int], tuple[tuple[int, ...], ...]]
    call: Callable[..., Tensor]

    def inputs(self, lengths, dtype=torch.float64) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        packed = tuple(randn(*s, seed=50 + i, dtype=dtype) for i, s in enumerate(self.frames(sum(lengths))))
        return packed, self.shared(dtype)

    def packed(self, lengths, packed, shared) -> Tensor:
        """The op once on all."""
        out = [self.lengths(n) for n in lengths]
        if out[0] is None:
            return self.call(packed, shared, offsets_of(lengths), None, None)
        return self.call(packed, shared, offsets_of(lengths), offsets_of(out), sum(out))

    def alone(self, lengths, packed, shared) -> Tensor:
        """The op on each utterance."""
        parts = []
        for first, end in pairwise([0, *accumulate(lengths)]):
            own = tuple(x[..., first:end] if at_end(self, i) else x[:, first:end] for i, x in enumerate(packed))
            parts.append(self.call(own, shared, None, None, None))
        return torch.cat(parts, 0 if self.name == "stats_pool" else 1)


def at_end(call: PackedCall, index: int) -> bool:
    """Whether the packed dimension of an input is the last one: the gate's."""
    return call.name == "gated_attention" and index == 3


def _resized(offsets, out_offsets, out_frames):
    return {"offsets": offsets, "out_offsets": out_offsets, "out_frames": out_frames}


def _bias_of(rel_bias: Tensor, frames: int, offsets: Tensor | None) -> Tensor:
    """All of it for packed frames, and what one utterance has of it."""
    longest = (rel_bias.shape[1] + 1) // 2
    return rel_bias if offsets is not None else rel_bias[:, longest - frames : longest + frames - 1]


def _attend(packed, shared, offsets, *_):
    q, k, v, gate = packed
    (rel_bias,) = shared
    wide = torch.promote_types(q.dtype, torch.float32)
    return ops.gated_attention(
        q, k, v, gate.to(wide), _bias_of(rel_bias.to(wide), q.shape[1], offsets), offsets=offsets
    )


def _layer(norm_first):
    def call(packed, shared, offsets, *_):
        (x,) = packed
        rel_bias, *rest = shared
        weights, biases, gate, norms = rest[:6], rest[6:12], rest[12:15], rest[15:]
        bias = _bias_of(rel_bias.to(torch.promote_types(x.dtype, torch.float32)), x.shape[1], offsets)
        return ops.encoder_layer(
            x, bias, None, weights, biases, gate, norms, eps=[1e-5, 1e-5], scale=WIDTH**-0.5, activation="gelu",
            norm_first=norm_first, offsets=offsets,
        )  # fmt: skip

    return call


def _layer_parameters(dtype):
    inner, shapes = 24, [(CHANNELS, CHANNELS)] * 4
    shapes += [(inner, CHANNELS), (CHANNELS, inner)]
    shapes = [(HEADS, 2 * LONGEST - 1), *shapes, *(s[:1] for s in shapes), (8, WIDTH), (8,), (HEADS,)]
    shapes += [(CHANNELS,)] * 4
    return tuple(randn(*s, seed=i, scale=0.3, dtype=dtype) for i, s in enumerate(shapes))


LONGEST = 70  # of the bias: more than any utterance has


def _of_waveform(norm):
    def shared(dtype):
        normed = norm != "none"
        return (
            randn(12, 1, 10, seed=1, dtype=dtype), randn(12, seed=2, dtype=dtype) if norm == "layer" else None,
            randn(12, seed=3, dtype=dtype) if normed else None, randn(12, seed=4, dtype=dtype) if normed else None,
        )  # fmt: skip

    def call(packed, shared, *resized):
        weight, bias, norm_weight, norm_bias = shared
        return ops.waveform_conv(
            *packed, weight, bias, stride=5, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias,
            activation="gelu", **_resized(*resized),
        )  # fmt: skip

    # Of one frame a group norm leaves the sign of rounding errors.
    least = 15 if norm == "group" else 10
    return PackedCall("waveform_conv", least, lambda n: (n - 10) // 5 + 1, shared, lambda n: ((1, n),), call)


def _of_strided(taps, stride, normed):
    def shared(dtype):
        tensors = (randn(20, CHANNELS, taps, seed=1, scale=0.3, dtype=dtype), randn(20, seed=2, dtype=dtype))
        norms = (randn(20, seed=3, dtype=dtype), randn(20, seed=4, dtype=dtype)) if normed else (None, None)
        return (*tensors, *norms)

    def call(packed, shared, *resized):
        weight, bias, norm_weight, norm_bias = shared
        return ops.strided_conv(
            *packed, weight, bias, stride=stride, norm_weight=norm_weight, norm_bias=norm_bias, activation="gelu",
            **_resized(*resized),
        )  # fmt: skip

    return PackedCall(
        "strided_conv", taps, lambda n: (n - taps) // stride + 1, shared, lambda n: ((1, n, CHANNELS),), call
    )


def _of_tdnn(taps, dilation):
    def shared(dtype):
        return randn(20, taps * CHANNELS, seed=1, scale=0.3, dtype=dtype), randn(20, seed=2, dtype=dtype)

    def call(packed, shared, *resized):
        return ops.tdnn(*packed, *shared, kernel_size=taps, dilation=dilation, **_resized(*resized))

    span = (taps - 1) * dilation
    return PackedCall("tdnn", span + 1, lambda n: n - span, shared, lambda n: ((1, n, CHANNELS),), call)


def _feature_encoder(norm):
    taps, strides, channels = (10, 3, 2), (5, 2, 2), (1, 12, 16, 16)
    normed = {"none": 0, "group": 1, "layer": 3}[norm]

    def shared(dtype):
        weights = [randn(channels[i + 1], channels[i], taps[i], seed=i, scale=0.4, dtype=dtype) for i in range(3)]
        norms = [randn(channels[i + 1], seed=9 + i, dtype=dtype) for i in range(normed)]
        return (*weights, *norms, *(randn(*n.shape, seed=20 + i, dtype=dtype) for i, n in enumerate(norms)))

    def call(packed, shared, *resized):
        weights, norms, biases = shared[:3], shared[3 : 3 + normed], shared[3 + normed :]
        return ops.feature_encoder(
            *packed, weights, strides=strides, norm=norm, norm_weights=norms, norm_biases=biases, **_resized(*resized)
        )

    def frames(n):
        for k, s in zip(taps, strides, strict=True):
            n = (n - k) // s + 1
        return n

    return PackedCall("feature_encoder", 30, frames, shared, lambda n: ((1, n),), call)


def _of_positional(taps, residual):
    def shared(dtype):
        return randn(CHANNELS, 8, taps, seed=1, scale=0.3, dtype=dtype), randn(CHANNELS, seed=2, dtype=dtype)

    def call(packed, shared, offsets, *_):
        return ops.positional_conv(*packed, *shared, groups=2, residual=residual, offsets=offsets)

    return PackedCall("positional_conv", 1, lambda n: None, shared, lambda n: ((1, n, CHANNELS),), call)


CALLS = {
    "gated_attention": PackedCall(
        "gated_attention", 1, lambda n: None, lambda dtype: (randn(HEADS, 2 * LONGEST - 1, seed=9, dtype=dtype),),
        lambda n: (*((1, n, HEADS, WIDTH),) * 3, (1, HEADS, n)), _attend,
    ),
    "encoder_layer": PackedCall(
        "encoder_layer", 1, lambda n: None, _layer_parameters, lambda n: ((1, n, CHANNELS),), _layer(False)
    ),
    "encoder_layer, norm first": PackedCall(
        "encoder_layer", 1, lambda n: None, _layer_parameters, lambda n: ((1, n, CHANNELS),), _layer(True)
    ),
    "stats_pool": PackedCall(
        "stats_pool", 2, lambda n: None, lambda dtype: (), lambda n: ((1, n, CHANNELS),),
        lambda packed, shared, offsets, *_: ops.stats_pool(*packed, offsets=offsets),
    ),
    **{f"waveform_conv, {norm}": _of_waveform(norm) for norm in ("none", "group", "layer")},
    "strided_conv": _of_strided(3, 2, False),
    "strided_conv, norm": _of_strided(2, 2, True),
    "strided_conv, odd": _of_strided(4, 3, False),
    "tdnn": _of_tdnn(3, 2),
    "tdnn, one tap": _of_tdnn(1, 1),
    **{f"feature_encoder, {norm}": _feature_encoder(norm) for norm in ("none", "group", "layer")},
    "positional_conv": _of_positional(16, True),
    "positional_conv, odd": _of_positional(5, False),
}  # fmt: skip
DIFFERENTIATED = [name for name, call in CALLS.items() if call.name not in ("encoder_layer", "feature_encoder")]

# How many frames utterances have beyond the fewest.
EXTRA = {
    "one": (20,),
    "shortest among others": (0, 37, 5, 0),
    "equal": (8, 8, 8),
    "sorted": (0, 1, 2, 3, 5, 8, 13, 40),
    "many": tuple((7 * i) % 23 for i in range(64)),
}
