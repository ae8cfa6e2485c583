"""What cases of ops are made of: values that hide nothing, in the shapes that a case asks for.

A case builds its inputs in float64 from a seeded generator; the harness rounds them to the dtype under test before the
truth is computed, so that the rounding of inputs is nobody's error.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import OPS, Operand
from .composed import layer, stack
from .drawn import Drawn, usual
from .values import OUTLIER, Build, Leaves, normal, uniform


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
    arrange: Callable[[Leaves], tuple]
    wide: frozenset[str] = frozenset()
    upstream: tuple[int, ...] = (0,)
    differentiate: bool = True
    quick: bool = False
    ragged: bool = False

    def leaves(self) -> Leaves:
        """The same values at every call."""
        seed = zlib.crc32(f"{self.op}/{self.name}".encode())
        return self.build(torch.Generator().manual_seed(seed))


def waveform(*sizes: int, quiet: bool = False, **options: Any) -> Drawn:
    def draw(g: torch.Generator, name: str, operand: Operand, before: Leaves) -> Tensor:
        if name != "waveform":
            return usual(g, name, operand, before)
        batch, samples = operand.shape
        waveform = normal(g, batch, samples)
        # Speech does not stay at one loudness, and a hum plus an offset make windows correlated.
        time = torch.arange(samples, dtype=torch.float64)
        waveform = waveform * (0.1 + torch.linspace(0, 2, batch)[:, None]) + torch.sin(time / 7) + 0.5
        return waveform * (3e-3 if quiet else 1)

    return Drawn("waveform_conv", OPS["waveform_conv"].example(*sizes, **options), draw)


def strided(*sizes: int, quiet: bool = False, **options: Any) -> Drawn:
    def draw(g: torch.Generator, name: str, operand: Operand, before: Leaves) -> Tensor:
        if quiet and name == "x":
            return normal(g, *operand.shape) * 3e-3
        return usual(g, name, operand, before)

    return Drawn("strided_conv", OPS["strided_conv"].example(*sizes, **options), draw)


def positional(*sizes: int, **options: Any) -> Drawn:
    def draw(g: torch.Generator, name: str, operand: Operand, before: Leaves) -> Tensor:
        return usual(g, name, operand, before) * (2 if name == "weight" else 1)

    return Drawn("positional_conv", OPS["positional_conv"].example(*sizes, **options), draw)


def norm(*shape: int, quiet: bool = False, **options: Any) -> Drawn:
    def draw(g: torch.Generator, name: str, operand: Operand, before: Leaves) -> Tensor:
        if name not in ("x", "residual"):
            return usual(g, name, operand, before)
        loud = name == "x" and not quiet
        return (usual(g, name, operand, before) if loud else normal(g, *operand.shape)) * (3e-3 if quiet else 1)

    return Drawn("add_layer_norm", OPS["add_layer_norm"].example(*shape, **options), draw)


def gate(*sizes: int) -> Drawn:
    def draw(g: torch.Generator, name: str, operand: Operand, before: Leaves) -> Tensor:
        if name == "weight":
            # The logits must spread, not saturate: outliers enter through small weights, as in trained models.
            (rows, width), channels = operand.shape, before["x"].shape[-1]
            weight = normal(g, rows, width, std=0.75 * width**-0.5)
            weight[:, [c % width for c in (3, channels // 2 + 1)]] *= 3 / OUTLIER
            return weight
        if name == "const":
            return 0.5 + 2.5 * uniform(g, *operand.shape)
        return normal(g, *operand.shape, std=0.3) if name == "bias" else usual(g, name, operand, before)

    return Drawn("position_gate", OPS["position_gate"].example(*sizes), draw)


def every_other_frame(leaves: Leaves) -> tuple:
    x, *rest = leaves.values()
    return x[:, 1::2], *rest


# Layout of queries, keys and values -> the shape of the tensor that they are views of.
_LAYOUTS: dict[str, Callable[[int, int, int, int], tuple[int, ...]]] = {
    "packed": lambda B, T, H, D: (B, T, 3, H, D),
    "separate": lambda B, T, H, D: (3, B, T, H, D),
    "heads first": lambda B, T, H, D: (3, B, H, T, D),
    "window": lambda B, T, H, D: (3, B, T + 3, H, D + 4),
}


@dataclass(frozen=True, eq=False)
class _Attention(Drawn):
    """Of queries, keys and values in one tensor, in one of _LAYOUTS."""

    layout: str = "separate"

    def arrange(self, leaves: Leaves) -> tuple:
        qkv = leaves["qkv"]
        if self.layout == "packed":
            qkv = qkv.unbind(2)
        elif self.layout == "heads first":
            qkv = [x.transpose(1, 2) for x in qkv]
        elif self.layout == "window":
            qkv = [x[:, 1:-2, :, 3:-1] for x in qkv]
        return super().arrange({**leaves, **dict(zip("qkv", qkv, strict=True))})


def attention(
    *sizes: int, lengths: tuple[int, ...] | None = None, layout: str = "separate", outliers: bool = False,
    **options: Any,
) -> Drawn:  # fmt: skip
    q, _, _, *others = OPS["gated_attention"].example(*sizes, lengths=lengths is not None, **options).items()
    example = {"qkv": Operand(_LAYOUTS[layout](*q[1].shape)), **dict(others)}

    def draw(g: torch.Generator, name: str, operand: Operand, before: Leaves) -> Tensor:
        if name == "gate":
            return 0.2 + 3.6 * uniform(g, *operand.shape)
        if name == "rel_bias":
            return normal(g, *operand.shape, std=1.5).clamp(-5, 5)
        if name != "qkv":
            return torch.tensor(lengths if name == "key_lengths" else [2**33 + 20260131])
        qkv = normal(g, *operand.shape)
        if layout == "separate":
            qkv[:2] *= 1.7  # scores of a deviation of three: rows with a handful of heavy keys
        if outliers:
            # Large in the product's one factor, small in the other, and large in the values.
            qkv[0, ..., 1], qkv[1, ..., 1] = OUTLIER, qkv[1, ..., 1] / OUTLIER
            qkv[2, ..., 2] += OUTLIER
        return qkv

    return _Attention("gated_attention", example, draw, layout)


def pool(*sizes: int, lengths: tuple[int, ...] | None = None) -> Drawn:
    def draw(g: torch.Generator, name: str, operand: Operand, before: Leaves) -> Tensor:
        return torch.tensor(lengths) if name == "lengths" else usual(g, name, operand, before)

    return Drawn("stats_pool", OPS["stats_pool"].example(*sizes, lengths=lengths is not None), draw)


def _as_described(op: str, *sizes: Any, **options: Any) -> Drawn:
    return Drawn(op, OPS[op].example(*sizes, **options))


linear = partial(_as_described, "linear_act")
tdnn = partial(_as_described, "tdnn")


def case(op: str, name: str, build: Drawn, **more: Any) -> Case:
    usually = {"arrange": build.arrange, "wide": build.wide, "differentiate": OPS[op].has_gradient}
    return Case(op, name, build, **usually | more)


# Builders of calls whose values are not the usual ones by their names, or that have options about values.
_BUILDERS: dict[str, Callable[..., Drawn]] = {
    "feature_encoder": stack,
    "waveform_conv": waveform,
    "strided_conv": strided,
    "positional_conv": positional,
    "add_layer_norm": norm,
    "position_gate": gate,
    "gated_attention": attention,
    "encoder_layer": layer,
    "stats_pool": pool,
}


def case_of(op: str, name: str, *sizes: Any, **options: Any) -> Case:
    """A case of other sizes than those of CASES.

    Args:
        op, name: identify it; equal names have equal random numbers.
        sizes, options: what the op's example takes, and the builder of its cases.
    """
    builder = _BUILDERS.get(op, partial(_as_described, op))
    return case(op, name, builder(*sizes, **options))
