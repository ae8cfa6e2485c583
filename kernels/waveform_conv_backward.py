"""Backward of the first convolution. One input channel makes recomputing cheap: nothing but the inputs was saved.

Group norm needs two sums over time before any gradient is known, which one
pass over the incoming gradient adds up; the pass after it forms the gradient dy of the convolution in registers, and
from it what each window contributes to the weight. Only where the waveform's own gradient is wanted is dy written: a
product with the taps says what each frame gives back to its window.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._activation import activate_slope
from ._frames_product import frames_product
from ._packed import apart, extent, first_place, following, in_memory, places, sum_places, utterance_at
from ._target import target
from ._tuning import Config, tunable
from .waveform_conv import (
    BLOCK_K,
    convolve,
    group_statistics,
    load_taps,
    load_vector,
    taps_of,
    uses_dot,
    utterance_of_program,
)

# Programs, each with its own part of the parameters' gradients. Not the number of processors: sums would differ.
PARTS = 256


@triton.jit
def _waveform_conv_bwd_sums_kernel(
    grad_ptr, waveform_ptr, taps_ptr, norm_weight_ptr, norm_bias_ptr, centre_ptr, rstd_ptr, offset_ptr,
    parts_ptr,  # [B, programs, 2, C] fp32
    offsets_ptr, out_offsets_ptr, utterances,  # of packed samples and frames, else None
    S, T, C, tiles_per_program,
    K: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over time of the normed values' gradient, and of it times the values before gain and shift."""
    row = tl.program_id(1).to(tl.int64)
    if offsets_ptr is None:
        b = row
        start, out_start, own_frames = b * S, b * T, T
        first = tl.program_id(0) * tiles_per_program
    else:
        size = tiles_per_program * BLOCK_T
        b, start, out_start, own_frames = utterance_of_program(offsets_ptr, out_offsets_ptr, utterances, size)
        first = (tl.program_id(0) - first_place(out_offsets_ptr, b, size)) * tiles_per_program
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    centre = tl.load(centre_ptr + b)
    rstd = load_vector(rstd_ptr, b * C + channel, inside, 1.0)
    offset = load_vector(offset_ptr, b * C + channel, inside, 0.0)
    gain = load_vector(norm_weight_ptr, channel, inside, 1.0)
    shift = load_vector(norm_bias_ptr, channel, inside, 0.0)
    taps, total = load_taps(taps_ptr, channel, C, K, DOT, BLOCK_K)
    plain = tl.zeros([BLOCK_C], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_C], dtype=tl.float32)
    for tile in range(first, tl.minimum(first + tiles_per_program, tl.cdiv(own_frames, BLOCK_T))):
        unit = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        frame = tl.minimum(unit, own_frames - 1)
        y = convolve(waveform_ptr + start, taps, total, centre, frame, K, STRIDE, DOT, BLOCK_K)
        hat = y * rstd[None, :] + offset[None, :]
        mask = (unit < own_frames)[:, None] & inside[None, :]
        at = (out_start + unit[:, None]) * C + channel[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad *= activate_slope(hat * gain[None, :] + shift[None, :], ACTIVATION)
        plain += tl.sum(grad, axis=0)
        weighted += tl.sum(grad * hat, axis=0)
    part = parts_ptr + (row * tl.num_programs(0) + tl.program_id(0)) * 2 * C + channel
    tl.store(part, plain, mask=inside)
    tl.store(part + C, weighted, mask=inside)


@triton.jit
def _waveform_conv_bwd_kernel(
    grad_ptr, waveform_ptr, taps_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr,
    centre_ptr, rstd_ptr, offset_ptr, sums_ptr,  # sums [B, 2, C], over time
    dy_ptr,  # [B, T, C] or None
    dtaps_ptr,  # [programs, BLOCK_K, C] fp32; row K is the gradient of the bias
    vectors_ptr,  # [programs, 2, C] fp32
    offsets_ptr, out_offsets_ptr,  # of packed samples and frames of B utterances, else None
    B, S, T, C, eps, tiles_per_program,
    K: tl.constexpr, STRIDE: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    TAPS_AGAIN: tl.constexpr,  # with layer norm: read for each tile
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel, k = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    inside = channel < C
    gain = load_vector(norm_weight_ptr, channel, inside, 1.0)
    if NORM != "layer":
        shift = load_vector(norm_bias_ptr, channel, inside, 0.0)
        bias = load_vector(bias_ptr, channel, inside, 0.0)
    if not TAPS_AGAIN:
        taps, total = load_taps(taps_ptr, channel, C, K, DOT, BLOCK_K)
    dtaps = tl.zeros([BLOCK_K, BLOCK_C], dtype=tl.float32)
    dgain = tl.zeros([BLOCK_C], dtype=tl.float32)
    dshift = tl.zeros([BLOCK_C], dtype=tl.float32)
    first = program * tiles_per_program
    if offsets_ptr is None:
        tiles = tl.cdiv(T, BLOCK_T)
        end = B * tiles
    else:
        end = T // BLOCK_T + B
        own = utterance_at(first, out_offsets_ptr, B, BLOCK_T)
    for index in range(first, tl.minimum(first + tiles_per_program, end)):
        if offsets_ptr is None:
            b = (index // tiles).to(tl.int64)
            tile, start, out_start, own_frames = index % tiles, b * S, b * T, T
        else:
            b = own
            tile = index - first_place(out_offsets_ptr, b, BLOCK_T)
            start, _ = extent(offsets_ptr, b)
            out_start, own_frames = extent(out_offsets_ptr, b)
        unit = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        frame = tl.minimum(unit, own_frames - 1)
        mask = (unit < own_frames)[:, None] & inside[None, :]
        at = (out_start + unit[:, None]) * C + channel[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if NORM == "group":
            centre = tl.load(centre_ptr + b)
            rstd = load_vector(rstd_ptr, b * C + channel, inside, 1.0)
            offset = load_vector(offset_ptr, b * C + channel, inside, 0.0)
            y = convolve(waveform_ptr + start, taps, total, centre, frame, K, STRIDE, DOT, BLOCK_K)
            hat = y * rstd[None, :] + offset[None, :]
            plain = tl.load(sums_ptr + b * 2 * C + channel, mask=inside, other=0.0) / own_frames
            weighted = tl.load(sums_ptr + b * 2 * C + C + channel, mask=inside, other=0.0) / own_frames
            grad *= activate_slope(hat * gain[None, :] + shift[None, :], ACTIVATION)
            dy = (grad - plain[None, :] - hat * weighted[None, :]) * (rstd * gain)[None, :]
        else:
            if NORM == "layer":  # whole rows leave few registers: these are read again for each tile
                bias = load_vector(bias_ptr, channel, inside, 0.0, VOLATILE=True)
                shift = load_vector(norm_bias_ptr, channel, inside, 0.0, VOLATILE=True)
                if TAPS_AGAIN:
                    taps, total = load_taps(taps_ptr, channel, C, K, DOT, BLOCK_K, VOLATILE=True)
            y = convolve(waveform_ptr + start, taps, total, None, frame, K, STRIDE, DOT, BLOCK_K) + bias[None, :]
            if NORM == "layer":
                centred = tl.where(inside[None, :], y - tl.sum(y, axis=1)[:, None] / C, 0.0)
                rstd_row = (1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps))[:, None]
                hat = centred * rstd_row
                grad *= activate_slope(hat * gain[None, :] + shift[None, :], ACTIVATION)
                dgain += tl.sum(grad * hat, axis=0)
                dshift += tl.sum(grad, axis=0)
                g = grad * gain[None, :]
                along = (tl.sum(g * hat, axis=1) / C)[:, None]
                dy = rstd_row * (g - (tl.sum(g, axis=1) / C)[:, None] - hat * along)
            else:
                dy = grad * activate_slope(y, ACTIVATION)
        dy = tl.where(mask, dy, 0.0)
        if DOT:
            dy = dy.to(waveform_ptr.dtype.element_ty)
        if dy_ptr is not None:
            tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
        x_at = waveform_ptr + start + frame[None, :] * STRIDE + k[:, None]
        x = tl.load(x_at, mask=(k < K)[:, None], other=0.0).to(tl.float32)  # [K, T]
        if NORM == "group":
            x -= centre
        x = tl.where((k == K)[:, None], 1.0, x).to(dy.dtype)
        dtaps = tl.dot(x, dy, dtaps, input_precision="ieee")
        if offsets_ptr is not None:
            own = following(index, b, out_offsets_ptr, BLOCK_T)
    tl.store(dtaps_ptr + (program * BLOCK_K + k[:, None]) * C + channel[None, :], dtaps, mask=inside[None, :])
    if NORM == "layer":
        tl.store(vectors_ptr + program * 2 * C + channel, dgain, mask=inside)
        tl.store(vectors_ptr + program * 2 * C + C + channel, dshift, mask=inside)


@triton.jit
def _waveform_conv_bwd_overlap_kernel(
    windows_ptr, dwaveform_ptr,  # windows [B, T, K]
    offsets_ptr, out_offsets_ptr, utterances,  # of packed samples and frames, else None
    S, T, K: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each sample gathers from the windows that it lies in."""
    b = tl.program_id(1).to(tl.int64)
    if offsets_ptr is None:
        block, start, out_start, own_samples, own_frames = tl.program_id(0), b * S, b * T, S, T
    else:
        own = utterance_at(tl.program_id(0), offsets_ptr, utterances, BLOCK)
        block = tl.program_id(0) - first_place(offsets_ptr, own, BLOCK)
        start, own_samples = extent(offsets_ptr, own)
        out_start, own_frames = extent(out_offsets_ptr, own)
    sample = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for step in tl.static_range((K + STRIDE - 1) // STRIDE):
        k = sample % STRIDE + step * STRIDE
        frame = sample // STRIDE - step
        inside = (k < K) & (frame >= 0) & (frame < own_frames)
        total += tl.load(windows_ptr + (out_start + frame) * K + k, mask=inside, other=0.0)
    tl.store(dwaveform_ptr + start + sample, total.to(dwaveform_ptr.dtype.element_ty), mask=sample < own_samples)


@tunable
def backward_configs(C: int, norm: str, dot: bool, target: str) -> tuple[Config, ...]:
    """Tiles and warps. Products need sixteen rows. A layer norm needs whole rows of channels, which in half precision
    cost products little.
    """
    block = max(16, triton.next_power_of_2(C))
    if norm != "layer" and not dot:
        block = min(block, 64)
    elif norm != "layer" and target == "cuda":
        block = min(block, 256)  # 512 spill registers on sm_120
    warps = 4 if block < 256 or (dot and target == "cdna") else 8  # AMD's are twice as wide
    default = {"BLOCK_T": 16, "BLOCK_C": block, "num_warps": warps, "num_stages": 1}
    if block >= 512:  # twice the warps have too few registers each
        return (default,)
    if dot or norm == "layer":
        return default, {**default, "num_warps": min(2 * warps, 16)}
    return default, {**default, "BLOCK_T": 32}, {**default, "num_warps": 8}


def waveform_conv_backward(
    grad: torch.Tensor,
    waveform: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    norm: str,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    activation: str,
    wanted: Sequence[bool],
    offsets: torch.Tensor | None = None,
    out_offsets: torch.Tensor | None = None,
    out_frames: int | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The op `waveform_conv_backward`: gradients of waveform, weight, bias, norm_weight and norm_bias, those wanted."""
    grad, waveform, weight = grad.contiguous(), waveform.contiguous(), weight.contiguous()
    offsets, out_offsets = packed = in_memory(offsets, out_offsets)
    (rows, S), (C, _, K), T = waveform.shape, weight.shape, grad.shape[1]
    utterances = None if offsets is None else offsets.shape[0] - 1
    B = utterances or rows
    constants = {"K": K, "STRIDE": stride, "ACTIVATION": activation, "DOT": uses_dot(waveform, weight)}
    also = (K, stride, activation, grad.dtype, weight.dtype, *apart(offsets))
    taps = taps_of(weight)
    statistics, sums = (None, None, None), None
    if norm == "group":
        statistics = group_statistics(waveform, weight, stride, T, eps, *packed)

        def run_sums(config: Config) -> torch.Tensor:
            tiles = triton.cdiv(T, config["BLOCK_T"])
            per_program = triton.cdiv(tiles, triton.cdiv(2 * PARTS, rows))
            size = per_program * config["BLOCK_T"]
            programs = triton.cdiv(tiles, per_program) if offsets is None else places(T, B, size)
            parts = torch.empty(rows, programs, 2, C, dtype=torch.float32, device=grad.device)
            _waveform_conv_bwd_sums_kernel[(programs, rows, triton.cdiv(C, config["BLOCK_C"]))](
                grad, waveform, taps, norm_weight, norm_bias, *statistics, parts, *packed, utterances,
                S, T, C, per_program, BLOCK_K=BLOCK_K, **constants, **config,
            )  # fmt: skip
            return parts.sum(1) if offsets is None else sum_places(parts[0], out_offsets, size)

        sums = backward_configs.launch(run_sums, grad.device, (C, norm, constants["DOT"]), (T, B), ("sums", *also))

    dy = torch.empty(rows, T, C, dtype=waveform.dtype, device=grad.device) if wanted[0] else None
    # sm_100 has no registers to keep them in fp32, and gfx90a none for reading them early.
    taps_again = norm == "layer" and not constants["DOT"] and target(grad.device) != "cdna"

    def run(config: Config) -> tuple[torch.Tensor, ...]:
        block, columns = config["BLOCK_T"], triton.cdiv(C, config["BLOCK_C"])
        tiles = B * triton.cdiv(T, block) if offsets is None else places(T, B, block)
        per_program = triton.cdiv(tiles, PARTS)
        programs = triton.cdiv(tiles, per_program)
        dtaps, vectors = (
            torch.empty(programs, rows, C, dtype=torch.float32, device=grad.device) for rows in (BLOCK_K, 2)
        )
        _waveform_conv_bwd_kernel[(programs, columns)](
            grad, waveform, taps, bias, norm_weight, norm_bias, *statistics, sums, dy, dtaps, vectors,
            *packed, B, S, T, C, eps, per_program, NORM=norm, TAPS_AGAIN=taps_again, BLOCK_K=BLOCK_K,
            **constants, **config,
        )  # fmt: skip
        return dtaps.sum(0), vectors.sum(0) if norm == "layer" else (None, None)

    arguments = (C, norm, constants["DOT"])
    dtaps, (dgain, dshift) = backward_configs.launch(run, grad.device, arguments, (T, B), (wanted[0], *also))
    dwaveform = dweight = None
    if dy is not None:
        dwaveform = _waveform_gradient(dy, waveform, weight, stride, *packed)
    if wanted[1]:
        dweight = dtaps[:K].t()[:, None].to(weight.dtype, memory_format=torch.contiguous_format)
    if norm == "group":
        dshift, dgain = sums.sum(0)
    vectors = zip((dtaps[K], dgain, dshift), (bias, norm_weight, norm_bias), wanted[2:], strict=True)
    return dwaveform, dweight, *(g.to(v.dtype) if wants else None for g, v, wants in vectors)


def _waveform_gradient(
    dy: torch.Tensor,
    waveform: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    offsets: torch.Tensor | None,
    out_offsets: torch.Tensor | None,
) -> torch.Tensor:
    """`[B, S]` from the gradient of the convolution `[B, T, C]`."""
    (B, S), (C, _, K) = waveform.shape, weight.shape
    T = dy.shape[1]
    windows = torch.empty(B, T, K, dtype=torch.float32, device=dy.device)
    frames_product(dy, weight.view(1, 1, C, K).to(dy.dtype), windows, T)
    dwaveform = torch.empty_like(waveform)
    utterances = None if offsets is None else offsets.shape[0] - 1
    blocks = places(S, utterances, 1024) if utterances else triton.cdiv(S, 1024)
    _waveform_conv_bwd_overlap_kernel[(blocks, B)](
        windows, dwaveform, offsets, out_offsets, utterances, S, T, K=K, STRIDE=stride, BLOCK=1024
    )
    return dwaveform
