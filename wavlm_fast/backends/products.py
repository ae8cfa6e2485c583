"""The convolutions and linear layers of the cpu backend, norm, bias and activation fused.

linear_act, strided_conv and tdnn have packed weights. All three are convolutions over time-major frames; a linear layer
has one tap. float32 runs in C++ (packed_conv.cpp): it is as fast as oneDNN, whose rounding error is more than twice
that of torch's own linear and conv1d. bfloat16 runs in oneDNN, which uses the matrix units of CPUs that have them.

A kernel runs below autograd and cannot see whether a gradient is recorded. While a weight learns it is packed anew at
each optimizer step, which costs less than the faster product saves; gradients take the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..derived import derived
from ..ops._activation import activate
from ..ops._define import or_empty
from . import onednn


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """The op of that name."""
    rows = x.reshape(-1, x.shape[-1])
    apart = save and activation != "none"
    fused = "none" if apart else activation
    if x.dtype == torch.bfloat16:
        packed = derived("onednn linear", (weight,), lambda: onednn.pack_linear(weight))
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
) -> tuple[Tensor, Tensor]:
    """The op of that name."""
    apart = save or norm_weight is not None
    fused = "none" if apart else activation
    out = pre = _convolve(x, weight, lambda: weight.transpose(1, 2), weight.shape[2], bias, stride, 1, fused)
    if norm_weight is not None:
        out = _norm_act(pre, norm_weight, norm_bias, eps, activation)
    elif apart:
        out = activate(activation, out)
    return out, or_empty(pre if save and out is not pre else None, x)


def waveform_conv(
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """The op of that name, in float32 inside."""
    vectors = [None if v is None else v.float() for v in (bias, norm_weight, norm_bias)]
    fused = "none" if norm == "layer" else activation
    native = torch.ops.wavlm_fast_cpu
    packed = derived("packed waveform conv", (weight,), lambda: native.pack_conv(weight.float()))
    out = native.waveform_conv(
        waveform.float(), weight.float(), packed, vectors[0], stride, norm == "group", *vectors[1:], eps, fused
    )
    if norm == "layer":
        out = _norm_act(out, *vectors[1:], eps, activation)
    return out.to(waveform.dtype)


def _norm_act(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str) -> Tensor:
    return torch.ops.wavlm_fast_cpu.norm_act(x, weight, bias, eps, activation)


def tdnn(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, dilation: int, activation: str) -> Tensor:
    """The op of that name."""
    filters = lambda: weight.unflatten(1, (kernel_size, -1))  # noqa: E731
    return _convolve(x, weight, filters, kernel_size, bias, 1, dilation, activation)


def _convolve(
    x: Tensor,
    weight: Tensor,
    filters: Callable[[], Tensor],
    taps: int,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    activation: str,
) -> Tensor:
    """`[B, T, C]` -> `[B, T', C']`; `filters` gives the weight as `[C', K, C]`."""
    if x.dtype == torch.bfloat16:
        kind = f"onednn conv, {taps} taps, stride {stride}, dilation {dilation}"
        packed = derived(kind, (weight,), lambda: onednn.pack_conv(filters(), stride, dilation))
        return onednn.convolve(x, packed, bias, stride, dilation, activation)
    packed = derived(f"packed conv, {taps} taps", (weight,), lambda: torch.ops.wavlm_fast_cpu.pack_conv(filters()))
    return torch.ops.wavlm_fast_cpu.packed_conv(x, packed, bias, weight.shape[0], taps, stride, dilation, activation)


def why_not(extension_problem: str | None, x: Tensor, weight: Tensor) -> str | None:
    """Why these ops cannot run on packed weights; None when they can."""
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype:
        return f"packed weights are float32 or bfloat16, x is {x.dtype} and the weight {weight.dtype}"
    if x.numel() == 0:
        return "there is nothing to compute"
    return extension_problem if x.dtype == torch.float32 else onednn.why_not()
