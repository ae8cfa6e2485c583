"""The C++ stats_pool and its gradient against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from cpu_rule import TABLE, check, check_threads
from op_contract import randn

from wavlm_fast.backends import cpu

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))

FORWARD, BACKWARD = TABLE["stats_pool"].fn, TABLE["stats_pool_backward"].fn
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# B, T, C, lengths. A block is 256 channels, a chunk 1, 1, 2, 4, 8, 16, then 32 frames.
CASES = [
    (1, 1, 1, None),
    (2, 2, 5, None),
    (4, 33, 70, (0, 1, 2, 33)),
    (3, 37, 257, (36, 37, 3)),
    (2, 300, 512, (129, 300)),
    (1, 1500, 20, None),
    (2, 0, 4, None),
    (0, 5, 4, None),
]


def frames(B, T, C, dtype=torch.float32):
    """Channels of several means and deviations, among them outliers, with deviations far below their means."""
    x = randn(B, T, C, seed=T) * torch.logspace(-2, 1, C) + torch.linspace(-3, 50, C)
    return x.to(dtype)


def given(B, T, C, lengths, dtype, index=torch.int64):
    return frames(B, T, C, dtype), None if lengths is None else torch.tensor(lengths, dtype=index)


@both_dtypes
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype):
    x, lengths = given(*case, dtype)
    out = check("stats_pool", x, lengths)
    grad = randn(*out.shape, seed=3, dtype=dtype)
    check("stats_pool_backward", grad, x, lengths, out, floor=1e-6)


def test_int32_lengths():
    x, lengths = given(3, 37, 8, (36, 0, 3), torch.float32, torch.int32)
    assert torch.equal(FORWARD(x, lengths)[::2], FORWARD(x, lengths.long())[::2])
    check("stats_pool", x, lengths)


@both_dtypes
def test_lengths_out_of_range_read_nothing_else(dtype):
    x = frames(3, 8, 4, dtype)
    found = FORWARD(x[1:2], torch.tensor([9]))
    assert torch.equal(found, FORWARD(x[1:2], None))
    assert FORWARD(x[1:2], torch.tensor([-1])).isnan().all()


@both_dtypes
def test_too_few_frames(dtype):
    x = frames(2, 3, 20, dtype)
    found = FORWARD(x, torch.tensor([1, 0]))
    assert torch.equal(found[0, :20], x[0, 0])
    assert found[0, 20:].isnan().all()
    assert found[1].isnan().all()
    dx = BACKWARD(torch.ones_like(found), x, torch.tensor([1, 0]), found)
    assert torch.equal(dx[0, 0], torch.ones_like(x[0, 0]))
    assert not dx[0, 1:].any()
    assert not dx[1].any()


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.1, 0.1), (1e4, 1e4), (-7e-30, -7e-30)])
def test_equal_frames_have_no_deviation(values):
    x = torch.tensor(values).repeat(150)[None, :, None].expand(1, 300, 9).contiguous()
    out = FORWARD(x, None)
    assert torch.equal(out[:, :9], x[:, 0])
    assert torch.equal(out[:, 9:], torch.zeros(1, 9))
    torch.testing.assert_close(BACKWARD(torch.ones_like(out), x, None, out), torch.full_like(x, 1 / 300))


@pytest.mark.parametrize("start", [1, 2, 40, 200])
def test_a_mean_that_moves_does_not_cancel(start):
    """Silence first, speech later; and a mean that is large beside the deviation."""
    x = randn(1, 300, 16, seed=1).float()
    x[:, :start] *= 1e-6
    x += torch.where(torch.arange(300) < start, 0.0, torch.tensor(100.0))[None, :, None]
    check("stats_pool", x, None)
    check("stats_pool", x + 1e4, None)


@both_dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 20, 49])
def test_a_bad_number_stays_in_its_channel(at, bad, dtype):
    x, lengths = frames(2, 60, 7, dtype), torch.tensor([60, 50])
    wanted = FORWARD(x, lengths)
    x[1, at, 3] = bad
    found = FORWARD(x, lengths)
    others = torch.ones(2, 14, dtype=torch.bool)
    others[1, [3, 10]] = False
    assert torch.equal(found[others], wanted[others])
    assert found[1, 10].isnan()
    assert found[1, 3].isnan() if bad != bad else found[1, 3] == bad
    x[1, 50:] = bad  # past the length, where it does not count
    assert torch.equal(FORWARD(x, lengths)[others], wanted[others])
    check("stats_pool_backward", randn(2, 14, seed=3, dtype=dtype), x, lengths, found, floor=1e-6)


@both_dtypes
def test_threads_change_nothing(dtype):
    x, lengths = given(3, 400, 300, (400, 3, 222), dtype)
    check_threads("stats_pool", x, lengths)
    out = FORWARD(x, lengths)
    check_threads("stats_pool_backward", torch.ones_like(out), x, lengths, out)


def test_strided():
    x = frames(2, 40, 24)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(FORWARD(turned, None), FORWARD(x, None))


def test_refusals():
    x = frames(2, 5, 3)
    why_not = TABLE["stats_pool"].why_not
    assert why_not(x, None) is None
    assert why_not(x.half(), None) == "the C++ stats_pool takes float32 or bfloat16, x is torch.float16"
    assert "float64" in TABLE["stats_pool_backward"].why_not(x, x.double(), None, x)
    with pytest.raises(RuntimeError, match=r"expected lengths of \[2\]"):
        FORWARD(x, torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match=r"expected grad of Float \[2, 6\], got Float \[2, 3\]"):
        BACKWARD(torch.ones(2, 3), x, None, torch.ones(2, 6))
