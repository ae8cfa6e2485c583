"""The ops that are made of ops: their cases, and their meaning in terms of the parts'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .values import OUTLIER, Build, Leaves, gain, hidden_states, matrix, normal, uniform

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


def stack(
    batch: int, samples: int, *layers: tuple[int, int, int],
    norm: str = "group", bias: bool = False, act: str = "gelu", quiet: bool = False,
) -> Build:  # fmt: skip
    """A feature encoder of layers (channels, kernel, stride)."""

    def build(g: torch.Generator) -> Leaves:
        time = torch.arange(samples, dtype=torch.float64)
        waveform = normal(g, batch, samples) * (0.1 + torch.linspace(0, 2, batch)[:, None]) + torch.sin(time / 7)
        leaves: Leaves = {"waveform": waveform * (3e-3 if quiet else 1)}
        narrow = 1
        for i, (channels, kernel, _) in enumerate(layers):
            normed = norm == "layer" or (norm == "group" and i == 0)
            leaves[f"weight {i}"] = matrix(g, channels, narrow, kernel) * 1.5
            if bias:
                leaves[f"bias {i}"] = normal(g, channels, std=0.5)
            if normed:
                leaves |= {f"norm weight {i}": gain(g, channels), f"norm bias {i}": normal(g, channels, std=0.5)}
            narrow = channels
        strides = [stride for _, _, stride in layers]
        return leaves | {"strides": strides, "norm": norm, "eps": 1e-5, "activation": act}

    return build


def arrange_stack(leaves: Leaves) -> tuple:
    """The leaves of `stack` as the op takes them."""
    def of(kind: str) -> list[Tensor]:
        names = [f"{kind} {i}" for i in range(len(leaves["strides"]))]
        return [leaves[name] for name in names if name in leaves]

    weights, biases, norm_weights, norm_biases = map(of, ("weight", "bias", "norm weight", "norm bias"))
    head = (leaves["waveform"], weights, biases, leaves["strides"], leaves["norm"])
    return *head, norm_weights, norm_biases, leaves["eps"], leaves["activation"]


def layer(
    batch: int, length: int, heads: int, width: int, inner: int, *,
    lengths: tuple[int, ...] | None = None, act: str = "gelu", norm_first: bool = False,
) -> Build:  # fmt: skip
    """A transformer layer of `heads` · `width` channels, with weights under which all of it matters."""
    channels = heads * width

    def build(g: torch.Generator) -> Leaves:
        x = hidden_states(g, batch, length, channels)
        leaves: Leaves = {"x": x, "rel_bias": normal(g, heads, 2 * length - 1, std=1.5).clamp(-5, 5)}
        leaves["key_lengths"] = None if lengths is None else torch.tensor(lengths)
        shapes = [(channels, channels)] * 4 + [(inner, channels), (channels, inner)]
        large = (x.abs().amax((0, 1)) > OUTLIER / 2).to(torch.float64)
        for i, shape in enumerate(shapes):
            weight = matrix(g, *shape) * (1.5 if i < 2 else 1)
            # Who reads the frames reads of their large channels not much more than of the others.
            leaves[f"weight {i}"] = weight * (1 - large + large * 3 / OUTLIER) if i in (0, 1, 2, 4) else weight
            leaves[f"bias {i}"] = normal(g, shape[0], std=0.3)
        folded = large.view(heads, width).amax(0)
        leaves["gate weight"] = normal(g, 8, width, std=0.75 * width**-0.5) * (1 - folded + folded * 3 / OUTLIER)
        leaves |= {"gate bias": normal(g, 8, std=0.3), "gate const": 0.5 + 2.5 * uniform(g, heads)}
        for i in range(2):
            leaves |= {f"norm weight {i}": gain(g, channels), f"norm bias {i}": normal(g, channels, std=0.5)}
        return leaves | {"eps": [1e-5, 3e-3], "scale": width**-0.5, "activation": act, "norm_first": norm_first}

    return build


def arrange_layer(leaves: Leaves) -> tuple:
    """The leaves of `layer` as the op takes them."""
    weights, biases = ([leaves[f"{kind} {i}"] for i in range(6)] for kind in ("weight", "bias"))
    gate = [leaves[f"gate {name}"] for name in ("weight", "bias", "const")]
    norms = [leaves[f"norm {name} {i}"] for i in range(2) for name in ("weight", "bias")]
    head = (leaves["x"], leaves["rel_bias"], leaves["key_lengths"], weights, biases, gate, norms)
    return *head, *(leaves[name] for name in ("eps", "scale", "activation", "norm_first"))
