"""add_layer_norm, position_gate and stats_pool, forward and backward, against the reference in float64."""

import pytest
import torch
from cases import DTYPES, assert_close, kernel, randn, wide

from wavlm_fast.backends.reference import TABLE as REFERENCE
from wavlm_fast.kernels import add_layer_norm as add_layer_norm_kernels
from wavlm_fast.kernels import position_gate as position_gate_kernels


def compare(op, args, saved=False, tiny=8.0, floor=0.0, packed=()):
    truth, plain = (REFERENCE[op].fn(*a, *packed) for a in (wide(args), args))
    found = kernel(op)(*args, *packed)
    assert_close(found, truth, plain, tiny=tiny)
    grad = randn(*found.shape, seed=5, dtype=found.dtype)
    given = [grad, *args, *([plain] if saved else [[True] * len(args)]), *packed]
    true, theirs = (REFERENCE[f"{op}_backward"].fn(*a) for a in (wide(given), given))
    ours = kernel(f"{op}_backward")(*given)
    if isinstance(ours, torch.Tensor):
        ours, true, theirs = (ours,), (true,), (theirs,)
    for o, t, p in zip(ours, true, theirs, strict=True):
        assert_close(o, t, p, tiny=tiny, floor=floor)


def compare_add_layer_norm(shape, dtype):
    x, residual, grad_sum, grad_normed = (randn(*shape, seed=i, dtype=dtype) for i in range(4))
    x[..., shape[-1] // 2] += 50  # an outlier channel, as trained models have them
    parameters = [randn(shape[-1], seed=i, dtype=dtype) for i in range(2)]
    args = [x, residual, *parameters, 1e-5, True]
    # The norm is of the sum as it was rounded: that rounding is the contract, not an error.
    truth = REFERENCE["add_layer_norm"].fn(*wide([x + residual, torch.zeros_like(x), *parameters]), 1e-5, True)
    plain = REFERENCE["add_layer_norm"].fn(*args)
    found = kernel("add_layer_norm")(*args)
    assert torch.equal(kernel("add_layer_norm")(*args[:-1], False)[1], found[1])
    given = [grad_sum, grad_normed, x + residual, parameters[0], 1e-5, [True] * 3]
    truth += REFERENCE["add_layer_norm_backward"].fn(*wide(given))
    plain += REFERENCE["add_layer_norm_backward"].fn(*given)
    found += kernel("add_layer_norm_backward")(*given)
    # A row's mean and variance are sums of its length, and their roundings are in all of its numbers.
    for f, t, p in zip(found, truth, plain, strict=True):
        assert_close(f, t, p, tiny=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (2, 5, 96), (3, 768), (258, 4)])
def test_add_layer_norm(shape, dtype):
    compare_add_layer_norm(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "H", "D"), [(1, 1, 1, 16), (2, 37, 3, 64), (3, 18, 2, 80), (1, 100, 12, 8)])
def test_position_gate(B, T, H, D, dtype):
    x = randn(B, T, H * D, dtype=dtype) * 3
    weight, bias = randn(8, D, dtype=dtype, scale=D**-0.5), randn(8, dtype=dtype)
    compare("position_gate", [x, weight, bias, randn(H, dtype=dtype) + 1])


@pytest.mark.parametrize("programs", [1, 14, 30])
def test_position_gate_in_programs_that_take_several_heads(monkeypatch, programs):
    monkeypatch.setattr(position_gate_kernels, "PROGRAMS", programs)
    compare("position_gate", [randn(2, 37, 5 * 16), randn(8, 16, scale=1 / 4), randn(8), randn(5) + 1])


def test_add_layer_norm_in_programs_that_take_several_steps(monkeypatch):
    monkeypatch.setattr(add_layer_norm_kernels, "PARTS", 2)
    compare_add_layer_norm((37, 96), DTYPES[-1])


def test_position_gate_in_programs_that_take_several_tiles(monkeypatch):
    monkeypatch.setattr(position_gate_kernels, "PARTS", 2)
    compare("position_gate", [randn(3, 37, 2 * 16), randn(8, 16, scale=1 / 4), randn(8), randn(2) + 1])


def test_position_gate_of_a_strided_view():
    x = randn(2, 20, 3, 64)[:, :, 1]
    args = [x, randn(8, 32), randn(8), randn(2)]
    compare("position_gate", args)
    dx = kernel("position_gate_backward")(randn(2, 2, 20), *args, [True] * 4)[0]
    assert dx.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "C", "lengths"),
    [(2, 1, 8, None), (2, 33, 70, [0, 33]), (4, 300, 20, [1, 2, 129, 300]), (1, 128, 64, None), (1, 257, 5, [256])],
)
def test_stats_pool(B, T, C, lengths, dtype):
    x = (randn(B, T, C) + torch.arange(C) * 0.5).to(dtype)
    compare("stats_pool", [x, None if lengths is None else torch.tensor(lengths)], saved=True)


def test_stats_pool_of_a_large_mean():
    compare("stats_pool", [randn(1, 200, 8) + 1000, None], saved=True, tiny=16)


def test_stats_pool_of_equal_frames():
    x = torch.full((1, 150, 8), 0.5)
    out = kernel("stats_pool")(x, None)
    assert torch.equal(out[:, 8:], torch.zeros(1, 8))
    dx = kernel("stats_pool_backward")(torch.ones(1, 16), x, None, out)
    torch.testing.assert_close(dx, torch.full_like(x, 1 / 150))


def test_frames_past_the_length_are_not_looked_at():
    x = randn(2, 50, 8)
    x[0, 20:] = float("nan")
    lengths = torch.tensor([20, 50])
    out = kernel("stats_pool")(x, lengths)
    assert out.isfinite().all()
    dx = kernel("stats_pool_backward")(torch.ones(2, 16), x, lengths, out)
    assert dx.isfinite().all()
    assert not dx[0, 20:].any()
