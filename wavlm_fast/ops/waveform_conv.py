"""First convolution of the feature encoder: waveform to frames, with its norm and activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check as check
from ._activation import activate, activate_backward
from ._define import autocast, define, differentiate, only, or_none
from ._packed import RESIZED, Resized, check_resized, each_backward, each_resized, windows

NAME = "waveform_conv"
BACKWARD = f"{NAME}_backward"
NORMS = ("none", "group", "layer")


def waveform_conv(
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> Tensor:
    """Convolution of a waveform (one input channel), norm and activation, written time-major.

    Equivalent to `activation(norm(F.conv1d(waveform[:, None], weight, bias, stride))).transpose(1, 2)`, as
    transformers' `WavLMGroupNormConvLayer` and `WavLMLayerNormConvLayer` compute it.

    Args:
        waveform: `[B, S]` samples.
        weight: `[C, 1, K]`, the dtype of `waveform`.
        bias: `[C]` or None.
        stride: in samples.
        norm: "group" (per utterance and channel, over time, biased variance), "layer" (over channels) or "none".
        norm_weight: `[C]` or None.
        norm_bias: `[C]` or None.
        eps: added to the variance.
        activation: "none", "gelu" (erf), "gelu_tanh" or "relu".
        offsets, out_offsets: of packed samples `[1, S]` and of the output's frames (`_packed.py`): statistics are each
            utterance's own, and no window spans a boundary.
        out_frames: the output's frames in all.

    Returns:
        `[B, T, C]` with T = (S - K) // stride + 1, the dtype of `waveform`.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or names do not fit; fewer than K samples.
    """
    packed = (offsets, out_offsets, out_frames)
    return _op(waveform.contiguous(), weight, bias, stride, norm, norm_weight, norm_bias, eps, activation, *packed)


def reference(
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> Tensor:
    if offsets is not None:
        tail = (weight, bias, stride, norm, norm_weight, norm_bias, eps, activation)
        after = windows(weight.shape[2], stride)
        packed = Resized(offsets, out_offsets, out_frames)
        return each_resized(NAME, lambda own: reference(own, *tail), after, packed, waveform)
    y = F.conv1d(waveform[:, None], weight, bias, stride)  # [B, C, T]
    # Norm parameters may be wider than the product under autocast.
    wide = y if norm_weight is None else y.to(norm_weight.dtype)
    if norm == "group":
        wide = torch.group_norm(wide, y.shape[1], norm_weight, norm_bias, eps)
    wide = wide.transpose(1, 2)  # [B, T, C]
    if norm == "layer":
        wide = F.layer_norm(wide, wide.shape[-1:], norm_weight, norm_bias, eps)
    return activate(activation, wide).to(y.dtype).contiguous()


def _check(
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    *packed: Tensor | int | None,
) -> None:
    check.floating(NAME, "waveform", waveform)
    check.shape(NAME, "waveform", waveform, ("B", "S"))
    check.shape(NAME, "weight", weight, ("C", 1, "K"))
    check.same(NAME, "waveform", waveform, weight=weight, bias=bias)
    if bias is not None:
        check.shape(NAME, "bias", bias, (weight.shape[0],))
    check.norm(NAME, weight.shape[0], waveform, norm_weight, norm_bias)
    if norm not in NORMS:
        raise ValueError(f"{NAME} wants a norm of {NORMS}, got {norm!r}")
    check.activation(NAME, activation)
    check.positive(NAME, stride=stride, taps=weight.shape[2])
    check.frames(NAME, waveform.shape[1], weight.shape[2], "samples")
    check_resized(NAME, "waveform", waveform, Resized(*packed))


def _check_backward(
    grad: Tensor,
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> None:
    _check(waveform, weight, bias, stride, norm, norm_weight, norm_bias, eps, activation, *packed)
    out = _shape(waveform, weight, stride, Resized(*packed))
    check.alike(BACKWARD, out, "waveform", waveform, grad=grad)
    if norm == "none":  # its parameters are not looked at, and have empty gradients
        norm_weight = norm_bias = weight
    inputs = {"waveform": waveform, "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    check.wanted(BACKWARD, wanted, **inputs)


def _shape(waveform: Tensor, weight: Tensor, stride: int, packed: Resized) -> tuple[int, int, int]:
    frames = (waveform.shape[1] - weight.shape[2]) // stride + 1 if packed.offsets is None else packed.out_frames
    return waveform.shape[0], frames, weight.shape[0]


def _fake(waveform: Tensor, weight: Tensor, bias: Tensor | None, stride: int, *rest: object) -> Tensor:
    return waveform.new_empty(_shape(waveform, weight, stride, Resized(*rest[-3:])))


def _backward_kernel(
    grad: Tensor,
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> tuple[Tensor, ...]:
    packed = Resized(*packed)
    if packed.offsets is not None:

        def alone(waveform: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            tail = (stride, norm, norm_weight, norm_bias, eps, activation, wanted)
            return _backward_kernel(grad, waveform, weight, bias, *tail)

        after = windows(weight.shape[2], stride)
        return each_backward(NAME, alone, after, packed, (waveform,), (grad,))
    aten = torch.ops.aten
    y = F.conv1d(waveform[:, None], weight, bias, stride)  # [B, C, T], recomputed: one channel in makes it cheap
    dtype = y.dtype if norm_weight is None else norm_weight.dtype
    grad, y = grad.to(dtype).transpose(1, 2).contiguous(), y.to(dtype)
    dnorm_weight = dnorm_bias = None
    mask = [True, norm_weight is not None, norm_bias is not None]
    batch, channels, frames = y.shape
    if norm == "none":
        dy = activate_backward(activation, grad, y)
    elif norm == "group":
        # torch's own group norm makes them contiguous before it calls what reads them as such.
        norm_weight, norm_bias = (None if v is None else v.contiguous() for v in (norm_weight, norm_bias))
        sizes = (batch, channels, frames, channels)
        normed, mean, rstd = aten.native_group_norm(y, norm_weight, norm_bias, *sizes, eps)
        dnormed = activate_backward(activation, grad, normed)
        mask[2] &= mask[1]  # torch has no gradient of the bias alone
        dy, dnorm_weight, dnorm_bias = aten.native_group_norm_backward(
            dnormed, y, mean, rstd, norm_weight, *sizes, mask
        )
        if norm_weight is None and norm_bias is not None:
            dnorm_bias = dnormed.sum((0, 2))
    else:
        y = y.transpose(1, 2).contiguous()
        normed, mean, rstd = aten.native_layer_norm(y, [channels], norm_weight, norm_bias, eps)
        dnormed = activate_backward(activation, grad.transpose(1, 2).contiguous(), normed)
        dy, dnorm_weight, dnorm_bias = aten.native_layer_norm_backward(
            dnormed, y, [channels], mean, rstd, norm_weight, norm_bias, mask
        )
        dy = dy.transpose(1, 2)
    dwaveform, dweight, dbias = aten.convolution_backward(
        dy.to(waveform.dtype).contiguous(), waveform[:, None], weight, [channels], [stride], [0], [1], False, [0], 1,
        wanted[:3],
    )  # fmt: skip
    dwaveform = dwaveform[:, 0] if wanted[0] else None
    return only(wanted, dwaveform, dweight, dbias, dnorm_weight, dnorm_bias, like=waveform)


def _backward_fake(
    grad: Tensor,
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> tuple[Tensor, ...]:
    tensors = (waveform, weight, bias, *((None, None) if norm == "none" else (norm_weight, norm_bias)))
    return only(wanted, *(None if t is None else torch.empty_like(t) for t in tensors), like=waveform)


_OPERANDS = (
    "Tensor waveform, Tensor weight, Tensor? bias, int stride, str norm, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, str activation"
)
_op = define(NAME, f"({_OPERANDS}, {RESIZED}) -> Tensor", check=_check, fake=_fake, kernel=reference)
_backward_op = define(
    BACKWARD,
    f"(Tensor grad, {_OPERANDS}, bool[] wanted, {RESIZED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_backward_fake,
    kernel=_backward_kernel,
)


def _backward(grads: tuple, inputs: list, saved: tuple, wanted: tuple) -> tuple:
    operands, packed = inputs[:9], inputs[9:]
    norm = operands[4]
    wanted = (*wanted[:3], *(w and norm != "none" for w in wanted[5:7]))
    found = _backward_op(grads[0].contiguous(), *operands, wanted, *packed)
    dwaveform, dweight, dbias, dnorm_weight, dnorm_bias = or_none(wanted, found)
    return dwaveform, dweight, dbias, None, None, dnorm_weight, dnorm_bias


differentiate(NAME, reference, _backward)
autocast(NAME, _op, lower=(0,), weights=(1, 2))
