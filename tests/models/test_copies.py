"""Copies of a model are models: deepcopy, pickle and torch.save wherever transformers' own allow them."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from wavlm_cases import (
    MODELS,
    assert_same,
    check_forward,
    fast_like,
    main_output,
    make_sensitive,
    plain_model,
    small_config,
    subject,
    waveforms,
)

both_forms = pytest.mark.parametrize("form", ["base", "large"])


def output(model):
    with torch.no_grad():
        return main_output(model(waveforms()))


def unparametrized(model, spelling):
    """The model with its weight norm folded into the weight, or in the old spelling: what torch can pickle."""
    conv = getattr(model, "wavlm", model).encoder.pos_conv_embed.conv
    torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")
    conv._load_state_dict_pre_hooks.clear()
    if spelling == "old weight norm":
        torch.nn.utils.weight_norm(conv, "weight", dim=2)
    return model


@pytest.mark.parametrize("name", MODELS)
@both_forms
def test_deepcopy_gives_the_same_output_and_is_independent(name, form):
    ours = fast_like(plain_model(name, small_config(form)))
    before = output(ours)
    twin = copy.deepcopy(ours)
    assert type(twin) is type(ours)
    assert torch.equal(output(twin), before)
    make_sensitive(twin, seed=9)
    assert not torch.allclose(output(twin), before)
    assert torch.equal(output(ours), before)
    make_sensitive(ours, seed=10)
    expected = output(twin)
    make_sensitive(twin, seed=9)
    assert torch.equal(output(twin), expected)


def test_deepcopy_of_a_submodule():
    ours = fast_like(plain_model("WavLMForCTC"))
    with torch.no_grad():
        expected = ours.wavlm(waveforms()).last_hidden_state
        assert torch.equal(copy.deepcopy(ours.wavlm)(waveforms()).last_hidden_state, expected)
        layer = copy.deepcopy(ours.wavlm.encoder.layers[0])
        assert type(layer) is type(ours.wavlm.encoder.layers[0])


def test_a_copy_outlives_its_original():
    ours = fast_like(plain_model("WavLMModel"))
    expected = output(ours)
    twin = copy.deepcopy(ours)
    del ours
    torch.zeros(200_000)  # reuses the memory that has just been freed
    assert torch.equal(output(twin), expected)


def test_pickle_of_the_parametrized_model_does_what_it_does_in_transformers():
    plain = plain_model("WavLMModel")
    ours = fast_like(plain)
    errors = []
    for model in (plain, ours):
        try:
            pickle.dumps(model)
            errors.append(None)
        except Exception as error:
            errors.append((type(error), str(error)))
    assert errors[0] == errors[1]


def picklable(model):
    try:
        pickle.dumps(model)
    except (AttributeError, pickle.PicklingError):
        return False
    return True


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spelling", ["removed", "old weight norm"])
@both_forms
def test_pickle_and_torch_save_of_the_whole_model(name, spelling, form):
    plain = unparametrized(plain_model(name, small_config(form)), spelling)
    ours = unparametrized(fast_like(plain_model(name, small_config(form))), spelling)
    output(plain)
    if picklable(plain):
        # The hooks that 5.x leaves on a model once its hidden states were collected cannot be pickled, in either.
        output(ours)
    saved = pickle.dumps(ours)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    expected = output(ours)
    loaded = pickle.loads(saved)
    assert type(loaded) is type(ours)
    assert torch.equal(output(loaded), expected)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in ours.modules()]
    assert torch.equal(output(loaded), expected)
    make_sensitive(loaded, seed=11)
    assert torch.equal(output(ours), expected)


@both_forms
def test_pickled_bytes_do_not_grow_with_use(form):
    # Packed weights are derived state: they must not travel with the model.
    ours = unparametrized(fast_like(plain_model("WavLMModel", small_config(form))), "removed")
    fresh = len(pickle.dumps(ours))
    output(ours)
    ours(waveforms()).last_hidden_state.sum()
    assert len(pickle.dumps(ours)) <= fresh + 200


def test_an_accelerated_model_pickles():
    plain = unparametrized(plain_model("WavLMModel"), "removed")
    ours = subject.accelerate(copy.deepcopy(plain))
    loaded = pickle.loads(pickle.dumps(ours))
    check_forward(plain, waveforms(), loaded)
    check_forward(plain, waveforms(), pickle.loads(pickle.dumps(subject.restore(loaded))))


@both_forms
@pytest.mark.parametrize("spelling", ["removed", "old weight norm"])
def test_other_spellings_of_the_weight_norm_compute_the_same(form, spelling):
    plain = plain_model("WavLMModel", small_config(form))
    ours = unparametrized(fast_like(plain), spelling)
    check_forward(plain, waveforms(), ours)
    ours.train()(waveforms()).last_hidden_state.square().mean().backward()
    names = {n.rpartition(".")[2] for n, p in ours.encoder.pos_conv_embed.conv.named_parameters() if p.grad is not None}
    assert names == ({"weight", "bias"} if spelling == "removed" else {"weight_g", "weight_v", "bias"})


def test_old_weight_norm_follows_its_parameters():
    # The old spelling recomputes the weight in a pre-hook of the convolution, into a plain attribute.
    plain = plain_model("WavLMModel")
    ours = unparametrized(fast_like(plain), "old weight norm")
    output(ours)
    with torch.no_grad():
        ours.encoder.pos_conv_embed.conv.weight_g.mul_(2)
        plain.encoder.pos_conv_embed.conv.parametrizations.weight.original0.mul_(2)
    check_forward(plain, waveforms(), ours)


def _child(payload, connection):
    torch.set_num_threads(1)
    connection.send(output(pickle.loads(payload)).numpy())


def test_a_pickled_model_works_in_a_fresh_process():
    ours = unparametrized(fast_like(plain_model("WavLMModel")), "removed")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(pickle.dumps(ours), there))
    process.start()
    try:
        assert here.poll(100), "the child gave no answer"
        assert_same(torch.from_numpy(here.recv()), output(ours))
    finally:
        process.join(20)
        process.kill()
