"""Loud, quiet, shifted and constant inputs: where sums of squares lose what they should keep, op by op."""

import pytest
import torch
from cases import DTYPES, assert_close, kernel, randn, wide
from test_pointwise import compare
from test_products import compare as compare_product
from test_waveform_conv import check, inputs

from wavlm_fast.backends.reference import TABLE as REFERENCE

# Gain and offset: loud, quiet, a DC offset far above the signal, silence, nothing but an offset.
LEVELS = [(1e3, 0.0), (1e-4, 0.0), (1.0, 100.0), (0.0, 0.0), (0.0, 0.5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize(("gain", "offset"), LEVELS)
def test_waveform_conv(gain, offset, norm, dtype):
    args = inputs(1, 600, 16, 10, 5, norm, "gelu", dtype=dtype)
    args[0] = (args[0].float() * gain + offset).to(dtype)
    check(args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gain", "offset"), [(1e3, 0.0), (1e-3, 0.0), (1.0, 200.0), (0.0, 0.5)])
def test_stats_pool(gain, offset, dtype):
    x = (randn(2, 290, 20) * gain + offset).to(dtype)
    compare("stats_pool", [x, torch.tensor([290, 131])], saved=True, tiny=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gain", "offset"), [(1e4, 0.0), (1e-4, 0.0), (1.0, 1000.0), (0.0, 0.0), (0.0, 0.5)])
def test_add_layer_norm(gain, offset, dtype):
    x, residual = ((randn(9, 70, seed=i) * gain + offset).to(dtype) for i in range(2))
    weight, bias = (randn(70, seed=i, dtype=dtype) for i in range(2))
    total = x + residual
    grads = [randn(9, 70, seed=i, dtype=dtype) for i in (2, 3)]
    forward = [total, torch.zeros_like(total), weight, bias, 1e-5, True]  # the norm is of the sum as it was rounded
    backward = [*grads, total, weight, 1e-5, [True] * 3]
    for op, args in (("add_layer_norm", forward), ("add_layer_norm_backward", backward)):
        truth, plain = (REFERENCE[op].fn(*a) for a in (wide(args), args))
        for found, true, theirs in zip(kernel(op)(*args), truth, plain, strict=True):
            assert_close(found, true, theirs, tiny=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [0.0, 1e-3, 100.0])
def test_position_gate(gain, dtype):
    x, weight, bias = randn(2, 60, 3 * 16, dtype=dtype) * gain, randn(8, 16, dtype=dtype), randn(8, dtype=dtype)
    if gain == 100:  # frames of which every sigmoid is at one of its ends
        arguments = (x.unflatten(-1, (3, 16)).float() @ weight.float().t() + bias.float()).unflatten(-1, (2, 4)).sum(-1)
        ends = (arguments.abs() > 30).flatten(2).all(-1)  # [B, T]
        x = torch.stack([utterance[end][:19] for utterance, end in zip(x, ends)])
    compare("position_gate", [x[:, :19], weight, bias, randn(3, dtype=dtype) + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gain", "offset"), [(1e3, 0.0), (1e-3, 0.0), (1.0, 300.0)])
def test_strided_conv_with_a_norm(gain, offset, dtype):
    x, weight = randn(2, 25, 32, dtype=dtype) * gain, randn(48, 32, 3, dtype=dtype, scale=96**-0.5)
    bias, shift = (randn(48, seed=i, dtype=dtype) for i in (0, 2))
    args = [x, weight, bias + offset, 2, randn(48, seed=1, dtype=dtype) + 1, shift, 1e-5, "gelu"]
    compare_product("strided_conv", args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_conv_with_a_norm_of_equal_channels(dtype):
    x, weight = torch.zeros(1, 9, 32, dtype=dtype), randn(48, 32, 3, dtype=dtype)
    vector = randn(48, dtype=dtype)
    args = [x, weight, torch.full_like(vector, 0.5), 2, vector + 1, vector, 1e-5, "gelu"]
    compare_product("strided_conv", args)
