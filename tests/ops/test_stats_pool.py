"""The contract of stats_pool."""

import op_contract as contract
import pytest
import torch
from op_contract import randn

from wavlm_fast import ops


def looped(x, lengths=None):
    lengths = [x.shape[1]] * len(x) if lengths is None else lengths.tolist()
    return torch.stack([torch.cat((u[:n].mean(0), u[:n].std(0))) for u, n in zip(x, lengths, strict=True)])


@pytest.mark.parametrize("lengths", [None, (2, 7, 5)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_is_its_torch_equivalent(lengths, dtype):
    x, lengths = randn(3, 7, 4), None if lengths is None else torch.tensor(lengths, dtype=dtype)
    contract.check_equal(ops.stats_pool(x, lengths), looped(x, lengths))


@pytest.mark.filterwarnings("ignore:std")
def test_too_few_frames():
    x, lengths = randn(2, 3, 4), torch.tensor([1, 0])
    found = ops.stats_pool(x, lengths)
    contract.check_equal(found[0, :4], x[0, 0])
    assert found[0, 4:].isnan().all()
    assert found[1].isnan().all()


def test_what_lies_past_the_length_does_not_count():
    x, lengths = randn(2, 6, 3), torch.tensor([4, 6])
    spoiled = x.clone()
    spoiled[0, 4:] = float("nan")
    contract.check_equal(ops.stats_pool(spoiled, lengths), ops.stats_pool(x, lengths))


def test_large_mean():
    x = (1e4 + randn(1, 50, 3)).float()
    torch.testing.assert_close(ops.stats_pool(x)[:, 3:].double(), x.double().std(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 2])])
def test_registration(lengths):
    x = randn(2, 5, 3, dtype=torch.float32)
    contract.check_registration("stats_pool", *contract.learning(x), lengths)
    out = ops.stats_pool(x, lengths)
    contract.check_registration("stats_pool_backward", torch.ones_like(out), x, lengths, out)


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 2])])
def test_gradients(lengths):
    contract.check_gradients(lambda x: ops.stats_pool(x, lengths), randn(2, 5, 3))


def test_gradient_where_all_frames_are_equal():
    (x,) = contract.learning(torch.ones(1, 4, 2, dtype=torch.float64))
    (y,) = contract.learning(x)
    ops.stats_pool(x).sum().backward()
    looped(y).sum().backward()
    contract.check_equal(x.grad, y.grad)


def test_compiles():
    lengths = torch.tensor([4, 2])
    contract.check_compiles(lambda x: ops.stats_pool(x, lengths), randn(2, 5, 3, dtype=torch.float32))


def test_autocast_leaves_the_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        contract.check_autocast(ops.stats_pool, (randn(2, 5, 3, dtype=dtype),), (dtype,))
        contract.check_autocast_gradients(ops.stats_pool, (randn(2, 5, 3, dtype=dtype),))


def test_strided_frames():
    x = randn(2, 5, 3)
    contract.check_equal(ops.stats_pool(contract.strided(x)), ops.stats_pool(x))


def test_refusals():
    x = randn(2, 5, 3)
    with contract.refuses(ValueError, "stats_pool wants x of shape [B, T, C], got [5, 3]"):
        ops.stats_pool(x[0])
    with contract.refuses(ValueError, "stats_pool wants lengths of shape [2], got [3]"):
        ops.stats_pool(x, torch.tensor([1, 2, 3]))
    with contract.refuses(TypeError, "stats_pool wants lengths of an integer dtype, got torch.float32"):
        ops.stats_pool(x, torch.tensor([1.0, 2.0]))
    with contract.refuses(TypeError, "stats_pool wants x of a floating-point dtype, got torch.int64"):
        ops.stats_pool(x.long())
    with contract.refuses(ValueError, "stats_pool wants lengths on the device of x, cpu, got meta"):
        ops.stats_pool(x, torch.tensor([1, 2], device="meta"))
