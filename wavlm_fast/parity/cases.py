"""What each op is tried on: shapes that break kernels."""

from __future__ import annotations

from .builders import (
    Case,
    attention,
    case,
    case_of,
    every_other_frame,
    gate,
    linear,
    norm,
    pool,
    positional,
    strided,
    tdnn,
    waveform,
)
from .composed import layer, stack
from .ragged_cases import RAGGED

__all__ = ["CASES", "Case", "case_of", "cases_of"]

_WIDE_NORM = frozenset({"norm_weight", "norm_bias"})
_BOTH = {"upstream": (0, 1)}

CASES: tuple[Case, ...] = (
    case("waveform_conv", "group norm, gelu", waveform(2, 403, 24), quick=True),
    case("waveform_conv", "group norm, bias, gelu_tanh", waveform(3, 258, 16, bias=True, activation="gelu_tanh")),
    case("waveform_conv", "group norm, quiet", waveform(2, 211, 16, bias=True, quiet=True), quick=True),
    case("waveform_conv", "group norm without affine", waveform(1, 97, 8, affine=False, activation="relu")),
    case("waveform_conv", "group norm, one frame", waveform(2, 12, 16, bias=True), differentiate=False),
    case("waveform_conv", "layer norm, bias, gelu", waveform(2, 403, 24, norm="layer", bias=True), quick=True),
    case("waveform_conv", "layer norm, quiet", waveform(1, 211, 16, norm="layer", quiet=True), quick=True),
    case("waveform_conv", "layer norm, one frame", waveform(1, 10, 40, norm="layer", activation="relu")),
    case("waveform_conv", "layer norm in float32", waveform(2, 158, 24, norm="layer"), wide=_WIDE_NORM),
    case("waveform_conv", "group norm in float32", waveform(2, 158, 24), wide=_WIDE_NORM),
    case("waveform_conv", "no norm, odd kernel and stride", waveform(1, 100, 12, 7, 3, norm="none", activation="none")),
    case("waveform_conv", "no norm, bias, relu", waveform(2, 101, 12, norm="none", bias=True, activation="relu")),
    case("waveform_conv", "512 channels", waveform(1, 1003, 512), quick=True),
    case("feature_encoder", "group norm", stack(2, 1003, (24, 10, 5), (16, 3, 2), (24, 3, 2), (16, 2, 2)), quick=True),
    case("feature_encoder", "layer norm, biases", stack(
        2, 1003, (24, 10, 5), (16, 3, 2), (24, 3, 2), (16, 2, 2), norm="layer", bias=True), quick=True),
    case("feature_encoder", "no norm, odd shapes, relu", stack(
        1, 311, (7, 5, 3), (9, 4, 3), (5, 3, 1), norm="none", bias=True, activation="relu")),
    case("feature_encoder", "quiet, gelu_tanh", stack(
        1, 500, (16, 10, 5), (16, 3, 2), activation="gelu_tanh", quiet=True)),
    case("feature_encoder", "one frame", stack(2, 55, (16, 10, 5), (16, 3, 2), (16, 3, 2), bias=True)),
    case("feature_encoder", "several pieces", stack(1, 9000, (16, 10, 5), (32, 3, 2), (16, 3, 2), (8, 2, 2))),
    case("feature_encoder", "128 channels", stack(1, 2003, *[(128, 10, 5)], *[(128, 3, 2)] * 3, norm="layer")),
    case("feature_encoder", "one layer", stack(2, 101, (16, 10, 5))),
    case("strided_conv", "k3 s2, gelu", strided(2, 41, 16, 24, 3, 2), quick=True),
    case("strided_conv", "k2 s2, even frames", strided(1, 40, 16, 16, 2, 2)),
    case("strided_conv", "k2 s2, odd frames, gelu_tanh", strided(
        2, 37, 24, 16, 2, 2, bias=True, activation="gelu_tanh")),
    case("strided_conv", "layer norm, bias, gelu", strided(2, 41, 16, 24, 3, 2, norm=True, bias=True), quick=True),
    case("strided_conv", "layer norm, quiet", strided(1, 33, 16, 24, 3, 2, norm=True, quiet=True), quick=True),
    case("strided_conv", "layer norm in float32", strided(2, 35, 24, 24, 3, 2, norm=True), wide=_WIDE_NORM),
    case("strided_conv", "one frame, relu", strided(2, 3, 16, 16, 3, 2, norm=True, activation="relu")),
    case("strided_conv", "k5 s1, none", strided(1, 19, 8, 12, 5, 1, activation="none", bias=True)),
    case("strided_conv", "k1 s3", strided(2, 17, 12, 8, 1, 3)),
    case("strided_conv", "128 channels", strided(1, 69, 128, 128, 3, 2, norm=True, bias=True)),
    case("positional_conv", "even kernel", positional(2, 37, 32, 16, 4), quick=True),
    case("positional_conv", "odd kernel", positional(2, 37, 32, 15, 4, activation="relu"), quick=True),
    case("positional_conv", "k128, fewer frames than taps", positional(1, 49, 64, 128, 16)),
    case("positional_conv", "one frame", positional(2, 1, 32, 16, 4)),
    case("positional_conv", "no bias", positional(1, 50, 24, 8, 2, bias=False)),
    case("positional_conv", "no residual", positional(1, 50, 24, 8, 2, residual=False), quick=True),
    case("positional_conv", "one group, gelu_tanh", positional(1, 21, 16, 6, 1, activation="gelu_tanh")),
    case("positional_conv", "as many groups as channels, none", positional(1, 21, 16, 6, 16, activation="none")),
    case("positional_conv", "long", positional(1, 301, 32, 128, 2)),
    case("linear_act", "none", linear(2, 19, 24, outer=40), quick=True),
    case("linear_act", "gelu", linear(2, 19, 24, outer=40, activation="gelu"), quick=True),
    case("linear_act", "gelu, no bias", linear(3, 7, 33, outer=17, bias=False, activation="gelu")),
    case("linear_act", "gelu_tanh", linear(1, 50, 64, outer=31, activation="gelu_tanh")),
    case("linear_act", "relu, one row", linear(1, 1, 16, outer=24, activation="relu")),
    case("linear_act", "a matrix", linear(21, 24, outer=8)),
    case("linear_act", "a vector", linear(24, outer=8, activation="gelu")),
    case("linear_act", "wide", linear(1, 129, 256, outer=320, activation="gelu")),
    case("add_layer_norm", "both used", norm(2, 19, 48), quick=True, **_BOTH),
    case("add_layer_norm", "normed used", norm(2, 19, 33), upstream=(1,)),
    case("add_layer_norm", "sum used", norm(1, 5, 16), upstream=(0,)),
    case("add_layer_norm", "sum not kept", norm(2, 17, 40, keep_sum=False), quick=True, upstream=(1,)),
    case("add_layer_norm", "quiet", norm(2, 21, 40, quiet=True), quick=True, **_BOTH),
    case("add_layer_norm", "one row", norm(1, 1, 40), **_BOTH),
    case("add_layer_norm", "a matrix", norm(7, 24), **_BOTH),
    case("add_layer_norm", "768 channels", norm(1, 11, 768), quick=True, **_BOTH),
    case("add_layer_norm", "1024 channels", norm(3, 5, 1024), **_BOTH),
    case("position_gate", "D 32", gate(2, 19, 4, 32), quick=True),
    case("position_gate", "D 64", gate(2, 37, 3, 64)),
    case("position_gate", "D 80", gate(1, 21, 2, 80)),
    case("position_gate", "one frame, one head", gate(1, 1, 1, 16)),
    case("position_gate", "strided frames", gate(2, 18, 2, 32), arrange=every_other_frame),
    case("position_gate", "parameters in float32", gate(2, 23, 4, 16), wide=frozenset({"weight", "bias", "const"})),
    case("gated_attention", "D 32", attention(2, 37, 3, 32), quick=True),
    case("gated_attention", "D 64, packed", attention(2, 65, 2, 64, layout="packed"), quick=True),
    case("gated_attention", "D 80, packed", attention(1, 51, 2, 80, layout="packed")),
    case("gated_attention", "D 128, heads first", attention(1, 33, 1, 128, layout="heads first")),
    case("gated_attention", "D 12, window", attention(2, 29, 2, 12, layout="window")),
    case("gated_attention", "one frame", attention(2, 1, 2, 32)),
    case("gated_attention", "two frames, one head", attention(1, 2, 1, 16, lengths=(1,))),
    case("gated_attention", "lengths", attention(4, 35, 2, 32, lengths=(35, 0, 1, 18)), quick=True),
    case("gated_attention", "lengths, packed", attention(3, 130, 2, 64, lengths=(64, 129, 130), layout="packed")),
    case("gated_attention", "outliers", attention(1, 47, 2, 64, outliers=True)),
    case("gated_attention", "another scale", attention(1, 31, 2, 32, scale=0.35)),
    case("gated_attention", "past max_distance", attention(1, 1100, 1, 16)),
    case("gated_attention", "past max_distance, lengths", attention(2, 1001, 1, 64, lengths=(813, 1001))),
    case("gated_attention", "dropout", attention(2, 43, 2, 32, dropout=0.25), quick=True),
    case("gated_attention", "dropout, lengths", attention(3, 67, 2, 16, dropout=0.5, lengths=(67, 0, 30))),
    case("encoder_layer", "norms after", layer(2, 37, 3, 32, 100), quick=True),
    case("encoder_layer", "norms first", layer(2, 37, 3, 32, 100, norm_first=True), quick=True),
    case("encoder_layer", "lengths", layer(3, 29, 2, 64, 80, lengths=(29, 1, 17), activation="gelu_tanh"), quick=True),
    case("encoder_layer", "norms first, lengths, relu", layer(
        2, 50, 2, 16, 48, lengths=(50, 0), norm_first=True, activation="relu")),
    case("encoder_layer", "one frame, odd width", layer(2, 1, 3, 5, 7)),
    case("encoder_layer", "several groups", layer(3, 700, 1, 16, 24)),
    case("encoder_layer", "longer than a group", layer(1, 1101, 1, 16, 24, norm_first=True)),
    case("tdnn", "k5", tdnn(2, 23, 16, 24, 5, 1), quick=True),
    case("tdnn", "k3, dilation 2", tdnn(2, 21, 24, 16, 3, 2), quick=True),
    case("tdnn", "k3, dilation 3, no bias, none", tdnn(1, 30, 16, 12, 3, 3, bias=False, activation="none")),
    case("tdnn", "k1", tdnn(2, 7, 16, 40, 1, 1)),
    case("tdnn", "one frame out", tdnn(2, 5, 16, 8, 3, 2)),
    case("stats_pool", "all frames", pool(2, 23, 16), quick=True),
    case("stats_pool", "lengths", pool(3, 37, 24, lengths=(37, 2, 19)), quick=True),
    case("stats_pool", "one frame and none", pool(3, 9, 8, lengths=(1, 0, 9)), differentiate=False),
    case("stats_pool", "long", pool(1, 1500, 8)),
    *RAGGED,
)  # fmt: skip


def cases_of(op: str, quick: bool = False) -> tuple[Case, ...]:
    """The cases of one op."""
    return tuple(c for c in CASES if c.op == op and (c.quick or not quick))
