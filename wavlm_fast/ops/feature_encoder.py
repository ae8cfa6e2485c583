"""The convolutional front end whole: waveform to the frames of its last layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._define import autocast, define, needs_grad, references
from ._packed import RESIZED, Resized, bounds, check_resized, windows
from .strided_conv import reference as further_reference
from .strided_conv import strided_conv
from .waveform_conv import NORMS, waveform_conv
from .waveform_conv import reference as first_reference

NAME = "feature_encoder"


def feature_encoder(
    waveform: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    strides: Sequence[int],
    norm: str,
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    eps: float = 1e-5,
    activation: str = "gelu",
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> Tensor:
    """`waveform_conv`, then one `strided_conv` after the other; what lies between need never exist as a whole.

    Equivalent to transformers' `WavLMFeatureEncoder`, its output time-major. Where gradients are wanted the layers run
    as the ops that they are.

    Args:
        waveform: `[B, S]` samples.
        weights: of the layers, `[C, 1, K]`, then `[C', C, K]` each, the dtype of `waveform`.
        biases: `[C']` of every layer, or nothing.
        strides: of the layers, in samples, then in frames of the layer before.
        norm: "group" (in the first layer only), "layer" (in every layer) or "none".
        norm_weights, norm_biases: `[C']` of every layer that has a norm.
        eps: added to the variances.
        activation: "none", "gelu" (erf), "gelu_tanh" or "relu".
        offsets, out_offsets: of packed samples `[1, S]` and of the last layer's frames (`_packed.py`). Run as the
            layers' ops, it reads the values of `offsets`, for which a GPU has to be waited.
        out_frames: the last layer's frames in all.

    Returns:
        `[B, T, C']`, the dtype of `waveform`.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or names do not fit; fewer samples than one frame needs.
    """
    args = (waveform.contiguous(), list(weights), list(biases), list(strides), norm, list(norm_weights),
            list(norm_biases), eps, activation, offsets, out_offsets, out_frames)  # fmt: skip
    if needs_grad(waveform, *weights, *biases, *norm_weights, *norm_biases):
        check_resized(NAME, "waveform", waveform, Resized(offsets, out_offsets, out_frames))
        return _kernel(*args)
    return _op(*args)


def per_layer(vectors: list[Tensor], layers: int) -> list[Tensor | None]:
    """Vectors of the first layers, or of all or none, with None for the others."""
    return [*vectors, *[None] * (layers - len(vectors))]


def _in_turn(
    first: Callable[..., Tensor],
    further: Callable[..., Tensor],
    waveform: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    strides: list[int],
    norm: str,
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    eps: float,
    activation: str,
    *packed: Tensor | int | None,
) -> Tensor:
    taps = [weight.shape[2] for weight in weights]
    places = _places(Resized(*packed), waveform.shape[1], taps, strides)
    vectors = (per_layer(v, len(weights)) for v in (biases, norm_weights, norm_biases))
    layers = zip(weights, strides, *vectors, places, strict=True)
    x = waveform
    for i, (weight, stride, bias, norm_weight, norm_bias, place) in enumerate(layers):
        options = {"stride": stride, "norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
        options |= {"activation": activation, "offsets": place.offsets}
        options |= {"out_offsets": place.out_offsets, "out_frames": place.out_frames}
        x = further(x, weight, bias, **options) if i else first(x, weight, bias, norm=norm, **options)
    return x


def _places(packed: Resized, samples: int, taps: list[int], strides: list[int]) -> list[Resized]:
    """Those of every layer."""
    if packed.offsets is None:
        return [packed] * len(taps)
    offsets, out_offsets, out_frames = packed
    lengths = given = [end - first for first, end in bounds(NAME, offsets, samples)]
    places = []
    for size, stride in zip(taps, strides, strict=True):
        lengths = [windows(size, stride)(length) for length in lengths]
        if min(lengths) < 1:
            raise ValueError(f"{NAME} wants offsets of utterances long enough for a frame, got lengths {given}")
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=offsets.device)
        places.append(Resized(offsets, ends, sum(lengths)))
        offsets = ends
    if lengths != [end - first for first, end in bounds(NAME, out_offsets, out_frames, "out_offsets")]:
        raise ValueError(f"{NAME} wants out_offsets of {lengths} frames for these offsets, got {out_offsets.tolist()}")
    return places


def reference(*args: Any) -> Tensor:
    return _in_turn(first_reference, further_reference, *args)


def _kernel(*args: Any) -> Tensor:
    # Of the layers' ops, not of their references: a backend without this op may have those.
    return _in_turn(waveform_conv, strided_conv, *args)


def _check(
    waveform: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    strides: list[int],
    norm: str,
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    eps: float,
    activation: str,
    *packed: Tensor | int | None,
) -> None:
    check.floating(NAME, "waveform", waveform)
    check.shape(NAME, "waveform", waveform, ("B", "S"))
    if norm not in NORMS:
        raise ValueError(f"{NAME} wants a norm of {NORMS}, got {norm!r}")
    check.activation(NAME, activation)
    layers = len(weights)
    if not layers:
        raise ValueError(f"{NAME} wants one layer or more, got no weights")
    normed = {"none": 0, "group": 1, "layer": layers}[norm]
    counts = {"strides": (strides, (layers,)), "biases": (biases, (0, layers))}
    counts |= {"norm_weights": (norm_weights, (normed,)), "norm_biases": (norm_biases, (normed,))}
    for name, (given, wanted) in counts.items():
        if len(given) not in wanted:
            raise ValueError(f"{NAME} wants {' or '.join(map(str, wanted))} {name} here, got {len(given)}")
    channels = 1
    for i, weight in enumerate(weights):
        check.shape(NAME, f"weights[{i}]", weight, ("C'", channels, "K"))
        check.same(NAME, "waveform", waveform, **{f"weights[{i}]": weight})
        channels = weight.shape[0]
        check.positive(NAME, **{f"strides[{i}]": strides[i], f"taps of weights[{i}]": weight.shape[2]})
        if i < normed:
            check.norm(NAME, channels, waveform, norm_weights[i], norm_biases[i])
    for i, bias in enumerate(biases):
        check.shape(NAME, f"biases[{i}]", bias, (weights[i].shape[0],))
        check.same(NAME, "waveform", waveform, **{f"biases[{i}]": bias})
    check.frames(NAME, waveform.shape[1], _samples(weights, strides), "samples")
    check_resized(NAME, "waveform", waveform, Resized(*packed))


def _samples(weights: list[Tensor], strides: list[int]) -> int:
    needed = 1
    for weight, stride in zip(reversed(weights), reversed(strides), strict=True):
        needed = (needed - 1) * stride + weight.shape[2]
    return needed


def _fake(
    waveform: Tensor, weights: list[Tensor], biases: list[Tensor], strides: list[int], *rest: object
) -> Tensor:
    frames, out_frames = waveform.shape[1], rest[-1]
    for weight, stride in zip(weights, strides, strict=True):
        frames = (frames - weight.shape[2]) // stride + 1
    frames = frames if out_frames is None else out_frames
    return waveform.new_empty((waveform.shape[0], frames, weights[-1].shape[0]))


_op = define(
    NAME,
    "(Tensor waveform, Tensor[] weights, Tensor[] biases, int[] strides, str norm, Tensor[] norm_weights, "
    f"Tensor[] norm_biases, float eps, str activation, {RESIZED}) -> Tensor",
    check=_check,
    fake=_fake,
    kernel=_kernel,
    in_parts=True,
)
references[NAME] = reference
autocast(NAME, _op, lower=(0,), weights=(1, 2))
