"""What is not finite, and what is very large, reaches the elements that it reaches in plain torch, and no others.

The rule is in wavlm_fast/ops/__init__.py. Values are put into any operand: frames, weights, biases, gates, norms.
"""

from __future__ import annotations

import pytest
import torch
from some_calls import FORWARD, SAVING, Draw, any_call, call, completed, with_option

from wavlm_fast import backends, use_backend
from wavlm_fast.backends import cpu
from wavlm_fast.backends.reference import TABLE as REFERENCE

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)
GRADIENTS = tuple(op for op in FORWARD if op not in ("encoder_layer", "feature_encoder"))


def floats(args, at=()):
    """Where the operands are."""
    found = []
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            found.append((*at, i))
        elif isinstance(a, list):
            found += floats(a, (*at, i))
    return found


def place(args, draw, values):
    """Put a value into one operand, or into two if it is not finite. The very largest numbers come alone: how far the
    sum of two leaves the range depends on its order.
    """
    for _ in range(draw.one(1, 1, 2)):
        operand = args
        for i in draw.one(*floats(args)):
            operand = operand[i]
        flat, value = operand.view(-1), draw.one(*values)
        finite = value not in NOT_FINITE and value == value
        if draw.random.random() < 0.15:
            flat.fill_(min(max(value, -1e30), 1e30) if finite else value)
        else:
            for _ in range(1 if finite else draw.one(1, 2)):
                flat[draw.random.randrange(len(flat))] = value
        if finite:
            return


def doubled(args):
    if isinstance(args, torch.Tensor):
        return args.double() if args.is_floating_point() else args
    return [doubled(a) for a in args] if isinstance(args, list) else args


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def check(found, plain, truth, what):
    for n, (ours, theirs, true) in enumerate(zip(found, plain, truth, strict=True)):
        if theirs is None or theirs.numel() == 0:
            continue
        told = theirs.isfinite() == true.to(theirs.dtype).isfinite()
        told &= ~(true.isfinite() & (true.abs() > torch.finfo(theirs.dtype).max / 2))
        wrong = told & (ours.isfinite() != theirs.isfinite())
        assert not wrong.any(), f"{what}, output {n}: {int(wrong.sum())} of {wrong.numel()}"


@DTYPES
@pytest.mark.parametrize("op", FORWARD)
def test_outputs(op, dtype):
    large = (1e30, -1e30, 6e4, torch.finfo(dtype).max, -torch.finfo(dtype).max)
    for seed in range(60):
        args, draw = any_call(op, seed, dtype), Draw(seed, dtype)
        place(args, draw, NOT_FINITE + large)
        try:
            with use_backend("cpu"):
                run = backends.choose(op, completed(op, args)).fn
        except backends.BackendUnavailable:
            continue
        found, plain = as_tuple(run(*completed(op, args))), as_tuple(REFERENCE[op].fn(*args))
        check(found, plain, as_tuple(REFERENCE[op].fn(*doubled(args))), f"seed {seed}")


@DTYPES
@pytest.mark.parametrize("op", GRADIENTS)
def test_gradients(op, dtype):
    for seed in range(30):
        args, draw = any_call(op, seed, dtype), Draw(seed, dtype)
        place(args, draw, (*NOT_FINITE, 6e4))
        if op in SAVING:
            args = with_option(op, args, SAVING[op], True)
        found, plain, truth = (_gradients(op, *way) for way in (
            (args, "auto", seed), (args, "reference", seed), (doubled(args), "reference", seed)
        ))  # fmt: skip
        check(found, plain, truth, f"seed {seed}")


def _gradients(op, args, backend, seed):
    args = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in args]  # fmt: skip
    with use_backend(backend):
        out = as_tuple(getattr(torch.ops.wavlm_fast, op)(*args))[0]
    inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    return torch.autograd.grad(out, inputs, Draw(seed).tensor(*out.shape, dtype=out.dtype), allow_unused=True)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_minimal_filtering_adds_frames_that_do_not_meet(value):
    """Three taps at a stride of two (packed_conv_kernel.cpp): a frame reaches the two outputs whose windows hold it."""
    args = call("strided_conv", 0)
    x, weight = torch.randn(1, 31, 8), torch.randn(20, 8, 3)
    x[0, 14, 3] = value
    out = cpu.TABLE["strided_conv"].fn(x, weight, None, 2, None, None, 1e-5, args[7], False)[0]
    assert (~out.isfinite()).any(-1).nonzero()[:, 1].tolist() == [6, 7]


def test_scores_beyond_the_range_of_their_unscaled_product():
    """What a query and a key make is in range once it is scaled."""
    args = call("gated_attention", 2)
    q, k = (torch.zeros_like(x) for x in args[:2])
    q[..., 0], k[..., 0] = 2.0, torch.finfo(torch.float32).max
    args[:2], args[6:8] = (q, k), (0.0, None)
    args[-1] = 0.125
    out, lse = cpu.TABLE["gated_attention"].fn(*args)
    assert out.isfinite().all() == REFERENCE["gated_attention"].fn(*args)[0].isfinite().all()
    assert lse.isfinite().all() or args[5] is not None
