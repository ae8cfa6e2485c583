"""Operands in every layout that torch has: no kernel raises or computes something else for it."""

from __future__ import annotations

import pytest
import torch
from some_calls import BACKWARD, FORWARD, OPS, SAVING, Draw, any_call, call, with_option

from wavlm_fast import backends, ops, use_backend
from wavlm_fast.backends import cpu
from wavlm_fast.backends.cpu import onednn, packed_conv

SEEDS = range(15)
DTYPES = (torch.float32, torch.bfloat16)


def laid_out(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """The same numbers elsewhere; where they are stretched, the first ones repeated."""
    if x.numel() == 0 or not x.dim():
        return x
    return draw.one(*LAYOUTS)(x, draw)


def _stretched(x, draw):
    at = draw.random.randrange(x.dim())
    return x.narrow(at, 0, 1).expand(x.shape)


def _gaps(x, draw):
    at = draw.random.randrange(x.dim())
    return x.repeat_interleave(2, at).narrow(at, 0, 2 * x.shape[at] - 1)[(slice(None),) * at + (slice(None, None, 2),)]


def _transposed(x, draw):
    order = draw.random.sample(range(x.dim()), x.dim())
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def _inside(x, draw):
    wide = torch.nn.functional.pad(x, (3, 2) * x.dim()) if x.is_floating_point() else x
    return wide[tuple(slice(3, -2) for _ in x.shape)] if x.is_floating_point() else x


LAYOUTS = (
    lambda x, draw: x, _stretched, _gaps, _transposed, _transposed, _inside,
    lambda x, draw: torch._neg_view(-x) if x.is_floating_point() else x,
)  # fmt: skip


def arguments(op: str, seed: int, dtype: torch.dtype) -> list:
    draw = Draw(seed, dtype)

    def change(a):
        if isinstance(a, list):
            return [change(x) for x in a]
        if isinstance(a, torch.Tensor):  # other numbers in offsets are no offsets
            return _gaps(a, draw) if a.dtype == torch.int32 else laid_out(a, draw)
        return a

    args = [change(a) for a in any_call(op, seed, dtype)]
    if op.startswith("gated_attention"):  # the op itself asks for this one
        first = 1 if op.endswith("backward") else 0
        args[first : first + 3] = [x if x.stride(-1) == 1 else x.contiguous() for x in args[first : first + 3]]
    return args


def packed(args: list) -> list:
    return [a.clone(memory_format=torch.contiguous_format) if isinstance(a, torch.Tensor) else
            packed(a) if isinstance(a, list) else a for a in args]  # fmt: skip


def outputs(op, args):
    found = getattr(torch.ops.wavlm_fast, op)(*args)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_the_layout_changes_nothing(op, dtype):
    for seed in SEEDS:
        args = arguments(op, seed, dtype)
        for found, wanted in zip(outputs(op, args), outputs(op, packed(args)), strict=True):
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True, msg=f"seed {seed}")


@pytest.mark.skipif(onednn.why_not() is not None, reason=str(onednn.why_not()))
@pytest.mark.parametrize("op", ["linear_act", "strided_conv", "tdnn", "encoder_layer", "feature_encoder"])
def test_the_layout_changes_nothing_in_onednn(op, monkeypatch):
    monkeypatch.setattr(packed_conv, "_prefers_onednn", lambda: True)
    test_the_layout_changes_nothing(op, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in FORWARD if f"{op}_backward" in BACKWARD])
def test_gradients_of_any_layout(op, dtype):
    """Forward and backward as autograd calls them, with gradients that are stretched as those of a sum are."""
    for seed in SEEDS:
        args = arguments(op, seed, dtype)
        inputs = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        found = [_gradients(op, given, len(inputs)) for given in (args, packed(args))]
        for a, b in zip(*found, strict=True):
            if a is None:
                assert b is None
                continue
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-2 if dtype == torch.bfloat16 else 1e-4, equal_nan=True)


def _gradients(op, args, count):
    args = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    assert len(inputs) == count
    if op in SAVING:  # as the public functions ask for where gradients are
        args = with_option(op, args, SAVING[op], True)
    # Of the first output, and of none that was only saved; of add_layer_norm of both.
    flowing = outputs(op, args)[: 2 if op == "add_layer_norm" else 1]
    return torch.autograd.grad([o.float().sum() for o in flowing], inputs, allow_unused=True)


@pytest.mark.parametrize("packed_frames", [False, True])
def test_the_reference_takes_norms_of_any_layout(packed_frames):
    """What is behind torch's group norm reads its parameters as if they were contiguous."""
    args = call("waveform_conv_backward", 1, packed=packed_frames)
    assert args[5] == "group"
    args[10] = [True, True, False, True, True]
    with use_backend("reference"):
        wanted = outputs("waveform_conv_backward", args)
        args[6:8] = (v.repeat_interleave(2)[::2] for v in args[6:8])
        found = outputs("waveform_conv_backward", args)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_projections_of_different_strides():
    """As where a key projection's weight is a transposed view."""
    args = call("encoder_layer", 4)
    wanted = ops.encoder_layer(*args[:7], **_options(args))
    weights = list(args[3])
    weights[1] = weights[1].t().contiguous().t()
    weights[5] = weights[5].t().contiguous().t()
    assert backends.choose("encoder_layer", (*args[:3], weights, *args[4:])).backend in ("cpu", "reference")
    found = ops.encoder_layer(*args[:3], weights, *args[4:7], **_options(args))
    torch.testing.assert_close(found, wanted)
    if cpu.extension.problem() is None:
        with use_backend("cpu"):
            assert torch.equal(ops.encoder_layer(*args[:3], weights, *args[4:7], **_options(args)), found)


def _options(args):
    return dict(zip(("eps", "scale", "activation", "norm_first"), args[7:], strict=True))
