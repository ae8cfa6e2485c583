"""The contract of positional_conv."""

from decimal import Decimal

import numpy as np
import op_contract as contract
import pytest
import torch
import torch.nn.functional as F
from op_contract import randn

from wavlm_fast import ops


def operands(batch=2, frames=5, channels=4, kernel=4, groups=2, dtype=torch.float64):
    made = (
        randn(batch, frames, channels, seed=1),
        randn(channels, channels // groups, kernel, seed=2),
        randn(channels, seed=3),
    )
    return tuple(x.to(dtype) for x in made)


def front(groups=2, **options):
    return lambda x, weight, bias=None: ops.positional_conv(x, weight, bias, groups=groups, **options)


@pytest.mark.parametrize("kernel", [1, 3, 4, 16])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_is_its_torch_equivalent(kernel, residual, groups):
    x, weight, bias = operands(kernel=kernel, groups=groups)
    y = F.gelu(F.conv1d(x.mT, weight, bias, padding=kernel // 2, groups=groups)[..., :5]).mT
    contract.check_equal(front(groups, residual=residual)(x, weight, bias), x + y if residual else y)


@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_registration(activation):
    args = operands(dtype=torch.float32)
    save = activation != "none"
    contract.check_registration("positional_conv", *contract.learning(*args), 2, activation, True, save)
    contract.check_registration("positional_conv", *args[:2], None, 2, activation, False, False)
    pre = torch.ones_like(args[0]) if save else torch.empty(0)
    grad = torch.ones(2, 5, 4)
    for wanted in ([True] * 3, [False, True, True]):
        contract.check_registration("positional_conv_backward", grad, *args, pre, 2, activation, True, wanted)


@pytest.mark.parametrize("options", [{}, {"residual": False}, {"activation": "none"}, {"activation": "gelu_tanh"}])
@pytest.mark.parametrize("kernel", [3, 4])
def test_gradients(options, kernel):
    contract.check_gradients(front(**options), *operands(batch=1, kernel=kernel))


def test_gradients_without_bias():
    contract.check_gradients(front(), *operands(batch=1)[:2])


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
    with contract.refuses(ValueError, "positional_conv wants x of shape [B, T, C], got [5, 4]"):
        front()(x[0], weight, bias)
    with contract.refuses(ValueError, "positional_conv wants groups that divide the 4 channels, got 3"):
        front(3)(x, weight, bias)
    with contract.refuses(ValueError, "positional_conv wants groups that divide the 4 channels, got 0"):
        front(0)(x, weight, bias)
    with contract.refuses(ValueError, "positional_conv wants weight of shape [4, 4, K], got [4, 2, 4]"):
        front(1)(x, weight, bias)
    with contract.refuses(ValueError, "positional_conv wants bias of shape [4], got [3]"):
        front()(x, weight, bias[:3])
    with contract.refuses(ValueError, "positional_conv needs at least 1 frames, got 0"):
        front()(x[:, :0], weight, bias)
    with contract.refuses(
        TypeError, "positional_conv wants weight of the dtype of x, torch.float64, got torch.float32"
    ):
        front()(x, weight.float(), bias)
    with contract.refuses(TypeError, "positional_conv wants x of a floating-point dtype, got torch.int64"):
        front()(x.long(), weight, bias)
    with contract.refuses(
        ValueError, "positional_conv wants an activation of ('none', 'gelu', 'gelu_tanh', 'relu'), got 'mish'"
    ):
        front(activation="mish")(x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 2])
def test_weight_norm_in_the_order_of_the_kernel(dtype, dim):
    """What a GPU gets in each forward: as exact as torch's, and nothing to copy."""
    from wavlm_fast.modules.positional_conv import _normed_by_taps

    v = torch.randn(24, 6, 15).to(dtype)
    g = torch.rand([size if axis == dim else 1 for axis, size in enumerate(v.shape)]).to(dtype)
    found, theirs = _normed_by_taps(g, v, dim), torch._weight_norm(v, g, dim)
    assert found.dtype == dtype and found.shape == v.shape
    assert found.permute(2, 1, 0).is_contiguous()
    # In more digits than float64 has: torch's own form in float64 is no truth about itself.
    found, theirs, v, g = (np.vectorize(Decimal, otypes=[object])(x.double().numpy()) for x in (found, theirs, v, g))
    axes = tuple(axis for axis in range(3) if axis != dim)
    truth = v * (g / np.sqrt((v * v).sum(axes, keepdims=True)))
    tiny = Decimal(torch.finfo(dtype).eps) * abs(truth).max()
    assert abs(found - truth).max() <= 2 * abs(theirs - truth).max() + tiny
