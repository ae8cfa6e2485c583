"""The C++ gated_attention against the reference in float64."""

from __future__ import annotations

import pytest
import torch

import wavlm_fast.ops
from wavlm_fast import backends
from wavlm_fast.backends import cpu

pytestmark = pytest.mark.skipif(cpu.EXTENSION_PROBLEM is not None, reason=str(cpu.EXTENSION_PROBLEM))

REFERENCE = wavlm_fast.ops.references["gated_attention"]
KERNEL = torch.ops.wavlm_fast_cpu.gated_attention

# B, T, H, D, lengths. A block of queries is 48, 24 or 12 long, a tile of keys 64.
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "T", "H", "D", "lengths"), CASES)
def test_against_float64(B, T, H, D, lengths, dtype):
    inputs = operands(B, T, H, D, dtype)
    rest = (None if lengths is None else torch.tensor(lengths), 0.0, None, D**-0.5)
    out, lse = KERNEL(*inputs, *rest)
    plain_out, plain_lse = backends.load("reference").TABLE["gated_attention"].fn(*inputs, *rest)
    true_out, true_lse = truth(*inputs, *rest)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    assert_no_worse(out, plain_out, true_out, dtype)
    assert_no_worse(lse, plain_lse, true_lse, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_key_gives_zeros(dtype):
    lengths = torch.tensor([0, 70], dtype=torch.int32)
    out, lse = KERNEL(*operands(2, 70, 2, 64, dtype), lengths, 0.0, None, 0.125)
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [33, 131])
def test_dropout_draws_the_mask_of_the_reference(dtype, T):
    inputs = operands(2, T, 3, 64, dtype)
    rest = (torch.tensor([T, T - 3]), 0.3, torch.tensor([2**40 + 12345]), 0.125)
    out, lse = KERNEL(*inputs, *rest)
    plain_out, plain_lse = backends.load("reference").TABLE["gated_attention"].fn(*inputs, *rest)
    true_out, true_lse = truth(*inputs, *rest)
    assert_no_worse(out, plain_out, true_out, dtype)
    assert_no_worse(lse, plain_lse, true_lse, torch.float32)


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


def test_threads_do_not_change_a_bit():
    inputs = operands(3, 200, 3, 64, torch.float32)
    rest = (torch.tensor([200, 17, 90]), 0.0, None, 0.125)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = KERNEL(*inputs, *rest)
        torch.set_num_threads(2)
        together = KERNEL(*inputs, *rest)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


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
