"""The contract of strided_conv."""

import op_contract as contract
import pytest
import torch
import torch.nn.functional as F
from op_contract import randn

from wavlm_fast import ops


def operands(batch=2, frames=9, inner=3, outer=4, kernel=3, dtype=torch.float64):
    made = (
        randn(batch, frames, inner, seed=1),
        randn(outer, inner, kernel, seed=2),
        randn(outer, seed=3),
        1 + randn(outer, seed=4, scale=0.3),
        randn(outer, seed=5),
    )
    return tuple(x.to(dtype) for x in made)


def front(activation="gelu", stride=2):
    def call(x, weight, bias=None, norm_weight=None, norm_bias=None):
        options = {"stride": stride, "norm_weight": norm_weight, "norm_bias": norm_bias, "activation": activation}
        return ops.strided_conv(x, weight, bias, **options)

    return call


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (1, 1), (4, 3)])
def test_is_its_torch_equivalent(normed, kernel, stride):
    x, weight, bias, gain, shift = operands(kernel=kernel)
    y = F.conv1d(x.mT, weight, bias, stride).mT
    if normed:
        y = F.layer_norm(y, (4,), gain, shift)
    found = front(stride=stride)(x, weight, bias, *((gain, shift) if normed else ()))
    contract.check_equal(found, F.gelu(y))
    assert found.is_contiguous()


@pytest.mark.parametrize("save", [True, False])
def test_registration(save):
    args = operands(dtype=torch.float32)
    x, weight, bias, gain, shift = contract.learning(*args) if save else args
    contract.check_registration("strided_conv", x, weight, bias, 2, gain, shift, 1e-5, "gelu", save)
    contract.check_registration("strided_conv", x, weight, None, 2, None, None, 1e-5, "gelu", save)
    x, weight, bias, gain, shift = args
    grad = pre = torch.ones(2, 4, 4)
    args = (grad, x, weight, bias, pre, 2, gain, shift, 1e-5, "gelu")
    contract.check_registration("strided_conv_backward", *args, [True] * 5)
    contract.check_registration("strided_conv_backward", *args, [True, False, False, True, False])


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_gradients(activation, count):
    contract.check_gradients(front(activation), *operands(frames=5)[:count])


def test_frames_that_no_window_reaches_have_no_gradient():
    x, weight, bias, *_ = operands(frames=8)
    (x,) = contract.learning(x)
    front()(x, weight, bias).sum().backward()
    assert torch.equal(x.grad[:, 7], torch.zeros(2, 3, dtype=torch.float64))


def test_compiles():
    contract.check_compiles(front(), *operands(dtype=torch.float32))


def test_autocast_lowers_the_product():
    inputs = operands(dtype=torch.float32)
    contract.check_autocast(front(), inputs, (torch.bfloat16,))
    contract.check_autocast_gradients(front(), inputs)


def test_strided_inputs():
    x, weight, *rest = operands()
    contract.check_equal(front()(contract.strided(x), contract.strided(weight), *rest), front()(x, weight, *rest))


def test_refusals():
    x, weight, bias, gain, shift = operands()
    with contract.refuses(ValueError, "strided_conv wants x of shape [B, T, 3], got [2, 9, 2]"):
        front()(x[..., :2], weight, bias)
    with contract.refuses(ValueError, "strided_conv wants weight of shape [C', C, K], got [4, 3]"):
        front()(x, weight[..., 0], bias)
    with contract.refuses(ValueError, "strided_conv wants norm_bias of shape [4], got [3]"):
        front()(x, weight, bias, gain, shift[:3])
    with contract.refuses(ValueError, "strided_conv needs at least 3 frames, got 2"):
        front()(x[:, :2], weight, bias)
    with contract.refuses(TypeError, "strided_conv wants bias of the dtype of x, torch.float64, got torch.float32"):
        front()(x, weight, bias.float())
    with contract.refuses(TypeError, "strided_conv wants x of a floating-point dtype, got torch.int64"):
        front()(x.long(), weight, bias)
    with contract.refuses(
        ValueError, "strided_conv wants an activation of ('none', 'gelu', 'gelu_tanh', 'relu'), got 'elu'"
    ):
        front("elu")(x, weight, bias)
