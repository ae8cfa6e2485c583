"""What every op owes: a registration that torch accepts, gradients twice, autocast, compilation, and clear refusals."""

from __future__ import annotations

import re

import pytest
import torch

import wavlm_fast.ops  # noqa: F401  registers the ops


def randn(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def learning(*tensors):
    """Copies that gradients are wanted for; None stays."""
    return tuple(None if t is None else t.detach().clone().requires_grad_() for t in tensors)


def overload(name):
    return getattr(torch.ops.wavlm_fast, name).default


def check_registration(name, *args):
    """torch.library.opcheck: schema, autograd registration, fake kernel, tracing with dynamic shapes."""
    torch.library.opcheck(overload(name), args)


def check_gradients(function, *inputs):
    """First and second derivatives against differences, in float64."""
    inputs = learning(*inputs)
    assert torch.autograd.gradcheck(function, inputs)
    # Along one random direction: all of them, twice over, take minutes.
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def check_compiles(function, *inputs):
    """One graph without breaks, forward and backward, with the values of eager mode."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, wanted = [], []
    for run, into in ((compiled, found), (function, wanted)):
        mine = learning(*inputs)
        outputs = run(*mine)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(sum(o.square().sum() for o in outputs), [t for t in mine if t is not None])
        into += [*outputs, *grads]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


def check_autocast(function, inputs, wanted):
    """Under bf16 autocast float32 inputs give the dtypes `wanted`; float64 inputs stay as they are."""
    with torch.autocast("cpu", torch.bfloat16):
        outputs = function(*inputs)
        doubled = function(*(None if t is None else t.double() for t in inputs))
    outputs, doubled = (o if isinstance(o, tuple) else (o,) for o in (outputs, doubled))
    assert tuple(o.dtype for o in outputs) == wanted
    assert all(o.dtype == torch.float64 for o in doubled)


def check_autocast_gradients(function, inputs):
    """Gradients come back in the dtype of the inputs, whatever the op computed in."""
    mine = learning(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = function(*mine)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(o.float().square().sum() for o in outputs).backward()
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in mine if t is not None)


def check_equal(found, wanted, rtol=1e-11, atol=1e-11):
    """Equal to rounding, in float64."""
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def strided(x):
    """The same values with gaps in memory, last dimension included."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
    wide[..., 1::2] = x
    return wide[..., 1::2]


def refuses(error, sentence):
    """A context in which a call must be refused with this sentence."""
    return pytest.raises(error, match=f"^{re.escape(sentence)}$")
