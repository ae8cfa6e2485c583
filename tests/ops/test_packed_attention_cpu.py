"""The C++ attention and encoder layer on packed frames: each utterance as if it were alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cpu_rule import assert_no_worse, check, check_threads
from op_contract import randn
from packed_calls import CALLS, EXTRA, offsets_of
from some_calls import native_call
from test_encoder_layer import operands as layer_operands
from test_encoder_layer import options
from test_gated_attention_backward_cpu import ALL
from test_gated_attention_backward_cpu import check as check_gradients

from wavlm_fast import backends, ops
from wavlm_fast.backends import cpu

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
DROPOUT = pytest.mark.parametrize("dropout", [(0.0, None), (0.3, torch.tensor([2**40 + 12345]))], ids=["", "dropout"])
LAYERS = pytest.mark.parametrize("name", ["encoder_layer", "encoder_layer, norm first"])
# Lengths, H, D. A block of queries is 48, 24 or 12 long, a tile of keys 128 forward and 64 backward; head
# dimensions are whole vectors, and not.
CASES = {
    "single frames": ((1, 1, 1), 2, 64),
    "tiles of keys": ((1, 300, 7, 131, 1, 49), 2, 64),
    "long among short": ((3, 5, 2, 420, 1, 4, 3), 1, 33),
    "narrow": ((50, 13), 2, 5),
    "many": (tuple(n + 1 for n in EXTRA["many"]), 3, 8),
}
SHAPES = pytest.mark.parametrize(("lengths", "H", "D"), CASES.values(), ids=CASES)


def operands(lengths, H, D, dtype, room=3):
    """q, k and v as views of one product, gate and a bias for `room` frames more than the longest utterance has."""
    N = sum(lengths)
    qkv = randn(1, N, 3, H, D, seed=1)
    qkv[:, :, :2] *= 1.7
    qkv[:, :, 2, :, -1] *= 20
    gate, rel_bias = randn(1, H, N, seed=2).sigmoid() * 4, randn(H, 2 * (max(lengths) + room) - 1, seed=3, scale=2)
    return (*qkv.to(dtype).unbind(2), gate.float(), rel_bias.float())


def tail(lengths, D, dropout=(0.0, None)):
    return (*dropout, D**-0.5, offsets_of(lengths))


def backward_args(inputs, lengths, *tail):
    grad = randn(*inputs[0].shape, seed=4, dtype=inputs[0].dtype)
    return (grad, *inputs, None, *cpu.TABLE["gated_attention"].fn(*inputs, None, *tail), *tail[:3], ALL, *tail[3:])


def within(lengths):
    return [slice(a, b) for a, b in pairwise(offsets_of(lengths).tolist())]


@DTYPES
@SHAPES
def test_attention_is_that_of_each_utterance_alone(lengths, H, D, dtype):
    q, k, v, gate, rel_bias = operands(lengths, H, D, dtype)
    kernel, L = cpu.TABLE["gated_attention"].fn, (rel_bias.shape[1] + 1) // 2
    out, lse = kernel(q, k, v, gate, rel_bias, None, *tail(lengths, D))
    for n, own in zip(lengths, within(lengths), strict=True):
        bias = rel_bias[:, L - n : L + n - 1]
        alone = kernel(q[:, own], k[:, own], v[:, own], gate[..., own], bias, None, 0.0, None, D**-0.5, None)
        assert torch.equal(out[:, own], alone[0])
        assert torch.equal(lse[..., own], alone[1])


@DTYPES
@DROPOUT
@SHAPES
def test_attention_against_float64(lengths, H, D, dropout, dtype):
    check("gated_attention", *operands(lengths, H, D, dtype), None, *tail(lengths, D, dropout))


@DTYPES
@DROPOUT
@SHAPES
def test_gradients_against_float64(lengths, H, D, dropout, dtype):
    inputs = operands(lengths, H, D, dtype)
    grad = randn(*inputs[0].shape, seed=4, dtype=dtype)
    *_, drel_bias = check_gradients(grad, inputs, None, *tail(lengths, D, dropout))
    assert not drel_bias[:, :3].any()  # of distances that no utterance has
    assert not drel_bias[:, -3:].any()


@DTYPES
@pytest.mark.parametrize("poisoned", range(4))
def test_nothing_passes_a_boundary(poisoned, dtype):
    lengths, D = (60, 1, 140, 17), 33
    inputs, found = operands(lengths, 2, D, dtype), []
    kernel, backward = cpu.TABLE["gated_attention"].fn, cpu.TABLE["gated_attention_backward"].fn
    grad, own = randn(*inputs[0].shape, seed=4, dtype=dtype), within(lengths)[poisoned]
    for value in (None, torch.nan):
        *frames, rel_bias = (x.clone() for x in (grad, *inputs))
        for x in frames:
            if value is not None:
                (x[..., own] if x.dim() == 3 else x[:, own]).fill_(value)
        mine, rest = (*frames[1:], rel_bias), tail(lengths, D, (0.3, torch.tensor([5])))
        out, lse = kernel(*mine, None, *rest)
        dq, dk, dv, dgate, _ = backward(frames[0], *mine, None, out, lse, *rest[:3], ALL, *rest[3:])
        found.append([out, dq, dk, dv, lse.transpose(1, 2), dgate.transpose(1, 2)])
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[own] = False
    for clean, dirty in zip(*found, strict=True):
        assert dirty[:, own].isnan().all()
        assert torch.equal(clean[:, others], dirty[:, others])


@DTYPES
def test_threads_do_not_change_a_bit(dtype):
    lengths = (3, 5, 250, 1, 4, 60, 250)
    inputs, rest = operands(lengths, 3, 16, dtype), tail(lengths, 16, (0.1, torch.tensor([5])))
    check_threads("gated_attention", *inputs, None, *rest)
    check_threads("gated_attention_backward", *backward_args(inputs, lengths, *rest))


def test_frames_come_in_any_layout():
    lengths = (20, 1, 33)
    q, k, v, gate, rel_bias = operands(lengths, 2, 16, torch.float32)
    *rest, offsets = tail(lengths, 16)
    args = backward_args((q, k, v, gate, rel_bias), lengths, *rest, offsets)
    q, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, v))
    gate, rel_bias, offsets = gate.mT.contiguous().mT, rel_bias.T.contiguous().T, offsets.repeat_interleave(2)[::2]
    wanted = cpu.TABLE["gated_attention_backward"].fn(*args)
    other = backward_args((q, k, v, gate, rel_bias), lengths, *rest, offsets)
    for found, same in zip(other[7:9], args[7:9], strict=True):
        assert torch.equal(found, same)
    for found, same in zip(cpu.TABLE["gated_attention_backward"].fn(*other), wanted, strict=True):
        assert torch.equal(found, same)


def test_the_front_takes_it():
    lengths = (20, 1, 33)
    tensors = [x.detach().requires_grad_() for x in operands(lengths, 2, 16, torch.float32)]
    with backends.use_backend("cpu"):  # which raises where its kernel does not take the call
        out = ops.gated_attention(*tensors, offsets=offsets_of(lengths))
    args = backward_args([x.detach() for x in tensors], lengths, *tail(lengths, 16))
    assert torch.equal(out, args[7])
    found = torch.autograd.grad(out, tensors, args[0])
    for a, b in zip(found, cpu.TABLE["gated_attention_backward"].fn(*args), strict=True):
        assert torch.equal(a, b)


def layers_run(dtype):
    x, *rest = layer_operands(dtype)
    return cpu.TABLE["encoder_layer"].why_not(x, *rest, *options().values()) is None


@DTYPES
@pytest.mark.parametrize("extra", EXTRA)
@LAYERS
def test_layer_is_that_of_each_utterance_alone(name, extra, dtype):
    if not layers_run(dtype):
        pytest.skip(f"no layer of {dtype} at this level")
    call, lengths = CALLS[name], [1 + n for n in EXTRA[extra]]
    packed, shared = call.inputs(lengths, dtype)
    wide = [tuple(x.double() for x in tensors) for tensors in (packed, shared)]
    with torch.no_grad():
        with backends.use_backend("cpu"):
            found = call.packed(lengths, packed, shared)
        with backends.use_backend("reference"):
            plain, truth = call.alone(lengths, packed, shared), call.alone(lengths, *wide)
    assert_no_worse(name, [found], [plain], [truth])


@pytest.mark.parametrize(
    "lengths",
    [(600, 500, 3, 1100, 20), (1100, 20, 5), (5, 1030, 1, 511, 512), (400,) * 6, (1,) * 1030],
    ids=lambda lengths: f"{len(lengths)} of {max(lengths)}",
)
@pytest.mark.parametrize("norm_first", [True, False])
def test_groups_of_utterances(norm_first, lengths):
    """More frames than go through a layer at a time: what is computed of an utterance does not depend on its group."""
    # So wide that a group which works beyond its memory, as large as that of another one, ends the process.
    x, rel_bias, _, *parameters = layer_operands(torch.float32, batch=1, frames=sum(lengths), inner=2000)
    L, layer = sum(lengths), cpu.TABLE["encoder_layer"].fn
    rest = tuple(options(norm_first).values())
    out = layer(x, rel_bias, None, *parameters, *rest, offsets_of(lengths))
    assert out.isfinite().all()
    for n, own in list(zip(lengths, within(lengths), strict=True))[:40]:
        alone = layer(x[:, own].contiguous(), rel_bias[:, L - n : L + n - 1], None, *parameters, *rest, None)
        torch.testing.assert_close(out[:, own], alone, rtol=2e-5, atol=2e-5)


@LAYERS
def test_nothing_passes_a_boundary_in_a_layer(name):
    call, lengths = CALLS[name], [9, 1, 40, 5]
    (x,), shared = call.inputs(lengths, torch.float32)
    with torch.no_grad(), backends.use_backend("cpu"):
        clean = call.packed(lengths, (x,), shared)
        for own in within(lengths):
            dirty = x.clone()
            dirty[:, own] = torch.nan
            out = call.packed(lengths, (dirty,), shared)
            assert out[:, own].isnan().all()
            out[:, own] = clean[:, own]
            assert torch.equal(out, clean)


WRONG = [
    ([1, 4, 9], "rise from 0 to the 9 frames"),
    ([0, 4, 8], "rise from 0 to the 9 frames"),
    ([0, 4, 10], "rise from 0 to the 9 frames"),
    ([0, 4, 4, 9], "rise from 0 to the 9 frames"),
    ([0, 12, 9], "rise from 0 to the 9 frames"),
    ([0, -4, 9], "rise from 0 to the 9 frames"),
    ([0, 9], "for 9 frames, the longest utterance"),  # the bias is for 5
    ([0], r"of \[B \+ 1\] int32"),
    ([0] * 11, "no more utterances than the 9 frames"),
]


@pytest.mark.parametrize(("values", "sentence"), WRONG)
def test_wrong_offsets_are_refused(values, sentence):
    offsets, native = torch.tensor(values, dtype=torch.int32), torch.ops.wavlm_fast_cpu
    inputs = operands((4, 5), 2, 8, torch.float32, room=0)
    args = backward_args(inputs, (4, 5), *tail((4, 5), 8))
    x, rel_bias, lengths, *parameters = native_call("encoder_layer", 3)
    H, C = rel_bias.shape[0], x.shape[2]
    layer = (randn(1, 9, C, dtype=torch.float32), randn(H, 9, dtype=torch.float32), None, *parameters)
    for kernel, right in (
        (native.gated_attention, (*inputs, None, *tail((4, 5), 8))),
        (native.gated_attention_backward, args),
        (native.encoder_layer, (*layer, offsets_of((4, 5)))),
    ):
        kernel(*right)
        with pytest.raises(RuntimeError, match=f"offsets.*{sentence}|{sentence}.*offsets"):
            kernel(*right[:-1], offsets)


def test_what_does_not_go_with_offsets_is_refused():
    native, (q, k, v, gate, rel_bias) = torch.ops.wavlm_fast_cpu, operands((4, 5), 2, 8, torch.float32)
    rest = tail((4, 5), 8)
    with pytest.raises(RuntimeError, match="offsets of \\[B \\+ 1\\] int32 on the CPU, got Long"):
        native.gated_attention(q, k, v, gate, rel_bias, None, *rest[:-1], rest[-1].long())
    with pytest.raises(RuntimeError, match="no lengths beside offsets"):
        native.gated_attention(q, k, v, gate, rel_bias, torch.tensor([9]), *rest)
    with pytest.raises(RuntimeError, match="2L - 1"):
        native.gated_attention(q, k, v, gate, rel_bias[:, 1:], None, *rest)
    two = [x.expand(2, *x.shape[1:]) for x in (q, k, v, gate)]
    with pytest.raises(RuntimeError, match="expected packed frames, .* beside offsets"):
        native.gated_attention(*two, rel_bias, None, *rest)
