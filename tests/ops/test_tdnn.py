"""The contract of tdnn."""

import op_contract as contract
import pytest
import torch
import torch.nn.functional as F
from op_contract import randn

from wavlm_fast import ops


def operands(batch=2, frames=9, inner=3, outer=4, kernel=3, dtype=torch.float64):
    made = (randn(batch, frames, inner, seed=1), randn(outer, kernel * inner, seed=2), randn(outer, seed=3))
    return tuple(x.to(dtype) for x in made)


def front(kernel=3, dilation=2, activation="relu"):
    options = {"kernel_size": kernel, "dilation": dilation, "activation": activation}
    return lambda x, weight, bias=None: ops.tdnn(x, weight, bias, **options)


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_is_its_torch_equivalent(kernel, dilation, activation):
    x, weight, bias = operands(kernel=kernel)
    y = F.conv1d(x.mT, weight.view(4, kernel, 3).mT, bias, dilation=dilation).mT
    contract.check_equal(front(kernel, dilation, activation)(x, weight, bias), y.relu() if activation == "relu" else y)


def test_is_the_layer_of_transformers():
    from transformers import WavLMConfig
    from transformers.models.wavlm.modeling_wavlm import TDNNLayer

    layer = TDNNLayer(WavLMConfig(tdnn_dim=[6, 4], tdnn_kernel=[1, 3], tdnn_dilation=[1, 2]), 1).double()
    x = randn(2, 9, 6)
    contract.check_equal(ops.tdnn(x, layer.kernel.weight, layer.kernel.bias, kernel_size=3, dilation=2), layer(x))


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_registration(activation):
    args = operands(dtype=torch.float32)
    contract.check_registration("tdnn", *contract.learning(*args), 3, 2, activation)
    contract.check_registration("tdnn", *args[:2], None, 3, 2, activation)
    grad = out = torch.ones(2, 5, 4)
    contract.check_registration("tdnn_backward", grad, *args, out, 3, 2, activation, [True] * 3)
    contract.check_registration("tdnn_backward", grad, *args, out, 3, 2, activation, [True, False, False])


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("count", [2, 3])
def test_gradients(activation, count):
    contract.check_gradients(front(activation=activation), *operands(batch=1, frames=6)[:count])


def test_compiles():
    contract.check_compiles(front(), *operands(dtype=torch.float32))


def test_autocast_lowers():
    inputs = operands(dtype=torch.float32)
    contract.check_autocast(front(), inputs, (torch.bfloat16,))
    contract.check_autocast_gradients(front(), inputs)


def test_strided_inputs():
    x, weight, bias = operands()
    contract.check_equal(front()(contract.strided(x), contract.strided(weight), bias), front()(x, weight, bias))


def test_refusals():
    x, weight, bias = operands()
    with contract.refuses(ValueError, "tdnn wants x of shape [B, T, C], got [9, 3]"):
        front()(x[0], weight, bias)
    with contract.refuses(ValueError, "tdnn wants weight of shape [C', 15], got [4, 9]"):
        front(5)(x, weight, bias)
    with contract.refuses(ValueError, "tdnn wants bias of shape [4], got [3]"):
        front()(x, weight, bias[:3])
    with contract.refuses(ValueError, "tdnn wants an activation of ('none', 'relu'), got 'gelu'"):
        front(activation="gelu")(x, weight, bias)
    with contract.refuses(ValueError, "tdnn needs at least 5 frames, got 4"):
        front()(x[:, :4], weight, bias)
    with contract.refuses(TypeError, "tdnn wants weight of the dtype of x, torch.float64, got torch.float32"):
        front()(x, weight.float(), bias)
    with contract.refuses(TypeError, "tdnn wants x of a floating-point dtype, got torch.int64"):
        front()(x.long(), weight, bias)
