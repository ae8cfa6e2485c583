"""Products and convolutions on packed weights against the reference in float64, and when they must stand aside."""

from __future__ import annotations

import pytest
import torch
from cpu_rule import check_threads

import wavlm_fast.ops
from wavlm_fast import backends, derived
from wavlm_fast.backends import cpu
from wavlm_fast.backends.cpu import onednn, packed_conv
from wavlm_fast.ops import references


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def skip_unless_usable(dtype):
    reason = cpu.extension.problem()
    if reason is not None and (dtype == torch.float32 or onednn.why_not() is not None):
        pytest.skip(reason)


def assert_no_worse(op, args, out):
    """Twice the reference's error in the same dtype, and two roundings of the largest value."""
    plain = references[op](*args)
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    expected = references[op](*wide)
    assert out.shape == expected.shape
    assert out.dtype == args[0].dtype
    assert out.is_contiguous()
    tiny = 2 * torch.finfo(out.dtype).eps * expected.abs().max()
    error, allowed = (out - expected).abs().max(), 2 * (plain - expected).abs().max() + tiny
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(params=[False, True], ids=["rows", "copies"])
def copies(request):
    """Whether long rows are multiplied as copies, which is a processor's own choice elsewhere."""
    skip_unless_usable(torch.float32)
    own = torch.ops.wavlm_fast_cpu.copies_pay()
    torch.ops.wavlm_fast_cpu.copies_pay(request.param)
    yield
    torch.ops.wavlm_fast_cpu.copies_pay(own)


def test_copies_of_rows_give_the_same_bits():
    skip_unless_usable(torch.float32)
    x, weight, own = random(130, 1024), random(300, 1024, seed=1), torch.ops.wavlm_fast_cpu.copies_pay()
    found = []
    for pay in (False, True):
        assert torch.ops.wavlm_fast_cpu.copies_pay(pay) == pay
        found.append(cpu.TABLE["linear_act"].fn(x, weight, None, "gelu", False)[0])
    torch.ops.wavlm_fast_cpu.copies_pay(own)
    assert torch.equal(*found)


@DTYPES
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("channels", "bias"), [(40, True), (40, False), (7, True), (97, True)])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 7, 24), (3, 1000), (31, 3072), (150, 300), (24,)])
def test_linear_act(shape, channels, bias, activation, dtype):
    skip_unless_usable(dtype)
    x = random(*shape, dtype=dtype)
    x[..., 3] *= 50
    weight = random(channels, shape[-1], dtype=dtype, seed=1, scale=0.05)
    args = (x, weight, random(channels, dtype=dtype, seed=2) if bias else None, activation)
    out, pre = cpu.TABLE["linear_act"].fn(*args, False)
    assert pre.numel() == 0
    assert_no_worse("linear_act", args, out)


@DTYPES
@pytest.mark.parametrize("width", [1000, 2048])
def test_a_row_knows_of_no_other_and_of_no_thread(width, dtype, copies):
    skip_unless_usable(torch.float32)
    x, weight = random(150, width, dtype=dtype), random(500, width, dtype=dtype, seed=1, scale=0.05)
    rest = (weight, random(500, dtype=dtype, seed=2), "gelu", False)
    if packed_conv.in_onednn(x):
        pytest.skip("bfloat16 products run in oneDNN here")
    check_threads("linear_act", x, *rest)
    whole = cpu.TABLE["linear_act"].fn(x, *rest)[0]
    assert_no_worse("linear_act", (x, *rest[:-1]), whole)
    for rows in (slice(0, 1), slice(5, 22), slice(40, 43), slice(149, 150)):
        assert torch.equal(cpu.TABLE["linear_act"].fn(x[rows], *rest)[0], whole[rows])


@DTYPES
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("B", "T", "K", "stride"), [(1, 3, 3, 2), (2, 31, 3, 2), (3, 30, 2, 2), (1, 50, 5, 3)])
def test_strided_conv(B, T, K, stride, norm, dtype):
    skip_unless_usable(torch.float32 if norm else dtype)  # the norm is the extension's
    vectors = [random(24, dtype=dtype, seed=s) if norm else None for s in (3, 4)]
    x, weight = random(B, T, 16, dtype=dtype), random(24, 16, K, dtype=dtype, seed=1, scale=0.2)
    args = (x, weight, random(24, dtype=dtype, seed=2), stride, *vectors, 1e-5, "gelu")
    out, _ = cpu.TABLE["strided_conv"].fn(*args, False)
    assert_no_worse("strided_conv", args, out)


@DTYPES
@pytest.mark.parametrize(("K", "dilation"), [(5, 1), (3, 2), (3, 3), (1, 1)])
def test_tdnn(K, dilation, dtype):
    skip_unless_usable(dtype)
    x, weight = random(2, 29, 16, dtype=dtype), random(24, 16 * K, dtype=dtype, seed=1, scale=0.2)
    args = (x, weight, random(24, dtype=dtype, seed=2), K, dilation, "relu")
    assert_no_worse("tdnn", args, cpu.TABLE["tdnn"].fn(*args))


def test_saved_values_are_those_before_norm_and_activation():
    skip_unless_usable(torch.float32)
    x, weight, vector = random(2, 9, 16), random(24, 16, 3, seed=1), random(24, seed=2)
    linear = cpu.TABLE["linear_act"].fn(x, weight[..., 0].contiguous(), vector, "gelu", True)
    torch.testing.assert_close(linear[1], torch.nn.functional.linear(x, weight[..., 0], vector))
    torch.testing.assert_close(linear[0], torch.nn.functional.gelu(linear[1]))
    conv = cpu.TABLE["strided_conv"].fn(x, weight, None, 2, vector, vector, 1e-5, "gelu", True)
    plain = backends.load("reference").TABLE["strided_conv"].fn(x, weight, None, 2, vector, vector, 1e-5, "gelu", True)
    torch.testing.assert_close(conv, plain)


def test_packed_once_until_the_weight_changes():
    skip_unless_usable(torch.float32)
    weight, x = torch.nn.Parameter(random(24, 16)), random(3, 16, seed=1)
    with torch.no_grad(), backends.use_backend("cpu"):
        first = wavlm_fast.ops.linear_act(x, weight)
        assert derived.nbytes([weight]) > 0
        weight.mul_(2)
        torch.testing.assert_close(wavlm_fast.ops.linear_act(x, weight), 2 * first)


def test_a_weight_that_learns():
    skip_unless_usable(torch.float32)
    weight, x = torch.nn.Parameter(random(24, 16)), random(3, 16, seed=1)
    optimizer = torch.optim.SGD([weight], 0.1)
    for _ in range(2):
        with backends.use_backend("cpu"):
            out = wavlm_fast.ops.linear_act(x, weight, activation="gelu")
        plain = references["linear_act"](x, weight, None, "gelu")
        torch.testing.assert_close(out, plain)
        weight.grad = torch.autograd.grad(out.square().sum(), weight)[0]
        torch.testing.assert_close(weight.grad, torch.autograd.grad(plain.square().sum(), weight)[0])
        optimizer.step()


def _step(op, weight, x, bias):
    table = cpu.TABLE[op].fn
    if op == "linear_act":
        return table(x, weight, bias, "none", True)[0]
    if op == "strided_conv":
        return table(x, weight, bias, 2, None, None, 1e-5, "none", True)[0]
    return table(x, weight, bias, 3, 2, "relu")


@DTYPES
@pytest.mark.parametrize("op", ["linear_act", "strided_conv", "tdnn"])
@pytest.mark.parametrize(("T", "C", "channels"), [(5, 1, 1), (9, 24, 7), (40, 300, 97), (700, 33, 50), (12, 16, 48)])
def test_a_weight_is_taken_as_it_is_until_it_is_met_again(op, T, C, channels, dtype):
    skip_unless_usable(dtype)
    x, bias = random(1, T, C, dtype=dtype), random(channels, dtype=dtype, seed=2)
    sizes = {"linear_act": (C,), "strided_conv": (C, 3), "tdnn": (3 * C,)}[op]
    weight = torch.nn.Parameter(random(channels, *sizes, dtype=dtype, seed=1, scale=0.1))
    if packed_conv.in_onednn(x) or not packed_conv.multiplies(x):
        pytest.skip("packed weights have another dtype here")
    with torch.no_grad():
        for _ in range(2):
            weight.add_(0.25)
            as_it_is = _step(op, weight, x, bias)
            assert derived.nbytes([weight]) == 0
        assert torch.equal(_step(op, weight, x, bias), as_it_is)
        assert derived.nbytes([weight]) > 0
        assert torch.equal(_step(op, weight, x, bias), as_it_is)


def test_a_weight_of_another_size_is_refused():
    skip_unless_usable(torch.float32)
    x = random(1, 9, 16)
    sizes = ((24, 1, 15), (23, 1, 16), (24, 2, 16), (24, 16))
    for weight in (*(random(*size) for size in sizes), random(24, 1, 16).bfloat16()):
        with pytest.raises(RuntimeError, match="packed_conv: expected a weight"):
            packed_conv._packed_conv(x, weight, None, 24, 1, 1, 1, False, "none", None, None, None)


def test_gradients_flow_past_a_frozen_weight():
    skip_unless_usable(torch.float32)
    weight, x = random(24, 16), random(3, 16, seed=1).requires_grad_()
    with backends.use_backend("cpu"):
        out = wavlm_fast.ops.linear_act(x, weight, activation="gelu")
    plain = references["linear_act"](x, weight, None, "gelu")
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(plain.sum(), x))


def test_refusals_are_sentences():
    x, weight = random(3, 16), random(24, 16)
    why_not = cpu.TABLE["linear_act"].why_not
    assert "float32 or bfloat16" in why_not(x.half(), weight.half(), None, "none", False)
    assert why_not(x[:0], weight, None, "none", False) == "there is nothing to compute"


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activation_is_as_accurate_as_torchs(activation):
    skip_unless_usable(torch.float32)
    x = torch.linspace(-15, 15, 30011)[:, None]
    one = torch.ones(1, 1)
    out = cpu.TABLE["linear_act"].fn(x, one, None, activation, False)[0]
    expected = references["linear_act"](x.double(), one.double(), None, activation)
    assert ((out - expected).abs() <= 2**-23 * x.abs().clamp(min=1)).all()
    extreme = torch.tensor([[torch.nan], [1e30], [-1e30]])
    out = cpu.TABLE["linear_act"].fn(extreme, one, None, activation, False)[0]
    assert out[0].isnan()
    assert out[1] == 1e30
    assert out[2].abs() < 1e-6
