"""The contract of linear_act."""

import op_contract as contract
import pytest
import torch
import torch.nn.functional as F
from op_contract import randn

from wavlm_fast import ops

ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def operands(*shape, outer=6, dtype=torch.float64, bias=True):
    made = (randn(*shape, seed=1), randn(outer, shape[-1], seed=2), randn(outer, seed=3) if bias else None)
    return tuple(None if x is None else x.to(dtype) for x in made)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_is_its_torch_equivalent(activation, bias):
    x, weight, bias = operands(2, 5, 7, bias=bias)
    wanted = ACTIVATIONS[activation](F.linear(x, weight, bias))
    contract.check_equal(ops.linear_act(x, weight, bias, activation), wanted)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 4, 7)])
def test_any_rank(shape):
    assert ops.linear_act(*operands(*shape), "gelu").shape == (*shape[:-1], 6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_registration(activation):
    args = contract.learning(*operands(2, 3, 5, dtype=torch.float32))
    contract.check_registration("linear_act", *args, activation, activation != "none")
    x, weight, bias = operands(2, 3, 5, dtype=torch.float32)
    pre = F.linear(x, weight, bias) if activation != "none" else x.new_empty(0)
    grad = torch.ones(2, 3, 6)
    contract.check_registration("linear_act_backward", grad, x, weight, bias, pre, activation, [True] * 3)
    contract.check_registration("linear_act_backward", grad, x, weight, None, pre, activation, [False, True, False])


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(activation, bias):
    contract.check_gradients(lambda x, w, b: ops.linear_act(x, w, b, activation), *operands(2, 3, 5, bias=bias))


def test_relu_gradients():
    x, weight, bias = contract.learning(*operands(4, 5))
    wanted = torch.autograd.grad(F.relu(F.linear(x, weight, bias)).square().sum(), (x, weight, bias))
    found = torch.autograd.grad(ops.linear_act(x, weight, bias, "relu").square().sum(), (x, weight, bias))
    for a, b in zip(found, wanted, strict=True):
        contract.check_equal(a, b)


def test_keeps_nothing_for_gradients_that_nobody_wants():
    _, pre = torch.ops.wavlm_fast.linear_act(*operands(2, 3, 5), "gelu", False)
    assert pre.numel() == 0


def test_compiles():
    contract.check_compiles(lambda *a: ops.linear_act(*a, "gelu"), *operands(2, 3, 8, dtype=torch.float32))


def test_autocast_lowers():
    inputs = operands(2, 3, 8, dtype=torch.float32)
    contract.check_autocast(ops.linear_act, inputs, (torch.bfloat16,))
    contract.check_autocast_gradients(ops.linear_act, inputs)


def test_strided_inputs():
    x, weight, bias = operands(2, 5, 7)
    found = ops.linear_act(contract.strided(x), contract.strided(weight), bias, "gelu")
    contract.check_equal(found, ops.linear_act(x, weight, bias, "gelu"))


def test_refusals():
    x, weight, bias = operands(2, 3, 5)
    with contract.refuses(ValueError, "linear_act wants x of shape [..., 5] for this weight, got [2, 3, 4]"):
        ops.linear_act(x[..., :4], weight, bias)
    with contract.refuses(ValueError, "linear_act wants weight of shape [C', C], got [5]"):
        ops.linear_act(x, weight[0], bias)
    with contract.refuses(ValueError, "linear_act wants bias of shape [6], got [5]"):
        ops.linear_act(x, weight, bias[:5])
    with contract.refuses(TypeError, "linear_act wants weight of the dtype of x, torch.float64, got torch.float32"):
        ops.linear_act(x, weight.float(), bias)
    with contract.refuses(TypeError, "linear_act wants x of a floating-point dtype, got torch.int64"):
        ops.linear_act(x.long(), weight, bias)
    with contract.refuses(
        ValueError, "linear_act wants an activation of ('none', 'gelu', 'gelu_tanh', 'relu'), got 'silu'"
    ):
        ops.linear_act(x, weight, bias, "silu")
