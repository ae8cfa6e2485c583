"""The contract of add_layer_norm."""

import op_contract as contract
import pytest
import torch
import torch.nn.functional as F
from op_contract import randn
from torch.utils._python_dispatch import TorchDispatchMode

from wavlm_fast import ops


def operands(*shape, dtype=torch.float64):
    channels = shape[-1]
    parameters = (1 + randn(channels, seed=3, scale=0.3), randn(channels, seed=4))
    return tuple(x.to(dtype) for x in (randn(*shape, seed=1), randn(*shape, seed=2), *parameters))


def test_is_its_torch_equivalent():
    x, residual, weight, bias = operands(2, 5, 7)
    total, normed = ops.add_layer_norm(x, residual, weight, bias, 1e-3)
    contract.check_equal(total, x + residual)
    contract.check_equal(normed, F.layer_norm(x + residual, (7,), weight, bias, 1e-3))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 4, 5)])
def test_any_rank(shape):
    x, residual, weight, bias = operands(*shape)
    assert all(o.shape == shape for o in ops.add_layer_norm(x, residual, weight, bias))


def test_sum_is_empty_where_it_is_not_wanted():
    inputs = operands(2, 5, 7)
    _, wanted = ops.add_layer_norm(*inputs)
    for mine in (inputs, contract.learning(*inputs)):
        total, normed = ops.add_layer_norm(*mine, keep_sum=False)
        assert total.shape == (0,)
        contract.check_equal(normed.detach(), wanted)


def test_registration():
    args = operands(2, 3, 5, dtype=torch.float32)
    contract.check_registration("add_layer_norm", *contract.learning(*args), 1e-5, True)
    contract.check_registration("add_layer_norm", *args, 1e-5, False)
    x, _, weight, _ = operands(2, 3, 5, dtype=torch.float32)
    contract.check_registration("add_layer_norm_backward", x, x, x, weight, 1e-5, [True] * 3)


def test_gradients():
    contract.check_gradients(ops.add_layer_norm, *operands(2, 3, 5))


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_one_output(used):
    contract.check_gradients(lambda *args: ops.add_layer_norm(*args, keep_sum=used == 0)[used], *operands(2, 3, 5))


def test_a_gradient_that_does_not_flow_is_not_written_as_zeros():
    x, residual, weight, bias = contract.learning(*operands(2, 3, 5))
    normed = ops.add_layer_norm(x, residual, weight, bias, keep_sum=False)[1]
    called = []

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Called():
        normed.backward(torch.ones(2, 3, 5, dtype=normed.dtype))
    assert "wavlm_fast::add_layer_norm_backward" in called
    assert not {"aten::zeros", "aten::fill_.Scalar", "aten::zero_"}.intersection(called), called


def test_what_a_gradient_must_be_is_said():
    x, _, weight, _ = operands(2, 3, 5)
    with pytest.raises(ValueError, match=r"grad_sum"):
        torch.ops.wavlm_fast.add_layer_norm_backward(x[:1], x, x, weight, 1e-5, [True] * 3)


def test_compiles():
    contract.check_compiles(ops.add_layer_norm, *operands(2, 3, 8, dtype=torch.float32))
    normed = lambda *args: ops.add_layer_norm(*args, keep_sum=False)[1]  # noqa: E731
    contract.check_compiles(normed, *operands(2, 3, 8, dtype=torch.float32))


def test_autocast_computes_in_float32():
    inputs = operands(2, 3, 8, dtype=torch.float32)
    contract.check_autocast(ops.add_layer_norm, inputs, (torch.float32, torch.float32))
    mixed = (inputs[0].bfloat16(), *inputs[1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.add_layer_norm(*mixed)[0].dtype == torch.float32
    contract.check_autocast_gradients(ops.add_layer_norm, mixed)
    with torch.autocast("cpu", torch.bfloat16):
        normed = ops.add_layer_norm(*mixed, keep_sum=False)[1]
    torch.testing.assert_close(normed, ops.add_layer_norm(mixed[0].float(), *mixed[1:])[1])


def test_strided_inputs():
    x, residual, weight, bias = operands(2, 5, 7)
    found = ops.add_layer_norm(contract.strided(x), residual.transpose(0, 1).contiguous().transpose(0, 1), weight, bias)
    for a, b in zip(found, ops.add_layer_norm(x, residual, weight, bias), strict=True):
        contract.check_equal(a, b)


def test_refusals():
    x, residual, weight, bias = operands(2, 3, 5)
    with contract.refuses(ValueError, "add_layer_norm wants residual of shape [2, 3, 5], got [2, 3, 4]"):
        ops.add_layer_norm(x, residual[..., :4], weight, bias)
    with contract.refuses(ValueError, "add_layer_norm wants weight of shape [5], got [4]"):
        ops.add_layer_norm(x, residual, weight[:4], bias)
    with contract.refuses(ValueError, "add_layer_norm wants bias of shape [5], got [4]"):
        ops.add_layer_norm(x, residual, weight, bias[:4])
    with contract.refuses(
        TypeError, "add_layer_norm wants residual of the dtype of x, torch.float64, got torch.float32"
    ):
        ops.add_layer_norm(x, residual.float(), weight, bias)
    with contract.refuses(TypeError, "add_layer_norm wants x of a floating-point dtype, got torch.int64"):
        ops.add_layer_norm(x.long(), residual, weight, bias)
    with contract.refuses(ValueError, "add_layer_norm wants weight on the device of x, cpu, got meta"):
        ops.add_layer_norm(x, residual, weight.to("meta"), bias)
