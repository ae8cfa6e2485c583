"""Matrix products over frames of a time-major tensor: every convolution and linear layer here is one.

    out[b, u · OUT_STRIDE + phase, n] = finish(sum over tap j and channel c of
                                        x[b, u · STRIDE + j · STEP + first, c] · weight[j, c, n])

No im2col buffer exists: a tile of rows is read where it lies. A convolution's gradient with respect to its input is the
same sum, once per phase of its stride, and so gathers instead of adding atomically. The gradient with respect to the
weight splits its long sum over utterances and frames into parts that are added in order.

Of packed frames every row finds its utterance: tiles are full, and a window that leaves its utterance reads zeros.
"""

import torch
import triton
import triton.language as tl

from ._activation import activate
from ._packed import apart, extent, first_place, following, places, utterance_at
from ._precision import conv_precision
from ._tuning import Config, tunable


@triton.jit
def _frames_product_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, out_ptr, pre_ptr,
    offsets_ptr, out_offsets_ptr, utterances,  # of packed frames, of which `units` are all places, else None
    frames_in, frames_out, units, length, first, phase, eps,  # length: taps · C
    GROUPS: tl.constexpr, C: tl.constexpr, N: tl.constexpr,  # channels of one group, in and out
    STRIDE: tl.constexpr, STEP: tl.constexpr, OUT_STRIDE: tl.constexpr,
    PADDED: tl.constexpr,  # whether rows can begin before or end after the input
    WHOLE: tl.constexpr,  # whether BLOCK_K divides the length
    TO_GROUP: tl.constexpr, TO_K: tl.constexpr, TO_N: tl.constexpr,  # strides of the weight
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TAP: tl.constexpr = STEP * GROUPS * C - C  # from the end of one tap's channels to the next tap's
    # All in the one axis of the grid that is long: programs that read the same rows run side by side.
    group, tile = tl.program_id(0) // TILES % GROUPS, tl.program_id(0) % TILES
    b = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) // (GROUPS * TILES) * BLOCK_T + tl.arange(0, BLOCK_T)
    # Rows past the end repeat the last one, and stores leave them out.
    if offsets_ptr is None:
        frame = tl.minimum(unit, units - 1) * STRIDE + first
        own_frames = frames_in
    else:
        place = tl.minimum(unit, units - 1)
        own = utterance_at(place, out_offsets_ptr, utterances, OUT_STRIDE)
        own_unit = place - first_place(out_offsets_ptr, own, OUT_STRIDE)
        frame = own_unit * STRIDE + first
        own_first, own_frames = extent(offsets_ptr, own)
        own_frames = own_frames[:, None]
    k = tl.arange(0, BLOCK_K)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < N
    x_row = b * frames_in + frame[:, None] if offsets_ptr is None else (own_first + frame)[:, None]
    x_rows = x_ptr + x_row * (GROUPS * C) + group * C
    weight_tile = weight_ptr + group.to(tl.int64) * TO_GROUP + k[:, None] * TO_K + n[None, :] * TO_N

    # The sum runs over taps and channels at once: a block may hold several taps of few channels.
    acc = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for start in range(0, length, BLOCK_K):
        if C % BLOCK_K == 0:
            tap = start // C
            x_at = x_rows + k[None, :] + (start + tap * TAP)
        else:
            tap = ((start + k) // C)[None, :]
            x_at = x_rows + (start + k[None, :] + tap * TAP)
        if PADDED:
            # Unsigned, frames before the first are past the end as well.
            x_mask = (frame[:, None] + tap * STEP).to(tl.uint32) < own_frames
            if not WHOLE:
                x_mask = x_mask & (start + k < length)[None, :]
            x = tl.load(x_at, mask=x_mask, other=0.0)
        elif not WHOLE:
            x = tl.load(x_at, mask=(start + k < length)[None, :], other=0.0)
        else:
            x = tl.load(x_at)
        if N % BLOCK_N == 0 and WHOLE:
            weight = tl.load(weight_tile + start * TO_K)
        else:
            weight_mask = (start + k < length)[:, None] & inside_n[None, :]
            weight = tl.load(weight_tile + start * TO_K, mask=weight_mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    column = group * N + n
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if offsets_ptr is None or OUT_STRIDE == 1:
        out_row = b * frames_out + unit[:, None] * OUT_STRIDE + phase
    else:
        out_first, out_frames = extent(out_offsets_ptr, own)
        out_frame = own_unit * OUT_STRIDE + phase
        out_row = (out_first + out_frame)[:, None]
    at = out_row * (GROUPS * N) + column[None, :]
    inside = (unit < units)[:, None] & inside_n[None, :]
    if offsets_ptr is not None and OUT_STRIDE > 1:
        inside = inside & (out_frame < out_frames)[:, None]
    if pre_ptr is not None:
        tl.store(pre_ptr + at, acc.to(pre_ptr.dtype.element_ty), mask=inside)
    if NORM:  # the tile holds whole rows
        centred = tl.where(inside_n[None, :], acc - tl.sum(acc, axis=1)[:, None] / N, 0.0)
        acc = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / N + eps))[:, None]
        acc *= tl.load(norm_weight_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        if norm_bias_ptr is not None:
            acc += tl.load(norm_bias_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _frames_product_bwd_weight_kernel(
    x_ptr, grad_ptr, parts_ptr,  # parts [splits, GROUPS, length, N] fp32
    offsets_ptr, out_offsets_ptr,  # of packed frames, else None
    frames_in, frames_out, batch, length, first, blocks_per_split,  # length: taps · C
    GROUPS: tl.constexpr, C: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr,
    PADDED: tl.constexpr, WHOLE: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr,  # SAME: of both offsets
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TAP: tl.constexpr = STEP * GROUPS * C - C
    tile, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k = tile // N_TILES * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tile % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_T)
    tap = k // C
    x_columns = x_ptr + group * C + (k + tap * TAP)[None, :]
    grad_columns = grad_ptr + group * N + n[None, :]
    blocks = tl.cdiv(frames_out, BLOCK_T)
    index = split * blocks_per_split
    if offsets_ptr is None:
        b = (index // blocks).to(tl.int64)
        block = index % blocks
        own_in, own_out = frames_in, frames_out
        end = tl.minimum(index + blocks_per_split, batch * blocks)
    else:
        end = tl.minimum(index + blocks_per_split, frames_out // BLOCK_T + batch)
        b = utterance_at(index, out_offsets_ptr, batch, BLOCK_T)
        begin = first_place(out_offsets_ptr, b, BLOCK_T)
        if not SAME:
            x_first, own_in = extent(offsets_ptr, b)
        grad_first, own_out = extent(out_offsets_ptr, b)

    acc = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    for place in range(index, end):
        if offsets_ptr is not None:
            block = place - begin
            if SAME:
                x_first, own_in = grad_first, own_out
        frame = block * BLOCK_T + row
        # Where the gradient is 0, x may be any: the last frame again.
        at = tl.minimum(frame, own_out - 1) * STRIDE + first
        if offsets_ptr is None:
            x_first = b * frames_in
        x_at = x_columns + (x_first + at[:, None]) * (GROUPS * C)
        if PADDED:
            x_mask = (at[:, None] + (tap * STEP)[None, :]).to(tl.uint32) < own_in
            if not WHOLE:
                x_mask = x_mask & (k < length)[None, :]
            x = tl.load(x_at, mask=x_mask, other=0.0)
        elif not WHOLE:
            x = tl.load(x_at, mask=(k < length)[None, :], other=0.0)
        else:
            x = tl.load(x_at)
        if offsets_ptr is None:
            grad_first = b * frames_out
        grad_at = grad_columns + (grad_first + frame[:, None]) * (GROUPS * N)
        grad_mask = (frame < own_out)[:, None]
        if N % BLOCK_N != 0:
            grad_mask = grad_mask & (n < N)[None, :]
        grad = tl.load(grad_at, mask=grad_mask, other=0.0)
        acc = tl.dot(x.T, grad, acc, input_precision=PRECISION)
        if offsets_ptr is None:
            block += 1
            b += (block == blocks).to(tl.int64)
            block = tl.where(block == blocks, 0, block)
        else:
            # Of the next block, so that no load waits for these.
            b = tl.minimum(following(place, b, out_offsets_ptr, BLOCK_T), batch - 1)
            begin = first_place(out_offsets_ptr, b, BLOCK_T)
            if not SAME:
                x_first, own_in = extent(offsets_ptr, b)
            grad_first, own_out = extent(out_offsets_ptr, b)
    part = (split * GROUPS + group).to(tl.int64) * length + k[:, None]
    tl.store(parts_ptr + part * N + n[None, :], acc, mask=(k < length)[:, None] & (n < N)[None, :])


# Programs of a product with large tiles, up to which smaller tiles fill a GPU better: about one for each
# multiprocessor of an A100 or H100.
FEW = 128


@tunable
def product_configs(
    length: int, N: int, dtype: torch.dtype, precision: str, norm: bool, few: bool, target: str
) -> tuple[Config, ...]:
    """Tiles and warps, for sums over `length`; `few` says that large tiles would leave a GPU without work.

    What reads of shared memory cost decides in half precision: a warp that multiplies 64 by 64 reads less than one that
    multiplies 64 by 32, and products of sm_90 read 64 rows at once. A norm needs whole rows in a tile.
    """
    whole = max(16, triton.next_power_of_2(N))
    half = dtype != torch.float32
    if norm:
        frames = max(16, min(64, (32768 if half and target != "cdna" else 16384) // whole))
        warps = 8 if frames * whole >= 8192 else 4
        depth = 64 if half and target == "hopper" and whole <= 512 else 32
        if (target == "cdna" and not half) or precision == "bf16x6":
            depth = 16  # two stages of 32 are more shared memory than there is, and pieces of 32 more registers
        default = {"BLOCK_T": frames, "BLOCK_N": whole, "BLOCK_K": depth, "num_warps": warps,
                   "num_stages": 3 if half and target != "cdna" else 2}  # fmt: skip
        return default, {**default, "BLOCK_T": max(16, frames // 2)}, {**default, "num_stages": 2}
    if not half:  # deeper tiles spill registers on some architectures, and gain nothing on any
        default = {"BLOCK_T": 128, "BLOCK_N": min(whole, 64), "BLOCK_K": 16, "num_warps": 4,
                   "num_stages": 2 if target == "cdna" else 3}  # fmt: skip
        small = {**default, "BLOCK_T": 64}
        return (small, default) if few else (default, small)
    small = {"BLOCK_T": 64, "BLOCK_N": min(whole, 64), "BLOCK_K": 64, "num_warps": 4,
             "num_stages": 2 if target == "cdna" else 4}  # fmt: skip
    if target == "cdna":
        large = {"BLOCK_T": 128, "BLOCK_N": min(whole, 128), "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
        alternatives = {**large, "BLOCK_K": 64}, {**large, "num_warps": 4}
    elif whole <= 64:
        large = {**small, "BLOCK_T": 128, "num_stages": 3}
        alternatives = {**large, "BLOCK_T": 256, "num_warps": 8}, {**large, "num_stages": 4}
    elif target == "hopper":
        wide = {"BLOCK_T": 128, "BLOCK_N": min(whole, 256), "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
        square = {**wide, "BLOCK_N": 128}
        # Of two smaller programs one multiplies while the other is at its end, which short sums reach soon.
        large, *alternatives = (wide, square) if length >= 1024 else (square, wide)
    else:
        large = {"BLOCK_T": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4}
        alternatives = {**large, "num_warps": 8}, {**large, "num_warps": 8, "BLOCK_K": 64, "num_stages": 3}
    return (small, large) if few else (large, *alternatives, small)


def frames_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    units: int,
    *,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, torch.Tensor | None, float] | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    pre: torch.Tensor | None = None,
    stride: int = 1,
    step: int = 1,
    first: int = 0,
    out_stride: int = 1,
    phase: int = 0,
    padded: bool = False,
    offsets: torch.Tensor | None = None,
    out_offsets: torch.Tensor | None = None,
) -> None:
    """Write `units` frames of `out` `[B, T', G·N]` from `x` `[B, T, G·C]` and `weight` `[G, taps, C, N]`.

    `weight` may have any strides with which channels run on from tap to tap, so that most weights are read as they are.
    Of packed frames, `offsets` are those of `x` and `out_offsets` those of `out`; every frame of a phase is written,
    whatever `units` says.
    """
    G, taps, C, N = weight.shape
    to_group, to_k, to_n = weight.view(G, taps * C, N).stride()
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    precision = conv_precision(x.dtype, x.device)
    utterances = None if offsets is None else offsets.shape[0] - 1
    if utterances:
        units = places(out.shape[1], utterances, out_stride)

    def run(config: Config) -> None:
        grid = (triton.cdiv(units, config["BLOCK_T"]) * G * triton.cdiv(N, config["BLOCK_N"]), x.shape[0])
        _frames_product_kernel[grid](
            x, weight, bias, norm_weight, norm_bias, residual, out, pre, offsets, out_offsets, utterances,
            x.shape[1], out.shape[1], units, taps * C, first, phase, eps,
            GROUPS=G, C=C, N=N, STRIDE=stride, STEP=step, OUT_STRIDE=out_stride, PADDED=padded,
            WHOLE=taps * C % config["BLOCK_K"] == 0, TO_GROUP=to_group, TO_K=to_k, TO_N=to_n,
            NORM=norm is not None, ACTIVATION=activation, PRECISION=precision, **config,
        )  # fmt: skip

    also = (G, taps, stride, step, out_stride, padded, activation, pre is None, residual is None, precision, to_k, to_n)
    also += apart(offsets)
    few = G * triton.cdiv(N, 128) * triton.cdiv(units, 128) * x.shape[0] < FEW
    depends_on = (taps * C, N, x.dtype, precision, norm is not None, few)
    product_configs.launch(run, x.device, depends_on, (units, x.shape[0]), also)


@tunable
def weight_gradient_configs(length: int, N: int, dtype: torch.dtype, target: str) -> tuple[Config, ...]:
    """Tiles and warps. A tile of the weight, of `length` rows in all, takes BLOCK_T frames a step."""
    rows, columns = max(16, triton.next_power_of_2(length)), max(16, triton.next_power_of_2(N))
    if dtype == torch.float32:
        default = {"BLOCK_T": 32, "BLOCK_K": min(rows, 64), "BLOCK_N": min(columns, 64), "num_warps": 4,
                   "num_stages": 2}  # fmt: skip
        if target == "cdna":
            return default, {**default, "num_stages": 1}
        return {**default, "BLOCK_T": 16, "num_stages": 3}, default  # sm_120 spills in TF32 with 32
    default = {"BLOCK_T": 64, "BLOCK_K": min(rows, 128), "BLOCK_N": min(columns, 128), "num_warps": 8,
               "num_stages": 2 if target == "cdna" else 3}  # fmt: skip
    if columns <= 64 and target != "cdna":  # twice the rows instead: what is read of the gradient is read half as often
        return {**default, "BLOCK_K": min(rows, 256)}, default
    return default, {**default, "num_warps": 4}, {**default, "BLOCK_N": min(columns, 64), "num_warps": 4}


def frames_product_weight_gradient(
    x: torch.Tensor,
    grad: torch.Tensor,
    taps: int,
    groups: int,
    *,
    stride: int = 1,
    step: int = 1,
    first: int = 0,
    offsets: torch.Tensor | None = None,
    out_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient `[G, taps, C, N]` fp32 of the weight, from `x` `[B, T, G·C]` and the out's gradient `[B, T', G·N]`.

    Of packed frames, `offsets` are those of `x` and `out_offsets` those of the gradient.
    """
    B, frames_out, N = grad.shape
    B = B if offsets is None else offsets.shape[0] - 1
    C, N = x.shape[2] // groups, N // groups
    length, precision = taps * C, conv_precision(x.dtype, x.device)

    def run(config: Config) -> torch.Tensor:
        tiles = triton.cdiv(length, config["BLOCK_K"]) * triton.cdiv(N, config["BLOCK_N"])
        # Enough programs to fill a GPU, whichever it is, but sums of at least eight blocks each.
        block_t = config["BLOCK_T"]
        blocks = B * triton.cdiv(frames_out, block_t) if offsets is None else places(frames_out, B, block_t)
        per_split = triton.cdiv(blocks, max(1, min(triton.cdiv(512, tiles * groups), blocks // 8)))
        splits = triton.cdiv(blocks, per_split)
        parts = torch.empty(splits, groups, taps, C, N, dtype=torch.float32, device=x.device)
        _frames_product_bwd_weight_kernel[(tiles, groups, splits)](
            x, grad, parts, offsets, out_offsets, x.shape[1], frames_out, B, length, first, per_split,
            GROUPS=groups, C=C, N=N, STRIDE=stride, STEP=step, PADDED=first != 0,
            WHOLE=length % config["BLOCK_K"] == 0, SAME=offsets is out_offsets, PRECISION=precision, **config,
        )  # fmt: skip
        return parts.sum(0) if splits > 1 else parts[0]

    also = (groups, taps, stride, step, first != 0, precision, *apart(offsets))
    return weight_gradient_configs.launch(run, x.device, (length, N, x.dtype), (frames_out, B), also)
