"""First convolution of the feature encoder: waveform to frames, with group or layer norm and activation.

Group norm's statistics follow from the Gram matrix of the waveform's windows, so the convolution's output is written
once, normed and activated. The matrix is added up in float64: a filter may pick out of loud, smooth audio what is a
millionth of its power. The backward is waveform_conv_backward.py.
"""

import torch
import triton
import triton.language as tl

from ._activation import activate
from ._tuning import Config, tunable

# Taps, and one column of ones: [16, 16] holds the sums of the windows and their number too.
BLOCK_K = 16


@triton.jit
def _waveform_gram_kernel(
    waveform_ptr, parts_ptr,  # [B, programs, BLOCK_K, BLOCK_K] fp64
    S, T, K, STRIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    inside = frame < T
    windows = waveform_ptr + b * S + frame * STRIDE
    x = tl.load(windows[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0).to(tl.float64)
    x = tl.where(inside[:, None] & (k == K)[None, :], 1.0, x)
    part = parts_ptr + (b * tl.num_programs(0) + tl.program_id(0)) * (BLOCK_K * BLOCK_K)
    for row in range(K):
        tap = tl.load(windows + row, mask=inside, other=0.0).to(tl.float64)
        tl.store(part + row * BLOCK_K + k, tl.sum(tap[:, None] * x, axis=0))
    tl.store(part + K * BLOCK_K + k, tl.sum(x, axis=0))


@triton.jit
def _waveform_norm_kernel(
    parts_ptr, weight_ptr, centre_ptr, rstd_ptr, offset_ptr,  # weight [C, K]
    C, K, programs, eps, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hat = convolution(waveform - centre) · rstd + offset: `centre` [B], `rstd` and `offset` [B, C], fp32."""
    b = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    gram = tl.zeros([BLOCK_K, BLOCK_K], dtype=tl.float64)
    for program in range(programs):
        part = parts_ptr + (b * programs + program) * (BLOCK_K * BLOCK_K)
        gram += tl.load(part + k[:, None] * BLOCK_K + k[None, :])
    sums = tl.sum(tl.where((k == K)[:, None], gram, 0.0), axis=0)  # [BLOCK_K]; entry K is the number of frames
    frames = tl.sum(tl.where(k == K, sums, 0.0), axis=0)
    mean = tl.where(k < K, sums / frames, 0.0)
    centre = (tl.sum(mean, axis=0) / K).to(tl.float32)
    # Row and column K of the matrix stay out.
    cross = tl.where((k < K)[:, None] & (k < K)[None, :], gram, 0.0) / frames
    covariance = cross - mean[:, None] * mean[None, :]
    inside = (channel < C)[:, None] & (k < K)[None, :]
    weight = tl.load(weight_ptr + channel[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float64)
    spread = tl.sum(weight[:, :, None] * covariance[None, :, :], axis=1)  # [BLOCK_C, BLOCK_K]
    variance = tl.maximum(tl.sum(spread * weight, axis=1), 0.0)
    rstd = 1.0 / tl.sqrt(variance + eps)
    middle = tl.sum(weight * tl.where(k < K, mean - centre.to(tl.float64), 0.0)[None, :], axis=1)
    at = b * C + channel
    tl.store(centre_ptr + b, centre)
    tl.store(rstd_ptr + at, rstd.to(tl.float32), mask=channel < C)
    tl.store(offset_ptr + at, (-middle * rstd).to(tl.float32), mask=channel < C)


@triton.jit
def convolve(waveform_ptr, taps_ptr, centre, row, frame, channel, S, C, K: tl.constexpr, STRIDE: tl.constexpr):
    """The convolution [T, C] of the utterance at `row`, less a constant; `taps` is [K, C]."""
    windows = waveform_ptr + row * S + frame * STRIDE
    acc = tl.zeros([frame.shape[0], channel.shape[0]], dtype=tl.float32)
    for k in tl.static_range(K):
        x = tl.load(windows + k).to(tl.float32) - centre
        tap = tl.load(taps_ptr + k * C + channel, mask=channel < C, other=0.0).to(tl.float32)
        acc += x[:, None] * tap[None, :]
    return acc


@triton.jit
def load_vector(pointer, at, inside, default):
    """A vector of parameters in fp32, `default` where there is none."""
    if pointer is None:
        return tl.full(at.shape, default, tl.float32)
    else:
        return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _waveform_conv_fwd_kernel(
    waveform_ptr, taps_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, centre_ptr, rstd_ptr, offset_ptr, out_ptr,
    S, T, C, eps,
    K: tl.constexpr, STRIDE: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    unit = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    frame = tl.minimum(unit, T - 1)  # frames past the end repeat the last one; the store leaves them out
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    if NORM == "group":  # the bias is part of the mean that is taken away
        acc = convolve(waveform_ptr, taps_ptr, tl.load(centre_ptr + b), b, frame, channel, S, C, K, STRIDE)
        acc = acc * load_vector(rstd_ptr, b * C + channel, inside, 1.0)[None, :]
        acc += load_vector(offset_ptr, b * C + channel, inside, 0.0)[None, :]
    else:
        acc = convolve(waveform_ptr, taps_ptr, 0.0, b, frame, channel, S, C, K, STRIDE)
        acc += load_vector(bias_ptr, channel, inside, 0.0)[None, :]
    if NORM == "layer":  # the tile holds whole rows
        centred = tl.where(inside[None, :], acc - tl.sum(acc, axis=1)[:, None] / C, 0.0)
        acc = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps))[:, None]
    if NORM != "none":
        acc = acc * load_vector(norm_weight_ptr, channel, inside, 1.0)[None, :]
        acc += load_vector(norm_bias_ptr, channel, inside, 0.0)[None, :]
    out = activate(acc, ACTIVATION).to(out_ptr.dtype.element_ty)
    at = (b * T + unit[:, None]) * C + channel[None, :]
    tl.store(out_ptr + at, out, mask=(unit < T)[:, None] & inside[None, :])


@tunable
def gram_configs(target: str) -> tuple[Config, ...]:
    """Frames of one part of the Gram matrix, and warps: fp64 sums leave room for few frames in each thread."""
    return (
        {"BLOCK_T": 512, "num_warps": 8},
        {"BLOCK_T": 256, "num_warps": 4},
        {"BLOCK_T": 256, "num_warps": 8},
    )


def group_statistics(
    waveform: torch.Tensor, weight: torch.Tensor, stride: int, frames: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What norms the convolution of each utterance over time: centre `[B]`, rstd and offset `[B, C]`, fp32."""
    (B, S), (C, _, K) = waveform.shape, weight.shape

    def run(config: Config) -> torch.Tensor:
        programs = triton.cdiv(frames, config["BLOCK_T"])
        parts = torch.empty(B, programs, BLOCK_K, BLOCK_K, dtype=torch.float64, device=waveform.device)
        _waveform_gram_kernel[(programs, B)](waveform, parts, S, frames, K, STRIDE=stride, BLOCK_K=BLOCK_K, **config)
        return parts

    parts = gram_configs.launch(run, waveform.device, (), (frames, B), (K, stride, waveform.dtype))
    centre, rstd, offset = (
        torch.empty(shape, dtype=torch.float32, device=waveform.device) for shape in (B, (B, C), (B, C))
    )
    _waveform_norm_kernel[(triton.cdiv(C, 16), B)](
        parts, weight, centre, rstd, offset, C, K, parts.shape[1], eps, BLOCK_C=16, BLOCK_K=BLOCK_K, num_warps=4
    )
    return centre, rstd, offset


@tunable
def frame_configs(C: int, norm: str, target: str) -> tuple[Config, ...]:
    """Tiles and warps. 4096 sums are 32 in each thread of four warps; a layer norm needs whole rows."""
    block = triton.next_power_of_2(C) if norm == "layer" else min(128, triton.next_power_of_2(C))
    default = {"BLOCK_T": max(1, 4096 // block), "BLOCK_C": block, "num_warps": 4}
    return default, {**default, "BLOCK_T": max(1, 2048 // block)}, {**default, "num_warps": 8}


def waveform_conv(
    waveform: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    norm: str,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    activation: str,
) -> torch.Tensor:
    """The op `waveform_conv`: `[B, T, C]`."""
    waveform, weight = waveform.contiguous(), weight.contiguous()
    (B, S), (C, _, K) = waveform.shape, weight.shape
    frames = (S - K) // stride + 1
    out = waveform.new_empty(B, frames, C)
    if not out.numel():
        return out
    statistics = group_statistics(waveform, weight, stride, frames, eps) if norm == "group" else (None, None, None)
    taps = weight[:, 0].t().contiguous()

    def run(config: Config) -> None:
        grid = (triton.cdiv(C, config["BLOCK_C"]), triton.cdiv(frames, config["BLOCK_T"]), B)
        _waveform_conv_fwd_kernel[grid](
            waveform, taps, bias, norm_weight, norm_bias, *statistics, out, S, frames, C, eps,
            K=K, STRIDE=stride, NORM=norm, ACTIVATION=activation, **config,
        )  # fmt: skip

    also = (K, stride, activation, waveform.dtype)
    frame_configs.launch(run, waveform.device, (C, norm), (frames, B), also)
    return out
