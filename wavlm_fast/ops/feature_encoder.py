"""The convolutional front end whole: waveform to the frames of its last layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from . import _check as check
from ._define import autocast, define, needs_grad, references
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

    Returns:
        `[B, T, C']`, the dtype of `waveform`.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or names do not fit; fewer samples than one frame needs.
    """
    args = (waveform.contiguous(), list(weights), list(biases), list(strides), norm, list(norm_weights),
            list(norm_biases), eps, activation)  # fmt: skip
    if needs_grad(waveform, *weights, *biases, *norm_weights, *norm_biases):
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
) -> Tensor:
    vectors = (per_layer(v, len(weights)) for v in (biases, norm_weights, norm_biases))
    layers = list(zip(weights, strides, *vectors, strict=True))
    weight, stride, bias, norm_weight, norm_bias = layers[0]
    x = first(waveform, weight, bias, stride, norm, norm_weight, norm_bias, eps, activation)
    for weight, stride, bias, norm_weight, norm_bias in layers[1:]:
        x = further(x, weight, bias, stride, norm_weight, norm_bias, eps, activation)
    return x


def reference(
    waveform: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    strides: list[int],
    norm: str,
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    eps: float,
    activation: str,
) -> Tensor:
    layers = (waveform, weights, biases, strides, norm, norm_weights, norm_biases)
    return _in_turn(first_reference, further_reference, *layers, eps, activation)


def _first(waveform: Tensor, weight: Tensor, bias: Tensor | None, stride: int, norm: str, *rest: object) -> Tensor:
    norm_weight, norm_bias, eps, activation = rest
    return waveform_conv(
        waveform, weight, bias, stride=stride, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
        activation=activation,
    )  # fmt: skip


def _further(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, *rest: object) -> Tensor:
    norm_weight, norm_bias, eps, activation = rest
    return strided_conv(
        x, weight, bias, stride=stride, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, activation=activation
    )


def _kernel(*args: object) -> Tensor:
    # Of the layers' ops, not of their references: a backend without this op may have those.
    return _in_turn(_first, _further, *args)


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


def _samples(weights: list[Tensor], strides: list[int]) -> int:
    needed = 1
    for weight, stride in zip(reversed(weights), reversed(strides), strict=True):
        needed = (needed - 1) * stride + weight.shape[2]
    return needed


def _fake(
    waveform: Tensor, weights: list[Tensor], biases: list[Tensor], strides: list[int], *rest: object
) -> Tensor:
    frames = waveform.shape[1]
    for weight, stride in zip(weights, strides, strict=True):
        frames = (frames - weight.shape[2]) // stride + 1
    return waveform.new_empty((waveform.shape[0], frames, weights[-1].shape[0]))


_op = define(
    NAME,
    "(Tensor waveform, Tensor[] weights, Tensor[] biases, int[] strides, str norm, Tensor[] norm_weights, "
    "Tensor[] norm_biases, float eps, str activation) -> Tensor",
    check=_check,
    fake=_fake,
    kernel=_kernel,
    in_parts=True,
)
references[NAME] = reference
autocast(NAME, _op, lower=(0,), weights=(1, 2))
