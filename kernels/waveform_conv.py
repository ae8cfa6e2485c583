"""First convolution of the feature encoder: waveform to frames, with group or layer norm and activation.

Group norm's statistics follow from the Gram matrix of the waveform's windows, so the convolution's output is written
once, normed and activated. The matrix is added up in float64: a filter may pick out of loud, smooth audio what is a
millionth of its power. The backward is waveform_conv_backward.py.
"""

import torch
import triton
import triton.language as tl

from ._activation import activate
from ._packed import apart, extent, first_place, in_memory, places, sum_places, utterance_at
from ._target import has_tensor_memory
from ._tuning import Config, tunable

# Taps, and one column of ones: [16, 16] holds the sums of the windows and their number too.
BLOCK_K = 16
# Frames that one program of the forward takes at most, and the programs that a batch is split into before they do.
PROGRAM_FRAMES, PROGRAMS = 512, 512


@triton.jit
def utterance_of_program(offsets_ptr, out_offsets_ptr, utterances, size):
    """Of the program's place, of `size` frames: its utterance, its first sample and first frame, and its frames."""
    own = utterance_at(tl.program_id(0), out_offsets_ptr, utterances, size)
    start, _ = extent(offsets_ptr, own)
    out_start, own_frames = extent(out_offsets_ptr, own)
    return own, start, out_start, own_frames


@triton.jit
def _waveform_gram_kernel(
    waveform_ptr, parts_ptr,  # [B, programs, BLOCK_K, BLOCK_K] fp64
    offsets_ptr, out_offsets_ptr, utterances,  # of packed samples and frames, else None
    S, T, K, STRIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    if offsets_ptr is None:
        start, own_frames, block = b * S, T, tl.program_id(0)
    else:
        own, start, _, own_frames = utterance_of_program(offsets_ptr, out_offsets_ptr, utterances, BLOCK_T)
        block = tl.program_id(0) - first_place(out_offsets_ptr, own, BLOCK_T)
    frame = block * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    inside = frame < own_frames
    windows = waveform_ptr + start + frame * STRIDE
    x = tl.load(windows[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0).to(tl.float64)
    x = tl.where(inside[:, None] & (k == K)[None, :], 1.0, x)
    part = parts_ptr + (b * tl.num_programs(0) + tl.program_id(0)) * (BLOCK_K * BLOCK_K)
    for row in range(K):
        tap = tl.load(windows + row, mask=inside, other=0.0).to(tl.float64)
        tl.store(part + row * BLOCK_K + k, tl.sum(tap[:, None] * x, axis=0))
    tl.store(part + K * BLOCK_K + k, tl.sum(x, axis=0))


@triton.jit
def _waveform_norm_kernel(
    gram_ptr, weight_ptr, centre_ptr, rstd_ptr, offset_ptr,  # gram [B, BLOCK_K, BLOCK_K] fp64, weight [C, K]
    C, K, eps, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hat = convolution(waveform - centre) · rstd + offset: `centre` [B], `rstd` and `offset` [B, C], fp32."""
    b = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    inside_k = (k <= K)[:, None] & (k <= K)[None, :]
    gram_at = gram_ptr + b * (BLOCK_K * BLOCK_K) + k[:, None] * BLOCK_K + k[None, :]
    gram = tl.load(gram_at, mask=inside_k, other=0.0)
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
def load_taps(
    taps_ptr, channel, C, K: tl.constexpr, DOT: tl.constexpr, BLOCK_K: tl.constexpr, VOLATILE: tl.constexpr = False
):  # fmt: skip
    """The weight [K, C], as `convolve` wants it, and its sums over the taps [C] in fp32 where it wants them."""
    if DOT:
        k = tl.arange(0, BLOCK_K)
        inside = (k < K)[:, None] & (channel < C)[None, :]
        taps = tl.load(taps_ptr + k[:, None] * C + channel[None, :], mask=inside, other=0.0)
        return taps, tl.sum(taps.to(tl.float32), axis=0)
    else:
        vectors = ()
        for k in tl.static_range(K):
            tap = tl.load(taps_ptr + k * C + channel, mask=channel < C, other=0.0, volatile=VOLATILE)
            vectors += (tap.to(tl.float32),)
        return vectors, 0.0


@triton.jit
def convolve(
    waveform_ptr, taps, total, centre, frame,
    K: tl.constexpr, STRIDE: tl.constexpr, DOT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The convolution [T, C] of the utterance, less `centre` unless that is None: a product in half precision, exact
    enough to take the centre away afterwards; else sums in fp32.
    """
    windows = waveform_ptr + frame * STRIDE
    if DOT:
        k = tl.arange(0, BLOCK_K)
        x = tl.load(windows[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
        acc = tl.dot(x, taps)
        return acc if centre is None else acc - centre * total[None, :]
    else:
        acc = tl.zeros([frame.shape[0], taps[0].shape[0]], dtype=tl.float32)
        for k in tl.static_range(K):
            x = tl.load(windows + k).to(tl.float32)
            if centre is not None:
                x -= centre
            acc += x[:, None] * taps[k][None, :]
        return acc


@triton.jit
def load_vector(pointer, at, inside, default, VOLATILE: tl.constexpr = False):
    """A vector of parameters in fp32, `default` where there is none."""
    if pointer is None:
        return tl.full(at.shape, default, tl.float32)
    else:
        return tl.load(pointer + at, mask=inside, other=0.0, volatile=VOLATILE).to(tl.float32)


@triton.jit
def _waveform_conv_fwd_kernel(
    waveform_ptr, taps_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, centre_ptr, rstd_ptr, offset_ptr, out_ptr,
    offsets_ptr, out_offsets_ptr, utterances,  # of packed samples and frames, else None
    S, T, C, eps, tiles_per_program,
    K: tl.constexpr, STRIDE: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program takes all channels of some frames, tile after tile: what every frame needs is read once."""
    if offsets_ptr is None:
        b = tl.program_id(1).to(tl.int64)
        start, out_start, own_frames = b * S, b * T, T
        first = tl.program_id(0) * tiles_per_program
    else:
        size = tiles_per_program * BLOCK_T
        b, start, out_start, own_frames = utterance_of_program(offsets_ptr, out_offsets_ptr, utterances, size)
        first = (tl.program_id(0) - first_place(out_offsets_ptr, b, size)) * tiles_per_program
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    taps, total = load_taps(taps_ptr, channel, C, K, DOT, BLOCK_K)
    gain = load_vector(norm_weight_ptr, channel, inside, 1.0)[None, :]
    shift = load_vector(norm_bias_ptr, channel, inside, 0.0)[None, :]
    if NORM == "group":  # the bias is part of the mean that is taken away
        centre = tl.load(centre_ptr + b)
        rstd = load_vector(rstd_ptr, b * C + channel, inside, 1.0)[None, :]
        offset = load_vector(offset_ptr, b * C + channel, inside, 0.0)[None, :]
    else:
        bias = load_vector(bias_ptr, channel, inside, 0.0)[None, :]
    for tile in range(first, tl.minimum(first + tiles_per_program, tl.cdiv(own_frames, BLOCK_T))):
        unit = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        # Frames past the end repeat the last one; the store leaves them out.
        frame = tl.minimum(unit, own_frames - 1)
        if NORM == "group":
            acc = convolve(waveform_ptr + start, taps, total, centre, frame, K, STRIDE, DOT, BLOCK_K) * rstd + offset
        else:
            acc = convolve(waveform_ptr + start, taps, total, None, frame, K, STRIDE, DOT, BLOCK_K) + bias
        if NORM == "layer":  # the tile holds whole rows
            centred = tl.where(inside[None, :], acc - tl.sum(acc, axis=1)[:, None] / C, 0.0)
            acc = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps))[:, None]
        if NORM != "none":
            acc = acc * gain + shift
        out = activate(acc, ACTIVATION).to(out_ptr.dtype.element_ty)
        at = (out_start + unit[:, None]) * C + channel[None, :]
        tl.store(out_ptr + at, out, mask=(unit < own_frames)[:, None] & inside[None, :])


def taps_of(weight: torch.Tensor) -> torch.Tensor:
    """`[C, 1, K]` as `[K, C]`."""
    return weight[:, 0].t().contiguous()


def uses_dot(waveform: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the convolution is a product for the matrix unit: in fp32 it would not be exact enough."""
    return waveform.dtype == weight.dtype and waveform.dtype != torch.float32


@tunable
def gram_configs(target: str) -> tuple[Config, ...]:
    """Frames of one part of the Gram matrix, and warps: fp64 sums leave room for few frames in each thread."""
    return (
        {"BLOCK_T": 512, "num_warps": 16},
        {"BLOCK_T": 512, "num_warps": 8},
        {"BLOCK_T": 256, "num_warps": 8},
    )


def group_statistics(
    waveform: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    frames: int,
    eps: float,
    offsets: torch.Tensor | None = None,
    out_offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What norms the convolution of each utterance over time: centre `[B]`, rstd and offset `[B, C]`, fp32."""
    (rows, S), (C, _, K) = waveform.shape, weight.shape
    utterances = None if offsets is None else offsets.shape[0] - 1
    B = utterances or rows

    def run(config: Config) -> torch.Tensor:
        size = config["BLOCK_T"]
        programs = triton.cdiv(frames, size) if offsets is None else places(frames, B, size)
        parts = torch.empty(rows, programs, BLOCK_K, BLOCK_K, dtype=torch.float64, device=waveform.device)
        _waveform_gram_kernel[(programs, rows)](
            waveform, parts, offsets, out_offsets, utterances, S, frames, K, STRIDE=stride, BLOCK_K=BLOCK_K, **config
        )
        return parts.sum(1) if offsets is None else sum_places(parts[0], out_offsets, size)

    also = (K, stride, waveform.dtype, *apart(offsets))
    gram = gram_configs.launch(run, waveform.device, (), (frames, B), also)
    centre, rstd, offset = (
        torch.empty(shape, dtype=torch.float32, device=waveform.device) for shape in (B, (B, C), (B, C))
    )
    _waveform_norm_kernel[(triton.cdiv(C, 16), B)](
        gram, weight, centre, rstd, offset, C, K, eps, BLOCK_C=16, BLOCK_K=BLOCK_K, num_warps=4
    )
    return centre, rstd, offset


@tunable
def frame_configs(C: int, norm: str, dot: bool, tensor_memory: bool, target: str) -> tuple[Config, ...]:
    """Tiles and warps: 8192 sums are 32 in each thread of eight warps. A product takes at least 16 frames, and as many
    channels. Without one, a layer norm of 16 frames spills registers on sm_100 or leaves none for a second program.
    """
    block = max(16, triton.next_power_of_2(C))
    frames = 8 if norm == "layer" and not dot and tensor_memory else 16
    default = {"BLOCK_T": frames, "BLOCK_C": block, "num_warps": 8 if block >= 512 else 4}
    return default, {**default, "num_warps": default["num_warps"] // 2}, {**default, "BLOCK_T": 2 * frames}


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
    offsets: torch.Tensor | None = None,
    out_offsets: torch.Tensor | None = None,
    out_frames: int | None = None,
) -> torch.Tensor:
    """The op `waveform_conv`: `[B, T, C]`."""
    waveform, weight = waveform.contiguous(), weight.contiguous()
    offsets, out_offsets = packed = in_memory(offsets, out_offsets)
    (B, S), (C, _, K) = waveform.shape, weight.shape
    frames = (S - K) // stride + 1 if out_frames is None else out_frames
    out = waveform.new_empty(B, frames, C)
    if not out.numel():
        return out
    statistics = (None, None, None)
    if norm == "group":
        statistics = group_statistics(waveform, weight, stride, frames, eps, *packed)
    taps, dot = taps_of(weight), uses_dot(waveform, weight)
    utterances = None if offsets is None else offsets.shape[0] - 1

    def run(config: Config) -> None:
        tiles = triton.cdiv(frames, config["BLOCK_T"])
        # Programs enough to fill a GPU come before few loads of the weight.
        per_program = min(triton.cdiv(PROGRAM_FRAMES, config["BLOCK_T"]), triton.cdiv(B * tiles, PROGRAMS))
        programs = triton.cdiv(tiles, per_program)
        if utterances:
            programs = places(frames, utterances, per_program * config["BLOCK_T"])
        _waveform_conv_fwd_kernel[(programs, B)](
            waveform, taps, bias, norm_weight, norm_bias, *statistics, out, *packed, utterances,
            S, frames, C, eps, per_program,
            K=K, STRIDE=stride, NORM=norm, ACTIVATION=activation, DOT=dot, BLOCK_K=BLOCK_K, **config,
        )  # fmt: skip

    also = (K, stride, activation, waveform.dtype, weight.dtype, *apart(offsets))
    depends_on = (C, norm, dot, has_tensor_memory(waveform.device))
    frame_configs.launch(run, waveform.device, depends_on, (frames, B), also)
    return out
