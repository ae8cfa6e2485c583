"""The C++ waveform_conv against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from wavlm_fast.backends import cpu
from wavlm_fast.backends.reference import TABLE as REFERENCE_TABLE
from wavlm_fast.ops import references

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))

REFERENCE = references["waveform_conv"]
KERNEL = cpu.TABLE["waveform_conv"].fn


def assert_no_worse(args, out):
    plain = REFERENCE(*args)
    expected = REFERENCE(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    assert out.shape == expected.shape
    assert out.dtype == args[0].dtype
    assert out.is_contiguous()
    tiny = torch.finfo(out.dtype).eps * expected.abs().max()
    error, allowed = (out - expected).abs().max(), 2 * (plain - expected).abs().max() + tiny
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def arguments(B, S, C=40, K=10, stride=5, norm="group", bias=True, dtype=torch.float32, offset=0.0, activation="gelu"):
    generator = torch.Generator().manual_seed(S)
    waveform = torch.randn(B, S, generator=generator) * torch.logspace(-2, 0, B)[:, None] + offset
    weight = torch.randn(C, 1, K, generator=generator)
    vectors = [torch.randn(C, generator=generator).to(dtype) for _ in range(3)]
    norms = vectors[1:] if norm != "none" else [None, None]
    first = vectors[0] if bias else None
    return waveform.to(dtype), weight.to(dtype), first, stride, norm, *norms, 1e-5, activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["none", "group", "layer"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("B", "S"), [(1, 10), (2, 14), (3, 400), (1, 3201)])
def test_against_float64(B, S, bias, norm, dtype):
    args = arguments(B, S, norm=norm, bias=bias, dtype=dtype)
    assert_no_worse(args, KERNEL(*args))


@pytest.mark.parametrize(("C", "K", "stride"), [(16, 3, 1), (97, 7, 3), (1, 5, 5), (48, 16, 20)])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "relu"])
def test_other_shapes(C, K, stride, activation):
    args = arguments(2, 500, C=C, K=K, stride=stride, activation=activation)
    assert_no_worse(args, KERNEL(*args))


@pytest.mark.parametrize("S", [1000, 65000])
def test_a_constant_offset_does_not_cancel(S):
    args = arguments(2, S, offset=3.0)
    assert_no_worse(args, KERNEL(*args))


def test_silence():
    waveform, *rest = arguments(1, 400)
    args = (torch.zeros_like(waveform), *rest)
    assert_no_worse(args, KERNEL(*args))


def test_threads_do_not_change_a_bit():
    args = arguments(2, 50000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = KERNEL(*args)
        torch.set_num_threads(2)
        assert torch.equal(alone, KERNEL(*args))
    finally:
        torch.set_num_threads(threads)


BACKWARD, BACKWARD_REFERENCE = (table["waveform_conv_backward"].fn for table in (cpu.TABLE, REFERENCE_TABLE))


def assert_gradients_no_worse(args, wanted=None):
    """Each gradient by the rule, with some roundings of its largest value: thousands of frames are summed."""
    wanted = [args[i] is not None for i in (0, 1, 2, 5, 6)] if wanted is None else wanted
    grad = torch.randn(REFERENCE(*args).shape, generator=torch.Generator().manual_seed(7)).to(args[0].dtype)
    assert cpu.TABLE["waveform_conv_backward"].why_not(grad, *args, wanted) is None
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    found, plain = (kernel(grad, *args, wanted) for kernel in (BACKWARD, BACKWARD_REFERENCE))
    truth = BACKWARD_REFERENCE(grad.double(), *wide, wanted)
    for name, f, p, t in zip(("waveform", "weight", "bias", "gain", "shift"), found, plain, truth, strict=True):
        assert f.shape == t.shape, name
        assert f.dtype == p.dtype, name
        if t.numel():
            # The norm takes the bias out: what is left of its gradient is rounding.
            size = truth[1].abs().max() if name == "bias" else t.abs().max()
            error, allowed = (f - t).abs().max(), 2 * (p - t).abs().max() + 8 * torch.finfo(f.dtype).eps * size
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["none", "group", "layer"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("B", "S"), [(1, 15), (2, 44), (3, 400), (1, 3201)])
def test_gradients_against_float64(B, S, bias, norm, dtype):
    assert_gradients_no_worse(arguments(B, S, norm=norm, bias=bias, dtype=dtype))


@pytest.mark.parametrize(("C", "K", "stride"), [(16, 3, 1), (97, 7, 3), (1, 5, 5), (48, 16, 20)])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "relu"])
def test_gradients_of_other_shapes(C, K, stride, activation):
    assert_gradients_no_worse(arguments(2, 500, C=C, K=K, stride=stride, activation=activation))


@pytest.mark.parametrize("wanted", [[False, True, False, True, True], [True, False, False, False, False]])
def test_gradients_that_are_not_wanted(wanted):
    for norm in ("group", "layer"):
        assert_gradients_no_worse(arguments(2, 400, norm=norm), wanted)


def test_gradients_with_an_offset_and_in_silence():
    assert_gradients_no_worse(arguments(2, 65000, offset=3.0))
    waveform, *rest = arguments(1, 400)
    found = BACKWARD(torch.ones(1, 79, 40), torch.zeros_like(waveform), *rest, [True] * 5)
    assert all(gradient.isfinite().all() for gradient in found)


def test_gradients_of_one_frame():
    waveform, *rest = arguments(2, 10)
    dwaveform, dweight, *_ = BACKWARD(torch.ones(2, 1, 40), waveform, *rest, [True] * 5)
    assert not dwaveform.any() and not dweight.any()


def test_threads_do_not_change_a_bit_of_the_gradients():
    args = arguments(2, 50000)
    grad, threads = torch.randn(REFERENCE(*args).shape), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = BACKWARD(grad, *args, [True] * 5)
        torch.set_num_threads(2)
        assert all(map(torch.equal, alone, BACKWARD(grad, *args, [True] * 5)))
    finally:
        torch.set_num_threads(threads)
