"""What cases of ops are made of: values that hide nothing, in the shapes that a case asks for.

A case builds its inputs in float64 from a seeded generator; the harness rounds them to the dtype under test before the
truth is computed, so that the rounding of inputs is nobody's error.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .composed import arrange_layer, arrange_stack, layer, stack
from .values import OUTLIER, Build, Leaves, gain, hidden_states, matrix, normal, optional, uniform


def _in_order(leaves: Leaves) -> tuple:
    return tuple(leaves.values())


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op, name: identify it.
        build: the arguments of the op's schema less `save`, by name, or what `arrange` makes them from. Floating
            tensors are in float64 and are differentiated.
        arrange: from the built values, rounded, to the positional arguments.
        wide: tensors kept in float32 (float64 under float64) when the dtype under test is narrower.
        upstream: the outputs that a gradient flows into; None for the first.
        differentiate: whether gradients are compared.
        quick: part of `--quick`, and of the first cases that the self-test turns to.
        ragged: of packed frames.
    """

    op: str
    name: str
    build: Build
    arrange: Callable[[Leaves], tuple] = _in_order
    wide: frozenset[str] = frozenset()
    upstream: tuple[int, ...] = (0,)
    differentiate: bool = True
    quick: bool = False
    ragged: bool = False

    def leaves(self) -> Leaves:
        """The same values at every call."""
        seed = zlib.crc32(f"{self.op}/{self.name}".encode())
        return self.build(torch.Generator().manual_seed(seed))


def waveform(
    batch: int, samples: int, channels: int, kernel: int = 10, stride: int = 5, *, norm: str = "group",
    bias: bool = False, affine: bool = True, act: str = "gelu", quiet: bool = False,
) -> Build:  # fmt: skip
    def build(g: torch.Generator) -> Leaves:
        waveform = normal(g, batch, samples)
        # Speech does not stay at one loudness, and a hum plus an offset make windows correlated.
        time = torch.arange(samples, dtype=torch.float64)
        waveform = waveform * (0.1 + torch.linspace(0, 2, batch)[:, None]) + torch.sin(time / 7) + 0.5
        return {
            "waveform": waveform * (3e-3 if quiet else 1),
            "weight": matrix(g, channels, 1, kernel),
            "bias": optional(g, channels, bias),
            "stride": stride,
            "norm": norm,
            "norm_weight": gain(g, channels) if affine and norm != "none" else None,
            "norm_bias": optional(g, channels, affine and norm != "none"),
            "eps": 1e-5,
            "activation": act,
        }

    return build


def strided(
    batch: int, frames: int, inner: int, outer: int, kernel: int, stride: int, *,
    norm: bool = False, bias: bool = False, act: str = "gelu", quiet: bool = False,
) -> Build:  # fmt: skip
    def build(g: torch.Generator) -> Leaves:
        return {
            "x": normal(g, batch, frames, inner) * 3e-3 if quiet else hidden_states(g, batch, frames, inner),
            "weight": matrix(g, outer, inner, kernel),
            "bias": optional(g, outer, bias),
            "stride": stride,
            "norm_weight": gain(g, outer) if norm else None,
            "norm_bias": optional(g, outer, norm),
            "eps": 1e-5,
            "activation": act,
        }

    return build


def positional(
    batch: int, frames: int, channels: int, kernel: int, groups: int, *,
    bias: bool = True, act: str = "gelu", residual: bool = True,
) -> Build:  # fmt: skip
    def build(g: torch.Generator) -> Leaves:
        return {
            "x": hidden_states(g, batch, frames, channels),
            "weight": matrix(g, channels, channels // groups, kernel) * 2,
            "bias": optional(g, channels, bias),
            "groups": groups,
            "activation": act,
            "residual": residual,
        }

    return build


def linear(*shape: int, outer: int, bias: bool = True, act: str = "none") -> Build:
    def build(g: torch.Generator) -> Leaves:
        return {
            "x": hidden_states(g, *shape),
            "weight": matrix(g, outer, shape[-1]),
            "bias": optional(g, outer, bias),
            "activation": act,
        }

    return build


def norm(*shape: int, quiet: bool = False, keep_sum: bool = True) -> Build:
    def build(g: torch.Generator) -> Leaves:
        make = normal if quiet else hidden_states
        scale = 3e-3 if quiet else 1
        return {
            "x": make(g, *shape) * scale,
            "residual": normal(g, *shape) * scale,
            "weight": gain(g, shape[-1]),
            "bias": normal(g, shape[-1], std=0.5),
            "eps": 1e-5,
            "keep_sum": keep_sum,
        }

    return build


def gate(batch: int, frames: int, heads: int, width: int) -> Build:
    def build(g: torch.Generator) -> Leaves:
        x = hidden_states(g, batch, frames, heads * width)
        # The logits must spread, not saturate: outliers enter through small weights, as in trained models.
        weight = normal(g, 8, width, std=0.75 * width**-0.5)
        weight[:, [c % width for c in (3, heads * width // 2 + 1)]] *= 3 / OUTLIER
        return {"x": x, "weight": weight, "bias": normal(g, 8, std=0.3), "const": 0.5 + 2.5 * uniform(g, heads)}

    return build


def every_other_frame(leaves: Leaves) -> tuple:
    x, *rest = leaves.values()
    return x[:, 1::2], *rest


def attention(
    batch: int, frames: int, heads: int, width: int, *, lengths: tuple[int, ...] | None = None,
    dropout: float = 0.0, layout: str = "separate", outliers: bool = False, scale: float | None = None,
) -> Build:  # fmt: skip
    shapes = {
        "packed": (batch, frames, 3, heads, width),
        "separate": (3, batch, frames, heads, width),
        "heads first": (3, batch, heads, frames, width),
        "window": (3, batch, frames + 3, heads, width + 4),
    }

    def build(g: torch.Generator) -> Leaves:
        qkv = normal(g, *shapes[layout])
        if layout == "separate":
            qkv[:2] *= 1.7  # scores of a deviation of three: rows with a handful of heavy keys
        if outliers:
            # Large in the product's one factor, small in the other, and large in the values.
            qkv[0, ..., 1], qkv[1, ..., 1] = OUTLIER, qkv[1, ..., 1] / OUTLIER
            qkv[2, ..., 2] += OUTLIER
        return {
            "qkv": qkv,
            "gate": 0.2 + 3.6 * uniform(g, batch, heads, frames),
            "rel_bias": normal(g, heads, 2 * frames - 1, std=1.5).clamp(-5, 5),
            "key_lengths": None if lengths is None else torch.tensor(lengths),
            "dropout_p": dropout,
            "seed": torch.tensor([2**33 + 20260131]) if dropout else None,
            "scale": width**-0.5 if scale is None else scale,
            "layout": layout,
        }

    return build


def _views(leaves: Leaves) -> tuple:
    values = dict(leaves)
    qkv, layout = values.pop("qkv"), values.pop("layout")
    if layout == "packed":
        qkv = qkv.unbind(2)
    elif layout == "heads first":
        qkv = [x.transpose(1, 2) for x in qkv]
    elif layout == "window":
        qkv = [x[:, 1:-2, :, 3:-1] for x in qkv]
    return (*qkv, *values.values())


def tdnn(
    batch: int, frames: int, inner: int, outer: int, kernel: int, dilation: int, *, bias: bool = True, act: str = "relu"
) -> Build:
    def build(g: torch.Generator) -> Leaves:
        return {
            "x": hidden_states(g, batch, frames, inner),
            "weight": matrix(g, outer, kernel * inner),
            "bias": optional(g, outer, bias),
            "kernel_size": kernel,
            "dilation": dilation,
            "activation": act,
        }

    return build


def pool(batch: int, frames: int, channels: int, lengths: tuple[int, ...] | None = None) -> Build:
    def build(g: torch.Generator) -> Leaves:
        return {
            "x": hidden_states(g, batch, frames, channels),
            "lengths": None if lengths is None else torch.tensor(lengths),
        }

    return build


_COMMON: dict[str, dict[str, Any]] = {
    "gated_attention": {"arrange": _views, "wide": frozenset({"gate", "rel_bias"})},
    "feature_encoder": {"arrange": arrange_stack, "differentiate": False},
    "encoder_layer": {"arrange": arrange_layer, "wide": frozenset({"rel_bias"}), "differentiate": False},
}


def case(op: str, name: str, build: Build, **more: Any) -> Case:
    more = _COMMON.get(op, {}) | more
    return Case(op, name, build, **more)


BUILDERS: dict[str, Callable[..., Build]] = {
    "feature_encoder": stack,
    "waveform_conv": waveform,
    "strided_conv": strided,
    "positional_conv": positional,
    "linear_act": linear,
    "add_layer_norm": norm,
    "position_gate": gate,
    "gated_attention": attention,
    "encoder_layer": layer,
    "tdnn": tdnn,
    "stats_pool": pool,
}


def case_of(op: str, name: str, *sizes: Any, **options: Any) -> Case:
    """A case of other sizes than those of CASES.

    Args:
        op, name: identify it; equal names have equal random numbers.
        sizes, options: what the builder of the op's cases takes.
    """
    return case(op, name, BUILDERS[op](*sizes, **options))
