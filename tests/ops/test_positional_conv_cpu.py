"""The C++ positional_conv and its gradient against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from cpu_rule import REFERENCE, TABLE, check, check_threads

import wavlm_fast.ops
from wavlm_fast import backends, derived
from wavlm_fast.backends import cpu
from wavlm_fast.parity.rule import poisoned

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])

# B, T, C, K, groups. A block of frames is the least power of two from 16 that is no less than K.
CASES = [
    (1, 1, 8, 1, 1),
    (2, 16, 32, 16, 2),
    (3, 17, 32, 15, 4),
    (1, 33, 40, 17, 2),
    (2, 37, 24, 8, 24),
    (1, 49, 64, 128, 16),
    (1, 100, 192, 33, 3),
    (1, 129, 96, 65, 2),
    (1, 130, 208, 64, 2),
    (9, 40, 35, 31, 5),
    (1, 300, 96, 128, 2),
    (1, 9, 24, 300, 2),
    (2, 255, 112, 128, 1),
    (1, 2100, 48, 128, 1),
]


def operands(B, T, C, K, groups, dtype, seed=0):
    """Frames with two channels at the magnitude that trained checkpoints show, weight, bias, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(2, B, T, C, generator=generator)
    x[..., 3] += 50
    x[..., C // 2 + 1] -= 50
    weight = torch.randn(C, C // groups, K, generator=generator) * 2 * (C // groups * K) ** -0.5
    bias = torch.randn(C, generator=generator) * 0.5
    return tuple(t.to(dtype) for t in (x, weight, bias, grad))


def convolve(x, weight, bias, groups, activation="gelu", residual=True, save=False):
    return TABLE["positional_conv"].fn(x, weight, bias, groups, activation, residual, save)


def gradients(grad, x, weight, bias, pre, groups, activation="gelu", residual=True, wanted=(True, True, True)):
    return TABLE["positional_conv_backward"].fn(
        grad, x, weight, bias, pre, groups, activation, residual, list(wanted)
    )


def check_both(x, weight, bias, grad, groups, activation, residual):
    """The op and its gradient, no worse than the reference's."""
    args = (x, weight, bias, groups, activation, residual, True)
    with poisoned():
        check("positional_conv", *args)
    pre = REFERENCE["positional_conv"].fn(*args)[1]
    wanted = [True, True, bias is not None]
    with poisoned():
        check("positional_conv_backward", grad, x, weight, bias, pre, groups, activation, residual, wanted)


@DTYPES
@pytest.mark.parametrize(("B", "T", "C", "K", "groups"), CASES)
def test_against_float64(B, T, C, K, groups, dtype):
    check_both(*operands(B, T, C, K, groups, dtype), groups, "gelu", True)


@DTYPES
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("biased", "residual"), [(True, False), (False, True)])
def test_options(activation, biased, residual, dtype):
    x, weight, bias, grad = operands(2, 70, 48, 32, 3, dtype)
    check_both(x, weight, bias if biased else None, grad, 3, activation, residual)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_are_not_wanted_are_empty(wanted):
    x, weight, bias, grad = operands(2, 70, 48, 32, 3, torch.float32)
    pre = convolve(x, weight, bias, 3, save=True)[1]
    every = gradients(grad, x, weight, bias, pre, 3)
    for got, full, asked in zip(gradients(grad, x, weight, bias, pre, 3, wanted=wanted), every, wanted, strict=True):
        assert torch.equal(got, full if asked else full.new_empty(0))


def test_kept_spectra_are_those_made_on_the_way():
    x, weight, bias, _ = operands(2, 70, 48, 32, 3, torch.float32)
    assert torch.equal(convolve(x, weight, bias, 3)[0], convolve(x, weight, bias, 3, save=True)[0])


@DTYPES
def test_strided_operands(dtype):
    x, weight, bias, grad = operands(2, 70, 48, 32, 3, dtype)
    pre = convolve(x, weight, bias, 3, save=True)[1]
    apart = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, weight, bias, grad, pre)]
    assert not any(t.is_contiguous() for t in apart)
    assert torch.equal(convolve(*apart[:3], 3)[0], convolve(x, weight, bias, 3)[0])
    found, expected = gradients(apart[3], *apart[:3], apart[4], 3), gradients(grad, x, weight, bias, pre, 3)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@DTYPES
@pytest.mark.parametrize("C", [96, 64])
def test_an_utterance_alone_gives_the_same_bits(C, dtype):
    x, weight, bias, _ = operands(13, 150, C, 128, 2, dtype)
    together = convolve(x, weight, bias, 2)[0]
    for b in (0, 5, 12):
        assert torch.equal(convolve(x[b : b + 1], weight, bias, 2)[0][0], together[b])


@DTYPES
def test_threads_do_not_change_a_bit(dtype):
    x, weight, bias, grad = operands(5, 400, 96, 128, 2, dtype)
    check_threads("positional_conv", x, weight, bias, 2, "gelu", True, False)
    check_threads("positional_conv", x, weight, bias, 2, "gelu", True, True)
    pre = convolve(x, weight, bias, 2, save=True)[1]
    check_threads("positional_conv_backward", grad, x, weight, bias, pre, 2, "gelu", True, [True] * 3)


@DTYPES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_the_frames_that_meet_it(value, dtype):
    """Not all frames of the blocks whose windows hold it; and the others are none the worse for it."""
    x, weight, bias, grad = operands(2, 700, 96, 128, 2, dtype)
    before = convolve(x, weight, bias, 2)[0]
    x[1, 300, 5] = value
    out = convolve(x, weight, bias, 2)[0]
    reached, plain = ~out.isfinite(), REFERENCE["positional_conv"].fn(x, weight, bias, 2, "gelu", True, False)[0]
    assert torch.equal(reached, ~plain.isfinite())
    assert reached[1, :, :48].all(-1).nonzero().flatten().tolist() == list(range(300 - 63, 300 + 65))
    near = {"rtol": 1e-4, "atol": 0.3 if dtype == torch.bfloat16 else 1e-3}
    torch.testing.assert_close(out[~reached], before[~reached], **near)
    pre = x.new_empty(0)
    args = (grad, x, weight, bias, pre, 2, "none", True, [True] * 3)
    found, plain = (table["positional_conv_backward"].fn(*args) for table in (TABLE, REFERENCE))
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_spectra_are_made_once_until_the_weight_changes():
    x, weight, _, _ = operands(1, 20, 48, 16, 3, torch.float32)
    weight = torch.nn.Parameter(weight)
    with torch.no_grad(), backends.use_backend("cpu"):
        options = {"groups": 3, "activation": "none", "residual": False}
        first = wavlm_fast.ops.positional_conv(x, weight, **options)
        held = derived.nbytes([weight])
        assert held > 0
        weight.mul_(2)
        torch.testing.assert_close(wavlm_fast.ops.positional_conv(x, weight, **options), 2 * first)
        assert derived.nbytes([weight]) == held


def test_a_weight_that_learns_keeps_no_spectra():
    x, weight, bias, grad = operands(2, 70, 48, 32, 3, torch.float32)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    with backends.use_backend("cpu"):
        out = wavlm_fast.ops.positional_conv(*tensors, groups=3)
    found = torch.autograd.grad(out, tensors, grad)
    assert derived.nbytes([weight]) == 0
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    plain = wavlm_fast.ops.references["positional_conv"](*doubles, 3, "gelu", True)
    for got, truth in zip(found, torch.autograd.grad(plain, doubles, grad.double()), strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())


def test_refusals_are_sentences():
    why_not = TABLE["positional_conv"].why_not
    x, weight, bias, _ = operands(1, 5, 8, 4, 2, torch.float32)
    assert "float32 or bfloat16" in why_not(x.double(), weight.double(), bias, 2, "gelu", True, False)
    assert why_not(x[:0], weight, bias, 2, "gelu", True, False) == "there is nothing to compute"
    many = torch.empty(1, 5, 1024), torch.empty(1024, 1024, 128)
    assert "spectra" in why_not(*many, None, 1, "gelu", True, False)
    assert why_not(x, weight, bias, 2, "gelu", True, False) is None
