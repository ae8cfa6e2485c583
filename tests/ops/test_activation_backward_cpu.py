"""The derivatives of the activations in C++ against float64."""

from __future__ import annotations

import pytest
import torch
from cpu_rule import assert_no_worse
from op_contract import randn, strided

from wavlm_fast.backends import cpu
from wavlm_fast.ops._activation import activate_backward

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))

BACKWARD = torch.ops.wavlm_fast_cpu.activation_backward.default
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@every_activation
@pytest.mark.parametrize("sign", [1, -1])
def test_absolute_error(activation, sign):
    x = sign * torch.cat((torch.linspace(0, 16, 200_001), torch.logspace(-38, 30, 1001)))
    found = BACKWARD(torch.ones_like(x), x, activation)
    wanted = activate_backward(activation, torch.ones_like(x).double(), x.double())
    assert (found - wanted).abs().max() < 2e-7


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 0, 5), (5, 1000), (33, 1031)])
def test_no_worse_than_torch(shape, dtype, activation):
    grad, x = randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, scale=3.0, dtype=dtype)
    truth = activate_backward(activation, grad.double(), x.double())
    ours, theirs = BACKWARD(grad, x, activation), activate_backward(activation, grad, x)
    assert_no_worse("activation_backward", (ours,), (theirs,), (truth,))


@every_activation
def test_strided(activation):
    grad, x = randn(4, 9, seed=1).float(), randn(4, 9, seed=2).float()
    assert torch.equal(BACKWARD(strided(grad), x.t().contiguous().t(), activation), BACKWARD(grad, x, activation))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_nan_and_infinity(activation):
    x = torch.tensor([float("nan"), float("inf"), -float("inf")])
    found, theirs = BACKWARD(torch.ones(3), x, activation), activate_backward(activation, torch.ones(3), x)
    assert torch.equal(found.isfinite(), theirs.isfinite())
    assert found[0].isnan()
    large = torch.tensor([3e38, -3e38])
    torch.testing.assert_close(BACKWARD(torch.ones(2), large, activation), torch.tensor([1.0, 0.0]))


def test_refusals():
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="expected float32 or bfloat16, got Double"):
        BACKWARD(x.double(), x.double(), "gelu")
    with pytest.raises(RuntimeError, match=r"expected grad of Float \[3\], got Float \[2\]"):
        BACKWARD(x[:2], x, "gelu")
    with pytest.raises(RuntimeError, match="unknown activation swish"):
        BACKWARD(x, x, "swish")
