"""Gradients of the CPU's convolutions and linear layers against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from wavlm_fast.backends import cpu
from wavlm_fast.backends.reference import TABLE as REFERENCE

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def check(op, *args):
    """Twice the reference's error in the same dtype, and some roundings of the largest value: sums differ in order."""
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    truth, plain = REFERENCE[op].fn(*wide), REFERENCE[op].fn(*args)
    assert cpu.TABLE[op].why_not(*args) is None
    found = cpu.TABLE[op].fn(*args)
    for index, (f, p, t) in enumerate(zip(found, plain, truth, strict=True)):
        assert f.shape == t.shape
        assert f.dtype == p.dtype
        assert f.is_contiguous()
        if t.numel():
            tiny = (8 if f.dtype == torch.float32 else 2) * torch.finfo(f.dtype).eps * t.abs().max()
            error, allowed = (f - t).abs().max(), 2 * (p - t).abs().max() + tiny
            assert error <= allowed, f"gradient {index}: error {error:.2e}, allowed {allowed:.2e}"


@DTYPES
@pytest.mark.parametrize("wanted", [[True, True, True], [True, False, False], [False, True, False]])
@pytest.mark.parametrize(
    ("shape", "channels", "activation"),
    [((1, 24), 7, "none"), ((2, 7, 40), 97, "gelu"), ((3, 100, 30), 48, "gelu_tanh"), ((700, 16), 300, "relu")],
)
def test_linear_act(shape, channels, activation, wanted, dtype):
    x = random(*shape, dtype=dtype)
    x[..., 3] *= 50
    weight = random(channels, shape[-1], dtype=dtype, seed=1, scale=0.05)
    pre = random(*shape[:-1], channels, dtype=dtype, seed=2) if activation != "none" else x.new_empty(0)
    grad, bias = random(*shape[:-1], channels, dtype=dtype, seed=3), random(channels, dtype=dtype, seed=4)
    check("linear_act_backward", grad, x, weight, bias, pre, activation, wanted)


@DTYPES
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(
    ("B", "T", "K", "stride"),
    [(1, 3, 3, 2), (2, 31, 3, 2), (1, 40, 3, 2), (3, 30, 2, 2), (1, 50, 5, 3), (2, 20, 2, 3), (1, 9, 4, 1)],
)
def test_strided_conv(B, T, K, stride, wanted, norm, dtype):
    x, weight = random(B, T, 16, dtype=dtype), random(24, 16, K, dtype=dtype, seed=1, scale=0.2)
    pre = random(B, (T - K) // stride + 1, 24, dtype=dtype, seed=2)
    grad, bias = random(*pre.shape, dtype=dtype, seed=3), random(24, dtype=dtype, seed=4)
    vectors = [random(24, dtype=dtype, seed=s) if norm else None for s in (5, 6)]
    wants = [wanted, True, wanted, norm, norm and wanted]
    check("strided_conv_backward", grad, x, weight, bias, pre, stride, *vectors, 1e-5, "gelu", wants)


@DTYPES
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize(("K", "dilation"), [(5, 1), (3, 2), (3, 3), (1, 1)])
def test_tdnn(K, dilation, activation, dtype):
    x, weight = random(2, 29, 16, dtype=dtype), random(24, 16 * K, dtype=dtype, seed=1, scale=0.2)
    out = random(2, 29 - (K - 1) * dilation, 24, dtype=dtype, seed=2)
    grad, bias = random(*out.shape, dtype=dtype, seed=3), random(24, dtype=dtype, seed=4)
    check("tdnn_backward", grad, x, weight, bias, out, K, dilation, activation, [True, True, True])
    check("tdnn_backward", grad, x, weight, bias, out, K, dilation, activation, [False, True, False])


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 1, 1), (7, 5, 3), (130, 300, 100), (300, 1100, 49)])
@pytest.mark.parametrize("transposed", [True, False])
def test_products_of_views(rows, depth, columns, transposed):
    a, b = random(rows, depth), random(depth + 3, columns, seed=1)[1:-2]
    out = random(rows, 2, columns, seed=2)[:, 1]
    before = out.double()
    left = a.t().contiguous().t() if transposed else a
    torch.ops.wavlm_fast_cpu.matmul(left, b, out, True)
    torch.testing.assert_close(out.double(), before + a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    torch.ops.wavlm_fast_cpu.matmul(left, b, out, False)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


def test_threads_do_not_change_a_bit():
    a, b = random(500, 400), random(400, 200, seed=1)
    out, again = torch.empty(500, 200), torch.empty(500, 200)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.ops.wavlm_fast_cpu.matmul(a, b, out, False)
        torch.set_num_threads(3)
        torch.ops.wavlm_fast_cpu.matmul(a, b, again, False)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(out, again)


def test_gradients_of_no_use_are_not_computed():
    weight, x = random(24, 16), random(3, 16, seed=1).requires_grad_()
    args = (torch.ones(3, 24), x.detach(), weight, None, x.new_empty(0), "none")
    dx, dweight, dbias = cpu.TABLE["linear_act_backward"].fn(*args, [True, False, False])
    assert dx.shape == x.shape
    assert dweight.numel() == dbias.numel() == 0
