"""A transformer layer whole, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derived import concatenated
from . import _check as check
from ._define import accumulation_dtype, autocast, define, references
from ._packed import check_either, check_packed
from ._registry import Arguments, Operand, Place, Sizes, describe, described, multiplied, vector
from .add_layer_norm import add_layer_norm, check_norm
from .add_layer_norm import reference as add_layer_norm_reference
from .gated_attention import check_rel_bias, gated_attention
from .gated_attention import reference as gated_attention_reference
from .linear_act import linear_act
from .linear_act import reference as linear_act_reference
from .position_gate import position_gate
from .position_gate import reference as position_gate_reference

NAME = "encoder_layer"
LINEARS = ("q", "k", "v", "out", "intermediate", "output")
MERGED = 4  # weights, where those of queries, keys and values are one


def encoder_layer(
    x: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gate: Sequence[Tensor],
    norms: Sequence[Tensor],
    *,
    eps: Sequence[float],
    scale: float,
    activation: str,
    norm_first: bool,
    offsets: Tensor | None = None,
) -> Tensor:
    """`linear_act`, `position_gate`, `gated_attention` and `add_layer_norm` in the order of a WavLM layer.

    Equivalent to transformers' `WavLMEncoderLayer`, or with `norm_first` to `WavLMEncoderLayerStableLayerNorm`, in
    inference: it has no dropout and no gradient. What lies between need never exist for all frames at once.

    Args:
        x: `[B, T, C]` frames.
        rel_bias: `[H, 2T - 1]` float32 (float64 for float64 frames), as `gated_attention` takes it.
        key_lengths: `[B]` integers, the number of valid frames, or None for all.
        weights, biases: of the projections to queries, keys and values `[C, C]`, or one of all three `[3C, C]`, of the
            attention's output `[C, C]`, of the feed-forward's two layers `[C', C]` and `[C, C']`; the dtype of `x`.
        gate: weight `[8, D]`, bias `[8]` and const `[H]` of `position_gate`.
        norms: weight and bias `[C]` of the attention's norm, then of the final one.
        eps: of these two.
        scale: of the attention's scores.
        activation: of the feed-forward: "none", "gelu" (erf), "gelu_tanh" or "relu".
        norm_first: whether the norms stand before attention and feed-forward, instead of after the sums.
        offsets: of packed frames `[1, N, C]` (`_packed.py`), instead of lengths; rel_bias is then `[H, 2L - 1]` of the
            longest utterance or more.

    Returns:
        `[B, T, C]`, the dtype of `x`.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        RuntimeError: a gradient is wanted.
    """
    tensors = (x, rel_bias, *weights, *biases, *gate, *norms)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(f"{NAME} has no gradient; run the ops that it is made of, or under torch.no_grad()")
    return _op(
        x.contiguous(), rel_bias, key_lengths, list(weights), list(biases), list(gate), list(norms), list(eps), scale,
        activation, norm_first, offsets,
    )  # fmt: skip


def _layer(
    ops: Sequence,
    x: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    gate: list[Tensor],
    norms: list[Tensor],
    eps: list[float],
    scale: float,
    activation: str,
    norm_first: bool,
    offsets: Tensor | None = None,
) -> Tensor:
    linear, position, attention, add_norm = ops
    heads = gate[2].numel()
    normed = F.layer_norm(x, x.shape[-1:], norms[0], norms[1], eps[0]) if norm_first else x
    weight, bias = weights[0], biases[0]
    if len(weights) > MERGED:
        weight, bias = concatenated("qkv weight", weights[:3]), concatenated("qkv bias", biases[:3])
    out, intermediate, output = zip(weights[-3:], biases[-3:], strict=True)
    q, k, v = linear(normed, weight, bias, "none").unflatten(-1, (3, heads, -1)).unbind(2)
    attended = attention(q, k, v, position(normed, *gate), rel_bias, key_lengths, scale, offsets).flatten(2)
    attended = linear(attended, *out, "none")
    first, second = (norms[:2], eps[0]), (norms[2:], eps[1])
    (norm_weight, norm_bias), norm_eps = second if norm_first else first
    total, normed = add_norm(attended, x, norm_weight, norm_bias, norm_eps)
    fed = linear(linear(normed, *intermediate, activation), *output, "none")
    if norm_first:
        return total + fed
    return add_norm(fed, normed, *second[0], second[1])[1]


_OPS = (
    linear_act,
    position_gate,
    lambda *args: gated_attention(*args[:6], 0.0, *args[6:]),
    add_layer_norm,
)
_REFERENCES = (
    linear_act_reference,
    position_gate_reference,
    lambda *args: gated_attention_reference(*args[:6], 0.0, None, *args[6:]),
    add_layer_norm_reference,
)


def reference(*args: Any) -> Tensor:
    return _layer(_REFERENCES, *args)


def _kernel(*args: Any) -> Tensor:
    # Of the ops, not of their references: a backend without this op may have those.
    return _layer(_OPS, *args)


def _check(
    x: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    gate: list[Tensor],
    norms: list[Tensor],
    eps: list[float],
    scale: float,
    activation: str,
    norm_first: bool,
    offsets: Tensor | None = None,
) -> None:
    check.floating(NAME, "x", x)
    check.shape(NAME, "x", x, ("B", "T", "C"))
    check.activation(NAME, activation)
    linears = MERGED if len(weights) == MERGED else len(LINEARS)
    counts = {"weights": (weights, linears), "biases": (biases, linears)}
    counts |= {"gate": (gate, 3), "norms": (norms, 4), "eps": (eps, 2)}
    for name, (given, wanted) in counts.items():
        if len(given) != wanted:
            raise ValueError(f"{NAME} wants {wanted} {name}, got {len(given)}")
    check.shape(NAME, "the intermediate weight", weights[-2], ("C'", x.shape[2]))
    channels, inner = x.shape[2], weights[-2].shape[0]
    shapes = [(channels, channels), (inner, channels), (channels, inner)]
    shapes = [(3 * channels, channels), *shapes] if linears == MERGED else [(channels, channels)] * 3 + shapes
    names = ("merged q, k and v", *LINEARS[3:]) if linears == MERGED else LINEARS
    for name, weight, bias, shape in zip(names, weights, biases, shapes, strict=True):
        check.shape(NAME, f"the {name} weight", weight, shape)
        check.shape(NAME, f"the {name} bias", bias, shape[:1])
        check.same(NAME, "x", x, **{f"the {name} weight": weight, f"the {name} bias": bias})
    for weight, bias in (norms[:2], norms[2:]):
        check_norm(NAME, "x", x, weight)
        check.alike(NAME, (channels,), "its weight", weight, **{"each norm bias": bias})
    check.shape(NAME, "gate const", gate[2], ("H",))
    heads = gate[2].shape[0]
    if heads < 1 or channels % heads:
        raise ValueError(f"{NAME} wants heads that divide the {channels} channels, got {heads}")
    check.shape(NAME, "gate weight", gate[0], (8, channels // heads))
    check.shape(NAME, "gate bias", gate[1], (8,))
    for name, parameter in zip(("gate weight", "gate bias", "gate const"), gate, strict=True):
        check.floating(NAME, name, parameter)
    check_packed(NAME, "x", x, offsets)
    check_rel_bias(NAME, rel_bias, heads, x.shape[1], offsets)
    check_either(NAME, offsets, key_lengths=key_lengths)
    if rel_bias.dtype != accumulation_dtype(x.dtype):
        raise TypeError(f"{NAME} wants rel_bias of {accumulation_dtype(x.dtype)}, got {rel_bias.dtype}")
    if key_lengths is not None:
        check.integers(NAME, "key_lengths", key_lengths, (x.shape[0],))
    check.same_device(NAME, "x", x, rel_bias=rel_bias, key_lengths=key_lengths)
    for parameter in gate:
        check.same_device(NAME, "x", x, gate=parameter)


def _fake(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


_op = define(
    NAME,
    "(Tensor x, Tensor rel_bias, Tensor? key_lengths, Tensor[] weights, Tensor[] biases, Tensor[] gate, "
    "Tensor[] norms, float[] eps, float scale, str activation, bool norm_first, Tensor? offsets=None) -> Tensor",
    check=_check,
    fake=_fake,
    kernel=_kernel,
    in_parts=True,
)
references[NAME] = reference
autocast(NAME, _op, lower=(0,), weights=(3, 4))


def _example(
    batch: int, frames: int, heads: int, width: int, inner: int, *,
    lengths: bool = False, activation: str = "gelu", norm_first: bool = False,
) -> Arguments:  # fmt: skip
    channels = heads * width
    shapes = [(channels, channels)] * 4 + [(inner, channels), (channels, inner)]
    attention = described["gated_attention"].example(batch, frames, heads, width, lengths=lengths)
    gate = described["position_gate"].example(batch, frames, heads, width)
    return {
        "x": gate["x"],
        "rel_bias": attention["rel_bias"],
        "key_lengths": attention["key_lengths"],
        "weights": [Operand(shape) for shape in shapes],
        "biases": [vector(shape[0]) for shape in shapes],
        "gate": [gate[name] for name in ("weight", "bias", "const")],
        "norms": [vector(channels)] * 4,
        "eps": [1e-5, 1e-5],
        "scale": attention["scale"],
        "activation": activation,
        "norm_first": norm_first,
    }


def _flops(x: Operand, weights: list[Operand], gate: list[Operand], **rest: object) -> int:
    (batch, frames, channels), heads = x.shape, gate[2].shape[0]
    q = Operand((batch, frames, heads, channels // heads))
    parts = described["gated_attention"].flops(q), described["position_gate"].flops(x, gate[0], gate[2])
    return sum(parts) + sum(multiplied(batch * frames, weight) for weight in weights)


def _in_model(s: Sizes) -> list[Place]:
    options = {"activation": s.activation, "norm_first": s.norm_first}
    return [Place("layer", (s.batch, s.frames, s.heads, s.width, s.inner), options, times=s.layers)]


_PARTS = ("linear_act", "position_gate", "gated_attention", "add_layer_norm")
describe(NAME, encoder_layer, example=_example, flops=_flops, places=_in_model, parts=_PARTS)
