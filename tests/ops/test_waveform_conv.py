"""The contract of waveform_conv."""

import op_contract as contract
import pytest
import torch
import torch.nn.functional as F
from op_contract import randn

from wavlm_fast import ops

NORMS = ("none", "group", "layer")


def operands(batch=2, samples=31, channels=4, kernel=5, dtype=torch.float64):
    made = (
        randn(batch, samples, seed=1),
        randn(channels, 1, kernel, seed=2),
        randn(channels, seed=3),
        1 + randn(channels, seed=4, scale=0.3),
        randn(channels, seed=5),
    )
    return tuple(x.to(dtype) for x in made)


def front(norm, activation="gelu", stride=3):
    def call(waveform, weight, bias, norm_weight=None, norm_bias=None):
        options = {"stride": stride, "norm": norm, "activation": activation}
        return ops.waveform_conv(waveform, weight, bias, norm_weight=norm_weight, norm_bias=norm_bias, **options)

    return call


@pytest.mark.parametrize("norm", NORMS)
def test_is_its_torch_equivalent(norm):
    waveform, weight, bias, gain, shift = operands()
    y = F.conv1d(waveform[:, None], weight, bias, 3)
    if norm == "group":
        y = F.group_norm(y, 4, gain, shift, 1e-3)
    if norm == "layer":
        y = F.layer_norm(y.mT, (4,), gain, shift, 1e-3).mT
    found = ops.waveform_conv(
        waveform, weight, bias, stride=3, norm=norm, norm_weight=gain, norm_bias=shift, eps=1e-3, activation="gelu"
    )
    contract.check_equal(found, F.gelu(y).mT)
    assert found.is_contiguous()


def test_utterances_do_not_meet_in_group_norm():
    waveform, weight, bias, gain, shift = operands()
    both = front("group")(waveform, weight, bias, gain, shift)
    contract.check_equal(both[1:], front("group")(waveform[1:], weight, bias, gain, shift))


@pytest.mark.parametrize("norm", NORMS)
def test_registration(norm):
    args = operands(dtype=torch.float32)
    waveform, weight, bias, gain, shift = contract.learning(*args)
    contract.check_registration("waveform_conv", waveform, weight, bias, 3, norm, gain, shift, 1e-5, "gelu")
    contract.check_registration("waveform_conv", waveform, weight, None, 3, norm, None, None, 1e-5, "none")
    waveform, weight, bias, gain, shift = args
    grad = torch.ones(2, 9, 4)
    tail = (3, norm, gain, shift, 1e-5, "gelu")
    contract.check_registration("waveform_conv_backward", grad, waveform, weight, bias, *tail, [True] * 5)
    wanted = [False, True, False, True, True]
    contract.check_registration("waveform_conv_backward", grad, waveform, weight, bias, *tail, wanted)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients(norm, activation):
    waveform, weight, bias, gain, shift = operands(batch=1, samples=11, channels=2)
    norm_parameters = () if norm == "none" else (gain, shift)
    contract.check_gradients(front(norm, activation), waveform, weight, bias, *norm_parameters)


def test_gradients_without_bias():
    waveform, weight, _, gain, shift = operands(batch=1, samples=11, channels=2)
    contract.check_gradients(front("group"), waveform, weight, None, gain, shift)


@pytest.mark.parametrize("norm", NORMS)
def test_compiles(norm):
    waveform, weight, bias, gain, shift = operands(dtype=torch.float32)
    norm_parameters = () if norm == "none" else (gain, shift)
    contract.check_compiles(front(norm), waveform, weight, bias, *norm_parameters)


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_lowers_the_product(norm):
    inputs = operands(dtype=torch.float32)
    contract.check_autocast(front(norm), inputs, (torch.bfloat16,))
    contract.check_autocast_gradients(front(norm), inputs[: 3 if norm == "none" else 5])


def test_strided_inputs():
    waveform, weight, *rest = operands()
    found = front("group")(contract.strided(waveform), contract.strided(weight), *rest)
    contract.check_equal(found, front("group")(waveform, weight, *rest))


def test_refusals():
    waveform, weight, bias, gain, shift = operands()
    call = front("group")
    with contract.refuses(ValueError, "waveform_conv wants waveform of shape [B, S], got [31]"):
        call(waveform[0], weight, bias, gain, shift)
    with contract.refuses(ValueError, "waveform_conv wants weight of shape [C, 1, K], got [4, 2, 5]"):
        call(waveform, weight.expand(-1, 2, -1), bias, gain, shift)
    for name, vectors in (("bias", (bias[:3], gain, shift)), ("norm_weight", (bias, gain[:3], shift))):
        with contract.refuses(ValueError, f"waveform_conv wants {name} of shape [4], got [3]"):
            call(waveform, weight, *vectors)
    with contract.refuses(ValueError, "waveform_conv wants a norm of ('none', 'group', 'layer'), got 'batch'"):
        front("batch")(waveform, weight, bias)
    with contract.refuses(
        ValueError, "waveform_conv wants an activation of ('none', 'gelu', 'gelu_tanh', 'relu'), got 'tanh'"
    ):
        front("group", "tanh")(waveform, weight, bias)
    with contract.refuses(ValueError, "waveform_conv needs at least 5 samples, got 4"):
        call(waveform[:, :4], weight, bias)
    with contract.refuses(
        TypeError, "waveform_conv wants weight of the dtype of waveform, torch.float64, got torch.float32"
    ):
        call(waveform, weight.float(), bias)
    with contract.refuses(TypeError, "waveform_conv wants waveform of a floating-point dtype, got torch.int16"):
        call(waveform.short(), weight, bias)
