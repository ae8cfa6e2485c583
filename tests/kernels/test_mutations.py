"""Mistakes made on purpose in the kernels: the comparisons of this folder must see each of them."""

from functools import cache

import pytest
import test_gated_attention as attention
import test_packed_attention as packed_attention
import test_packed_front as packed_front
import test_pointwise as pointwise
import test_products as products
import test_waveform_conv as waveform
import torch
from cases import DEVICE, assert_close, kernel, randn, wide

from wavlm_fast.backends.reference import TABLE as REFERENCE

if DEVICE != "cpu":
    pytest.skip("kernels are rewritten for the interpreter", allow_module_level=True)

from mutation import mutated


def attend(lengths=None, dropout_p=0.0, far=20, T=150):
    attention.check(attention.inputs(1, T, 1, 16, lengths, dropout_p, far=far))


def two_pieces():
    attention.check(attention.inputs(1, 40, 1, 32))


def wide_heads():
    attention.check(attention.inputs(1, 70, 1, 80, [69]))


def attend_deterministically():
    torch.use_deterministic_algorithms(True)
    try:
        attend(far=None, T=70)
    finally:
        torch.use_deterministic_algorithms(False)


def strided(norm=True, frames=37):
    x, weight = randn(2, frames, 40), randn(24, 40, 3, scale=120**-0.5)
    vectors = [randn(24, seed=i) for i in range(3)]
    norms = [vectors[1] + 1, vectors[2]] if norm else [None, None]
    products.compare("strided_conv", [x, weight, vectors[0], 2, *norms, 1e-5, "gelu"])


def positional():
    x, weight = randn(1, 35, 32), randn(32, 16, 8, scale=128**-0.5)
    products.compare("positional_conv", [x, weight, randn(32), 2, "gelu", True])


def dilated():
    x, weight = randn(1, 71, 16), randn(16, 48, scale=48**-0.5)
    products.compare("tdnn", [x, weight, randn(16), 3, 3, "relu"], save=False)


def convolve(norm):
    waveform.check(waveform.inputs(2, 163, 24, 10, 5, norm, "gelu"))


def pool():
    x = randn(2, 300, 8) + torch.arange(8) * 0.5
    pointwise.compare("stats_pool", [x, torch.tensor([300, 201])], saved=True)


def gate():
    x, weight, bias = randn(2, 37, 48) * 3, randn(8, 16, scale=0.25), randn(8)
    pointwise.compare("position_gate", [x, weight, bias, randn(3) + 1])


def add_norm():
    x, residual, grad_sum, grad_normed = (randn(260, 8, seed=i) for i in range(4))
    weight, bias = (randn(8, seed=i) for i in range(2))
    forward = [x, residual, weight, bias, 1e-5, True]
    backward = [grad_sum, grad_normed, x + residual, weight, 1e-5, [True] * 3]
    for op, args in (("add_layer_norm", forward), ("add_layer_norm_backward", backward)):
        truth, plain = (REFERENCE[op].fn(*a) for a in (wide(args), args))
        for found, true, theirs in zip(kernel(op)(*args), truth, plain, strict=True):
            assert_close(found, true, theirs, tiny=8)


def group():
    convolve("group")


def layer():
    convolve("layer")


def ragged():
    attend([97])


def dropped_out():
    attend(dropout_p=0.3, T=70)


def packed(dropout_p=0.0):
    attention.check(packed_attention.packed([5, 40, 18], dropout_p=dropout_p))


def packed_dropped_out():
    packed(0.3)


def packed_strided():
    args, packed = packed_front.strided([21, 3, 38, 6], 3, 2, False)
    products.compare("strided_conv", args, packed=packed)


def packed_dilated():
    args, packed = packed_front.dilated([21, 5, 38, 6], 3, 2)
    products.compare("tdnn", args, save=False, packed=packed)


def packed_group():
    args, packed = packed_front.waveform([163, 30, 330], "group")
    waveform.check(args, packed=packed)


FWD, DQ, DKV = (
    f"gated_attention{n}" for n in ("._gated_attention_fwd_kernel", "_backward._gated_attention_bwd_dq_kernel",
                                    "_backward._gated_attention_bwd_dkv_kernel")
)  # fmt: skip
DBIAS = "gated_attention_dbias._gated_attention_bwd_dbias_kernel"
FORWARD_GATE = "gate = tl.load(gate_ptr + head + row) * gate_scale"
FAR_LOOP = "for index in range(left + full - right):"
PRODUCT, FINISH = "_frames_product._frames_product_kernel", "_finish_backward._finish_bwd_kernel"
WEIGHT = "_frames_product._frames_product_bwd_weight_kernel"
WAVE_BWD = "waveform_conv_backward._waveform_conv_bwd_kernel"
GATE, GATE_BWD = "position_gate._position_gate_fwd_kernel", "position_gate._position_gate_bwd_kernel"
NORM, NORM_BWD = "add_layer_norm._add_layer_norm_fwd_kernel", "add_layer_norm._add_layer_norm_bwd_kernel"
PIECE, POOL_BWD = "stats_pool._stats_pool_piece_kernel", "stats_pool._stats_pool_bwd_kernel"

# What is wrong: where, the right source, the wrong one, and the comparison that has to fail.
MISTAKES = {
    "attention: gate dropped": (FWD, FORWARD_GATE, "gate = tl.full([BLOCK_M], gate_scale, tl.float32)", attend),
    "attention: bias shifted by one": (
        "_toeplitz._toeplitz_kernel", "entry = place + shift - MARGIN", "entry = place + shift - MARGIN + 1", attend,
    ),
    "attention: tail tile skipped": (FWD, "if full * BLOCK_N < length:", "if full * BLOCK_N < 0:", attend),
    "attention: far tiles on the right dropped": (FWD, FAR_LOOP, "for index in range(left):", attend),
    "attention: far tiles begin a tile early": (
        "_toeplitz.far_tiles", "low + row - T + 2", "low + row - T + 2 + BLOCK_COLUMNS", attend,
    ),
    "attention: far biases swapped": (
        FWD, "tl.where(index < left, bias_left, bias_right)", "tl.where(index < left, bias_right, bias_left)", attend,
    ),
    "attention: a key past the length seen": (
        "gated_attention._fwd_step", "scores = tl.where((key < length)", "scores = tl.where((key <= length)", ragged,
    ),
    "attention: last piece of a product dropped": (
        "_rows.product_of_rows", "(0, D, PIECE", "(0, D - PIECE, PIECE", two_pieces,
    ),
    "attention: sum not rescaled": ("gated_attention._fwd_step", "total * decay[:, None]", "total", attend),
    "attention: no step to the next keys": (FWD, "row_at(k_at, BLOCK_N, stride_kt)", "k_at", attend),
    "attention: no step to the next values": (FWD, "row_at(v_at, BLOCK_N, stride_vt)", "v_at", attend),
    "attention: no step along the bias": (FWD, "start += BLOCK_N", "start += 0", attend),
    "attention: dropout of another seed": ("_dropout.row_keys", "_mix(seed + ", "_mix(seed + 1 + ", dropped_out),
    "attention: log-sum-exp in base 2": (FWD, "* 0.6931471805599453", "", attend),
    "dq: gate dropped": (DQ, FORWARD_GATE, "gate = tl.full([BLOCK_M], gate_scale, tl.float32)", attend),
    "dq: tail tile skipped": (DQ, "full * BLOCK_N < length", "full * BLOCK_N < 0", attend),
    "dq: tail tile skipped in wide heads": (DQ, "(tl.cdiv(length, BLOCK_N) - full if WIDE else 0)", "0", wide_heads),
    "dq: far tiles on the right dropped": (DQ, FAR_LOOP, "for index in range(left):", attend),
    "dq: not scaled": (DQ, "(dq * dot_scale)", "dq", attend),
    "dgate: dropped where the bias is loaded": (
        "gated_attention_backward._dq_step", "dgate += tl.sum(dscores * bias, axis=1)", "dgate += 0.0", attend,
    ),
    "dgate: dropped in far tiles": (
        "gated_attention_backward._dq_step", "dgate += rest_here * far", "dgate += 0.0", attend,
    ),
    "dk: row sums not taken away": (
        "gated_attention_backward._dkv_step", "(dweights - delta[None, :])", "dweights", attend,
    ),
    "dk, dv: tail tile skipped": (DKV, "(T % BLOCK_M != 0)", "(T < 0)", attend),
    "dk, dv: tail tile skipped in wide heads": (DKV, "tl.cdiv(T, BLOCK_M) - full, 0)", "0, 0)", wide_heads),
    "dk, dv: far tiles on the right dropped": (DKV, FAR_LOOP, "for index in range(left):", attend),
    "dv: dropout's scale dropped": (
        "gated_attention_backward._dkv_step", "tl.where(mask, weights * keep_scale, 0.0)",
        "tl.where(mask, weights, 0.0)", dropped_out,
    ),
    "drel_bias: off by one": (DBIAS, "* BLOCK_N + column + L - 1", "* BLOCK_N + column + L", attend),
    "drel_bias: gate dropped": (DBIAS, "(dweights - delta[:, None]) * gate[:, None]", "(dweights - delta[:, None])",
                                attend),
    "drel_bias: last tile of a diagonal dropped": (DBIAS, "tiles * batch, splits", "tiles * batch - 1, splits", attend),
    "drel_bias, deterministic: off by one": (
        "gated_attention_dbias._gated_attention_bwd_dbias_sum_kernel", "* BLOCK_N + column + L - 1",
        "* BLOCK_N + column + L", attend_deterministically,
    ),
    "packed: boundary shifted by one": (
        "_packed_tiles.frames_of", "offsets_ptr + b), 0)", "offsets_ptr + b) - 1, 0)", packed,
    ),
    "packed: end shifted by one": (
        "_packed_tiles.frames_of", "offsets_ptr + b + 1), N)", "offsets_ptr + b + 1) + 1, N)", packed,
    ),
    "packed: places begin a tile late": ("_packed_tiles.utterance_at", "+ b <= place", "+ b < place", packed),
    "packed: bias of the utterance's own length": (
        "_packed_tiles.own_tile", "* BLOCK, frames, L", "* BLOCK, frames, frames", packed,
    ),
    "packed: gates of the first utterance": (
        "_packed_tiles.numbers_before", "h.to(tl.int64) * N + b", "h.to(tl.int64) * N", packed,
    ),
    "packed: keys of the whole buffer": (FWD, "if LENGTHS else T", "if LENGTHS else N - b", packed),
    "packed: dropout of the utterance's own rows": (
        FWD, "row_keys(seed_ptr, head + row)", "row_keys(seed_ptr, row)", packed_dropped_out,
    ),
    "packed, dq: keys of the whole buffer": (DQ, "if LENGTHS else T", "if LENGTHS else N - b", packed),
    "packed, dk, dv: queries of the whole buffer": (
        DKV, "left, right = far_tiles(", "T = N - b\n    left, right = far_tiles(", packed,
    ),
    "packed, drel_bias: of the first utterance alone": (
        DBIAS, "utterance += (item >=", "utterance += 0 * (item >=", packed,
    ),
    "packed, drel_bias: last tile of an utterance dropped": (DBIAS, "(tile < tiles)", "(tile < tiles - 1)", packed),
    "packed, drel_bias: last place dropped": (
        DBIAS, "T // BLOCK_M + utterances", "T // BLOCK_M + utterances - 1", packed,
    ),
    "product: last row dropped": (PRODUCT, "(unit < units)[:, None]", "(unit < units - 1)[:, None]", dilated),
    "product: last block of the sum dropped": (
        PRODUCT, "range(0, length, BLOCK_K)", "range(0, length - BLOCK_K, BLOCK_K)", strided,
    ),
    "product: last frame taken for padding": (
        PRODUCT, "(tl.uint32) < own_frames", "(tl.uint32) < own_frames - 1", positional,
    ),
    "product: residual dropped": (
        PRODUCT, "acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)", "acc += 0.0", positional,
    ),
    "product: unbiased variance": (PRODUCT, "axis=1) / N + eps)", "axis=1) / (N - 1) + eps)", strided),
    "input gradient: wrong phase": (
        PRODUCT, "unit[:, None] * OUT_STRIDE + phase", "unit[:, None] * OUT_STRIDE + (OUT_STRIDE - 1 - phase)",
        lambda: strided(frames=38),
    ),
    "packed: boundaries one frame early": (
        "_packed.extent", "first = tl.load(offsets_ptr + b)", "first = tl.load(offsets_ptr + b) - (b > 0)",
        packed_strided,
    ),
    "packed: first frames taken for the utterance before": (
        "_packed.utterance_at", "<= place", "< place", packed_strided,
    ),
    "packed: a place too few between utterances": (
        "_packed.first_place", "start // size + b", "start // size", packed_strided,
    ),
    "packed: blocks stay with an utterance": ("_packed.following", "b + ends.to(tl.int32)", "b", packed_strided),
    "packed: windows reach a frame into the next utterance": (
        PRODUCT, "own_frames = own_frames[:, None]",
        "own_frames = (own_frames + (own < utterances - 1))[:, None]", packed_dilated,
    ),
    "packed input gradient: last frames dropped": (
        PRODUCT, "(out_frame < out_frames)", "(out_frame < out_frames - 1)", packed_strided,
    ),
    "packed group norm: statistics over the whole batch": (
        "_packed._sum_places_kernel",
        "first = first_place(offsets_ptr, b, size).to(tl.int64)\n    _, frames = extent(offsets_ptr, b)",
        "first = b.to(tl.int64) * 0\n    frames = size * first_place(offsets_ptr, tl.num_programs(1), size)",
        packed_group,
    ),
    "packed group norm: statistics of the first utterance": (
        "waveform_conv._waveform_conv_fwd_kernel", "b * C + channel, inside, 1.0", "channel, inside, 1.0", packed_group,
    ),
    "packed group norm's gradient: mean over all frames": (
        WAVE_BWD, "sums_ptr + b * 2 * C + channel, mask=inside, other=0.0) / own_frames",
        "sums_ptr + b * 2 * C + channel, mask=inside, other=0.0) / T", packed_group,
    ),
    "packed waveform's gradient: a window of the next utterance": (
        "waveform_conv_backward._waveform_conv_bwd_overlap_kernel", "(frame < own_frames)",
        "(frame < own_frames + (own == 0))", packed_group,
    ),
    "weight gradient: tail rows dropped": (WEIGHT, "tl.cdiv(frames_out, BLOCK_T)", "frames_out // BLOCK_T", dilated),
    "weight gradient: padding ignored": (WEIGHT, "* STRIDE + first", "* STRIDE", positional),
    "norm's gradient: unbiased variance": (FINISH, "axis=1) / C + eps)", "axis=1) / (C - 1) + eps)", strided),
    "norm's gradient: mean not taken away": (FINISH, "g - tl.sum(g, axis=1)[:, None] / C", "g", strided),
    "bias's gradient: last row dropped": (
        FINISH, "last = tl.minimum(first + rows_per_program, rows)",
        "last = tl.minimum(first + rows_per_program, rows - 1)", positional,
    ),
    "gelu: a wrong coefficient": ("_activation._normal_tail", "0.459187775850296", "0.4591", positional),
    "gelu's slope: density dropped": (
        "_activation.activate_slope", " + x * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)", "",
        positional,
    ),
    "group norm: unbiased variance": (
        "waveform_conv._waveform_norm_kernel", "variance = tl.maximum(",
        "variance = frames / (frames - 1) * tl.maximum(", group,
    ),
    "group norm: mean not taken away": ("waveform_conv._waveform_norm_kernel", "(-middle * rstd)", "(0 * rstd)", group),
    "waveform_conv: tail tile skipped": (
        "waveform_conv._waveform_conv_fwd_kernel", "tl.cdiv(own_frames, BLOCK_T)", "own_frames // BLOCK_T",
        lambda: convolve("none"),
    ),
    "waveform_conv, layer norm: unbiased variance": (
        "waveform_conv._waveform_conv_fwd_kernel", "axis=1) / C + eps)", "axis=1) / (C - 1) + eps)", layer,
    ),
    "waveform_conv's gradient: group norm's mean kept": (WAVE_BWD, "grad - plain[None, :]", "grad", group),
    "waveform_conv's gradient: layer norm's mean kept": (
        WAVE_BWD, "g - (tl.sum(g, axis=1) / C)[:, None]", "g", layer,
    ),
    "waveform's gradient: second window dropped": (
        "waveform_conv_backward._waveform_conv_bwd_overlap_kernel", "(K + STRIDE - 1) // STRIDE", "1", layer,
    ),
    "stats_pool: biased deviation": (
        "stats_pool._stats_pool_merge_kernel", "tl.maximum(count - 1, 1.0)", "tl.maximum(count, 1.0)", pool,
    ),
    "stats_pool: distance of the pieces' means dropped": (
        "stats_pool._merge", " + delta * delta * (count * share)", "", pool,
    ),
    "stats_pool: frames past the length taken in": (
        PIECE, "valid = (frame < length)", "valid = (frame < T)", pool,
    ),
    "stats_pool's gradient: biased deviation": (POOL_BWD, "(count - 1) * std", "count * std", pool),
    "stats_pool's gradient: frames past the length": (
        POOL_BWD, "valid = (frame < length)", "valid = (frame < T)", pool,
    ),
    "position_gate: constant dropped": (GATE, "(c * const - 1)", "(c - 1)", gate),
    "position_gate: heads shifted": (GATE, "rows + h * D", "rows + (h + 1) % H * D", gate),
    "position_gate's gradient: sigmoid's slope": (GATE_BWD, "* a * (1 - a)", "* a", gate),
    "position_gate's gradient: constant's dropped": (
        GATE_BWD, "tl.where(head == h, tl.sum(grad * a * c, axis=0), 0.0)", "0.0", gate,
    ),
    "position_gate's gradient: last tile dropped": (
        GATE_BWD, "first + heads_per_program, B * tiles * H)", "first + heads_per_program, B * tiles * H - 1)", gate,
    ),
    "add_layer_norm: residual dropped": (NORM, "(x + residual)", "x", add_norm),
    "add_layer_norm: unbiased variance": (NORM, "axis=1) / C + eps)", "axis=1) / (C - 1) + eps)", add_norm),
    "add_layer_norm: last row dropped": (NORM, "(row < rows)", "(row < rows - 1)", add_norm),
    "add_layer_norm's gradient: the sum's own dropped": (
        NORM_BWD, "dx += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)", "dx += 0.0", add_norm,
    ),
    "add_layer_norm's gradient: last row dropped": (
        NORM_BWD, "tl.minimum(first + rows_per_program, rows)", "tl.minimum(first + rows_per_program, rows - 1)",
        add_norm,
    ),
}  # fmt: skip


@cache
def holds_without_a_mistake(comparison):
    comparison()
    return True


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake):
    where, right, wrong, comparison = MISTAKES[mistake]
    assert holds_without_a_mistake(comparison)
    with mutated(where, right, wrong), pytest.raises(AssertionError):
        comparison()


def test_a_mistake_that_is_none_is_refused():
    for nowhere_or_twice in ("no such source", "BLOCK_C"):
        with pytest.raises(ValueError, match="times in"), mutated(NORM, nowhere_or_twice, ""):
            pass


def test_a_mistake_ends_with_its_context():
    with mutated(NORM, "(x + residual)", "x"):
        pass
    add_norm()
