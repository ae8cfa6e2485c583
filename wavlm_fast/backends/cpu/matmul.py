"""Engine: gradients of convolutions and linear layers, as products of matrices.

float32 runs in C++ (csrc/matmul.cpp), bfloat16 in torch, whose products are oneDNN's. Where frames overlap or are
skipped the operands are views that say so; nothing is unfolded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension
from .grid import Bounds

_matmul = extension.kernel("matmul(Tensor a, Tensor b, Tensor(a!) out, bool add) -> Tensor(a!)")


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`."""
    if a.dtype != torch.float32:
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    _multiply(a, b, out)
    return out


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """`out = a @ b` or `out += a @ b`."""
    if a.dtype == torch.float32:
        _matmul(a, b, out, add)
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)


def runs(frames: Tensor, places: Bounds | None = None) -> list[Tensor]:
    """`[T, C]` of each utterance: of the batch, or of packed frames; views."""
    return list(frames) if places is None else [frames[0, first:end] for first, end in places]


def of_filters(dpre: list[Tensor], x: list[Tensor], taps: int, stride: int, dilation: int) -> Tensor:
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


def of_input(dpre: list[Tensor], taps: Tensor, x: Tensor, places: Bounds | None, stride: int, dilation: int) -> Tensor:
    """Gradient of `x`, its shape, from that of each utterance's `[T', C']` and the weight as `[K, C', C]`."""
    dx = torch.empty_like(x)
    for phase in range(stride):
        # Frames phase, phase + stride, ... of x meet these taps only, each so many output frames earlier.
        meeting = [tap for tap in range(len(taps)) if (tap * dilation - phase) % stride == 0]
        delays = [(tap * dilation - phase) // stride for tap in meeting]
        for own, frames in zip(dpre, runs(dx, places), strict=True):
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


def why_not(grad: Tensor, x: Tensor, weight: Tensor, *rest: object) -> str | None:
    """Why these gradients cannot be computed here; None when they can."""
    if x.dtype not in extension.DTYPES or weight.dtype != x.dtype or grad.dtype != x.dtype:
        return f"products of gradients are float32 or bfloat16, x is {x.dtype} and the weight {weight.dtype}"
    if grad.numel() == 0 or x.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    return extension.problem() if x.dtype == torch.float32 else None
