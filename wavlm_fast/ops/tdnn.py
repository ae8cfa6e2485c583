"""Time-delay layer of the x-vector head: dilated convolution with bias and activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check as check
from ._activation import activate
from ._define import autocast, define, differentiate, only, or_none, trained_by_torch
from ._packed import RESIZED, Resized, check_resized, each_backward, each_resized, windows
from ._registry import Arguments, Operand, Place, Sizes, describe, multiplied, vector

NAME = "tdnn"
BACKWARD = f"{NAME}_backward"
ACTIVATIONS = ("none", "relu")


def tdnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int,
    dilation: int = 1,
    activation: str = "relu",
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> Tensor:
    """Dilated convolution over time-major frames with its weight stored as a linear layer's.

    Equivalent to transformers' `TDNNLayer`: `relu(F.conv1d(x.transpose(1, 2), w, bias, dilation=dilation))
    .transpose(1, 2)` with `w = weight.view(C', K, C).transpose(1, 2)`.

    Args:
        x: `[B, T, C]` frames.
        weight: `[C', K·C]`, taps outermost, the dtype of `x`.
        bias: `[C']` or None.
        kernel_size: K, taps.
        dilation: frames between taps.
        activation: "relu" or "none".
        offsets, out_offsets: of packed frames `[1, N, C]` and of the output's (`_packed.py`): no window spans a
            boundary.
        out_frames: the output's frames in all.

    Returns:
        `[B, T', C']` with T' = T - (K - 1)·dilation, the dtype of `x`.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or the activation do not fit; too few frames.
    """
    tail = (bias, kernel_size, dilation, activation, offsets, out_offsets, out_frames)
    if trained_by_torch(NAME, weight, x, weight, *tail):
        return reference(x, weight, *tail)
    return _op(x.contiguous(), weight, *tail)


def _filter(weight: Tensor, kernel_size: int) -> Tensor:
    return weight.unflatten(1, (kernel_size, -1)).transpose(1, 2)  # [C', C, K]


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int,
    activation: str,
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> Tensor:
    if offsets is not None:
        tail = (weight, bias, kernel_size, dilation, activation)
        after = windows((kernel_size - 1) * dilation + 1)
        packed = Resized(offsets, out_offsets, out_frames)
        return each_resized(NAME, lambda own: reference(own, *tail), after, packed, x)
    y = F.conv1d(x.transpose(1, 2), _filter(weight, kernel_size), bias, dilation=dilation)
    return activate(activation, y.transpose(1, 2).contiguous())


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int,
    activation: str,
    *packed: Tensor | int | None,
) -> None:
    check.floating(NAME, "x", x)
    check.shape(NAME, "x", x, ("B", "T", "C"))
    check.positive(NAME, kernel_size=kernel_size, dilation=dilation)
    check.shape(NAME, "weight", weight, ("C'", kernel_size * x.shape[2]))
    if bias is not None:
        check.shape(NAME, "bias", bias, (weight.shape[0],))
    check.same(NAME, "x", x, weight=weight, bias=bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME} wants an activation of {ACTIVATIONS}, got {activation!r}")
    check.frames(NAME, x.shape[1], (kernel_size - 1) * dilation + 1)
    check_resized(NAME, "x", x, Resized(*packed))


def _check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    kernel_size: int,
    dilation: int,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> None:
    _check(x, weight, bias, kernel_size, dilation, activation, *packed)
    shape = _shape(x, weight, kernel_size, dilation, Resized(*packed))
    check.alike(BACKWARD, shape, "x", x, grad=grad, **({} if activation == "none" else {"out": out}))
    check.wanted(BACKWARD, wanted, x=x, weight=weight, bias=bias)


def _shape(x: Tensor, weight: Tensor, kernel_size: int, dilation: int, packed: Resized) -> tuple[int, int, int]:
    frames = x.shape[1] - (kernel_size - 1) * dilation if packed.offsets is None else packed.out_frames
    return x.shape[0], frames, weight.shape[0]


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int,
    activation: str,
    *packed: Tensor | int | None,
) -> Tensor:
    return x.new_empty(_shape(x, weight, kernel_size, dilation, Resized(*packed)))


def _backward_kernel(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    kernel_size: int,
    dilation: int,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> tuple[Tensor, ...]:
    packed = Resized(*packed)
    if packed.offsets is not None:

        def alone(x: Tensor, grad: Tensor, out: Tensor) -> tuple[Tensor, ...]:
            return _backward_kernel(grad, x, weight, bias, out, kernel_size, dilation, activation, wanted)

        after = windows((kernel_size - 1) * dilation + 1)
        return each_backward(NAME, alone, after, packed, (x,), (grad, out))
    if activation == "relu":
        grad = torch.where(out > 0, grad, 0)
    dx, dfilter, dbias = torch.ops.aten.convolution_backward(
        grad.transpose(1, 2), x.transpose(1, 2), _filter(weight, kernel_size),
        [weight.shape[0]], [1], [0], [dilation], False, [0], 1, wanted,
    )  # fmt: skip
    dx = dx.transpose(1, 2).contiguous() if wanted[0] else None
    dweight = dfilter.transpose(1, 2).reshape(weight.shape) if wanted[1] else None
    return only(wanted, dx, dweight, dbias, like=x)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    kernel_size: int,
    dilation: int,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> tuple[Tensor, ...]:
    dbias = None if bias is None else torch.empty_like(bias)
    return only(wanted, torch.empty_like(x), weight.new_empty(weight.shape), dbias, like=x)


_op = define(
    NAME,
    f"(Tensor x, Tensor weight, Tensor? bias, int kernel_size, int dilation, str activation, {RESIZED}) -> Tensor",
    check=_check,
    fake=_fake,
    kernel=reference,
)
_backward_op = define(
    BACKWARD,
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor out, int kernel_size, int dilation, str activation, "
    f"bool[] wanted, {RESIZED}) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_backward_fake,
    kernel=_backward_kernel,
)


def _backward(grads: tuple, inputs: list, saved: tuple, wanted: tuple) -> tuple:
    x, weight, bias, kernel_size, dilation, activation, *packed = inputs
    wanted = wanted[:3]
    grad = grads[0].contiguous()
    found = _backward_op(grad, x, weight, bias, *saved, kernel_size, dilation, activation, wanted, *packed)
    return or_none(wanted, found)


differentiate(NAME, reference, _backward, save=lambda outputs: outputs)
autocast(NAME, _op, lower=(0,), weights=(1, 2))


def _example(
    batch: int, frames: int, inner: int, outer: int, kernel: int, dilation: int, *,
    bias: bool = True, activation: str = "relu",
) -> Arguments:  # fmt: skip
    return {
        "x": Operand((batch, frames, inner)),
        "weight": Operand((outer, kernel * inner)),
        "bias": vector(outer, bias),
        "kernel_size": kernel,
        "dilation": dilation,
        "activation": activation,
    }


def _flops(x: Operand, weight: Operand, kernel_size: int, dilation: int, **rest: object) -> int:
    batch, frames, _ = x.shape
    return multiplied(batch * windows((kernel_size - 1) * dilation + 1)(frames), weight)


def _in_model(s: Sizes) -> list[Place]:
    frames, channels = [s.frames, *s.frames_of_tdnn], [s.tdnn[0][0], *(outer for outer, _, _ in s.tdnn)]
    return [
        Place("x-vector head", (s.batch, *before, *layer), what=f"k{layer[1]} d{layer[2]}")
        for *before, layer in zip(frames, channels, s.tdnn, strict=False)
    ]


describe(NAME, tdnn, example=_example, flops=_flops, places=_in_model)
