"""However a model is run, weights are packed, merged and cast once, and a change of theirs is seen by the next call."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from wavlm_cases import (
    assert_gradients_close,
    fast_like,
    fast_model,
    gradients,
    main_output,
    make_sensitive,
    ours_only,
    plain_model,
    small_config,
    truth_of,
    waveforms,
)

from wavlm_fast.backends import cpu
from wavlm_fast.backends.cpu import packed_conv, positional_conv
from wavlm_fast.derived import values

pytestmark = [ours_only, pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))]
both_forms = pytest.mark.parametrize("form", ["base", "large"])


def no_grad(model):
    with torch.no_grad():
        return main_output(model(waveforms()))


def grad(model):
    return main_output(model(waveforms()))


def inference_mode(model):
    with torch.inference_mode():
        return main_output(model(waveforms()))


def autocast(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return main_output(model(waveforms()))


def to_waveform(model):
    model.requires_grad_(False)
    x = waveforms().requires_grad_()
    main_output(model(x)).square().mean().backward()
    return x.grad


RUNS = {"no_grad": no_grad, "grad": grad, "inference-built": inference_mode, "autocast": autocast,
        "to-waveform": to_waveform}  # fmt: skip
every_run = pytest.mark.parametrize("run", RUNS)


def built(run, model):
    """The model as its regime has it."""
    if run != "inference-built":
        return model
    with torch.inference_mode():
        return copy.deepcopy(model)


@pytest.fixture
def packed(monkeypatch):
    """What is packed: names of native ops, one for each call."""
    found = []
    for module, name in ((packed_conv, "_pack_conv"), (positional_conv, "_positional_spectra")):
        op = getattr(module, name)
        counting = lambda *args, op=op, name=name: (found.append(name), op(*args))[1]  # noqa: E731
        monkeypatch.setattr(module, name, counting)
    return found


@every_run
@both_forms
def test_everything_is_derived_once(run, form, packed):
    model = built(run, fast_model("WavLMForXVector", small_config(form)))
    RUNS[run](model)
    RUNS[run](model)  # what may not pay is built when it is met again
    count = len(packed)
    assert count >= 3 * 3 + 3  # of each layer and tdnn at least
    found = [id(v) for v in values(model.parameters())]
    expected = RUNS[run](model)
    assert torch.equal(RUNS[run](model), expected)
    assert len(packed) == count
    assert [id(v) for v in values(model.parameters())] == found


def test_training_keeps_nothing_of_weights_that_learn(packed):
    model = fast_model("WavLMModel").train()
    for _ in range(3):
        model(waveforms()).last_hidden_state.square().mean().backward()
    assert "_positional_spectra" not in packed
    kept = {tuple(v.shape) for v in values(model.parameters()) if isinstance(v, torch.Tensor)}
    width = model.config.hidden_size
    assert (3 * width, width) not in kept  # queries, keys and values merged
    assert (width, width // model.config.num_conv_pos_embedding_groups, 16) not in kept


def writes(run):
    """In-place writes to a weight, by name."""
    found = {
        "whole": lambda w: w.mul_(1.5).add_(0.1),
        "row": lambda w: w[len(w) // 2].add_(0.3),
        "copy": lambda w: w.copy_(w.flip(0)),
    }
    if run != "inference-built":  # where only versions tell
        found["data"] = lambda w: w.data.mul_(1.5)
    return found


@every_run
@both_forms
def test_a_change_of_any_parameter_is_seen(run, form):
    model = built(run, fast_model("WavLMForXVector", small_config(form, conv_bias=True)))
    RUNS[run](model)
    RUNS[run](model)
    changed = 0
    names = [name for name, _ in model.named_parameters() if not name.startswith("objective")]
    before = RUNS[run](model)
    for index, name in enumerate(names):
        kinds = writes(run)
        write = kinds[list(kinds)[index % len(kinds)]]
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode() if run == "inference-built" else torch.no_grad())
            write(model.get_parameter(name))
        found = RUNS[run](model)
        with torch.inference_mode(run == "inference-built"):
            fresh = copy.deepcopy(model)  # which has nothing derived
        assert torch.equal(found, RUNS[run](fresh)), name
        changed += not torch.equal(found, before)
        before = found
    assert changed > 0.8 * len(names)


@both_forms
def test_gradients_in_evaluation_while_weights_change(form):
    """A model may well learn in eval mode: what is remembered then must follow, and must not lose gradients."""
    plain = plain_model("WavLMForXVector", small_config(form))
    ours = fast_like(plain)
    no_grad(ours)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    loss = lambda x: lambda m: m(x.to(next(m.parameters()).dtype)).logits.square().mean()  # noqa: E731
    for step in range(3):
        plain.load_state_dict(ours.state_dict())
        x = waveforms(seed=step)
        for _ in range(2):  # the second finds everything derived
            got = {n: g.clone() for n, g in gradients(ours, loss(x)).items()}
        expected = gradients(plain, loss(x))
        truth = gradients(truth_of(plain), loss(x))
        assert_gradients_close(got, expected, truth, plain)
        optimizer.step()


@both_forms
def test_gradients_under_autocast_in_evaluation(form):
    """As in training, where nothing is remembered."""
    ours = fast_model("WavLMModel", small_config(form))

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            out = grad(model)
        return out.float().square().mean()

    expected = {n: g.clone() for n, g in gradients(ours.train(), loss).items()}
    autocast(ours.eval())
    for _ in range(2):
        found = gradients(ours, loss)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            if not name.endswith("k_proj.bias"):  # zero but for rounding
                assert (value - expected[name]).norm() <= 0.02 * expected[name].norm(), name


@both_forms
def test_checkpointed_layers_in_evaluation(form):
    """Recomputation sees as many saved tensors as the first run did, met before or not."""
    ours = fast_model("WavLMModel", small_config(form))
    expected = {n: g.clone() for n, g in gradients(copy.deepcopy(ours), lambda m: grad(m).square().mean()).items()}
    for layer in ours.encoder.layers:
        inner = layer.forward
        layer.forward = lambda *args, inner=inner, **kwargs: torch.utils.checkpoint.checkpoint(
            inner, *args, use_reentrant=False, **kwargs
        )
    found = gradients(ours, lambda m: grad(m).square().mean())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5 * value.abs().max().item())


def test_a_write_between_forward_and_backward_is_refused_as_by_torch():
    ours = fast_model("WavLMModel")
    out = grad(ours)
    make_sensitive(ours, seed=4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
