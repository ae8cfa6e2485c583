"""Linear layer with bias and activation in one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..freed import contiguous
from . import _check as check
from ._activation import activate, activate_backward
from ._define import autocast, define, differentiate, needs_grad, only, or_empty, or_none, trained_by_torch
from ._registry import Arguments, Operand, Place, Sizes, describe, multiplied, vector

NAME = "linear_act"
BACKWARD = f"{NAME}_backward"


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """A linear layer followed by an activation; equivalent to `activation(F.linear(x, weight, bias))`.

    Args:
        x: `[..., C]`, floating point.
        weight: `[C', C]`, the dtype of `x`.
        bias: `[C']` or None.
        activation: "none", "gelu" (erf), "gelu_tanh" or "relu".

    Returns:
        `[..., C']`, the dtype of `x`.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or the activation do not fit.
    """
    if trained_by_torch(NAME, weight, x, weight, bias, activation, True):
        return reference(x, weight, bias, activation)
    save = needs_grad(x, weight, bias)  # of no activation nothing is saved, but a weight may learn
    return _op(x.contiguous(), contiguous(weight), bias, activation, save)[0]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return activate(activation, F.linear(x, weight, bias))


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, weight, bias)
    return activate(activation, pre), or_empty(pre if save and activation != "none" else None, x)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> None:
    check.floating(NAME, "x", x)
    check.shape(NAME, "weight", weight, ("C'", "C"))
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{NAME} wants x of shape [..., {weight.shape[1]}] for this weight, got {list(x.shape)}")
    if bias is not None:
        check.shape(NAME, "bias", bias, (weight.shape[0],))
    check.same(NAME, "x", x, weight=weight, bias=bias)
    check.activation(NAME, activation)


def _check_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, activation: str, wanted: list[bool]
) -> None:
    _check(x, weight, bias, activation, True)
    out = (*x.shape[:-1], weight.shape[0])
    check.alike(BACKWARD, out, "x", x, grad=grad, **({} if activation == "none" else {"pre": pre}))
    check.wanted(BACKWARD, wanted, x=x, weight=weight, bias=bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return out, torch.empty_like(out) if save and activation != "none" else x.new_empty(0)


def _backward_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, activation: str, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad = activate_backward(activation, grad, pre).reshape(-1, weight.shape[0])
    dx = (grad @ weight).view(x.shape) if wanted[0] else None
    dweight = grad.mT @ x.reshape(-1, weight.shape[1]) if wanted[1] else None
    return only(wanted, dx, dweight, grad.sum(0) if wanted[2] else None, like=x)


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, activation: str, wanted: list[bool]
) -> tuple[Tensor, ...]:
    return only(wanted, *(None if t is None else torch.empty_like(t) for t in (x, weight, bias)), like=x)


_SIGNATURE = "(Tensor x, Tensor weight, Tensor? bias, str activation, bool save) -> (Tensor, Tensor)"
_BACKWARD_SIGNATURE = (
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor pre, str activation, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)"
)
_op = define(NAME, _SIGNATURE, check=_check, fake=_fake, kernel=_kernel)
_backward_op = define(
    BACKWARD, _BACKWARD_SIGNATURE, check=_check_backward, fake=_backward_fake, kernel=_backward_kernel
)


def _backward(grads: tuple, inputs: list, saved: tuple, wanted: tuple) -> tuple:
    x, weight, bias, activation, _ = inputs
    wanted = wanted[:3]
    return or_none(wanted, _backward_op(grads[0].contiguous(), x, weight, bias, *saved, activation, wanted))


differentiate(NAME, reference, _backward, save=lambda outputs: outputs[1:], unread="save")
autocast(NAME, _op, lower=(0,), weights=(1, 2))


def _example(*shape: int, outer: int, bias: bool = True, activation: str = "none") -> Arguments:
    return {
        "x": Operand(shape),
        "weight": Operand((outer, shape[-1])),
        "bias": vector(outer, bias),
        "activation": activation,
    }


def _flops(x: Operand, weight: Operand, **rest: object) -> int:
    return multiplied(math.prod(x.shape[:-1]), weight)


def _in_model(s: Sizes) -> list[Place]:
    C, inner = s.channels, s.inner

    def place(stage: str, narrow: int, wide: int, activation: str = "none", times: int = s.layers) -> Place:
        return Place(stage, (s.batch, s.frames, narrow), {"outer": wide, "activation": activation}, stage, times)

    return [
        place("projection", s.convs[-1][0], C, times=1),
        place("qkv", C, 3 * C),
        place("out proj", C, C),
        place("feed-forward in", C, inner, s.activation),
        place("feed-forward out", inner, C),
    ]


describe(NAME, linear_act, example=_example, flops=_flops, places=_in_model)
