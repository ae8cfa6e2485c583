"""Three models of the same weights: a client's own, that accelerated, and that in float64, which is the truth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from s3prl.upstream.wavlm import modules as microsoft_modules
from torch import nn
from torch.nn import functional as F
from wavlm_cases import assert_close_to_truth, assert_tensor_close, tensors, waveforms

import wavlm_fast
from wavlm_fast.parity.rule import error_of, magnitude
from wavlm_fast.parity.run_models import allowed_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Three(NamedTuple):
    theirs: nn.Module
    ours: nn.Module
    exact: nn.Module


def three(build, dtype=torch.float32):
    """Of what `build` returns three times alike, with weights rounded to `dtype`."""
    theirs, ours, exact = (build().to(dtype) for _ in range(3))
    return Three(theirs, wavlm_fast.accelerate(ours), in_float64(exact))


def assert_nothing_is_slow(model):
    said = wavlm_fast.report(wavlm_fast.accelerate(model))
    assert said.slow_modules == {}
    assert said.rows and all(row.backend != "modules" for row in said.rows), str(said)


def in_float64(model):
    """Microsoft's norms and its gelu compute in float32 whatever they are given: here they do not.

    Those of copies are left alone, since there may be something else in them.
    """
    norms = {microsoft_modules.Fp32LayerNorm: nn.LayerNorm, microsoft_modules.Fp32GroupNorm: nn.GroupNorm}
    for module in model.double().modules():
        module.__class__ = norms.get(type(module), type(module))
        if getattr(module, "activation_fn", None) is microsoft_modules.gelu:
            module.activation_fn = F.gelu
    return model


def heard(model, batch=2, samples=600):
    """Waveforms in the dtype of the model. [B, S]"""
    return waveforms(batch, samples).to(next(p.dtype for p in model.parameters() if p.is_floating_point()))


def assert_theirs(models, call):
    """What `call` makes of the accelerated model is as near to the truth as what it makes of their own."""
    with torch.no_grad():
        theirs, ours, exact = map(call, models)
    for (name, value), (_, truth) in zip(tensors(theirs), tensors(exact), strict=True):
        if value.dtype == torch.float32:
            assert error_of(value, truth) <= 1e-4 * magnitude(truth), f"{name}: the truth is none"
    assert_close_to_truth(ours, theirs, exact)


def assert_their_gradients(models, states, name=lambda n: n, to_waveform=True):
    """By the harness's rule, of all parameters and of the waveform.

    `states` makes hidden states of a model and a waveform; `name` is a parameter's in transformers' model, from which
    it is seen what belongs together.
    """
    found = []
    for model in models:
        model.zero_grad(set_to_none=True)
        x = heard(model).requires_grad_(to_waveform)
        hidden = states(model, x)
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden.dtype)
        (hidden * weights).mean().backward()
        found.append(({name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}, x.grad))
    (theirs, their_x), (ours, our_x), (exact, exact_x) = found
    assert ours.keys() == theirs.keys() == exact.keys() and theirs
    parameters = {name(n): p for n, p in models.exact.named_parameters()}
    allowed = allowed_gradients(theirs, exact, parameters, heard(models.theirs).dtype)
    for n, gradient in ours.items():
        error, most = error_of(gradient, exact[n]), allowed[f"d {n}"]
        assert error <= most, f"{n}: error {error:.3g}, allowed {most:.3g}"
    assert (our_x is None) == (their_x is None)
    if our_x is not None:
        assert_tensor_close("waveform", our_x, their_x, exact_x)
