"""Attention with a gated, Toeplitz relative position bias, backward.

Weights are recomputed from the log-sum-exp. With dscores = weights · (dweights - delta) and delta the row sums of
weights · dweights, three kernels follow each other: dq and dgate (a tile of queries walks over the keys), dk and dv
(a tile of keys walks over the queries), and drel_bias in gated_attention_dbias.py.

The row sums come from out · dout as usual, but `out` was rounded. The first kernel therefore also adds up dscores'
rows, which should be zero, corrects dgate by what is left, and hands the corrected row sums to the other two.

The last tile, which needs masks, has code of its own behind the loops, as forward. The compiler reads that code's
operands before the loops and keeps them: with wide heads there are no registers for that, and the last tile is one of
a loop with masks.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._dropout import keep, row_keys
from ._packed_tiles import arguments, frames_before, grid, numbers_before, own_tile, sizes, strides
from ._rows import in_pieces, load_tile, operand, product_of_rows, row_pointers, row_starts
from ._target import target
from ._toeplitz import biased_scores, far_tiles, fragment_warps, toeplitz
from ._tuning import Config, tunable
from ._wanted import only
from .gated_attention import LOG2_E, launch_constants
from .gated_attention_dbias import rel_bias_gradient


@triton.jit
def _dq_step(
    dq, dgate, rest, mean_bias, q, dout, gate, far, lse, delta, row_key, k_base, v_base, copies, first, start,
    length, L, W, stride_kt, stride_vt, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MARGIN: tl.constexpr,
    FAR: tl.constexpr, EDGE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One tile of keys. Per row: `rest` sums dscores, `dgate` dscores · bias, `mean_bias` weights · bias."""
    rows, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    key = start + rows
    k = load_tile(row_pointers(k_base, start, stride_kt, rows, column), key, length, column, EDGE, D, BLOCK_D)
    k_rows = row_starts(k_base, start, stride_kt, rows, length, EDGE) if q.dtype.is_ptr() else k
    v_rows = operand(v_base, start, stride_vt, rows, length, column, EDGE, q.dtype.is_ptr(), D, BLOCK_D)
    if FAR:
        scores = product_of_rows(q, k_rows, D, PRECISION)  # [M, N], before the scale
        weights = tl.exp2(scores * scale - (lse - gate * far * scale)[:, None])
    else:
        scores, bias = biased_scores(
            q, k_rows, gate[:, None], copies, first, start, L, W, MARGIN, BLOCK_M, BLOCK_N, WARPS, D, PRECISION
        )
        weights = tl.exp2(scores * scale - lse[:, None])
    if EDGE:
        weights = tl.where((key < length)[None, :], weights, 0.0)
    dweights = product_of_rows(dout, v_rows, D, PRECISION)
    if DROPOUT:
        dweights = tl.where(keep(row_key[:, None], key[None, :], threshold), dweights * keep_scale, 0.0)
    dscores = weights * (dweights - delta[:, None])
    rest_here = tl.sum(dscores, axis=1)
    rest += rest_here
    if FAR:
        dgate += rest_here * far
        mean_bias += tl.sum(weights, axis=1) * far
    else:
        dgate += tl.sum(dscores * bias, axis=1)
        mean_bias += tl.sum(weights * bias, axis=1)
    dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, dgate, rest, mean_bias


@triton.jit(do_not_specialize=["utterances", "L"])
def _gated_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, rel_bias_ptr, copies_ptr, ends_ptr, lengths_ptr, seed_ptr,
    offsets_ptr, utterances, L,  # of packed frames; T is N
    dout_ptr, out_ptr, lse_ptr, dq_ptr, dgate_ptr, delta_ptr,
    T, H, W, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    scale, gate_scale, dot_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MARGIN: tl.constexpr,
    LENGTHS: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    IN_PIECES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = D > 64  # the last tile is one of the loop: see above
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
    own = ((frames_before(b, T, PACKED) + row[:, None]) * H + h) * D  # of the contiguous tensors
    dout = load_tile(dout_ptr + own + column[None, :], row, T, column, False, D, BLOCK_D)
    out = load_tile(out_ptr + own + column[None, :], row, T, column, False, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    dout = dout_ptr + own if IN_PIECES else dout
    gate = tl.load(gate_ptr + head + row) * gate_scale
    lse = tl.load(lse_ptr + head + row) * 1.4426950408889634
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

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    dgate = tl.zeros([BLOCK_M], dtype=tl.float32)
    rest = tl.zeros([BLOCK_M], dtype=tl.float32)
    mean_bias = tl.zeros([BLOCK_M], dtype=tl.float32)
    for index in range(left + full - right):
        tile = tl.where(index < left, index, index - left + right)
        dq, dgate, rest, mean_bias = _dq_step(
            dq, dgate, rest, mean_bias, q, dout, gate, tl.where(index < left, bias_left, bias_right), lse, delta,
            row_key, k_base, v_base, copies, first, tile * BLOCK_N, length, L, W, stride_kt, stride_vt, scale,
            threshold, keep_scale, D, BLOCK_D, BLOCK_M, BLOCK_N, MARGIN, True, False, DROPOUT, PRECISION, WARPS,
        )  # fmt: skip
    for index in range(left, right + (tl.cdiv(length, BLOCK_N) - full if WIDE else 0)):
        tile = tl.where(index < right, index, full) if WIDE else index
        dq, dgate, rest, mean_bias = _dq_step(
            dq, dgate, rest, mean_bias, q, dout, gate, 0.0, lse, delta,
            row_key, k_base, v_base, copies, first, tile * BLOCK_N, length, L, W, stride_kt, stride_vt, scale,
            threshold, keep_scale, D, BLOCK_D, BLOCK_M, BLOCK_N, MARGIN, False, WIDE, DROPOUT, PRECISION, WARPS,
        )  # fmt: skip
    if not WIDE and full * BLOCK_N < length:
        dq, dgate, rest, mean_bias = _dq_step(
            dq, dgate, rest, mean_bias, q, dout, gate, 0.0, lse, delta,
            row_key, k_base, v_base, copies, first, full * BLOCK_N, length, L, W, stride_kt, stride_vt, scale,
            threshold, keep_scale, D, BLOCK_D, BLOCK_M, BLOCK_N, MARGIN, False, True, DROPOUT, PRECISION, WARPS,
        )  # fmt: skip

    inside = query < T
    tl.store(dgate_ptr + head + query, dgate - rest * mean_bias, mask=inside)
    tl.store(delta_ptr + head + query, delta + rest, mask=inside)
    dq_at = ((frames_before(b, T, PACKED) + query[:, None]) * H + h) * D + column[None, :]
    dq = (dq * dot_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + dq_at, dq, mask=inside[:, None] & (column < D)[None, :])


@triton.jit
def _dkv_step(
    dk, dv, k, v, gate_base, far, lse_base, delta_base, seed_ptr, head, key, q_base, dout_base, copies, first, start,
    T, L, W, stride_qt, stride_ot, scale, gate_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MARGIN: tl.constexpr,
    FAR: tl.constexpr, EDGE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One tile of queries, everything transposed: rows are keys. Queries past the end have lse inf, so weights 0."""
    column = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_M)
    query = start + rows
    # Offsets in 64 bits: the shorter way to them takes registers that this kernel has not.
    place = query[:, None].to(tl.int64)
    q = load_tile(q_base + place * stride_qt + column[None, :], query, T, column, EDGE, D, BLOCK_D)
    dout = load_tile(dout_base + place * stride_ot + column[None, :], query, T, column, EDGE, D, BLOCK_D)
    if EDGE:
        # 1 past the end: 0 times a bias of -inf would be NaN.
        gate = tl.load(gate_base + query, mask=query < T, other=1.0) * gate_scale
        lse = tl.load(lse_base + query, mask=query < T, other=float("inf")) * 1.4426950408889634
        delta = tl.load(delta_base + query, mask=query < T, other=0.0)
    else:
        gate = tl.load(gate_base + query) * gate_scale
        lse = tl.load(lse_base + query) * 1.4426950408889634
        delta = tl.load(delta_base + query)
    if k.dtype.is_ptr():
        q_rows = row_starts(q_base, start, stride_qt, rows, T, EDGE)
        dout_rows = row_starts(dout_base, start, stride_ot, rows, T, EDGE)
    else:
        q_rows, dout_rows = q, dout
    if FAR:
        scores = product_of_rows(k, q_rows, D, PRECISION)  # [N, M], before the scale
        weights = tl.exp2(scores * scale - (lse - gate * far * scale)[None, :])
    else:
        scores, _ = biased_scores(
            k, q_rows, gate[None, :], copies, first, start, L, W, MARGIN, BLOCK_N, BLOCK_M, WARPS, D, PRECISION
        )
        weights = tl.exp2(scores * scale - lse[None, :])
    dweights = product_of_rows(v, dout_rows, D, PRECISION)
    kept = weights
    if DROPOUT:
        mask = keep(row_keys(seed_ptr, head + query)[None, :], key[:, None], threshold)
        kept = tl.where(mask, weights * keep_scale, 0.0)
        dweights = tl.where(mask, dweights * keep_scale, 0.0)
    dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dscores = weights * (dweights - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["utterances", "L"])
def _gated_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, rel_bias_ptr, copies_ptr, ends_ptr, lengths_ptr, seed_ptr,
    offsets_ptr, utterances, L,  # of packed frames; T is N
    dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    T, H, W, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    scale, gate_scale, dot_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MARGIN: tl.constexpr,
    LENGTHS: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    IN_PIECES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = D > 64  # the last tile is one of the loop: see above
    N = T
    # Of a head by division sm_80 has 5 % fewer instructions in the loop, but sm_90 spills with wide heads.
    b, h, first, T, L = own_tile(offsets_ptr, utterances, L, N, H, BLOCK_N, PACKED, DIVIDED=not WIDE)
    if PACKED and first >= T:
        return
    key = first + tl.arange(0, BLOCK_N)
    # Keys past the end compute on the last one; a row of a product depends on no other row, and stores leave them out.
    row = tl.minimum(key, T - 1)
    column = tl.arange(0, BLOCK_D)
    head = numbers_before(b, h, N, PACKED)
    k_base = k_ptr + b.to(tl.int64) * stride_kb + h * stride_kh
    v_base = v_ptr + b.to(tl.int64) * stride_vb + h * stride_vh
    place = row[:, None].to(tl.int64)
    k, v = k_base + place * stride_kt, v_base + place * stride_vt
    if not IN_PIECES:
        k = load_tile(k + column[None, :], row, T, column, False, D, BLOCK_D)
        v = load_tile(v + column[None, :], row, T, column, False, D, BLOCK_D)
    q_base = q_ptr + b.to(tl.int64) * stride_qb + h * stride_qh
    dout_base = dout_ptr + (frames_before(b, T, PACKED) * H + h) * D
    copies = copies_ptr + (H + h) * (4 * W)  # reversed

    length = tl.minimum(tl.load(lengths_ptr + b), T).to(tl.int32) if LENGTHS else T
    # A tile past the length takes part in nothing.
    full = tl.where(first < length, T // BLOCK_M, 0)
    low, high = tl.load(ends_ptr + h * 2), tl.load(ends_ptr + h * 2 + 1)
    left, right = far_tiles(first, 2 * L - 2 - high, 2 * L - 2 - low, L, full, BLOCK_N, BLOCK_M)
    bias_left = tl.load(rel_bias_ptr + h * (2 * L - 1) + 2 * L - 2)
    bias_right = tl.load(rel_bias_ptr + h * (2 * L - 1))

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for index in range(left + full - right):
        tile = tl.where(index < left, index, index - left + right)
        dk, dv = _dkv_step(
            dk, dv, k, v, gate_ptr + head, tl.where(index < left, bias_left, bias_right), lse_ptr + head,
            delta_ptr + head, seed_ptr, head, key, q_base, dout_base, copies, first, tile * BLOCK_M,
            T, L, W, stride_qt, H * D, scale, gate_scale, threshold, keep_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MARGIN, True, False, DROPOUT, PRECISION, WARPS,
        )  # fmt: skip
    for index in range(left, right + (tl.where(first < length, tl.cdiv(T, BLOCK_M) - full, 0) if WIDE else 0)):
        tile = tl.where(index < right, index, full) if WIDE else index
        dk, dv = _dkv_step(
            dk, dv, k, v, gate_ptr + head, 0.0, lse_ptr + head,
            delta_ptr + head, seed_ptr, head, key, q_base, dout_base, copies, first, tile * BLOCK_M,
            T, L, W, stride_qt, H * D, scale, gate_scale, threshold, keep_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MARGIN, False, WIDE, DROPOUT, PRECISION, WARPS,
        )  # fmt: skip
    if not WIDE and (first < length) & (T % BLOCK_M != 0):
        dk, dv = _dkv_step(
            dk, dv, k, v, gate_ptr + head, 0.0, lse_ptr + head,
            delta_ptr + head, seed_ptr, head, key, q_base, dout_base, copies, first, full * BLOCK_M,
            T, L, W, stride_qt, H * D, scale, gate_scale, threshold, keep_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MARGIN, False, True, DROPOUT, PRECISION, WARPS,
        )  # fmt: skip

    at = ((frames_before(b, T, PACKED) + key[:, None]) * H + h) * D + column[None, :]
    inside = (key < T)[:, None] & (column < D)[None, :]
    valid = (key < length)[:, None]
    dk = tl.where(valid, dk * dot_scale, 0.0).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + at, dk, mask=inside)
    tl.store(dv_ptr + at, tl.where(valid, dv, 0.0).to(dv_ptr.dtype.element_ty), mask=inside)


@tunable
def backward_configs(head_dim: int, dtype: torch.dtype, precision: str, target: str) -> tuple[Config, ...]:
    """Tiles and warps. Rows are queries for dq, keys for dk and dv. Where products read their operands from registers,
    three or four products a tile leave room for half the columns, and wide heads for half of that. Products in pieces
    are followed by one over all columns of a tile: without TF32 a thread holds whole rows of it, which leaves room for
    few columns, and takes many threads with wide heads.
    """
    small = {"ROWS": 64, "COLUMNS": 32, "num_warps": 4, "num_stages": 1}
    eight = {"ROWS": 128, "COLUMNS": 64 if target == "hopper" else 32, "num_warps": 8, "num_stages": 2}
    wide = head_dim > 64
    if in_pieces(head_dim, dtype, precision, target):
        if precision == "tf32":
            default = {**small, "ROWS": 32, "num_stages": 2}
            return default, {**default, "ROWS": 64, "num_warps": 8}
        short = {**small, "ROWS": 32, "COLUMNS": 16, "num_warps": 8 if wide else 4}
        tall = {**short, "ROWS": 64, "num_warps": 2 * short["num_warps"]}
        return (tall, short) if wide else (short, tall)
    if dtype == torch.float32:
        default = {**small, "COLUMNS": 32 if not wide and target == "cdna" else 16}
        return default, {**default, "ROWS": 32}
    if target == "cdna":
        default = {**small, "num_stages": 1 if wide else 2}
        return default, {**small, "num_stages": 3 - default["num_stages"]}, {**small, "COLUMNS": 16}
    if wide:
        default = {**eight, "COLUMNS": eight["COLUMNS"] // 2, "num_stages": 1}
        return default, {**default, "num_stages": 2}, small
    # Twice the programs for short batches.
    return eight, {**small, "num_stages": 2}


def gated_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    rel_bias: torch.Tensor,
    key_lengths: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    scale: float,
    wanted: Sequence[bool],
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The op `gated_attention_backward`: dq, dk, dv `[B, T, H, D]`, dgate `[B, H, T]`, drel_bias `[H, 2T - 1]`, those
    wanted.
    """
    _, T, H, D = q.shape
    grad, out, lse, gate, rel_bias = (t.contiguous() for t in (grad, out, lse, gate, rel_bias))
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    dgate, delta = torch.empty_like(gate), torch.empty_like(gate)
    if not q.numel():
        return only(wanted, dq, dk, dv, dgate, torch.zeros_like(rel_bias))
    # A row whose scores all are -inf has weights of 0. Here, not in the kernels: there it would be done for each tile.
    lse = lse.nan_to_num(float("nan"), float("inf"), 0.0)
    copies, ends = toeplitz(rel_bias, both=True)
    constants = launch_constants(q, key_lengths, dropout_p, offsets)
    operands = (q, k, v, gate, rel_bias, copies, ends, key_lengths, seed, *arguments(offsets, rel_bias))
    numbers = (
        T, H, copies.shape[-1], *strides(offsets, q, k, v),
        scale * LOG2_E, 1 / scale, scale, int(dropout_p * 2**24), 1 / (1 - dropout_p),
    )  # fmt: skip

    chip = target(q.device)

    # In TF32, where operands are registers, dk and dv leave none for whole rows of k and v.
    dkv_in_pieces = constants["IN_PIECES"] or (q.dtype == torch.float32 and chip == "cuda")

    def warps(config: Config) -> int:
        # On "hopper" the last tile's gradients are still being added to when scores would begin with the next bias,
        # and the compiler would wait for every single instruction of all products.
        if chip == "hopper":
            return 0
        return fragment_warps(config["ROWS"], config["num_warps"], q.dtype, constants["PRECISION"], chip)

    def run_dq(config: Config) -> None:
        _gated_attention_bwd_dq_kernel[grid(q, offsets, config["ROWS"])](
            *operands, grad, out, lse, dq, dgate, delta, *numbers,
            BLOCK_M=config["ROWS"], BLOCK_N=config["COLUMNS"], WARPS=warps(config), **constants,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip

    def run_dkv(config: Config) -> None:
        _gated_attention_bwd_dkv_kernel[grid(q, offsets, config["ROWS"])](
            *operands, grad, lse, delta, dk, dv, *numbers,
            BLOCK_M=config["COLUMNS"], BLOCK_N=config["ROWS"], WARPS=warps(config),
            **{**constants, "IN_PIECES": dkv_in_pieces},
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip

    # The first finds the row sums that the others need.
    for name, run in (("dq", run_dq), *([("dkv", run_dkv)] if wanted[1] or wanted[2] else [])):
        depends_on = (D, q.dtype, constants["PRECISION"])
        also = (name, constants["DROPOUT"], *(["packed"] if constants["PACKED"] else []))
        backward_configs.launch(run, q.device, depends_on, sizes(q, offsets), also)
    drel_bias = rel_bias_gradient(operands, grad, lse, delta, numbers, constants, offsets) if wanted[4] else None
    return only(wanted, dq, dk, dv, dgate, drel_bias)
