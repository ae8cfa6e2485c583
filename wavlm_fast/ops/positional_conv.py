"""Convolutional positional embedding: a wide grouped convolution, activation and residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check as check
from ._activation import activate, activate_backward
from ._define import autocast, define, differentiate, needs_grad, only, or_empty, or_none
from ._packed import Resized, check_packed, each, each_backward, windows

NAME = "positional_conv"
BACKWARD = f"{NAME}_backward"


def positional_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int,
    activation: str = "gelu",
    residual: bool = True,
    offsets: Tensor | None = None,
) -> Tensor:
    """Grouped convolution over time that keeps the length, activation, and the input added on top.

    Equivalent to `x + activation(F.conv1d(x.transpose(1, 2), weight, bias, padding=K // 2, groups=groups)[..., :T])
    .transpose(1, 2)`, as transformers' `WavLMPositionalConvEmbedding` and the encoders compute it.

    Args:
        x: `[B, T, C]` frames; padded frames hold zeros.
        weight: `[C, C / groups, K]`, weight norm already applied, the dtype of `x`.
        bias: `[C]` or None.
        groups: number of channel groups.
        activation: "none", "gelu" (erf), "gelu_tanh" or "relu".
        residual: whether `x` is added.
        offsets: of packed frames `[1, N, C]` (`_packed.py`): there are zeros beyond both ends of each utterance.

    Returns:
        `[B, T, C]`, the dtype of `x`.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or the activation do not fit.
    """
    save = activation != "none" and needs_grad(x, weight, bias)
    return _op(x.contiguous(), weight, bias, groups, activation, residual, save, offsets)[0]


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, offsets: Tensor | None = None
) -> Tensor:
    if offsets is not None:
        return each(NAME, lambda own: _convolve(own, weight, bias, groups), offsets, x)
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[2] // 2, groups=groups)
    return y[..., : x.shape[1]].transpose(1, 2).contiguous()  # an even kernel gives one frame more


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    activation: str,
    residual: bool,
    offsets: Tensor | None = None,
) -> Tensor:
    y = activate(activation, _convolve(x, weight, bias, groups, offsets))
    return x + y if residual else y


def _kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    activation: str,
    residual: bool,
    save: bool,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    pre = _convolve(x, weight, bias, groups, offsets)
    y = activate(activation, pre)
    return x + y if residual else y, or_empty(pre if save and activation != "none" else None, x)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    activation: str,
    residual: bool,
    save: bool,
    offsets: Tensor | None = None,
) -> None:
    check.floating(NAME, "x", x)
    check.shape(NAME, "x", x, ("B", "T", "C"))
    channels = x.shape[2]
    if groups < 1 or channels % groups:
        raise ValueError(f"{NAME} wants groups that divide the {channels} channels, got {groups}")
    check.shape(NAME, "weight", weight, (channels, channels // groups, "K"))
    if bias is not None:
        check.shape(NAME, "bias", bias, (channels,))
    check.same(NAME, "x", x, weight=weight, bias=bias)
    check.activation(NAME, activation)
    check.positive(NAME, taps=weight.shape[2])
    check.frames(NAME, x.shape[1], 1)
    check_packed(NAME, "x", x, offsets)


def _check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    groups: int,
    activation: str,
    residual: bool,
    wanted: list[bool],
    offsets: Tensor | None = None,
) -> None:
    _check(x, weight, bias, groups, activation, residual, True, offsets)
    check.alike(BACKWARD, tuple(x.shape), "x", x, grad=grad, **({} if activation == "none" else {"pre": pre}))
    check.wanted(BACKWARD, wanted, x=x, weight=weight, bias=bias)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    activation: str,
    residual: bool,
    save: bool,
    *rest: object,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if save and activation != "none" else x.new_empty(0)


def _backward_kernel(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    groups: int,
    activation: str,
    residual: bool,
    wanted: list[bool],
    offsets: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if offsets is not None:

        def alone(x: Tensor, grad: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
            return _backward_kernel(grad, x, weight, bias, pre, groups, activation, residual, wanted)

        return each_backward(NAME, alone, windows(1), Resized(offsets, offsets), (x,), (grad, pre))
    kernel = weight.shape[2]
    dy = activate_backward(activation, grad, pre).transpose(1, 2)
    dy = F.pad(dy, (0, (kernel + 1) % 2))  # the dropped frame has no gradient
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dy, x.transpose(1, 2).contiguous(), weight, [weight.shape[0]], [1], [kernel // 2], [1], False, [0], groups,
        wanted,
    )  # fmt: skip
    if wanted[0]:
        dx = dx.transpose(1, 2)
        dx = (dx + grad if residual else dx).contiguous()
    return only(wanted, dx, dweight, dbias, like=x)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    groups: int,
    activation: str,
    residual: bool,
    wanted: list[bool],
    offsets: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return only(wanted, *(None if t is None else torch.empty_like(t) for t in (x, weight, bias)), like=x)


_op = define(
    NAME,
    "(Tensor x, Tensor weight, Tensor? bias, int groups, str activation, bool residual, bool save, "
    "Tensor? offsets=None) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    kernel=_kernel,
)
_backward_op = define(
    BACKWARD,
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor pre, int groups, str activation, bool residual, "
    "bool[] wanted, Tensor? offsets=None) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_backward_fake,
    kernel=_backward_kernel,
)


def _backward(grads: tuple, inputs: list, saved: tuple, wanted: tuple) -> tuple:
    x, weight, bias, groups, activation, residual, _, offsets = inputs
    wanted = wanted[:3]
    grad = grads[0].contiguous()
    found = _backward_op(grad, x, weight, bias, *saved, groups, activation, residual, wanted, offsets)
    return or_none(wanted, found)


differentiate(NAME, reference, _backward, save=lambda outputs: outputs[1:], unread="save")
autocast(NAME, _op, lower=(0,), weights=(1, 2))
