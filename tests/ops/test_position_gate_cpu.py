"""The C++ position_gate and its gradient against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from cpu_rule import TABLE, check, check_threads
from op_contract import randn

from wavlm_fast.backends import cpu

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))

FORWARD, BACKWARD = TABLE["position_gate"].fn, TABLE["position_gate_backward"].fn
ALL = [True] * 4
# B, T, H, D. A block is 32 frames, a vector 4, 8 or 16 channels.
SHAPES = [(1, 1, 1, 1), (2, 31, 3, 64), (1, 32, 2, 12), (3, 33, 2, 80), (2, 70, 4, 32), (1, 64, 12, 67), (2, 0, 2, 8)]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def operands(B, T, H, D, dtype=torch.float32, parameters=None):
    """Gates over their whole range, and an outlier channel that enters through a small weight."""
    x, weight = 2 * randn(B, T, H * D, seed=1), randn(8, D, seed=2, scale=0.75 * D**-0.5)
    x[..., D // 2] += 50
    weight[:, D // 2] *= 0.06
    made = x, weight, randn(8, seed=3, scale=0.3), 0.5 + 2.5 * randn(H, seed=4).abs()
    return tuple(v.to(dtype if v is x or parameters is None else parameters) for v in made)


def gradient(B, T, H):
    return randn(B, H, T, seed=5).float()


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype):
    args = operands(*shape, dtype)
    gates = check("position_gate", *args)
    assert gates.dtype == torch.float32
    check("position_gate_backward", gradient(*shape[:3]), *args, ALL, floor=1e-6)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_parameters_of_another_dtype(wide):
    args = operands(2, 37, 2, 64, torch.bfloat16, wide)
    check("position_gate", *args)
    check("position_gate_backward", gradient(2, 37, 2), *args, ALL)


@both_dtypes
def test_strided(dtype):
    x, weight, bias, const = operands(2, 40, 3, 64, dtype)
    wide = torch.full((2, 80, 2 * 192), float("nan"), dtype=dtype)
    wide[:, 1::2, 192:] = x
    apart = torch.full((2, 40, 2 * 192), float("nan"), dtype=dtype)
    apart[..., ::2] = x
    views = wide[:, 1::2, 192:], apart[..., ::2], x.transpose(0, 1).contiguous().transpose(0, 1)
    wanted = FORWARD(x, weight, bias, const), *BACKWARD(gradient(2, 40, 3), x, weight, bias, const, ALL)
    for view in views:
        found = FORWARD(view, weight, bias, const), *BACKWARD(gradient(2, 40, 3), view, weight, bias, const, ALL)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, wanted, strict=True))
    parameters = [torch.stack((p, p), -1)[..., 0] for p in (weight, bias, const)]
    assert torch.equal(FORWARD(x, *parameters), wanted[0])


def test_gates_at_their_ends():
    x = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4]).view(1, -1, 1)
    weight = torch.full((8, 1), 0.25)
    for sign in (1, -1):
        weight[4:] = 0.25 * sign
        args = x, weight, torch.zeros(8), torch.tensor([3.0])
        check("position_gate", *args, floor=1e-7)
        check("position_gate_backward", torch.ones(1, 1, 7), *args, ALL, floor=1e-7)


@both_dtypes
def test_a_bad_number_stays_in_its_frame_and_head(dtype):
    x, *parameters = operands(2, 40, 3, 64, dtype)
    wanted = FORWARD(x, *parameters)
    x[1, 33, 70] = float("nan")
    found = FORWARD(x, *parameters)
    assert found[1, 1, 33].isnan()
    assert found.isnan().sum() == 1
    assert torch.equal(found.nan_to_num(0), torch.where(found.isnan(), 0, wanted))


@both_dtypes
def test_threads_change_nothing(dtype):
    args = operands(3, 333, 4, 64, dtype)
    check_threads("position_gate", *args)
    check_threads("position_gate_backward", gradient(3, 333, 4), *args, ALL)


def test_blocks_of_frames_do_not_show():
    x, *parameters = operands(2, 77, 2, 64)
    whole = FORWARD(x, *parameters)
    assert all(torch.equal(FORWARD(x[:, t : t + 1], *parameters), whole[..., t : t + 1]) for t in range(77))


def test_refusals():
    x, weight, bias, const = operands(1, 5, 2, 8)
    why_not = TABLE["position_gate"].why_not
    assert why_not(x, weight, bias, const) is None
    assert why_not(x.half(), weight, bias, const) == (
        "the C++ position_gate takes float32 or bfloat16, x is torch.float16"
    )
    assert "float64" in TABLE["position_gate_backward"].why_not(x, x.double(), weight, bias, const)
    with pytest.raises(RuntimeError, match=r"expected x of \[B, T, 16\], got \[1, 5, 15\]"):
        FORWARD(x[..., :15], weight, bias, const)
    with pytest.raises(RuntimeError, match=r"expected grad of \[1, 2, 5\], got \[1, 5, 2\]"):
        BACKWARD(torch.ones(1, 5, 2), x, weight, bias, const, ALL)
