"""The ops that are made of ops: their cases, and their meaning in terms of the parts'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import OPS, Operand
from .drawn import Drawn, usual
from .values import OUTLIER, Leaves, gain, hidden_states, matrix, normal, uniform

_Parts = Mapping[str, Callable[..., Any]]


def feature_encoder_of(parts: _Parts) -> Callable[..., Tensor]:
    """The op in terms of `waveform_conv` and `strided_conv` as `parts` has them."""

    def feature_encoder(
        waveform: Tensor,
        weights: list[Tensor],
        biases: list[Tensor],
        strides: list[int],
        norm: str,
        norm_weights: list[Tensor],
        norm_biases: list[Tensor],
        eps: float,
        act: str,
    ) -> Tensor:
        x = waveform
        for i, (weight, stride) in enumerate(zip(weights, strides, strict=True)):
            bias, *affine = (v[i] if i < len(v) else None for v in (biases, norm_weights, norm_biases))
            if i == 0:
                x = parts["waveform_conv"](x, weight, bias, stride, norm, *affine, eps, act)
            else:
                x = parts["strided_conv"](x, weight, bias, stride, *affine, eps, act)
        return x

    return feature_encoder


def encoder_layer_of(parts: _Parts) -> Callable[..., Tensor]:
    """The op in terms of `linear_act`, `position_gate`, `gated_attention` and `add_layer_norm` as `parts` has them."""

    def encoder_layer(
        x: Tensor,
        rel_bias: Tensor,
        key_lengths: Tensor | None,
        weights: list[Tensor],
        biases: list[Tensor],
        gate: list[Tensor],
        norms: list[Tensor],
        eps: list[float],
        scale: float,
        act: str,
        norm_first: bool,
    ) -> Tensor:
        def linear(i: int, x: Tensor, act: str = "none") -> Tensor:
            return parts["linear_act"](x, weights[i], biases[i], act)

        def add_norm(x: Tensor, residual: Tensor | None, i: int) -> Tensor:
            return parts["add_layer_norm"](x, residual, norms[2 * i], norms[2 * i + 1], eps[i], False)[1]

        entered = add_norm(x, None, 0) if norm_first else x
        q, k, v = (linear(i, entered).unflatten(-1, (gate[2].numel(), -1)) for i in range(3))
        gates = parts["position_gate"](entered, *gate)
        attended = parts["gated_attention"](q, k, v, gates, rel_bias, key_lengths, 0.0, None, scale)[0]
        attended = linear(3, attended.flatten(2))
        if norm_first:
            total = x + attended
            return total + linear(5, linear(4, add_norm(attended, x, 1), act))
        normed = add_norm(attended, x, 0)
        return add_norm(linear(5, linear(4, normed, act)), normed, 1)

    return encoder_layer


def stack(*sizes: Any, quiet: bool = False, **options: Any) -> Drawn:
    """A feature encoder of layers (channels, kernel, stride) after batch and samples."""

    def draw(g: torch.Generator, name: str, operand: Operand, before: Leaves) -> Tensor:
        if name.startswith("weights"):
            return matrix(g, *operand.shape) * 1.5
        if name != "waveform":
            return usual(g, name, operand, before)
        batch, samples = operand.shape
        time = torch.arange(samples, dtype=torch.float64)
        waveform = normal(g, batch, samples) * (0.1 + torch.linspace(0, 2, batch)[:, None]) + torch.sin(time / 7)
        return waveform * (3e-3 if quiet else 1)

    return Drawn("feature_encoder", OPS["feature_encoder"].example(*sizes, **options), draw)


def layer(*sizes: int, lengths: tuple[int, ...] | None = None, **options: Any) -> Drawn:
    """A transformer layer with weights under which all of it matters."""
    example = OPS["encoder_layer"].example(*sizes, lengths=lengths is not None, **options)

    def draw(g: torch.Generator, name: str, operand: Operand, before: Leaves) -> Tensor:
        if name == "x":
            return hidden_states(g, *operand.shape)
        if name == "rel_bias":
            return normal(g, *operand.shape, std=1.5).clamp(-5, 5)
        if name == "key_lengths":
            return torch.tensor(lengths)
        large = (before["x"].abs().amax((0, 1)) > OUTLIER / 2).to(torch.float64)
        return _parameter(g, name, operand, large)

    return Drawn("encoder_layer", {**example, "eps": [1e-5, 3e-3]}, draw)


def _parameter(g: torch.Generator, name: str, operand: Operand, large: Tensor) -> Tensor:
    """Of a layer into which frames with `large` channels come: who reads these reads of them not much more than of the
    others."""
    (kind, _, index), shape = name.partition(" "), operand.shape
    if kind == "weights":
        weight = matrix(g, *shape) * (1.5 if index in "01" else 1)
        return weight * (1 - large + large * 3 / OUTLIER) if index in "0124" else weight
    if kind == "gate" and index == "0":
        folded = large.view(-1, shape[1]).amax(0)
        return normal(g, *shape, std=0.75 * shape[1] ** -0.5) * (1 - folded + folded * 3 / OUTLIER)
    if kind == "gate" and index == "2":
        return 0.5 + 2.5 * uniform(g, *shape)
    if kind == "norms":
        return gain(g, *shape) if index in "02" else normal(g, *shape, std=0.5)
    return normal(g, *shape, std=0.3)  # biases, that of the gate among them
