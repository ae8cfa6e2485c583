"""What each op is tried on: shapes that break kernels, and values that hide nothing.

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

OPS = (
    "feature_encoder",
    "waveform_conv",
    "strided_conv",
    "positional_conv",
    "linear_act",
    "add_layer_norm",
    "position_gate",
    "gated_attention",
    "encoder_layer",
    "tdnn",
    "stats_pool",
)


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
    """

    op: str
    name: str
    build: Build
    arrange: Callable[[Leaves], tuple] = _in_order
    wide: frozenset[str] = frozenset()
    upstream: tuple[int, ...] = (0,)
    differentiate: bool = True
    quick: bool = False

    def leaves(self) -> Leaves:
        """The same values at every call."""
        seed = zlib.crc32(f"{self.op}/{self.name}".encode())
        return self.build(torch.Generator().manual_seed(seed))


def _waveform(
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


def _strided(
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


def _positional(
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


def _linear(*shape: int, outer: int, bias: bool = True, act: str = "none") -> Build:
    def build(g: torch.Generator) -> Leaves:
        return {
            "x": hidden_states(g, *shape),
            "weight": matrix(g, outer, shape[-1]),
            "bias": optional(g, outer, bias),
            "activation": act,
        }

    return build


def _norm(*shape: int, quiet: bool = False, keep_sum: bool = True) -> Build:
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


def _gate(batch: int, frames: int, heads: int, width: int) -> Build:
    def build(g: torch.Generator) -> Leaves:
        x = hidden_states(g, batch, frames, heads * width)
        # The logits must spread, not saturate: outliers enter through small weights, as in trained models.
        weight = normal(g, 8, width, std=0.75 * width**-0.5)
        weight[:, [c % width for c in (3, heads * width // 2 + 1)]] *= 3 / OUTLIER
        return {"x": x, "weight": weight, "bias": normal(g, 8, std=0.3), "const": 0.5 + 2.5 * uniform(g, heads)}

    return build


def _every_other_frame(leaves: Leaves) -> tuple:
    x, *rest = leaves.values()
    return x[:, 1::2], *rest


def _attention(
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


def _tdnn(
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


def _pool(batch: int, frames: int, channels: int, lengths: tuple[int, ...] | None = None) -> Build:
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


def _case(op: str, name: str, build: Build, **more: Any) -> Case:
    more = _COMMON.get(op, {}) | more
    return Case(op, name, build, **more)


_BUILDERS: dict[str, Callable[..., Build]] = {
    "feature_encoder": stack,
    "waveform_conv": _waveform,
    "strided_conv": _strided,
    "positional_conv": _positional,
    "linear_act": _linear,
    "add_layer_norm": _norm,
    "position_gate": _gate,
    "gated_attention": _attention,
    "encoder_layer": layer,
    "tdnn": _tdnn,
    "stats_pool": _pool,
}


def case_of(op: str, name: str, *sizes: Any, **options: Any) -> Case:
    """A case of other sizes than those of CASES.

    Args:
        op, name: identify it; equal names have equal random numbers.
        sizes, options: what the builder of the op's cases takes.
    """
    return _case(op, name, _BUILDERS[op](*sizes, **options))


_WIDE_NORM = frozenset({"norm_weight", "norm_bias"})
_BOTH = {"upstream": (0, 1)}

CASES: tuple[Case, ...] = (
    _case("waveform_conv", "group norm, gelu", _waveform(2, 403, 24), quick=True),
    _case("waveform_conv", "group norm, bias, gelu_tanh", _waveform(3, 258, 16, bias=True, act="gelu_tanh")),
    _case("waveform_conv", "group norm, quiet", _waveform(2, 211, 16, bias=True, quiet=True), quick=True),
    _case("waveform_conv", "group norm without affine", _waveform(1, 97, 8, affine=False, act="relu")),
    _case("waveform_conv", "group norm, one frame", _waveform(2, 12, 16, bias=True), differentiate=False),
    _case("waveform_conv", "layer norm, bias, gelu", _waveform(2, 403, 24, norm="layer", bias=True), quick=True),
    _case("waveform_conv", "layer norm, quiet", _waveform(1, 211, 16, norm="layer", quiet=True), quick=True),
    _case("waveform_conv", "layer norm, one frame", _waveform(1, 10, 40, norm="layer", act="relu")),
    _case("waveform_conv", "layer norm in float32", _waveform(2, 158, 24, norm="layer"), wide=_WIDE_NORM),
    _case("waveform_conv", "group norm in float32", _waveform(2, 158, 24), wide=_WIDE_NORM),
    _case("waveform_conv", "no norm, odd kernel and stride", _waveform(1, 100, 12, 7, 3, norm="none", act="none")),
    _case("waveform_conv", "no norm, bias, relu", _waveform(2, 101, 12, norm="none", bias=True, act="relu")),
    _case("waveform_conv", "512 channels", _waveform(1, 1003, 512), quick=True),
    _case("feature_encoder", "group norm", stack(2, 1003, (24, 10, 5), (16, 3, 2), (24, 3, 2), (16, 2, 2)), quick=True),
    _case("feature_encoder", "layer norm, biases", stack(
        2, 1003, (24, 10, 5), (16, 3, 2), (24, 3, 2), (16, 2, 2), norm="layer", bias=True), quick=True),
    _case("feature_encoder", "no norm, odd shapes, relu", stack(
        1, 311, (7, 5, 3), (9, 4, 3), (5, 3, 1), norm="none", bias=True, act="relu")),
    _case("feature_encoder", "quiet, gelu_tanh", stack(1, 500, (16, 10, 5), (16, 3, 2), act="gelu_tanh", quiet=True)),
    _case("feature_encoder", "one frame", stack(2, 55, (16, 10, 5), (16, 3, 2), (16, 3, 2), bias=True)),
    _case("feature_encoder", "several pieces", stack(1, 9000, (16, 10, 5), (32, 3, 2), (16, 3, 2), (8, 2, 2))),
    _case("feature_encoder", "128 channels", stack(1, 2003, *[(128, 10, 5)], *[(128, 3, 2)] * 3, norm="layer")),
    _case("feature_encoder", "one layer", stack(2, 101, (16, 10, 5))),
    _case("strided_conv", "k3 s2, gelu", _strided(2, 41, 16, 24, 3, 2), quick=True),
    _case("strided_conv", "k2 s2, even frames", _strided(1, 40, 16, 16, 2, 2)),
    _case("strided_conv", "k2 s2, odd frames, gelu_tanh", _strided(2, 37, 24, 16, 2, 2, bias=True, act="gelu_tanh")),
    _case("strided_conv", "layer norm, bias, gelu", _strided(2, 41, 16, 24, 3, 2, norm=True, bias=True), quick=True),
    _case("strided_conv", "layer norm, quiet", _strided(1, 33, 16, 24, 3, 2, norm=True, quiet=True), quick=True),
    _case("strided_conv", "layer norm in float32", _strided(2, 35, 24, 24, 3, 2, norm=True), wide=_WIDE_NORM),
    _case("strided_conv", "one frame, relu", _strided(2, 3, 16, 16, 3, 2, norm=True, act="relu")),
    _case("strided_conv", "k5 s1, none", _strided(1, 19, 8, 12, 5, 1, act="none", bias=True)),
    _case("strided_conv", "k1 s3", _strided(2, 17, 12, 8, 1, 3)),
    _case("strided_conv", "128 channels", _strided(1, 69, 128, 128, 3, 2, norm=True, bias=True)),
    _case("positional_conv", "even kernel", _positional(2, 37, 32, 16, 4), quick=True),
    _case("positional_conv", "odd kernel", _positional(2, 37, 32, 15, 4, act="relu"), quick=True),
    _case("positional_conv", "k128, fewer frames than taps", _positional(1, 49, 64, 128, 16)),
    _case("positional_conv", "one frame", _positional(2, 1, 32, 16, 4)),
    _case("positional_conv", "no bias", _positional(1, 50, 24, 8, 2, bias=False)),
    _case("positional_conv", "no residual", _positional(1, 50, 24, 8, 2, residual=False), quick=True),
    _case("positional_conv", "one group, gelu_tanh", _positional(1, 21, 16, 6, 1, act="gelu_tanh")),
    _case("positional_conv", "as many groups as channels, none", _positional(1, 21, 16, 6, 16, act="none")),
    _case("positional_conv", "long", _positional(1, 301, 32, 128, 2)),
    _case("linear_act", "none", _linear(2, 19, 24, outer=40), quick=True),
    _case("linear_act", "gelu", _linear(2, 19, 24, outer=40, act="gelu"), quick=True),
    _case("linear_act", "gelu, no bias", _linear(3, 7, 33, outer=17, bias=False, act="gelu")),
    _case("linear_act", "gelu_tanh", _linear(1, 50, 64, outer=31, act="gelu_tanh")),
    _case("linear_act", "relu, one row", _linear(1, 1, 16, outer=24, act="relu")),
    _case("linear_act", "a matrix", _linear(21, 24, outer=8)),
    _case("linear_act", "a vector", _linear(24, outer=8, act="gelu")),
    _case("linear_act", "wide", _linear(1, 129, 256, outer=320, act="gelu")),
    _case("add_layer_norm", "both used", _norm(2, 19, 48), quick=True, **_BOTH),
    _case("add_layer_norm", "normed used", _norm(2, 19, 33), upstream=(1,)),
    _case("add_layer_norm", "sum used", _norm(1, 5, 16), upstream=(0,)),
    _case("add_layer_norm", "sum not kept", _norm(2, 17, 40, keep_sum=False), quick=True, upstream=(1,)),
    _case("add_layer_norm", "quiet", _norm(2, 21, 40, quiet=True), quick=True, **_BOTH),
    _case("add_layer_norm", "one row", _norm(1, 1, 40), **_BOTH),
    _case("add_layer_norm", "a matrix", _norm(7, 24), **_BOTH),
    _case("add_layer_norm", "768 channels", _norm(1, 11, 768), quick=True, **_BOTH),
    _case("add_layer_norm", "1024 channels", _norm(3, 5, 1024), **_BOTH),
    _case("position_gate", "D 32", _gate(2, 19, 4, 32), quick=True),
    _case("position_gate", "D 64", _gate(2, 37, 3, 64)),
    _case("position_gate", "D 80", _gate(1, 21, 2, 80)),
    _case("position_gate", "one frame, one head", _gate(1, 1, 1, 16)),
    _case("position_gate", "strided frames", _gate(2, 18, 2, 32), arrange=_every_other_frame),
    _case("position_gate", "parameters in float32", _gate(2, 23, 4, 16), wide=frozenset({"weight", "bias", "const"})),
    _case("gated_attention", "D 32", _attention(2, 37, 3, 32), quick=True),
    _case("gated_attention", "D 64, packed", _attention(2, 65, 2, 64, layout="packed"), quick=True),
    _case("gated_attention", "D 80, packed", _attention(1, 51, 2, 80, layout="packed")),
    _case("gated_attention", "D 128, heads first", _attention(1, 33, 1, 128, layout="heads first")),
    _case("gated_attention", "D 12, window", _attention(2, 29, 2, 12, layout="window")),
    _case("gated_attention", "one frame", _attention(2, 1, 2, 32)),
    _case("gated_attention", "two frames, one head", _attention(1, 2, 1, 16, lengths=(1,))),
    _case("gated_attention", "lengths", _attention(4, 35, 2, 32, lengths=(35, 0, 1, 18)), quick=True),
    _case("gated_attention", "lengths, packed", _attention(3, 130, 2, 64, lengths=(64, 129, 130), layout="packed")),
    _case("gated_attention", "outliers", _attention(1, 47, 2, 64, outliers=True)),
    _case("gated_attention", "another scale", _attention(1, 31, 2, 32, scale=0.35)),
    _case("gated_attention", "past max_distance", _attention(1, 1100, 1, 16)),
    _case("gated_attention", "past max_distance, lengths", _attention(2, 1001, 1, 64, lengths=(813, 1001))),
    _case("gated_attention", "dropout", _attention(2, 43, 2, 32, dropout=0.25), quick=True),
    _case("gated_attention", "dropout, lengths", _attention(3, 67, 2, 16, dropout=0.5, lengths=(67, 0, 30))),
    _case("encoder_layer", "norms after", layer(2, 37, 3, 32, 100), quick=True),
    _case("encoder_layer", "norms first", layer(2, 37, 3, 32, 100, norm_first=True), quick=True),
    _case("encoder_layer", "lengths", layer(3, 29, 2, 64, 80, lengths=(29, 1, 17), act="gelu_tanh"), quick=True),
    _case("encoder_layer", "norms first, lengths, relu", layer(
        2, 50, 2, 16, 48, lengths=(50, 0), norm_first=True, act="relu")),
    _case("encoder_layer", "one frame, odd width", layer(2, 1, 3, 5, 7)),
    _case("encoder_layer", "several groups", layer(3, 700, 1, 16, 24)),
    _case("encoder_layer", "longer than a group", layer(1, 1101, 1, 16, 24, norm_first=True)),
    _case("tdnn", "k5", _tdnn(2, 23, 16, 24, 5, 1), quick=True),
    _case("tdnn", "k3, dilation 2", _tdnn(2, 21, 24, 16, 3, 2), quick=True),
    _case("tdnn", "k3, dilation 3, no bias, none", _tdnn(1, 30, 16, 12, 3, 3, bias=False, act="none")),
    _case("tdnn", "k1", _tdnn(2, 7, 16, 40, 1, 1)),
    _case("tdnn", "one frame out", _tdnn(2, 5, 16, 8, 3, 2)),
    _case("stats_pool", "all frames", _pool(2, 23, 16), quick=True),
    _case("stats_pool", "lengths", _pool(3, 37, 24, (37, 2, 19)), quick=True),
    _case("stats_pool", "one frame and none", _pool(3, 9, 8, (1, 0, 9)), differentiate=False),
    _case("stats_pool", "long", _pool(1, 1500, 8)),
)  # fmt: skip


def cases_of(op: str, quick: bool = False) -> tuple[Case, ...]:
    """The cases of one op."""
    return tuple(c for c in CASES if c.op == op and (c.quick or not quick))
