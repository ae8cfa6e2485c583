"""The convolutions and linear layers of the cpu backend, norm, bias and activation fused.

linear_act, strided_conv and tdnn have packed weights. All three are convolutions over time-major frames; a linear layer
has one tap. They run in C++ (packed_conv.cpp), float32 as fast as in oneDNN, whose rounding error is more than twice
that of torch's own linear and conv1d. bfloat16 runs in oneDNN on CPUs with matrix units (AMX), or for want of the
extension: packed frames in one call on a grid, for it would make itself ready anew for each length.

A kernel runs below autograd and cannot see whether a gradient is recorded. While a weight learns it is packed anew at
each optimizer step, which costs less than the faster product saves; gradients take the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .._private import is_amx_supported
from ..derived import derived
from ..ops._activation import activate
from ..ops._define import or_empty
from . import onednn
from .grid import Grid, resized_bounds


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """The op of that name."""
    rows = x.reshape(-1, x.shape[-1])
    apart = save and activation != "none"
    fused = "none" if apart else activation
    if in_onednn(x):
        packed = derived("onednn linear", (weight,), lambda: onednn.pack_linear(weight), replaces=True)
        out = onednn.linear(rows, packed, bias, fused)
    else:
        out = _convolve(rows[None], weight, lambda: weight[:, None], 1, bias, 1, 1, fused)
    out = out.view(*x.shape[:-1], weight.shape[0])
    return (activate(activation, out), out) if apart else (out, or_empty(None, x))


def strided_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    save: bool,
    offsets: Tensor | None = None,
    out_offsets: Tensor | None = None,
    out_frames: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The op of that name."""
    apart = save or norm_weight is not None
    fused = "none" if apart else activation
    filtered = can_filter(weight.shape[2], stride) and not save
    filters = lambda: weight.transpose(1, 2)  # noqa: E731
    packed = (offsets, out_offsets, out_frames)
    out = pre = _convolve(x, weight, filters, weight.shape[2], bias, stride, 1, fused, filtered, packed)
    if norm_weight is not None:
        out = norm_act(pre, norm_weight, norm_bias, eps, activation)
    elif apart:
        out = activate(activation, out)
    return out, or_empty(pre if save and out is not pre else None, x)


def tdnn(
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
    """The op of that name."""
    filters = lambda: weight.unflatten(1, (kernel_size, -1))  # noqa: E731
    packed = (offsets, out_offsets, out_frames)
    return _convolve(x, weight, filters, kernel_size, bias, 1, dilation, activation, packed=packed)


def _convolve(
    x: Tensor,
    weight: Tensor,
    filters: Callable[[], Tensor],
    taps: int,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    activation: str,
    filtered: bool = False,
    packed: tuple[Tensor | None, Tensor | None, int | None] = (None, None, None),
) -> Tensor:
    """`[B, T, C]` -> `[B, T', C']`; `filters` gives the weight as `[C', K, C]`, `packed` offsets of packed frames."""
    if in_onednn(x):
        kind = f"onednn conv, {taps} taps, stride {stride}, dilation {dilation}"
        ready = derived(kind, (weight,), lambda: onednn.pack_conv(filters(), stride, dilation), replaces=True)
        convolve = lambda x: onednn.convolve(x, ready, bias, stride, dilation, activation)  # noqa: E731
        if packed[0] is None:
            return convolve(x)
        stride = min(stride, x.shape[1])  # beyond the frames a stride leaves one, whatever it is
        span = (taps - 1) * dilation + 1
        grid = Grid(*resized_bounds("the convolution", *packed, x.shape[1], span, stride), stride)
        return grid.pick_out(convolve(grid.place(x)))
    ready = pack(weight, filters, taps, filtered)
    channels = weight.shape[0]
    native = torch.ops.wavlm_fast_cpu
    return native.packed_conv(x, ready, bias, channels, taps, stride, dilation, filtered, activation, *packed)


def pack(weight: Tensor, filters: Callable[[], Tensor], taps: int, filtered: bool) -> Tensor:
    """`filters()` `[C', K, C]` of a weight in the order of packed_conv.cpp, remembered."""
    kind = f"packed conv, {taps} taps{', filtered' if filtered else ''}"
    return derived(kind, (weight,), lambda: torch.ops.wavlm_fast_cpu.pack_conv([filters()], filtered), replaces=True)


def can_filter(taps: int, stride: int) -> bool:
    """Whether minimal filtering (packed_conv_kernel.cpp) does a convolution in 7/9 of the products.

    It rounds sums of frames and of taps: in bfloat16 no more than what the fused forward saves, in float32 a tenth of
    the error more. Gradients, which add up more roundings, are taken of the direct form.
    """
    return taps == 3 and stride == 2


def norm_act(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str) -> Tensor:
    """Layer norm over channels and activation."""
    return torch.ops.wavlm_fast_cpu.norm_act(x, weight, bias, eps, activation)


def in_onednn(x: Tensor) -> bool:
    """Whether products of `x` run in oneDNN."""
    return x.dtype == torch.bfloat16 and _prefers_onednn()


@cache
def _prefers_onednn() -> bool:
    return onednn.why_not() is None and (is_amx_supported() or not has_extension())


@cache
def has_extension() -> bool:
    """Whether the C++ kernels are there."""
    try:
        torch.ops.wavlm_fast_cpu.isa()
    except RuntimeError:  # an op without a kernel
        return False
    return True


def why_not(extension_problem: str | None, x: Tensor, weight: Tensor) -> str | None:
    """Why these ops cannot run on packed weights; None when they can."""
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype:
        return f"packed weights are float32 or bfloat16, x is {x.dtype} and the weight {weight.dtype}"
    if x.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    return None if in_onednn(x) else extension_problem
