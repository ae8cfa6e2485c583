"""Gradients of the cpu backend's convolutions and linear layers, as products of matrices.

float32 runs in C++ (matmul.cpp), bfloat16 in torch, whose products are oneDNN's. Where frames overlap or are skipped
the operands are views that say so; nothing is unfolded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._activation import activate_backward
from ..ops._define import only
from ..ops.strided_conv import finish_backward as finish_norm_backward
from . import products
from .grid import Bounds, Grid, resized_bounds


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """`out = a @ b` or `out += a @ b`."""
    if a.dtype == torch.float32:
        torch.ops.wavlm_fast_cpu.matmul(a, b, out, add)
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    _multiply(a, b, out)
    return out


def _through(activation: str, grad: Tensor, pre: Tensor) -> Tensor:
    """The gradient before the activation."""
    if activation == "none":
        return grad
    if not products.has_extension():
        return activate_backward(activation, grad, pre)
    return torch.ops.wavlm_fast_cpu.activation_backward(grad, pre, activation)


def linear_act_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, activation: str, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """The op of that name."""
    dpre = _through(activation, grad, pre).contiguous().view(-1, weight.shape[0])
    x, weight = x.contiguous(), weight.contiguous()
    dx = _product(dpre, weight).view(x.shape) if wanted[0] else None
    dweight = _product(dpre.t(), x.view(-1, weight.shape[1])) if wanted[1] else None
    return only(wanted, dx, dweight, dpre.sum(0) if wanted[2] else None, like=x)


def strided_conv_backward(
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
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> tuple[Tensor, ...]:
    """The op of that name."""
    x, stride = x.contiguous(), min(stride, x.shape[1])  # beyond the frames a stride leaves one, whatever it is
    if norm_weight is None:
        dpre, dnorm_weight, dnorm_bias = _through(activation, grad, pre), None, None
    else:
        dpre, dnorm_weight, dnorm_bias = finish_norm_backward(grad, pre, norm_weight, norm_bias, eps, activation)
    dpre, taps = dpre.to(x.dtype).contiguous(), weight.permute(2, 0, 1)  # [K, C', C]
    places = out_places = None
    if offsets is not None:
        packed = (offsets, out_offsets, out_frames)
        places, out_places = resized_bounds("strided_conv_backward", *packed, x.shape[1], len(taps), stride)
    runs = _runs(dpre, out_places)
    dx = _of_input(runs, taps, x, places, stride, 1) if wanted[0] else None
    dweight = None
    if wanted[1]:
        dweight = _of_filters(runs, _runs(x, places), len(taps), stride, 1).transpose(1, 2).contiguous()
    dbias = dpre.sum((0, 1)) if wanted[2] else None
    return only(wanted, dx, dweight, dbias, dnorm_weight, dnorm_bias, like=x)


def tdnn_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    kernel_size: int,
    dilation: int,
    activation: str,
    wanted: list[bool],
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> tuple[Tensor, ...]:
    """The op of that name."""
    x, dpre = x.contiguous(), (torch.where(out > 0, grad, 0) if activation == "relu" else grad).contiguous()
    taps = weight.unflatten(1, (kernel_size, -1)).transpose(0, 1)
    dbias = dpre.sum((0, 1)) if wanted[2] else None
    places = out_places = None
    if offsets is not None:
        span = (kernel_size - 1) * dilation + 1
        packed = (offsets, out_offsets, out_frames)
        places, out_places = resized_bounds("tdnn_backward", *packed, x.shape[1], span, 1)
        if bool((x.sum() + weight.sum()).isfinite()):
            # All utterances at once, with zeros for the windows across a boundary, where zeros do no harm. At a stride
            # of one x lies as it has to.
            dpre, places, out_places = Grid(places, out_places, 1).place_out(dpre, span), None, None
    runs = _runs(dpre, out_places)
    dx = _of_input(runs, taps, x, places, 1, dilation) if wanted[0] else None
    dweight = _of_filters(runs, _runs(x, places), kernel_size, 1, dilation).flatten(1) if wanted[1] else None
    return only(wanted, dx, dweight, dbias, like=x)


def _runs(frames: Tensor, places: Bounds | None = None) -> list[Tensor]:
    """`[T, C]` of each utterance: of the batch, or of packed frames; views."""
    return list(frames) if places is None else [frames[0, first:end] for first, end in places]


def _of_filters(dpre: list[Tensor], x: list[Tensor], taps: int, stride: int, dilation: int) -> Tensor:
    """Gradient of the filters, `[C', K, C]`, from that of each utterance's `[T', C']`."""
    channels, width = dpre[0].shape[1], x[0].shape[1]
    # Sums over utterances in float32, whatever the frames are in.
    total = x[0].new_empty(channels, taps, width, dtype=torch.float32)
    for b, (own, frames) in enumerate(zip(dpre, x, strict=True)):
        count = len(own)
        if dilation == 1:  # the windows of all taps are runs of contiguous numbers
            windows = frames.as_strided((count, taps * width), (stride * width, 1))
            _multiply(own.t(), windows, total.flatten(1), b > 0)
            continue
        for tap in range(taps):
            first = tap * dilation
            seen = frames[first : first + (count - 1) * stride + 1 : stride]
            _multiply(own.t(), seen, total[:, tap], b > 0)
    return total.to(x[0].dtype)


def _of_input(dpre: list[Tensor], taps: Tensor, x: Tensor, places: Bounds | None, stride: int, dilation: int) -> Tensor:
    """Gradient of `x`, its shape, from that of each utterance's `[T', C']` and the weight as `[K, C', C]`."""
    dx = torch.empty_like(x)
    for phase in range(stride):
        # Frames phase, phase + stride, ... of x meet these taps only, each so many output frames earlier.
        meeting = [tap for tap in range(len(taps)) if (tap * dilation - phase) % stride == 0]
        delays = [(tap * dilation - phase) // stride for tap in meeting]
        for own, frames in zip(dpre, _runs(dx, places), strict=True):
            _of_phase(own, taps, meeting, delays, frames[phase::stride])
    return dx


def _of_phase(dpre: Tensor, taps: Tensor, meeting: list[int], delays: list[int], dx: Tensor) -> None:
    frames, channels = dpre.shape
    count = len(meeting)
    if not count or delays != list(range(count)) or frames < count:
        dx.zero_()
        for tap, delay in zip(meeting, delays, strict=True):
            _multiply(dpre, taps[tap].contiguous(), dx[delay : delay + frames], True)
        return
    # All taps in one product: a frame's window on dpre ends with the output frame of its own number.
    weights = torch.cat([taps[tap] for tap in reversed(meeting)])  # [count * C', C]
    windows = dpre.as_strided((frames - count + 1, count * channels), (channels, 1))
    _multiply(windows, weights, dx[count - 1 : frames])
    for edge in range(count - 1):
        _multiply(windows[:1, : (edge + 1) * channels], weights[-(edge + 1) * channels :], dx[edge : edge + 1])
        late = dpre[frames - count + 1 + edge :].reshape(1, -1)
        _multiply(late, weights[: late.shape[1]], dx[frames + edge : frames + edge + 1])
    dx[frames + count - 1 :].zero_()


def why_not(extension_problem: str | None, grad: Tensor, x: Tensor, weight: Tensor) -> str | None:
    """Why these gradients cannot be computed here; None when they can."""
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype or grad.dtype != x.dtype:
        return f"products of gradients are float32 or bfloat16, x is {x.dtype} and the weight {weight.dtype}"
    if grad.numel() == 0 or x.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    return extension_problem if x.dtype == torch.float32 else None
