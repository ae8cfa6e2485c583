"""The C++ gradient of gated_attention against the reference in float64."""

from __future__ import annotations

import pytest
import torch

import wavlm_fast.ops
from wavlm_fast import backends
from wavlm_fast.backends import cpu
from wavlm_fast.backends.reference import TABLE as REFERENCE

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
NAMES = ("dq", "dk", "dv", "dgate", "drel_bias")

# B, T, H, D, lengths. A block of queries is 48, 24 or 12 long, a tile of keys 64; fewer than 24 pairs of an utterance
# and a head are cut along the queries.
CASES = [
    (1, 1, 1, 64, None),
    (2, 7, 3, 64, [7, 3]),
    (1, 47, 2, 64, None),
    (2, 64, 2, 64, None),
    (4, 65, 2, 64, [0, 1, 64, 65]),
    (1, 97, 2, 128, [96]),
    (1, 131, 3, 80, None),
    (9, 67, 3, 48, [67, 66, 65, 64, 63, 33, 2, 1, 0]),
    (2, 131, 2, 32, [100, 131]),
    (1, 131, 2, 33, None),
    (1, 50, 2, 5, None),
    (1, 499, 2, 64, [333]),
    (1, 700, 1, 96, None),
]


def operands(B, T, H, D, dtype, seed=0):
    """Rows with a handful of heavy keys, a bias of order 2, gates over their whole range, views of one product."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, 3, H, D, generator=generator)
    qkv[:, :, :2] *= 1.7
    qkv[:, :, 2, :, -1] *= 20
    q, k, v = qkv.to(dtype).unbind(2)
    gate = torch.rand(B, H, T, generator=generator) * 4
    rel_bias = torch.randn(H, 2 * T - 1, generator=generator) * 2
    grad = torch.randn(B, T, H, D, generator=generator).to(dtype)
    return grad, (q, k, v, gate, rel_bias)


ALL = [True] * 5


def gradients(table, grad, inputs, lengths, *tail, wanted=ALL):
    out, lse = table["gated_attention"].fn(*inputs, lengths, *tail)
    return table["gated_attention_backward"].fn(grad, *inputs, lengths, out, lse, *tail[:3], wanted, *tail[3:])


def check(grad, inputs, lengths, *tail):
    """Twice the reference's error in the same dtype, and some roundings of the largest value."""
    got = gradients(cpu.TABLE, grad, inputs, lengths, *tail)
    plain = gradients(REFERENCE, grad, inputs, lengths, *tail)
    truth = gradients(REFERENCE, grad.double(), [x.double() for x in inputs], lengths, *tail)
    for name, g, p, t in zip(NAMES, got, plain, truth, strict=True):
        assert g.shape == t.shape
        assert g.dtype == p.dtype
        assert g.is_contiguous()
        tiny = (16 if g.dtype == torch.float32 else 2) * torch.finfo(g.dtype).eps * t.abs().max()
        error, allowed = (g - t).abs().max(), 2 * (p - t).abs().max() + tiny
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    return got


@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("B", "T", "H", "D", "lengths"), CASES)
def test_against_float64(B, T, H, D, lengths, dropout, dtype):
    seed = torch.tensor([2**40 + 12345]) if dropout else None
    grad, inputs = operands(B, T, H, D, dtype)
    check(grad, inputs, None if lengths is None else torch.tensor(lengths), dropout, seed, D**-0.5)


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0, -0.2])
def test_scales(scale, dtype):
    grad, inputs = operands(2, 70, 2, 32, dtype)
    check(grad, inputs, torch.tensor([70, 41]), 0.0, None, scale)


@DTYPES
def test_strides(dtype):
    grad, (q, k, v, gate, rel_bias) = operands(2, 70, 2, 64, dtype)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    v = torch.nn.functional.pad(v, (3, 1, 0, 1))[:, :, :-1, 3:-1]
    gate = gate.mT.contiguous().mT
    grad = grad.transpose(0, 2).contiguous().transpose(0, 2)
    strided = check(grad, (q, k, v, gate, rel_bias), None, 0.0, None, 0.125)
    dense = check(*operands(2, 70, 2, 64, dtype), None, 0.0, None, 0.125)
    for a, b in zip(strided, dense, strict=True):
        assert torch.equal(a, b)


@DTYPES
def test_what_has_no_weight_has_no_gradient(dtype):
    grad, (q, k, v, gate, rel_bias) = operands(3, 70, 2, 64, dtype)
    k, v = k.clone(), v.clone()
    k[1, 41:], v[1, 41:], k[2], v[2] = torch.nan, torch.nan, torch.nan, torch.nan  # not read either
    inputs, lengths = (q, k, v, gate, rel_bias), torch.tensor([70, 41, 0], dtype=torch.int32)
    dq, dk, dv, dgate, drel_bias = gradients(cpu.TABLE, grad, inputs, lengths, 0.0, None, 0.125)
    for zero in (dq[2], dgate[2], dk[1, 41:], dv[1, 41:], dk[2], dv[2]):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert all(x.isfinite().all() for x in (dq, dk, dv, dgate, drel_bias))


def test_rows_whose_bias_is_minus_infinity():
    grad, (q, k, v, gate, rel_bias) = operands(1, 70, 2, 64, torch.float32)
    rel_bias[:, 30:] = -torch.inf  # the first rows have no key that is not at -inf
    got = gradients(cpu.TABLE, grad, (q, k, v, gate, rel_bias), None, 0.0, None, 0.125)
    wanted = gradients(REFERENCE, grad, (q, k, v, gate, rel_bias), None, 0.0, None, 0.125)
    for name, g, w in zip(NAMES, got, wanted, strict=True):
        if name != "dgate":  # the reference multiplies its zeros with the infinite bias
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5, msg=name)


def test_nan_reaches_what_it_reaches_in_the_reference():
    grad, (q, *rest) = operands(1, 70, 2, 64, torch.float32)
    q = q.clone()
    q[0, 50, 1, 3] = torch.nan
    got = gradients(cpu.TABLE, grad, (q, *rest), None, 0.0, None, 0.125)
    wanted = gradients(REFERENCE, grad, (q, *rest), None, 0.0, None, 0.125)
    for name, g, w in zip(NAMES, got, wanted, strict=True):
        assert torch.equal(g.isnan(), w.isnan()), name


@DTYPES
def test_a_row_of_gradients_of_scores_sums_to_zero(dtype):
    """A constant added to all of a row's scores changes nothing, so a gate over a constant bias has no gradient."""
    grad, (q, k, v, gate, rel_bias) = operands(2, 131, 2, 64, dtype)
    inputs = (q, k, v, gate, torch.full_like(rel_bias, 3.0))
    out, lse = cpu.TABLE["gated_attention"].fn(*inputs, None, 0.0, None, 0.125)
    lse += 1e-3  # of a backend that computes it otherwise
    backward = cpu.TABLE["gated_attention_backward"].fn
    dgate = backward(grad, *inputs, None, out, lse, 0.0, None, 0.125, ALL)[3]
    scale = backward(grad, q, k, v, gate, rel_bias, None, out, lse, 0.0, None, 0.125, ALL)[3].abs().max()
    assert dgate.abs().max() <= 1e-5 * scale


@DTYPES
@pytest.mark.parametrize(("B", "H"), [(1, 2), (9, 3)])
def test_threads_do_not_change_a_bit(B, H, dtype):
    grad, inputs = operands(B, 300, H, 64, dtype)
    lengths = torch.tensor([300, 17, 0, 90, 299, 300, 1, 250, 300])[:B]
    runs, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            runs.append(gradients(cpu.TABLE, grad, inputs, lengths, 0.1, torch.tensor([5]), 0.125))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_nothing_to_differentiate():
    grad, inputs = operands(0, 5, 2, 64, torch.float32)
    got = gradients(cpu.TABLE, grad, inputs, None, 0.0, None, 0.125)
    assert [g.shape for g in got] == [x.shape for x in inputs]
    assert torch.equal(got[4], torch.zeros_like(inputs[4]))


def test_memory_that_is_used_again():
    """Scratch of a long call, and what it left there, serves a short one."""
    short = operands(2, 33, 2, 64, torch.float32)
    first = gradients(cpu.TABLE, *short, torch.tensor([33, 20]), 0.0, None, 0.125)
    grad, inputs = operands(2, 400, 2, 64, torch.float32)
    gradients(cpu.TABLE, grad * torch.inf, inputs, None, 0.0, None, 0.125)
    again = gradients(cpu.TABLE, *short, torch.tensor([33, 20]), 0.0, None, 0.125)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_through_the_front():
    grad, inputs = operands(2, 70, 2, 64, torch.float32)
    tensors, lengths = [x.detach().requires_grad_() for x in inputs], torch.tensor([70, 41])
    with backends.use_backend("cpu"):
        out = wavlm_fast.ops.gated_attention(*tensors, lengths)
    found = torch.autograd.grad(out, tensors, grad)
    for a, b in zip(found, gradients(cpu.TABLE, grad, inputs, lengths, 0.0, None, 0.125), strict=True):
        assert torch.equal(a, b)


def test_refusal_of_float64_is_a_sentence():
    grad, inputs = operands(1, 5, 1, 64, torch.float64)
    why_not = cpu.TABLE["gated_attention_backward"].why_not
    assert "float32 or bfloat16" in why_not(grad, *inputs, None, grad, inputs[3], 0.0, None, 0.125)
