"""Gradient of the relative position bias: sums of gate · dscores over the diagonals, over all utterances.

All tiles on one diagonal of tiles contribute to the same diagonals at the same places, so a program adds up whole tiles
elementwise and takes the sums over diagonals once, at its end. What it found is either added to the result atomically,
or, where torch asks for deterministic algorithms, stored as a part of its own for a second kernel to add up in order.

Diagonals are an utterance's own. Of a dense batch a program takes every splits-th tile of a diagonal; of packed frames
those tiles whose queries have `each` neighbouring places (`_packed_tiles.py`), as many as lie on its diagonal.
"""

import torch
import triton
import triton.language as tl

from ._dropout import keep, row_keys
from ._packed import places
from ._packed_tiles import frames_before, frames_of, sizes, utterance_at
from ._rows import operand, product_of_rows
from ._target import has_tensor_memory, target
from ._toeplitz import biased_scores, fragment_warps, row_places
from ._tuning import Config, tunable

# Tiles of a program, about: enough to make little of its end, few enough to fill a GPU. How many programs there are
# depends on the shapes alone, so that sums do not differ between GPUs.
EACH = 8
# Programs of a diagonal, and with them parts: memory goes by the frames, not by their square.
MOST_SPLITS = 32


@triton.jit(do_not_specialize=["utterances", "L"])
def _gated_attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, rel_bias_ptr, copies_ptr, ends_ptr, lengths_ptr, seed_ptr,
    offsets_ptr, utterances, L,  # of packed frames; T is N
    dout_ptr, lse_ptr, delta_ptr, drel_bias_ptr,  # [H, 2L - 1], or parts [H, diagonals, splits, GROUPS, N]
    T, H, W, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    scale, gate_scale, dot_scale, threshold, keep_scale, batch, splits, each,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MARGIN: tl.constexpr,
    LENGTHS: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ATOMIC: tl.constexpr, IN_PIECES: tl.constexpr,
    WARPS: tl.constexpr,  # of biased_scores; with 0 the bias stays in registers
):  # fmt: skip
    RATIO: tl.constexpr = BLOCK_M // BLOCK_N
    GROUPS: tl.constexpr = RATIO + 1
    # Numbers of the weights' gradient are loaded as late as can be, but of wide heads: sm_100 spills with those.
    WIDE: tl.constexpr = D > 64
    split, h = tl.program_id(1), tl.program_id(2)
    if not PACKED:
        L = T
    query_tiles, key_tiles = tl.cdiv(L, BLOCK_M), tl.cdiv(L, BLOCK_N)
    # Tile m of the queries meets tile diagonal + m * RATIO of the keys.
    diagonal = tl.program_id(0) - (query_tiles - 1) * RATIO
    first_m = tl.cdiv(tl.maximum(-diagonal, 0), RATIO)
    tiles = tl.minimum(query_tiles, tl.cdiv(key_tiles - diagonal, RATIO)) - first_m
    row, column, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    # The bias is the same for all tiles of the diagonal.
    copies = copies_ptr + h * (4 * W)
    start = first_m * BLOCK_M
    if not WARPS:
        bias_rows = copies + row_places(start + row, L, W, MARGIN)
        bias = tl.load(bias_rows[:, None] + (diagonal * BLOCK_N + start + column)[None, :])

    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    first_item, stop_item, step = split, tiles * batch, splits
    if PACKED:
        first_item, step = split * each, 1
        stop_item = tl.minimum(first_item + each, T // BLOCK_M + utterances)
        utterance = utterance_at(offsets_ptr, utterances, first_item, BLOCK_M)
        found = tl.full([], 0, tl.int32)
    for item in range(first_item, stop_item, step):
        if PACKED:
            # Every utterance has a place: from one place to the next it is the same one or its neighbour.
            utterance += (item >= tl.load(offsets_ptr + utterance + 1) // BLOCK_M + utterance + 1).to(tl.int32)
            b, frames = frames_of(offsets_ptr, utterance, T, L)
            tile = item - b // BLOCK_M - utterance
            tiles = tl.minimum(tl.cdiv(frames, BLOCK_M), tl.cdiv(tl.cdiv(frames, BLOCK_N) - diagonal, RATIO))
            meets = (tile >= first_m) & (tile < tiles)
            found += meets.to(tl.int32)
        else:
            b, tile, frames, meets = item // tiles, first_m + item % tiles, T, True
        if meets:
            first_query = tile * BLOCK_M
            first_key = first_query + diagonal * BLOCK_N
            query, key = first_query + row, first_key + column
            length = tl.minimum(tl.load(lengths_ptr + b), T).to(tl.int32) if LENGTHS else frames
            head = h.to(tl.int64) * T + b if PACKED else (b * H + h).to(tl.int64) * T
            wide = b.to(tl.int64)
            q_base = q_ptr + wide * stride_qb + h * stride_qh
            dout_base = dout_ptr + (frames_before(b, T, PACKED) * H + h) * D
            k_base = k_ptr + wide * stride_kb + h * stride_kh
            v_base = v_ptr + wide * stride_vb + h * stride_vh
            q = operand(q_base, first_query, stride_qt, row, frames, d, True, IN_PIECES, D, BLOCK_D)
            dout = operand(dout_base, first_query, H * D, row, frames, d, True, IN_PIECES, D, BLOCK_D)
            k = operand(k_base, first_key, stride_kt, column, length, d, True, IN_PIECES, D, BLOCK_D)
            v = operand(v_base, first_key, stride_vt, column, length, d, True, IN_PIECES, D, BLOCK_D)
            # 1 past the end: 0 times a bias of -inf would be NaN.
            gate = tl.load(gate_ptr + head + query, mask=query < frames, other=1.0)
            # An infinite log-sum-exp makes the weights of a row 0.
            lse = tl.load(lse_ptr + head + query, mask=query < frames, other=float("inf")) * 1.4426950408889634
            if WIDE:
                delta = tl.load(delta_ptr + head + query, mask=query < frames, other=0.0)
            if WARPS:
                scores, _ = biased_scores(
                    q, k, (gate * gate_scale)[:, None], copies, first_query, first_key, L, W,
                    MARGIN, BLOCK_M, BLOCK_N, WARPS, D, PRECISION,
                )  # fmt: skip
            else:
                scores = product_of_rows(q, k, D, PRECISION)
                scores = tl.fma(tl.broadcast_to((gate * gate_scale)[:, None], bias.shape), bias, scores)
            weights = tl.exp2(scores * scale - lse[:, None])
            weights = tl.where((key < length)[None, :], weights, 0.0)
            dweights = product_of_rows(dout, v, D, PRECISION)
            if not WIDE:
                delta = tl.load(delta_ptr + head + query, mask=query < frames, other=0.0)
            if DROPOUT:
                mask = keep(row_keys(seed_ptr, head + query)[:, None], key[None, :], threshold)
                dweights = tl.where(mask, dweights * keep_scale, 0.0)
            sums += weights * (dweights - delta[:, None]) * gate[:, None]

    if PACKED and ATOMIC and found == 0:
        return
    # Row i turned left by i: each column then holds a diagonal, and GROUPS times around it goes from one to the next.
    turned = (row[:, None] + column[None, :]) % BLOCK_N
    sheared = tl.gather(sums, turned, axis=1)
    group = (row[:, None] + column[None, :]) // BLOCK_N
    part = (h * tl.num_programs(0) + tl.program_id(0)) * splits + split
    for number in tl.static_range(GROUPS):
        along = tl.sum(tl.where(group == number, sheared, 0.0), axis=0)
        if ATOMIC:
            entry = (diagonal - number) * BLOCK_N + column + L - 1
            at = drel_bias_ptr + h * (2 * L - 1) + entry
            tl.atomic_add(at, along, mask=(entry >= 0) & (entry < 2 * L - 1), sem="relaxed")
        else:
            tl.store(drel_bias_ptr + (part.to(tl.int64) * GROUPS + number) * BLOCK_N + column, along)


@triton.jit
def _gated_attention_bwd_dbias_sum_kernel(
    parts_ptr,  # [H, diagonals, splits, GROUPS, N]
    drel_bias_ptr, L, diagonals, splits, first_diagonal,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Block `program 0` of the entries, counted from the first diagonal's last group: GROUPS parts meet in each."""
    block, h = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for number in tl.static_range(GROUPS):
        diagonal = block - (GROUPS - 1) + number
        inside = column < tl.where((diagonal >= 0) & (diagonal < diagonals), BLOCK_N, 0)
        for split in range(splits):
            part = ((h * diagonals + diagonal) * splits + split).to(tl.int64) * GROUPS + number
            total += tl.load(parts_ptr + part * BLOCK_N + column, mask=inside, other=0.0)
    entry = (block - (GROUPS - 1) + first_diagonal) * BLOCK_N + column + L - 1
    inside = (entry >= 0) & (entry < 2 * L - 1)
    tl.store(drel_bias_ptr + h * (2 * L - 1) + entry, total, mask=inside)


@tunable
def dbias_configs(head_dim: int, dtype: torch.dtype, tensor_memory: bool, target: str) -> tuple[Config, ...]:
    """Tiles and warps. The loop holds three tiles of scores in registers. Eight warps have room for 128 keys on sm_90,
    whose operands need none, and for 64 elsewhere; for half of that with wide heads. Without matrix instructions four
    warps have not enough registers.
    """
    small = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    wide = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1}
    if target == "cdna" and (dtype == torch.float32 or head_dim > 64):
        return small, {**small, "BLOCK_M": 32}
    if head_dim > 64:
        return wide if target == "hopper" and dtype != torch.float32 else {**wide, "BLOCK_N": 32}, small
    if dtype == torch.float32:
        return {**small, "num_warps": 8}, {**small, "BLOCK_M": 32}
    if target == "hopper":
        others = wide, {**small, "BLOCK_N": 64}, small
        return others if tensor_memory else ({**wide, "BLOCK_N": 128}, *others)
    return wide, {**wide, "BLOCK_N": 32}


def rel_bias_gradient(
    operands: tuple, grad: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, numbers: tuple, constants: dict,
    offsets: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """drel_bias `[H, 2L - 1]`; operands, numbers and constants are those of the dq kernel."""
    q = operands[0]
    atomic = not torch.are_deterministic_algorithms_enabled()

    def run(config: Config) -> torch.Tensor:
        return _rel_bias_gradient(operands, grad, lse, delta, numbers, constants, config, atomic, offsets)

    arguments = (q.shape[-1], q.dtype, has_tensor_memory(q.device))
    also = (constants["DROPOUT"], constants["PRECISION"], *(["packed"] if constants["PACKED"] else []))
    return dbias_configs.launch(run, q.device, arguments, sizes(q, offsets), also)


def _rel_bias_gradient(
    operands: tuple, grad: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, numbers: tuple, constants: dict,
    config: Config, atomic: bool, offsets: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    q, rel_bias = operands[0], operands[4]
    B, T, H, _ = q.shape
    BLOCK_M, BLOCK_N = config["BLOCK_M"], config["BLOCK_N"]
    groups = BLOCK_M // BLOCK_N + 1
    L = (rel_bias.shape[1] + 1) // 2
    query_tiles, key_tiles = triton.cdiv(L, BLOCK_M), triton.cdiv(L, BLOCK_N)
    first_diagonal = -(query_tiles - 1) * (groups - 1)
    diagonals = key_tiles - first_diagonal
    tiles = B * query_tiles if offsets is None else places(T, offsets.shape[0] - 1, BLOCK_M)
    each = max(EACH, triton.cdiv(tiles, MOST_SPLITS))
    splits = triton.cdiv(tiles, each)
    parts = (H, diagonals, splits, groups, BLOCK_N)
    found = torch.zeros_like(rel_bias) if atomic else rel_bias.new_empty(parts)
    warps = 0
    if not has_tensor_memory(q.device):
        chip = target(q.device)
        warps = fragment_warps(BLOCK_M, config["num_warps"], q.dtype, constants["PRECISION"], chip)
    _gated_attention_bwd_dbias_kernel[(diagonals, splits, H)](
        *operands, grad, lse, delta, found, *numbers, B, splits, each, ATOMIC=atomic, WARPS=warps, **constants, **config
    )
    if atomic:
        return found
    drel_bias = torch.empty_like(rel_bias)
    _gated_attention_bwd_dbias_sum_kernel[(diagonals + groups - 1, H)](
        found, drel_bias, L, diagonals, splits, first_diagonal, BLOCK_N=BLOCK_N, GROUPS=groups
    )
    return drel_bias
