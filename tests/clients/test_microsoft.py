"""Microsoft's own class, as s3prl ships it."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from held_to_truth import DTYPES, assert_nothing_is_slow, assert_their_gradients, assert_theirs, heard, three
from houses import FORMS, LAYERS, config, microsoft_model, microsoft_name, plain_model
from torch import nn
from wavlm_cases import assert_close_to_truth, assert_same, ragged_mask, tensors

import wavlm_fast
from wavlm_fast.parity.rule import allowed_error, error_of

both_forms = pytest.mark.parametrize("form", ["base", "large"])
every_form = pytest.mark.parametrize("form", FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PADDED = ragged_mask(600, 400) == 0  # True where there is padding
MASKS = {"no mask": None, "a mask of nothing": torch.zeros(2, 600, dtype=torch.bool), "a mask": PADDED}


def of(form, dtype=torch.float32, **changes):
    return three(lambda: microsoft_model(form, **changes), dtype)


def kinds(model):
    return [type(m) for m in model.modules()]


def states(model, **arguments):
    with torch.no_grad():
        return model.extract_features(heard(model), output_layer=LAYERS, ret_layer_results=True, **arguments)


@every_dtype
@every_form
def test_extract_features(form, dtype):
    models = of(form, dtype)
    layers, either = (None, *range(1, LAYERS + 1)), (False, True)
    for mask, layer, results, conv in itertools.product(MASKS.values(), layers, either, either):
        arguments = {"padding_mask": mask, "output_layer": layer, "ret_layer_results": results, "ret_conv": conv}
        assert_theirs(models, lambda m, a=arguments: m.extract_features(heard(m), **a))


@every_dtype
@both_forms
def test_waveforms_of_any_length(form, dtype):
    models = of(form, dtype)
    for samples in (70, 599, 601, 1234):
        assert_theirs(models, lambda m, s=samples: m.extract_features(heard(m, 1, s)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@every_form
def test_gradients(form, train):
    # The front end gets all of its gradient, a tenth as while Microsoft's models were made, and none as in s3prl.
    names = {microsoft_name(n, form): n for n, _ in plain_model("WavLMModel", config(form)).named_parameters()}
    for mask, share in ((None, 1.0), (PADDED, 0.1), (PADDED, 0.0)):
        models = of(form, feature_grad_mult=share)
        for model in models:
            model.train(train)
        assert_their_gradients(models, lambda m, x, k=mask: m.extract_features(x, padding_mask=k)[0], names.get)


@every_dtype
@both_forms
def test_training_gives_the_same_states(form, dtype):
    models = of(form, dtype)
    for model in models:
        model.train()
    assert_theirs(models, lambda m: m.extract_features(heard(m), padding_mask=PADDED, ret_layer_results=True))


@both_forms
def test_a_training_loop_ends_with_the_same_weights(form):
    models = of(form)
    for model in models:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            model.extract_features(heard(model) * (1 + step))[0].square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
    assert_theirs(models, states)


@both_forms
@pytest.mark.parametrize("mask", MASKS)
def test_masked_frames_are_drawn_alike(form, mask):
    def call(model):
        np.random.seed(3)
        return model.train().extract_features(heard(model), padding_mask=MASKS[mask], mask=True), np.random.rand()

    assert_theirs(of(form), lambda m: call(m)[0])
    assert len({call(m)[1] for m in of(form)}) == 1  # nothing else was drawn


@both_forms
def test_layers_are_dropped_alike(form):
    models = of(form, encoder_layerdrop=0.5)

    def call(model, seed):
        np.random.seed(seed)
        return model.train().extract_features(heard(model), output_layer=LAYERS, ret_layer_results=True)

    for seed in range(1, 6):  # the first layer among them, without which there is no bias
        assert_theirs(models, lambda m, s=seed: call(m, s))


@every_dtype
@both_forms
@pytest.mark.parametrize("layer", [None, 2])
def test_hooks_see_what_they_saw(form, dtype, layer):
    def call(model):
        seen = []
        watched = {"encoder": model.encoder, **{f"layer {i}": m for i, m in enumerate(model.encoder.layers)}}
        for name, module in watched.items():
            module.register_forward_hook(lambda _, given, output, n=name: seen.append((n, given[0], output)))
        model.extract_features(heard(model), padding_mask=PADDED, output_layer=layer)
        return seen

    assert_theirs(of(form, dtype), call)


@both_forms
def test_hooks_change_what_they_changed(form):
    def call(model):
        model.encoder.layers[1].register_forward_hook(lambda _, given, output: (output[0] * 0.5, *output[1:]))
        model.encoder.layers[2].register_forward_pre_hook(lambda _, given: (given[0] + 1.0, *given[1:]))
        model.encoder.layers[0].fc2.register_forward_hook(lambda _, given, output: output * 2)
        model.encoder.layers[1].self_attn.register_forward_hook(lambda _, given, out: (out[0] * 2, *out[1:]))
        model.encoder.layers[2].self_attn.q_proj.register_forward_hook(lambda _, given, out: out * 2)  # not called
        model.feature_extractor.conv_layers[1].register_forward_hook(lambda _, given, output: output * 2)
        model.encoder.pos_conv.register_forward_hook(lambda _, given, output: output * 2)
        return states(model)

    assert_theirs(of(form), call)


@both_forms
def test_adapters_around_submodules(form):
    class LowRank(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear
            self.down, self.up = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features)

        def forward(self, x):
            return self.linear(x) + self.up(self.down(x))

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    def build():
        model = microsoft_model(form)
        torch.manual_seed(1)
        model.encoder.layers[0].fc1 = LowRank(model.encoder.layers[0].fc1)
        model.encoder.layers[2].fc2 = LowRank(model.encoder.layers[2].fc2)
        model.post_extract_proj = LowRank(model.post_extract_proj)
        nn.utils.parametrize.register_parametrization(model.encoder.layers[1].self_attn.v_proj, "weight", Doubled())
        return model

    assert_theirs(three(build), states)


@both_forms
@pytest.mark.parametrize("activation", ["relu", "gelu_accurate", "gelu_fast", "tanh", "linear", "glu"])
@pytest.mark.filterwarnings("ignore:--activation-fn")
def test_every_activation(form, activation):
    assert_theirs(of(form, activation_fn=activation), states)


@both_forms
@pytest.mark.parametrize(
    "changes",
    [
        {"conv_bias": True},
        {"encoder_embed_dim": 24, "conv_pos_groups": 3},  # as wide as the front end: no projection between
        {"conv_pos": 15},
        {"num_buckets": 8, "max_distance": 4},
        {"encoder_attention_heads": 1},
    ],
    ids=str,
)
def test_every_structure(form, changes):
    assert_theirs(of(form, **changes), states)


@every_form
def test_nothing_of_theirs_is_slow(form):
    assert_nothing_is_slow(microsoft_model(form))


@both_forms
def test_parameters_are_the_very_same(form):
    model = microsoft_model(form)
    before = {n: (id(v), v.data_ptr()) for n, v in model.state_dict(keep_vars=True).items()}
    values = {n: v.clone() for n, v in model.state_dict().items()}
    states(wavlm_fast.accelerate(model))
    assert {n: (id(v), v.data_ptr()) for n, v in model.state_dict(keep_vars=True).items()} == before
    assert list(model.state_dict()) == list(values)
    assert_same(dict(model.state_dict()), values)
    assert_same(states(wavlm_fast.accelerate(model)), states(model))


@both_forms
def test_restore_is_exact(form):
    model = microsoft_model(form)
    classes, before, own = kinds(model), states(model), [sorted(vars(m)) for m in model.modules()]
    wavlm_fast.accelerate(model)
    assert kinds(model) != classes
    states(model)
    assert wavlm_fast.restore(model) is model
    assert kinds(model) == classes
    assert [sorted(vars(m)) for m in model.modules()] == own
    assert_same(states(model), before)


@both_forms
def test_classes_answer_to_their_names_and_are_of_their_kind(form):
    theirs, ours, _ = of(form)
    for plain, fast in zip(theirs.modules(), ours.modules()):
        assert isinstance(fast, type(plain))
        assert (type(fast).__name__, type(fast).__module__) == (type(plain).__name__, type(plain).__module__)


@both_forms
def test_copies(form):
    theirs, ours, _ = of(form)
    for model in (theirs, ours):  # before a forward, weight norm has left a weight that is not copied
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(model)
    expected, own = states(theirs), states(ours)
    assert_same(states(copy.deepcopy(theirs)), expected)
    twin = copy.deepcopy(ours)
    assert kinds(twin) == kinds(ours)
    assert_same(states(twin), own)
    assert_same(states(pickle.loads(pickle.dumps(theirs))), expected)
    assert_same(states(pickle.loads(pickle.dumps(ours))), own)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    assert_same(states(torch.load(saved, weights_only=False)), own)


@both_forms
def test_weights_follow_what_is_loaded_and_cast(form):
    models = of(form)
    for model in models:
        states(model)
        model.load_state_dict(microsoft_model(form, seed=5).state_dict())
    assert_theirs(models, states)
    for model in models[:2]:
        model.half()
    halved = microsoft_model(form, seed=5).half().double()
    models.exact.load_state_dict(halved.state_dict())
    assert_theirs(models, states)


@both_forms
def test_autocast(form):
    def call(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype != torch.float64):
            return model.extract_features(heard(model), padding_mask=PADDED)

    with torch.no_grad():
        (theirs, mask), (ours, our_mask), (exact, _) = map(call, of(form))
    assert ours.dtype == theirs.dtype
    assert torch.equal(our_mask, mask)
    assert error_of(ours, exact) <= allowed_error(theirs, exact, torch.bfloat16)


@both_forms
def test_originals_that_are_not_kept(form):
    theirs, ours, exact = of(form)
    wavlm_fast.accelerate(ours, keep_originals=False)
    assert_theirs((theirs, ours, exact), lambda m: m.extract_features(heard(m), padding_mask=PADDED))
    with pytest.raises(RuntimeError, match="freed"):
        ours.state_dict()


@every_dtype
@both_forms
def test_exact_padding_gives_every_row_as_if_alone(form, dtype):
    theirs, ours, exact = of(form, dtype)
    wavlm_fast.accelerate(ours, padding="exact")
    noisy = heard(ours).masked_fill(PADDED, float("nan"))
    for layer in (None, 2):
        with torch.no_grad():
            rows, mask = ours.extract_features(noisy, padding_mask=PADDED, output_layer=layer)
        assert mask.dtype == torch.bool and mask.shape == rows.shape[:2]
        for i, end in enumerate((600, 400)):
            with torch.no_grad():
                alone, truth = (m.extract_features(heard(m)[[i], :end], output_layer=layer)[0] for m in (theirs, exact))
            frames = alone.shape[1]
            assert_close_to_truth(rows[[i], :frames], alone, truth)
            assert not rows[i, frames:].any()


def test_all_that_is_returned_is_finite():
    # What all the comparisons above would not see: two models that are broken alike.
    for form in FORMS:
        assert all(value.isfinite().all() for _, value in tensors(states(microsoft_model(form))))
