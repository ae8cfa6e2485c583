"""The contract of position_gate."""

import op_contract as contract
import torch
from op_contract import randn

from wavlm_fast import ops


def operands(batch=2, frames=3, heads=2, width=5, dtype=torch.float64):
    made = (
        randn(batch, frames, heads * width, seed=1),
        randn(8, width, seed=2, scale=0.5),
        randn(8, seed=3),
        1 + randn(heads, seed=4).abs(),
    )
    return tuple(x.to(dtype) for x in made)


def transformers_gate(x, weight, bias, const):
    """As `WavLMAttention.forward` writes it."""
    heads = x.view(*x.shape[:-1], const.numel(), -1).permute(0, 2, 1, 3)
    projected = torch.nn.functional.linear(heads, weight, bias).view(*heads.shape[:-1], 2, 4).sum(-1)
    a, b = torch.sigmoid(projected).chunk(2, dim=-1)
    return (a * (b * const.view(1, -1, 1, 1) - 1.0) + 2.0).squeeze(-1)


def test_is_its_torch_equivalent():
    args = operands()
    contract.check_equal(ops.position_gate(*args), transformers_gate(*args))


def test_gates_are_float32_for_narrow_frames():
    args = operands(dtype=torch.bfloat16)
    found = ops.position_gate(*args)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    wanted = transformers_gate(*(a.double() for a in args))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def test_parameters_may_be_wider_than_frames():
    x, *parameters = operands(dtype=torch.float32)
    mine = contract.learning(x.bfloat16(), *parameters)
    ops.position_gate(*mine).sum().backward()
    assert [t.grad.dtype for t in mine] == [torch.bfloat16, *[torch.float32] * 3]


def test_registration():
    args = operands(dtype=torch.float32)
    contract.check_registration("position_gate", *contract.learning(*args))
    contract.check_registration("position_gate_backward", torch.ones(2, 2, 3), *args, [True] * 4)


def test_gradients():
    contract.check_gradients(ops.position_gate, *operands())


def test_compiles():
    contract.check_compiles(ops.position_gate, *operands(dtype=torch.float32))


def test_autocast_leaves_inputs_as_they_are():
    inputs = operands(dtype=torch.float32)
    contract.check_autocast(ops.position_gate, inputs, (torch.float32,))
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.position_gate(*inputs)
    torch.testing.assert_close(found, ops.position_gate(*inputs), rtol=0, atol=0)
    contract.check_autocast_gradients(ops.position_gate, (inputs[0].bfloat16(), *inputs[1:]))


def test_strided_frames():
    x, *parameters = operands(frames=6)
    contract.check_equal(ops.position_gate(x[:, ::2], *parameters), ops.position_gate(x, *parameters)[..., ::2])
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    contract.check_equal(ops.position_gate(turned, *parameters), ops.position_gate(x, *parameters))


def test_refusals():
    x, weight, bias, const = operands()
    with contract.refuses(ValueError, "position_gate wants x of shape [B, T, 10], got [2, 3, 9]"):
        ops.position_gate(x[..., :9], weight, bias, const)
    with contract.refuses(ValueError, "position_gate wants weight of shape [8, D], got [6, 5]"):
        ops.position_gate(x, weight[:6], bias, const)
    with contract.refuses(ValueError, "position_gate wants bias of shape [8], got [6]"):
        ops.position_gate(x, weight, bias[:6], const)
    with contract.refuses(ValueError, "position_gate wants const of shape [H], got [1, 2, 1, 1]"):
        ops.position_gate(x, weight, bias, const.view(1, -1, 1, 1))
    with contract.refuses(TypeError, "position_gate wants x of a floating-point dtype, got torch.int64"):
        ops.position_gate(x.long(), weight, bias, const)
    with contract.refuses(ValueError, "position_gate wants const on the device of x, cpu, got meta"):
        ops.position_gate(x, weight, bias, const.to("meta"))
