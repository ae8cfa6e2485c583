"""Pruned forks of torchaudio's model: every layer its own heads and width, or neither."""

from __future__ import annotations

import copy

import pytest
import torch
from pruned_fork import PLAN, pruned
from wavlm_cases import (
    FORMS,
    SAMPLES,
    assert_close_to_truth,
    assert_gradients_close,
    assert_same,
    assert_tensor_close,
    waveforms,
)

import wavlm_fast

every_form = pytest.mark.parametrize("form", FORMS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = torch.tensor([SAMPLES, 400])


class Mask(torch.nn.Module):
    """Of what is being pruned: still learning how much to leave out."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self):
        return torch.linspace(0.2, 0.9, self.size)


def three(form, dtype=torch.float32, **changes):
    """The fork's own model, the same accelerated, and the same in float64, all of weights rounded to `dtype`."""
    theirs, ours, exact = (pruned(form, **changes).to(dtype) for _ in range(3))
    return theirs, wavlm_fast.accelerate(ours), exact.double()


def heard(model, batch=2):
    return waveforms(batch).to(model.encoder.transformer.layer_norm.weight.dtype)


def check(models, name, *arguments):
    """A method of the model, called with two waveforms and these arguments, gives the fork's own numbers."""
    with torch.no_grad():
        theirs, ours, exact = (getattr(model, name)(heard(model), *arguments) for model in models)
    assert_close_to_truth(ours, theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_a_pruned_model_gives_its_own_numbers(form, dtype):
    models = three(form, dtype)
    for lengths in (None, LENGTHS):
        check(models, "__call__", lengths)
        for count in (None, 1, 3):
            check(models, "extract_features", lengths, count)


@every_form
def test_gradients_of_a_pruned_model(form):
    found = []
    models = three(form)
    for model in models:
        model.train()
        x = heard(model).requires_grad_()
        states, _ = model.extract_features(x)
        weights = torch.linspace(0.5, 1.5, states[-1].numel(), dtype=torch.float64).view_as(states[-1]).to(x.dtype)
        sum((state * weights).mean() for state in states).backward()
        found.append(({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, x.grad))
    (plain, plain_x), (got, got_x), (truth, truth_x) = found
    assert set(plain) == {n for n, p in models[0].named_parameters() if p.requires_grad} - unread(form)
    assert_gradients_close(got, plain, truth, models[0])
    assert_tensor_close("waveform", got_x, plain_x, truth_x)


def unread(form):
    """Parameters that no state depends on: the last norm, and in layers that begin with it that of what is no more."""
    if not FORMS[form]["do_stable_layer_norm"]:
        return set()
    norms = [f"layers.{i}.layer_norm" for i, (heads, _) in enumerate(PLAN) if heads is None]
    norms += [f"layers.{i}.final_layer_norm" for i, (_, width) in enumerate(PLAN) if width is None]
    return {f"encoder.transformer.{n}.{p}" for n in (*norms, "layer_norm") for p in ("weight", "bias")}


@every_form
def test_a_first_layer_without_attention_leaves_all_without_a_bias(form):
    plan = ((None, 96), ((0, 3), 40), ((2,), None))
    check(three(form, plan=plan), "extract_features")


def test_masks_that_are_still_being_learned_are_applied():
    models = three("base")
    places = [
        (lambda m: m.feature_extractor.conv_layers[1], "hard_concrete", 11),
        (lambda m: m.encoder.transformer.layers[0].attention, "hard_concrete_for_heads", 3),
        (lambda m: m.encoder.transformer.layers[1].attention, "hard_concrete_for_layer", 1),
        (lambda m: m.encoder.transformer.layers[2].feed_forward, "hard_concrete_for_intermediate", 96),
        (lambda m: m.encoder.transformer.layers[3].feed_forward, "hard_concrete_for_layer", 1),
    ]
    for module, name, size in places:
        for model in models:
            setattr(module(model), name, Mask(size))
        check(models, "extract_features")


def test_exact_batches_of_a_model_that_is_being_pruned_run_one_at_a_time():
    """Its blocks' own code knows no packed frames."""
    models = [pruned("base", plan=[(list(range(4)), 96)] * 2) for _ in range(2)]
    for model in models:
        model.feature_extractor.conv_layers[1].hard_concrete = Mask(11)
    theirs, ours = models[0], wavlm_fast.accelerate(models[1], padding="exact")
    rows = heard(theirs)
    assert "hard_concrete" in wavlm_fast.report(ours).alone
    with torch.no_grad():
        found, counts = ours(rows, LENGTHS)
        for row, (length, count) in enumerate(zip(LENGTHS.tolist(), counts.tolist())):
            wanted, _ = theirs(rows[row : row + 1, :length])
            torch.testing.assert_close(found[row : row + 1, :count], wanted)


def test_restore_gives_the_fork_back():
    model = pruned("base")
    kinds, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model.extract_features(heard(model))
        wavlm_fast.accelerate(model).extract_features(heard(model))
        assert [type(m) for m in model.modules()] != kinds
        assert_same(model.state_dict(), state)
        wavlm_fast.restore(model)
        assert [type(m) for m in model.modules()] == kinds
        assert_same(model.extract_features(heard(model)), before)


def test_report_knows_every_module_of_a_pruned_model():
    ours = wavlm_fast.accelerate(pruned("base"))
    said = wavlm_fast.report(ours)
    assert said.slow_modules == {}
    assert said.rows
