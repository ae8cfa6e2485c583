"""A change of a parameter after a forward is seen by the next forward, whatever was derived from the old value."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from wavlm_cases import (
    MODELS,
    assert_close_to_truth,
    check_forward,
    fast_like,
    fast_model,
    main_output,
    make_sensitive,
    ours_only,
    plain_model,
    small_config,
    truth_of,
    waveforms,
    with_labels,
)

from wavlm_fast.derived import nbytes, values

both_forms = pytest.mark.parametrize("form", ["base", "large"])


def warm(model):
    """Forwards that fill every cache."""
    with torch.no_grad():
        model(waveforms())
        model(waveforms(1, 333))
    return model


def assert_fresh(ours, plain):
    """Ours computes with the weights that it has now."""
    current = copy.deepcopy(plain)
    current.load_state_dict(ours.state_dict())
    check_forward(current, waveforms(), ours)


@pytest.mark.parametrize("name", MODELS)
@both_forms
def test_an_optimizer_step(name, form):
    plain = plain_model(name, small_config(form))
    ours = warm(fast_like(plain))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    for _ in range(2):
        output = ours.train()(waveforms(), **with_labels(name, plain.config))
        loss = main_output(output).pow(2).mean() if name == "WavLMModel" else output.loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
        assert_fresh(ours.eval(), plain)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD"])
@pytest.mark.parametrize("foreach", [False, True])
def test_optimizers(optimizer, foreach):
    plain = plain_model("WavLMModel")
    ours = warm(fast_like(plain))
    step = getattr(torch.optim, optimizer)(ours.parameters(), lr=1e-2, foreach=foreach)
    ours(waveforms()).last_hidden_state.pow(2).mean().backward()
    step.step()
    assert_fresh(ours, plain)


@both_forms
def test_load_state_dict(form):
    plain = plain_model("WavLMForXVector", small_config(form))
    ours = warm(fast_like(plain))
    make_sensitive(plain, seed=5)
    ours.load_state_dict(plain.state_dict())
    check_forward(plain, waveforms(), ours)
    make_sensitive(plain, seed=6)
    ours.load_state_dict(plain.state_dict(), assign=True)
    check_forward(plain, waveforms(), ours)


@pytest.mark.parametrize(
    ("how", "form"),
    [
        ("in place", "base"),
        ("in place", "large"),
        ("data in place", "base"),
        ("new data", "large"),
        ("new parameter", "base"),
        ("one element", "large"),
        ("inference mode", "base"),
    ],
)
def test_every_parameter_by_itself(how, form):
    plain = plain_model("WavLMForXVector", small_config(form, conv_bias=True))
    names = [n for n, _ in plain.named_parameters() if not n.startswith("objective")]
    state = {n: p.detach().clone() for n, p in plain.named_parameters()}
    ours = warm(fast_like(plain))
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = ours.get_submodule(owner)
        p = getattr(module, leaf)
        if how == "in place":
            with torch.no_grad():
                p.mul_(1.5).add_(0.1)
        elif how == "inference mode":
            with torch.inference_mode():
                p.copy_(p * 1.5 + 0.1)
        elif how == "data in place":
            p.data.mul_(1.5).add_(0.1)
        elif how == "new data":
            p.data = p.data * 1.5 + 0.1
        elif how == "one element":
            with torch.no_grad():
                p.view(-1)[p.numel() // 2 + 1 if p.numel() > 2 else 0] += 1.0
        else:
            setattr(module, leaf, nn.Parameter(p.detach() * 1.5 + 0.1))
        plain.get_parameter(name).data.copy_(getattr(module, leaf).data)
        with torch.no_grad():
            expected, got = main_output(plain(waveforms())), main_output(ours(waveforms()))
            assert (got - expected).abs().max() < 1e-4 * expected.abs().max(), f"a change of {name} was not seen"
            plain.get_parameter(name).copy_(state[name])
            getattr(module, leaf).data = state[name].clone()


def warm_output(model):
    with torch.no_grad():
        return main_output(model(waveforms()))


@pytest.mark.parametrize(
    "path",
    [
        "encoder.layers.1.feed_forward.intermediate_dense.weight",
        "encoder.layers.1.attention.q_proj.weight",
        "feature_extractor.conv_layers.1.conv.weight",
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
    ],
)
def test_a_fifth_of_the_elements_through_data(path):
    # Pruning and weight averaging write through `.data`, which leaves no trace in the version counter.
    plain = plain_model("WavLMModel")
    ours = warm(fast_like(plain))
    weight = ours.get_parameter(path)
    weight.data.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) > 0.2)
    assert_fresh(ours, plain)


@pytest.fixture
def elsewhere(monkeypatch):
    """Parameters on a device whose values are not at hand, as on a GPU, where looking would wait for the device."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))


def written_through_data(ours, plain):
    """The name of each parameter in turn while its values are others, written through `.data` in both models."""
    for name, theirs in plain.named_parameters():
        written = ours.get_parameter(name)
        before = theirs.detach().clone()
        for p in (theirs, written):
            p.data.mul_(1.5).add_(0.1)
        yield name
        for p in (theirs, written):
            p.data.copy_(before)


@pytest.mark.parametrize("name", MODELS)
@both_forms
def test_every_write_through_data_is_seen_where_values_cannot_be_looked_at(name, form, elsewhere):
    plain = plain_model(name, small_config(form, conv_bias=True))
    ours = warm(fast_like(plain))
    unseen = []
    with torch.no_grad():
        before, noticed = main_output(plain(waveforms())), 0
        for parameter in written_through_data(ours, plain):
            expected = main_output(plain(waveforms()))
            scale = expected.abs().max()
            noticed += bool((expected - before).abs().max() > 1e-3 * scale)
            if (main_output(ours(waveforms())) - expected).abs().max() > 1e-4 * scale:
                unseen.append(parameter)
    assert not unseen
    assert noticed > 0.8 * len(list(plain.parameters()))  # of the rest only biases of keys and masked_spec_embed


@ours_only
@both_forms
def test_nothing_is_kept_where_values_cannot_be_looked_at(form, elsewhere):
    ours = warm(fast_model("WavLMForXVector", small_config(form)))
    assert not values(ours.parameters())


@ours_only
@both_forms
def test_replaced_parameters_leave_nothing_behind(form):
    # Adapters that are merged, unmerged and swapped put new weights beside old ones, hundreds of times.
    ours = warm(fast_model("WavLMForXVector", small_config(form, conv_bias=True)))
    names = [name for name, _ in ours.named_parameters()]
    count, size = len(values(ours.parameters())), nbytes(ours.parameters())
    assert count > 20
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(owner), leaf, nn.Parameter(ours.get_parameter(name).detach().clone()))
        warm_output(ours)
        assert len(values(ours.parameters())) <= count, name
        assert nbytes(ours.parameters()) <= size, name
        warm_output(ours)  # a time-delay layer's weight is packed when it is met again
        assert (len(values(ours.parameters())), nbytes(ours.parameters())) == (count, size), name


def test_swapped_values_of_two_layers():
    plain = plain_model("WavLMModel")
    ours = warm(fast_like(plain))
    a, b = (ours.encoder.layers[i].feed_forward.output_dense.weight for i in (0, 1))
    a.data, b.data = b.data, a.data
    assert_fresh(ours, plain)


def test_swapped_layers():
    plain = plain_model("WavLMModel")
    ours = warm(fast_like(plain))
    for model in (ours, plain):
        layers = model.encoder.layers
        layers[1], layers[2] = layers[2], layers[1]
    check_forward(plain, waveforms(), ours)


def test_fewer_layers():
    plain = plain_model("WavLMModel")
    ours = warm(fast_like(plain))
    for model in (ours, plain):
        del model.encoder.layers[2]
    check_forward(plain, waveforms(), ours, output_hidden_states=True)


def test_a_change_made_during_training_is_seen_in_evaluation_and_back():
    plain = plain_model("WavLMModel")
    ours = warm(fast_like(plain))
    for seed in (7, 8):
        make_sensitive(ours.train(), seed)
        ours(waveforms()).last_hidden_state.sum().backward()
        assert_fresh(ours.eval(), plain)


@both_forms
@pytest.mark.parametrize("move", ["half", "bfloat16", "double"])
def test_dtype_moves_and_back(form, move):
    plain = plain_model("WavLMModel", small_config(form))
    ours = warm(fast_like(plain))
    moved_plain, moved = getattr(copy.deepcopy(plain), move)(), getattr(ours, move)()
    dtype = next(moved.parameters()).dtype
    with torch.no_grad():
        got = moved(waveforms(dtype=dtype)).last_hidden_state
        expected = moved_plain(waveforms(dtype=dtype)).last_hidden_state
        truth = truth_of(moved_plain)(waveforms(dtype=dtype).double()).last_hidden_state
    assert got.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * expected.abs().max().item())
    else:
        assert_close_to_truth(got, expected, truth)
    back = moved.float()
    assert_fresh(back, plain)


def test_some_modules_in_another_dtype():
    # The usual mixture: layer norms kept in float32 by hand, with an autocast around.
    plain = plain_model("WavLMModel")
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    ours, exact = fast_like(plain_model("WavLMModel")), truth_of(plain)
    for module in ours.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(waveforms()).last_hidden_state, plain(waveforms()).last_hidden_state
    with torch.no_grad():
        truth = exact(waveforms().double()).last_hidden_state
    assert_close_to_truth(got, expected, truth)


def test_empty_parameters_leave_no_old_values_behind():
    model = warm(fast_model("WavLMModel"))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = warm_output(model)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    torch.testing.assert_close(warm_output(model), before, rtol=0, atol=0)
