"""torch.func, forward-mode derivatives, gradients of gradients: what transformers' models allow, by their numbers."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.autograd.functional as AF
from leaving_cases import both_forms, each_class, pair
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp
from wavlm_cases import TRANSFORMERS_5, main_output, make_sensitive, waveforms

# transformers 4 draws a number for every layer, layer drop or not.
vmap, jacfwd = (partial(transform, randomness="different") for transform in (torch.vmap, torch.func.jacfwd))


def output(model, x, parameters=None):
    return main_output(model(x) if parameters is None else functional_call(model, parameters, (x,)))


def loss(model, x, parameters=None):
    return output(model, x[None], parameters).square().mean()


def three(model, x):
    return output(model, x[None]).flatten()[:3]


def parameters_of(model):
    return dict(model.named_parameters())


def ensemble(model, x):
    other = make_sensitive(copy.deepcopy(model), seed=5)
    parameters, buffers = stack_module_state([model, other])
    return vmap(lambda p, b: output(model, x, (p, b)))(parameters, buffers)


def dual_numbers(model, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(
            output(model, torch.autograd.forward_ad.make_dual(x, x.flip(0)))
        ).tangent


def batched_gradients(model, x):
    x = x.clone().requires_grad_()
    out = output(model, x)
    return torch.autograd.grad(out, x, torch.stack([torch.ones_like(out), out.detach()]), is_grads_batched=True)[0]


SHORT = 250  # samples: derivatives by every one of them
TRANSFORMS = {
    "functional_call": lambda m, x: output(m, x, parameters_of(m)),
    "grad": lambda m, x: grad(lambda p: loss(m, x[0], p))(parameters_of(m)),
    "per-sample gradients": lambda m, x: vmap(grad(lambda p, s: loss(m, s, p)), (None, 0))(parameters_of(m), x),
    "ensemble": ensemble,
    "vmap": lambda m, x: vmap(lambda s: output(m, s[None]))(x),
    "jvp": lambda m, x: jvp(lambda s: output(m, s), (x,), (x.flip(0),))[1],
    "vjp": lambda m, x: vjp(lambda s: output(m, s), x)[1](output(m, x.flip(0)))[0],
    "jacrev": lambda m, x: jacrev(lambda s: three(m, s))(x[0]),
    "jacfwd": lambda m, x: jacfwd(lambda s: three(m, s))(x[0, :SHORT]),
    "hessian": lambda m, x: jacfwd(jacrev(lambda s: loss(m, s)))(x[0, :SHORT]),
    "dual numbers": dual_numbers,
    "is_grads_batched": batched_gradients,
    "functional.jacobian": lambda m, x: AF.jacobian(lambda s: three(m, s), x[0], vectorize=True),
    "functional.hessian": lambda m, x: AF.hessian(lambda s: loss(m, s), x[0, :SHORT]),
    "functional.vhp": lambda m, x: AF.vhp(lambda s: loss(m, s), x[0], x[1])[1],
    "functional.jvp": lambda m, x: AF.jvp(lambda s: output(m, s), x, x.flip(0))[1],
}


def close(got, expected):
    if isinstance(expected, dict):
        assert set(got) == set(expected)
        for name in expected:
            close(got[name], expected[name])
        return
    scale = expected.nan_to_num().abs().max().item()
    # An unused channel of the x-vector has no deviation, and the second derivative of that is NaN.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * scale + 1e-7, equal_nan=True)


@pytest.mark.parametrize("how", TRANSFORMS)
@each_class
@both_forms
def test_transforms(how, name, form):
    case = pair(name, form, 1)
    try:
        expected = TRANSFORMS[how](case.plain, case.x)
    except RuntimeError as error:
        if TRANSFORMERS_5:
            raise
        pytest.skip(f"transformers 4 cannot do this itself: {str(error).splitlines()[0]}")
    close(TRANSFORMS[how](case.ours, case.x), expected)


def test_a_transform_leaves_nothing_behind():
    case = pair("WavLMModel", "base", 1)
    with torch.no_grad():  # where transformers 4 can do it too
        before = output(case.ours, case.x)
        vmap(lambda s: output(case.ours, s[None]))(waveforms(seed=3))
        assert torch.equal(output(case.ours, case.x), before)


def test_a_compiled_transform():
    case = pair("WavLMModel", "base", 1)
    run = torch.compile(vmap(lambda s: output(case.ours, s[None])), backend="eager")
    with torch.no_grad():
        close(run(case.x), vmap(lambda s: output(case.plain, s[None]))(case.x))
    torch._dynamo.reset()
