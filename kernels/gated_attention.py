"""Attention with a gated, Toeplitz relative position bias, forward. The backward is gated_attention_backward.py.

A program holds one tile of queries and walks over the tiles of keys with an online softmax in base 2. Scores are kept
divided by the scale, so that one fused multiply-add adds the gated bias and one more leads into exp2. The walk has
three parts: tiles whose bias is one constant, tiles that load it, and the last tile, which alone needs masks.
"""

import math

import torch
import triton
import triton.language as tl

from ._dropout import keep, row_keys
from ._packed_tiles import arguments, frames_before, grid, numbers_before, own_tile, sizes, strides
from ._precision import dot_precision
from ._rows import in_pieces, load_tile, operand, product_of_rows, row_at, row_pointers
from ._target import has_tensor_memory, target
from ._toeplitz import MARGIN, biased_scores, far_tiles, fragment_warps, toeplitz
from ._tuning import Config, tunable

LOG2_E = 1 / math.log(2)
# The largest score yet where there is none: far below any whose differences fp32 tells apart, and a power of two, whose
# product with the scale is exact.
LOWEST = tl.constexpr(-(2.0**100))


@triton.jit
def _fwd_step(
    acc, total, top, q, gate, far, row_key, k_at, v_at, copies, first, start, length, L, W,
    stride_kt, stride_vt, scale, threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MARGIN: tl.constexpr,
    FAR: tl.constexpr, EDGE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WARPS: tl.constexpr, APART: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """One tile of keys, the first of them `start`, at `k_at` and `v_at`.

    `acc` [M, D] and `total` [M, SUMS] are relative to 2**(top * scale), `top` [M] is the largest score yet, or LOWEST.
    `far` [M] is the gated bias of a FAR tile.
    """
    rows, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    key = start + rows
    k = operand(k_at, 0, stride_kt, rows, length - start, column, EDGE, q.dtype.is_ptr(), D, BLOCK_D)
    if FAR:
        scores = product_of_rows(q, k, D, PRECISION)  # [M, N], before the scale
    else:
        scores, _ = biased_scores(
            q, k, gate[:, None], copies, first, start, L, W, MARGIN, BLOCK_M, BLOCK_N, WARPS, D, PRECISION
        )
    if EDGE:
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
    here = tl.max(scores, axis=1)
    # A bias that is one number per row joins the row's numbers, not the scores.
    new_top = tl.maximum(top, here + far if FAR else here)
    shift = new_top * scale
    weights = tl.exp2(scores * scale - (shift - far * scale if FAR else shift)[:, None])
    decay = tl.exp2(top * scale - shift)
    total = total * decay[:, None] + tl.sum(weights.reshape(BLOCK_M, BLOCK_N // SUMS, SUMS), axis=1)
    if DROPOUT:
        weights = tl.where(keep(row_key[:, None], key[None, :], threshold), weights, 0.0)
    v = load_tile(row_pointers(v_at, 0, stride_vt, rows, column), key, length, column, EDGE, D, BLOCK_D)
    weights = weights.to(v.dtype)
    if APART:
        product = tl.dot(weights, v, input_precision=PRECISION)
        acc = tl.fma(acc, tl.broadcast_to(decay[:, None], acc.shape), product)
    else:
        acc = tl.dot(weights, v, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit(do_not_specialize=["utterances", "L"])
def _gated_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, rel_bias_ptr, copies_ptr, ends_ptr, lengths_ptr, seed_ptr,
    offsets_ptr, utterances, L,  # of packed frames; T is N
    out_ptr, lse_ptr,
    T, H, W, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    scale,  # of the scores, times log2(e)
    gate_scale,  # what the scale does not multiply has to be divided by it
    threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MARGIN: tl.constexpr,
    LENGTHS: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    IN_PIECES: tl.constexpr,  # products of queries and keys
    WARPS: tl.constexpr,  # of biased_scores
    APART: tl.constexpr,  # products with values are added to the sum of those before, not summed up in place
    SUMS: tl.constexpr,  # of weights that a row has: of every SUMS columns each gets one
    REGISTERS: tl.constexpr,  # products take queries from registers
):  # fmt: skip
    N = T
    b, h, first, T, L = own_tile(offsets_ptr, utterances, L, N, H, BLOCK_M, PACKED)
    if PACKED and first >= T:
        return
    query = first + tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one: loads need no masks, and only stores leave them out.
    row = tl.minimum(query, T - 1)
    column = tl.arange(0, BLOCK_D)
    head = numbers_before(b, h, N, PACKED)
    q_base = q_ptr + b.to(tl.int64) * stride_qb + h * stride_qh
    q_at = q_base + row[:, None].to(tl.int64) * stride_qt
    q = q_at if IN_PIECES else load_tile(q_at + column[None, :], row, T, column, False, D, BLOCK_D)
    if REGISTERS and not IN_PIECES:
        # The compiler leaves an operand in shared memory if nothing but a load made it.
        q = tl.where((query < T)[:, None], q, 0.0)
    gate = tl.load(gate_ptr + head + row) * gate_scale
    row_key = row_keys(seed_ptr, head + row) if DROPOUT else row
    k_base = k_ptr + b.to(tl.int64) * stride_kb + h * stride_kh
    v_base = v_ptr + b.to(tl.int64) * stride_vb + h * stride_vh
    copies = copies_ptr + h * (4 * W)

    length = tl.minimum(tl.load(lengths_ptr + b), T).to(tl.int32) if LENGTHS else T
    full = length // BLOCK_N
    low, high = tl.load(ends_ptr + h * 2), tl.load(ends_ptr + h * 2 + 1)
    left, right = far_tiles(first, low, high, L, full, BLOCK_M, BLOCK_N)
    bias_left = tl.load(rel_bias_ptr + h * (2 * L - 1))
    bias_right = tl.load(rel_bias_ptr + h * (2 * L - 1) + 2 * L - 2)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M, SUMS], dtype=tl.float32)
    top = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    for index in range(left + full - right):
        start = tl.where(index < left, index, index - left + right) * BLOCK_N
        acc, total, top = _fwd_step(
            acc, total, top, q, gate, gate * tl.where(index < left, bias_left, bias_right), row_key,
            row_at(k_base, start, stride_kt), row_at(v_base, start, stride_vt),
            copies, first, start, length, L, W, stride_kt, stride_vt, scale, threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MARGIN, True, False, DROPOUT, PRECISION, WARPS, APART, SUMS,
        )  # fmt: skip
    # Places are carried from tile to tile: made of a counter they would take more instructions, and it 64 bits.
    start = left * BLOCK_N
    k_at, v_at = row_at(k_base, start, stride_kt), row_at(v_base, start, stride_vt)
    for _ in range(right - left):
        acc, total, top = _fwd_step(
            acc, total, top, q, gate, 0.0, row_key, k_at, v_at,
            copies, first, start, length, L, W, stride_kt, stride_vt, scale, threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MARGIN, False, False, DROPOUT, PRECISION, WARPS, APART, SUMS,
        )  # fmt: skip
        start += BLOCK_N
        k_at, v_at = row_at(k_at, BLOCK_N, stride_kt), row_at(v_at, BLOCK_N, stride_vt)
    if full * BLOCK_N < length:
        start = full * BLOCK_N
        acc, total, top = _fwd_step(
            acc, total, top, q, gate, 0.0, row_key, row_at(k_base, start, stride_kt), row_at(v_base, start, stride_vt),
            copies, first, start, length, L, W, stride_kt, stride_vt, scale, threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MARGIN, False, True, DROPOUT, PRECISION, WARPS, APART, SUMS,
        )  # fmt: skip

    total = tl.sum(total, axis=1)
    # A row without keys, or with none above -inf, has total 0: zeros out, and a log-sum-exp of -inf.
    lse = (top * scale + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + head + query, tl.where(total == 0, float("-inf"), lse), mask=query < T)
    out = acc * (keep_scale / tl.where(total == 0, 1.0, total))[:, None]
    out_at = ((frames_before(b, T, PACKED) + query[:, None]) * H + h) * D + column[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=(query < T)[:, None] & (column < D)[None, :])


@tunable
def forward_configs(
    head_dim: int, dtype: torch.dtype, precision: str, tensor_memory: bool, dropout: bool, target: str
) -> tuple[Config, ...]:
    """Tiles and warps. 128 queries read keys and values half as often as 64 do, with as many warps resident: eight of
    one program in place of four of two. What an iteration does once per tile is spread over more scores in wide tiles:
    128 keys, where registers hold one program at a time. With 64 sm_90 would hold two, but for compute capability 9
    Triton's tutorial on fused attention, and many kernels that come from it, leave out of their search whatever is
    smaller than 128 by 128 with eight warps. Dropout's hashes leave sm_90 registers for 64 keys, and sm_100 spills with
    more. Wide heads leave registers for 64 keys on sm_90, whose operands take few, and for 32 elsewhere, as fp32 does.
    AMD's wider warps hold half a tile. Products of queries and keys in pieces are followed by one over all keys of a
    tile: without TF32 a thread holds whole rows of it, and wide heads take many threads.
    """
    small = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    if in_pieces(head_dim, dtype, precision, target):
        default = {**small, "BLOCK_M": 32, "BLOCK_N": 16, "num_stages": 1}
        if precision == "tf32":
            default = {**small, "BLOCK_M": 128, "num_warps": 8}
        elif head_dim > 64:
            default = {**small, "num_warps": 16, "num_stages": 1}
        return default, {**default, "num_stages": 3 - default["num_stages"]}
    if dtype == torch.float32:
        default = {**small, "num_stages": 2 if head_dim <= 64 else 1}
        return default, {**small, "BLOCK_N": 16}, {**small, "BLOCK_M": 32}
    if target == "cdna":
        return small, {**small, "num_stages": 1}, {**small, "BLOCK_M": 128}, {**small, "BLOCK_N": 64}
    wide = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    if head_dim > 64:
        default = {**wide, "BLOCK_N": 64 if target == "hopper" and not tensor_memory else 32}
        return default, {**default, "num_stages": 3}, {**default, "BLOCK_M": 64, "num_warps": 4}, small
    # Half the programs at a time for a quarter fewer instructions or the reverse, and more programs for short batches.
    narrow = {**wide, "BLOCK_N": 64}
    both: tuple[Config, ...] = (wide, narrow)
    if tensor_memory:
        both = (narrow,)
    elif target == "hopper" and dropout:
        both = (narrow, wide)
    return *both, {**both[0], "num_stages": 3}, {**wide, "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}


def launch_constants(
    q: torch.Tensor, key_lengths: torch.Tensor | None, dropout_p: float, offsets: torch.Tensor | None
) -> dict[str, object]:
    """The constexpr arguments that forward and backward share."""
    D, precision = q.shape[-1], dot_precision(q.dtype, q.device)
    return {
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "MARGIN": MARGIN,
        "LENGTHS": key_lengths is not None,
        "PACKED": offsets is not None,
        "DROPOUT": dropout_p > 0,
        "PRECISION": precision,
        "IN_PIECES": in_pieces(D, q.dtype, precision, target(q.device)),
    }


def gated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    rel_bias: torch.Tensor,
    key_lengths: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    scale: float,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `gated_attention`: out `[B, T, H, D]` in the dtype of `q`, and the log-sum-exp `[B, H, T]` fp32."""
    _, T, H, D = q.shape
    gate, rel_bias = gate.contiguous(), rel_bias.contiguous()
    out, lse = q.new_empty(q.shape), torch.empty_like(gate)
    if not out.numel():
        return out, lse
    copies, ends = toeplitz(rel_bias, both=False)
    constants = launch_constants(q, key_lengths, dropout_p, offsets)
    chip = target(q.device)
    tensor_memory = has_tensor_memory(q.device)

    def run(config: Config) -> None:
        warps = 0
        if not tensor_memory:
            warps = fragment_warps(config["BLOCK_M"], config["num_warps"], q.dtype, constants["PRECISION"], chip)
        # On sm_90 a product still running into `acc` while the next scores' first bias is written makes the compiler
        # wait for every single instruction of both products. On sm_100 `acc` would go to tensor memory and back.
        apart = tensor_memory or (chip == "hopper" and warps > 0)
        # Threads hold some columns of every eight, each adds up its own, and they add up theirs at the end.
        sums = 8 if warps else 1
        # On sm_90 an operand's address in shared memory is made anew for every tile, but only wide tiles of keys, of
        # which one program is resident, leave registers. On AMD's GPUs shared memory limits how many are.
        registers = chip == "cdna" or (chip == "hopper" and config["BLOCK_N"] == 128)
        _gated_attention_fwd_kernel[grid(q, offsets, config["BLOCK_M"])](
            q, k, v, gate, rel_bias, copies, ends, key_lengths, seed, *arguments(offsets, rel_bias), out, lse,
            T, H, copies.shape[-1], *strides(offsets, q, k, v),
            scale * LOG2_E, 1 / scale, int(dropout_p * 2**24), 1 / (1 - dropout_p), **constants, **config,
            WARPS=warps, APART=apart, SUMS=sums, REGISTERS=registers,
        )  # fmt: skip

    depends_on = (D, q.dtype, constants["PRECISION"], tensor_memory, constants["DROPOUT"])
    also = ("packed",) if constants["PACKED"] else ()
    forward_configs.launch(run, q.device, depends_on, sizes(q, offsets), also)
    return out, lse
