"""The gate on the relative position bias, one number per frame and head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check as check
from ._define import accumulation_dtype, autocast, define, differentiate, only, or_none
from ._registry import Arguments, Operand, Place, Sizes, describe, multiplied, vector

NAME = "position_gate"
BACKWARD = f"{NAME}_backward"


def position_gate(x: Tensor, weight: Tensor, bias: Tensor, const: Tensor) -> Tensor:
    """The gate of WavLM's relative position bias, from the attention module's input.

    Equivalent to, per head, `a * (b * const - 1) + 2` with
    `a, b = F.linear(x, weight, bias).unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)`. Source: equations 5 and 6 of
    WavLM (Chen et al. 2022); transformers' `WavLMAttention`.

    Args:
        x: `[B, T, C]` frames, heads side by side in C = H·D, any strides with C contiguous.
        weight: `[8, D]`.
        bias: `[8]`.
        const: `[H]`, one scale per head.

    Returns:
        `[B, H, T]` float32 (float64 for float64 frames).

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
    """
    return _op(x, weight, bias, const)


def _project(x: Tensor, weight: Tensor, bias: Tensor, const: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    # The sum over four commutes with the projection: two vectors per head are left of eight.
    weight, bias = weight.to(dtype).view(2, 4, -1).sum(1), bias.to(dtype).view(2, 4).sum(1)
    heads = x.to(dtype).unflatten(-1, (const.numel(), -1))  # [B, T, H, D]
    a, b = F.linear(heads, weight, bias).sigmoid().unbind(-1)  # [B, T, H] each
    return heads, a, b


def reference(x: Tensor, weight: Tensor, bias: Tensor, const: Tensor) -> Tensor:
    _, a, b = _project(x, weight, bias, const)
    return (a * (b * const.to(a.dtype) - 1) + 2).transpose(1, 2).contiguous()


def _check(x: Tensor, weight: Tensor, bias: Tensor, const: Tensor) -> None:
    check.floating(NAME, "x", x)
    check.shape(NAME, "const", const, ("H",))
    heads = const.shape[0]
    check.shape(NAME, "weight", weight, (8, "D"))
    check.shape(NAME, "bias", bias, (8,))
    check.shape(NAME, "x", x, ("B", "T", heads * weight.shape[1]))
    check.same_device(NAME, "x", x, weight=weight, bias=bias, const=const)
    for name, parameter in (("weight", weight), ("bias", bias), ("const", const)):
        check.floating(NAME, name, parameter)


def _check_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, const: Tensor, wanted: list[bool]
) -> None:
    _check(x, weight, bias, const)
    check.shape(BACKWARD, "grad", grad, (x.shape[0], const.shape[0], x.shape[1]))
    if grad.dtype != accumulation_dtype(x.dtype):
        raise TypeError(f"{BACKWARD} wants grad of {accumulation_dtype(x.dtype)} for x of {x.dtype}, got {grad.dtype}")
    check.same_device(BACKWARD, "x", x, grad=grad)
    check.wanted(BACKWARD, wanted, x=x, weight=weight, bias=bias, const=const)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, const: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], const.shape[0], x.shape[1]), dtype=accumulation_dtype(x.dtype))


def _backward_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, const: Tensor, wanted: list[bool]
) -> tuple[Tensor, ...]:
    heads, a, b = _project(x, weight, bias, const)
    scale = const.to(a.dtype)
    grad = grad.transpose(1, 2)  # [B, T, H]
    da = grad * (b * scale - 1) * a * (1 - a)
    db = grad * a * scale * b * (1 - b)
    dprojected = torch.stack((da, db), -1)  # [B, T, H, 2]
    folded = weight.to(a.dtype).view(2, 4, -1).sum(1)
    dx = (dprojected @ folded).flatten(2).to(x.dtype)
    dweight = torch.einsum("bthn,bthd->nd", dprojected, heads).repeat_interleave(4, 0)
    dbias = dprojected.sum((0, 1, 2)).repeat_interleave(4)
    dconst = (grad * a * b).sum((0, 1))
    return only(wanted, dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dconst.to(const.dtype), like=x)


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, const: Tensor, wanted: list[bool]
) -> tuple[Tensor, ...]:
    return only(wanted, *(t.new_empty(t.shape) for t in (x, weight, bias, const)), like=x)


_OPERANDS = "Tensor x, Tensor weight, Tensor bias, Tensor const"
_op = define(NAME, f"({_OPERANDS}) -> Tensor", check=_check, fake=_fake, kernel=reference)
_backward_op = define(
    BACKWARD,
    f"(Tensor grad, {_OPERANDS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_backward_fake,
    kernel=_backward_kernel,
)


def _backward(grads: tuple, inputs: list, saved: tuple, wanted: tuple) -> tuple:
    return or_none(wanted, _backward_op(grads[0].contiguous(), *inputs, wanted))


differentiate(NAME, reference, _backward)
autocast(NAME, _op)


def _example(batch: int, frames: int, heads: int, width: int) -> Arguments:
    return {
        "x": Operand((batch, frames, heads * width)),
        "weight": Operand((8, width)),
        "bias": vector(8),
        "const": vector(heads),
    }


def _flops(x: Operand, weight: Operand, const: Operand, **rest: object) -> int:
    return multiplied(x.shape[0] * x.shape[1] * const.shape[0], weight)


def _in_model(s: Sizes) -> list[Place]:
    return [Place("gate", (s.batch, s.frames, s.heads, s.width), times=s.layers)]


describe(NAME, position_gate, example=_example, flops=_flops, places=_in_model)
