"""The C++ gated_attention against the reference in float64."""

from __future__ import annotations

import pytest
import torch

import wavlm_fast.ops
from wavlm_fast import backends
from wavlm_fast.backends import cpu

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))

REFERENCE = wavlm_fast.ops.references["gated_attention"]
KERNEL = torch.ops.wavlm_fast_cpu.gated_attention

# B, T, H, D, lengths. A block of queries is 48, 24 or 12 long, a tile of keys 128; a task has up to 12 blocks.
CASES = [
    (1, 1, 1, 64, None),
    (2, 7, 3, 64, [7, 3]),
    (1, 47, 2, 64, None),
    (2, 64, 2, 64, None),
    (4, 65, 2, 64, [0, 1, 64, 65]),
    (1, 97, 2, 128, [96]),
    (1, 131, 3, 80, None),
    (2, 131, 2, 32, [100, 131]),
    (1, 131, 2, 33, None),
    (1, 50, 2, 5, None),
    (1, 499, 2, 64, [333]),
    (5, 259, 1, 48, [127, 128, 129, 257, 259]),
    (2, 99, 12, 64, None),
    (1, 1200, 1, 64, None),
]


def operands(B, T, H, D, dtype, seed=0):
    """Peaked rows, a bias of order 2, gates over their whole range, q, k and v as views of one product."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, 3, H, D, generator=generator)
    qkv[:, :, :2, :, 0] *= 8
    qkv[:, :, 2, :, -1] *= 20
    q, k, v = qkv.to(dtype).unbind(2)
    gate = torch.rand(B, H, T, generator=generator) * 4
    rel_bias = torch.randn(H, 2 * T - 1, generator=generator) * 2
    return q, k, v, gate, rel_bias


def truth(q, k, v, gate, rel_bias, *rest):
    kernel = backends.load("reference").TABLE["gated_attention"].fn
    return kernel(*(x.double() for x in (q, k, v, gate, rel_bias)), *rest)


def assert_no_worse(got, plain, expected, dtype):
    """Twice the reference's own error in the dtype, and a few roundings of the largest value."""
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    tiny = torch.finfo(dtype).eps * expected[finite].abs().max() if finite.any() else 0
    error = (got.double() - expected)[finite].abs().amax() if finite.any() else torch.tensor(0.0)
    allowed = 2 * (plain.double() - expected)[finite].abs().amax() + tiny if finite.any() else 0
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def check(inputs, *rest):
    """As precise as the reference; returns the output."""
    out, lse = KERNEL(*inputs, *rest)
    plain_out, plain_lse = backends.load("reference").TABLE["gated_attention"].fn(*inputs, *rest)
    true_out, true_lse = truth(*inputs, *rest)
    assert_no_worse(out, plain_out, true_out, out.dtype)
    assert_no_worse(lse, plain_lse, true_lse, torch.float32)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "T", "H", "D", "lengths"), CASES)
def test_against_float64(B, T, H, D, lengths, dtype):
    inputs = operands(B, T, H, D, dtype)
    out = check(inputs, None if lengths is None else torch.tensor(lengths), 0.0, None, D**-0.5)
    assert out.dtype == dtype
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_key_gives_zeros(dtype):
    lengths = torch.tensor([0, 70], dtype=torch.int32)
    out, lse = KERNEL(*operands(2, 70, 2, 64, dtype), lengths, 0.0, None, 0.125)
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.5, 1e-3, 0.0, -0.2])
def test_scales(scale, dtype):
    check(operands(2, 131, 2, 32, dtype), torch.tensor([131, 41]), 0.0, None, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype):
    q, k, v, gate, rel_bias = operands(2, 131, 2, 64, dtype)
    dense = KERNEL(q, k, v, gate, rel_bias, None, 0.0, None, 0.125)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    v = torch.nn.functional.pad(v, (3, 1, 0, 1))[:, :, :-1, 3:-1]
    gate, rel_bias = gate.mT.contiguous().mT, rel_bias.T.contiguous().T
    strided = KERNEL(q, k, v, gate, rel_bias, None, 0.0, None, 0.125)
    assert torch.equal(strided[0], dense[0])
    assert torch.equal(strided[1], dense[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beyond", [30, 100, 170])
def test_rows_whose_bias_is_minus_infinity(beyond, dtype):
    """Whole rows, and whole tiles of keys at the beginning of a row."""
    q, k, v, gate, rel_bias = operands(1, 300, 2, 64, dtype)
    rel_bias[:, : 299 - beyond], rel_bias[:, 299 + beyond :] = -torch.inf, -torch.inf
    check((q, k, v, gate + 0.1, rel_bias), torch.tensor([200]), 0.0, None, 0.125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [33, 131])
def test_dropout_draws_the_mask_of_the_reference(dtype, T):
    rest = (torch.tensor([T, T - 3]), 0.3, torch.tensor([2**40 + 12345]), 0.125)
    check(operands(2, T, 3, 64, dtype), *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_its_own_rows_only(dtype):
    q, k, v, gate, rel_bias = operands(1, 70, 2, 64, dtype)
    q = q.clone()
    q[0, 50, 1, 3] = torch.nan
    out, _ = KERNEL(q, k, v, gate, rel_bias, None, 0.0, None, 0.125)
    wanted = torch.zeros(70, 2, dtype=torch.bool)
    wanted[50, 1] = True
    assert torch.equal(out[0].isnan().all(-1), wanted)
    assert torch.equal(out[0].isnan().any(-1), wanted)


def test_keys_past_the_end_are_not_read():
    q, k, v, gate, rel_bias = operands(1, 130, 2, 64, torch.float32)
    k, v = k.clone(), v.clone()
    k[:, 70:], v[:, 70:] = torch.nan, torch.nan
    out, _ = KERNEL(q, k, v, gate, rel_bias, torch.tensor([70]), 0.0, None, 0.125)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "H"), [(1, 1), (3, 3)])
def test_threads_do_not_change_a_bit(B, H, dtype):
    inputs = operands(B, 700, H, 64, dtype)
    rest = (torch.tensor([700, 17, 90])[:B], 0.0, None, 0.125)
    runs, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            runs.append(KERNEL(*inputs, *rest))
    finally:
        torch.set_num_threads(threads)
    for out, lse in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert torch.equal(lse, runs[0][1])


def test_gradients_through_the_front():
    tensors = [x.detach().requires_grad_() for x in operands(2, 70, 2, 64, torch.float32)]
    lengths = torch.tensor([70, 41])
    with backends.use_backend("cpu"):
        out = wavlm_fast.ops.gated_attention(*tensors, lengths)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, tensors, grad)
    plain = torch.autograd.grad(REFERENCE(*tensors, lengths, 0.0, None, 0.125), tensors, grad)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(REFERENCE(*doubles, lengths, 0.0, None, 0.125), doubles, grad.double())
    for a, b, c in zip(got, plain, expected, strict=True):
        assert_no_worse(a, b, c, torch.float32)


def test_refusal_of_float64_is_a_sentence():
    inputs = [x.double() for x in operands(1, 5, 1, 64, torch.float32)]
    with backends.use_backend("cpu"), pytest.raises(backends.BackendUnavailable, match="float32 or bfloat16"):
        wavlm_fast.ops.gated_attention(*inputs)
