"""The feature encoder's further convolutions: frames to fewer frames, with bias, norm and activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check as check
from ._activation import activate, activate_backward
from ._define import autocast, define, differentiate, needs_grad, only, or_empty, or_none
from ._packed import DENSE, RESIZED, Resized, check_resized, each_backward, each_resized, windows

NAME = "strided_conv"
BACKWARD = f"{NAME}_backward"


def strided_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> Tensor:
    """Strided convolution over time-major frames, layer norm over channels when it has a weight, activation.

    Equivalent to `activation(layer_norm(F.conv1d(x.transpose(1, 2), weight, bias, stride).transpose(1, 2)))`, as
    transformers' `WavLMNoLayerNormConvLayer` and `WavLMLayerNormConvLayer` compute it.

    Args:
        x: `[B, T, C]` frames.
        weight: `[C', C, K]`, the dtype of `x`.
        bias: `[C']` or None.
        stride: in frames.
        norm_weight: `[C']`, or None for no norm.
        norm_bias: `[C']` or None.
        eps: added to the variance.
        activation: "none", "gelu" (erf), "gelu_tanh" or "relu".
        offsets, out_offsets: of packed frames `[1, N, C]` and of the output's (`_packed.py`): no window spans a
            boundary.
        out_frames: the output's frames in all.

    Returns:
        `[B, T', C']` with T' = (T - K) // stride + 1, the dtype of `x`.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or the activation do not fit; fewer than K frames.
    """
    save = needs_grad(x, weight, bias, norm_weight, norm_bias)
    tail = (norm_weight, norm_bias, eps, activation, save, offsets, out_offsets, out_frames)
    return _op(x.contiguous(), weight, bias, stride, *tail)[0]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, packed: Resized) -> Tensor:
    if packed.offsets is not None:
        after = windows(weight.shape[2], stride)
        return each_resized(NAME, lambda own: _convolve(own, weight, bias, stride, DENSE), after, packed, x)
    # conv2d over channels-last frames would be faster on a CPU, and more than twice as far from float64.
    return F.conv1d(x.transpose(1, 2), weight, bias, stride).transpose(1, 2).contiguous()


def _finish(
    pre: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, activation: str
) -> Tensor:
    if norm_weight is None:
        return activate(activation, pre)
    # Norm parameters may be wider than the product under autocast.
    normed = F.layer_norm(pre.to(norm_weight.dtype), pre.shape[-1:], norm_weight, norm_bias, eps)
    return activate(activation, normed).to(pre.dtype)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> Tensor:
    pre = _convolve(x, weight, bias, stride, Resized(offsets, out_offsets, out_frames))
    return _finish(pre, norm_weight, norm_bias, eps, activation)


def _kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    save: bool,
    *packed: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    pre = _convolve(x, weight, bias, stride, Resized(*packed))
    out = _finish(pre, norm_weight, norm_bias, eps, activation)
    return out, or_empty(pre if save and out is not pre else None, x)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    save: bool,
    *packed: Tensor | int | None,
) -> None:
    check.floating(NAME, "x", x)
    check.shape(NAME, "weight", weight, ("C'", "C", "K"))
    check.shape(NAME, "x", x, ("B", "T", weight.shape[1]))
    check.same(NAME, "x", x, weight=weight, bias=bias)
    if bias is not None:
        check.shape(NAME, "bias", bias, (weight.shape[0],))
    check.norm(NAME, weight.shape[0], x, norm_weight, norm_bias)
    check.activation(NAME, activation)
    check.positive(NAME, stride=stride, taps=weight.shape[2])
    check.frames(NAME, x.shape[1], weight.shape[2])
    check_resized(NAME, "x", x, Resized(*packed))


def _check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> None:
    _check(x, weight, bias, stride, norm_weight, norm_bias, eps, activation, True, *packed)
    out = _shape(x, weight, stride, Resized(*packed))
    unread = norm_weight is None and activation == "none"
    check.alike(BACKWARD, out, "x", x, grad=grad, **({} if unread else {"pre": pre}))
    norm_bias = None if norm_weight is None else norm_bias  # the forward ignores it
    inputs = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    check.wanted(BACKWARD, wanted, **inputs)


def _shape(x: Tensor, weight: Tensor, stride: int, packed: Resized) -> tuple[int, int, int]:
    frames = (x.shape[1] - weight.shape[2]) // stride + 1 if packed.offsets is None else packed.out_frames
    return x.shape[0], frames, weight.shape[0]


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    save: bool,
    *packed: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    out = x.new_empty(_shape(x, weight, stride, Resized(*packed)))
    distinct = norm_weight is not None or activation != "none"
    return out, torch.empty_like(out) if save and distinct else x.new_empty(0)


def _backward_kernel(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> tuple[Tensor, ...]:
    packed = Resized(*packed)
    if packed.offsets is not None:

        def alone(x: Tensor, grad: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
            tail = (stride, norm_weight, norm_bias, eps, activation, wanted)
            return _backward_kernel(grad, x, weight, bias, pre, *tail)

        after = windows(weight.shape[2], stride)
        return each_backward(NAME, alone, after, packed, (x,), (grad, pre))
    dpre, dnorm_weight, dnorm_bias = finish_backward(grad, pre, norm_weight, norm_bias, eps, activation)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dpre.to(x.dtype).transpose(1, 2), x.transpose(1, 2), weight,
        [weight.shape[0]], [stride], [0], [1], False, [0], 1, wanted[:3],
    )  # fmt: skip
    dx = dx.transpose(1, 2).contiguous() if wanted[0] else None
    dweight = dweight.contiguous() if wanted[1] else None
    return only(wanted, dx, dweight, dbias, dnorm_weight, dnorm_bias, like=x)


def finish_backward(
    grad: Tensor,
    pre: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradient of the output to those of `pre`, before norm and activation, and of the norm's parameters."""
    aten = torch.ops.aten
    dnorm_weight = dnorm_bias = None
    if norm_weight is None:
        dpre = activate_backward(activation, grad, pre)
    else:
        wide, shape = pre.to(norm_weight.dtype), [pre.shape[-1]]
        normed, mean, rstd = aten.native_layer_norm(wide, shape, norm_weight, norm_bias, eps)
        dnormed = activate_backward(activation, grad.to(wide.dtype), normed)
        dpre, dnorm_weight, dnorm_bias = aten.native_layer_norm_backward(
            dnormed, wide, shape, mean, rstd, norm_weight, norm_bias, [True, True, norm_bias is not None]
        )
    return dpre, dnorm_weight, dnorm_bias


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> tuple[Tensor, ...]:
    vectors = (None if v is None else torch.empty_like(v) for v in (bias, norm_weight, norm_bias))
    return only(wanted, torch.empty_like(x), weight.new_empty(weight.shape), *vectors, like=x)


_TAIL = "int stride, Tensor? norm_weight, Tensor? norm_bias, float eps, str activation"
_op = define(
    NAME,
    f"(Tensor x, Tensor weight, Tensor? bias, {_TAIL}, bool save, {RESIZED}) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    kernel=_kernel,
)
_backward_op = define(
    BACKWARD,
    f"(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor pre, {_TAIL}, bool[] wanted, {RESIZED}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_backward_fake,
    kernel=_backward_kernel,
)


def _backward(grads: tuple, inputs: list, saved: tuple, wanted: tuple) -> tuple:
    x, weight, bias, *tail = inputs[:8]
    wanted = (*wanted[:3], *(w and tail[1] is not None for w in wanted[4:6]))
    found = _backward_op(grads[0].contiguous(), x, weight, bias, *saved, *tail, wanted, *inputs[9:])
    dx, dweight, dbias, dnorm_weight, dnorm_bias = or_none(wanted, found)
    return dx, dweight, dbias, None, dnorm_weight, dnorm_bias


differentiate(NAME, reference, _backward, save=lambda outputs: outputs[1:], unread="save")
autocast(NAME, _op, lower=(0,), weights=(1, 2))
