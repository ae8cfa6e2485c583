"""torchaudio's model: what its factories build, and what its bundles wrap around."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchaudio
from held_to_truth import DTYPES, assert_nothing_is_slow, assert_their_gradients, assert_theirs, heard, three
from houses import LAYERS, config, torchaudio_config, torchaudio_model, torchaudio_state
from torchaudio.pipelines import Wav2Vec2ASRBundle, Wav2Vec2Bundle
from torchaudio.pipelines._wav2vec2 import utils
from wavlm_cases import FORMS, assert_close_to_truth, assert_same, plain_model, tensors, waveforms

import wavlm_fast
from wavlm_fast.parity.rule import allowed_error, error_of

both_forms = pytest.mark.parametrize("form", ["base", "large"])
every_form = pytest.mark.parametrize("form", FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ENDS = (600, 400, 171)


def of(form, dtype=torch.float32, **changes):
    return three(lambda: torchaudio_model(form, **changes), dtype)


def kinds(model):
    return [type(m) for m in model.modules()]


def states(model):
    with torch.no_grad():
        return model.extract_features(heard(model))


@every_dtype
@every_form
@pytest.mark.parametrize("aux", [None, 5], ids=["", "aux"])
def test_forward_and_extract_features(form, dtype, aux):
    models = of(form, dtype, aux=aux)
    assert_theirs(models, lambda m: m(heard(m)))
    for count in (None, *range(1, LAYERS + 1)):
        assert_theirs(models, lambda m, n=count: m.extract_features(heard(m), num_layers=n))
    for samples in (70, 599, 601, 1234):
        assert_theirs(models, lambda m, s=samples: m(heard(m, 1, s)))


@both_forms
def test_wrong_counts_of_layers_are_refused_as_before(form):
    for model in of(form)[:2]:
        for count in (0, LAYERS + 1):
            with pytest.raises(ValueError, match="num_layers"):
                model.extract_features(heard(model), num_layers=count)
        with pytest.raises(ValueError, match="batch"):
            model(torch.zeros(600))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@every_form
def test_gradients(form, train):
    models = of(form, aux=5)
    for model in models:
        model.train(train)
    assert_their_gradients(models, lambda m, x: m(x)[0])
    assert_their_gradients(models, lambda m, x: torch.cat(m.extract_features(x)[0]))


@both_forms
def test_a_training_loop_ends_with_the_same_weights(form):
    models = of(form)
    for model in models:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            model(heard(model) * (1 + step))[0].square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
    assert_theirs(models, states)


@both_forms
def test_layers_are_dropped_alike(form):
    models = of(form)
    for model in models:
        model.train().encoder.transformer.layer_drop = 0.5

    def call(model, seed):
        torch.manual_seed(seed)
        return model(heard(model)), (torch.rand(3) * 100).int()  # nothing else was drawn

    for seed in range(5):  # the first layer among them, without which there is no bias
        assert_theirs(models, lambda m, s=seed: call(m, s))


@every_dtype
@every_form
@pytest.mark.parametrize("ends", [ENDS, (600, 600, 600)], ids=str)
def test_lengths_give_every_row_as_if_alone(form, dtype, ends):
    theirs, ours, exact = of(form, dtype, aux=5)
    lengths = torch.tensor(ends)
    padded = torch.arange(600) >= lengths[:, None]
    x = heard(ours, len(ends))
    with torch.no_grad():
        expected = theirs.feature_extractor(x, lengths)[1]
        noisy = x.masked_fill(padded, float("nan"))
        for call in (lambda m, *a: m(*a), lambda m, *a: m.extract_features(*a)):
            found, frames = call(ours, noisy, lengths)
            assert torch.equal(frames, expected) and frames.dtype == expected.dtype
            for i, end in enumerate(ends):
                alone, truth = (call(m, heard(m, len(ends))[[i], :end])[0] for m in (theirs, exact))
                rows = [v[[i], : expected[i]] for _, v in tensors(found)]
                assert_close_to_truth(rows, [v for _, v in tensors(alone)], [v for _, v in tensors(truth)])
        # Past the end of a row there are zeros, but for what the head makes of them.
        for state in ours.extract_features(noisy, lengths)[0]:
            assert not any(row[n:].any() for row, n in zip(state, expected))


@both_forms
def test_lengths_in_training(form):
    theirs, ours, exact = of(form)
    lengths = torch.tensor(ENDS)

    def loss(model, rows):
        model.train().zero_grad(set_to_none=True)
        sum(row.square().sum() for row in rows).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    def alone(model):
        return [model(heard(model, len(ENDS))[[i], :end])[0] for i, end in enumerate(ENDS)]

    found, frames = ours(heard(ours, len(ENDS)), lengths)
    got = loss(ours, [row[:n] for row, n in zip(found, frames)])
    expected, truth = loss(theirs, alone(theirs)), loss(exact, alone(exact))
    for name, value in got.items():
        assert error_of(value, truth[name]) <= 2 * allowed_error(expected[name], truth[name], torch.float32), name


@both_forms
def test_hooks_see_and_change_what_they_did(form):
    def call(model):
        seen = []
        layers = model.encoder.transformer.layers
        layers[0].feed_forward.output_dense.register_forward_hook(lambda _, given, output: output * 2)
        layers[1].register_forward_hook(lambda _, given, output: (output[0] * 0.5, *output[1:]))
        layers[1].attention.attention.out_proj.register_forward_hook(lambda _, given, output: output * 2)
        layers[2].register_forward_pre_hook(lambda _, given: (given[0] + 1.0, *given[1:]))
        model.encoder.transformer.pos_conv_embed.register_forward_hook(lambda _, given, output: output * 2)
        model.feature_extractor.conv_layers[1].register_forward_hook(lambda _, given, out: (out[0] * 2, out[1]))
        watched = (*layers, model.encoder, model.encoder.feature_projection, model.feature_extractor)
        for module in watched:
            module.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
        model(heard(model))
        return seen

    assert_theirs(of(form), call)


@both_forms
def test_layers_that_somebody_replaced(form):
    class Louder(torchaudio.models.wav2vec2.components.EncoderLayer):
        def forward(self, *arguments, **named):
            x, bias = super().forward(*arguments, **named)
            return x + 1.0, bias

    class LowRank(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear
            self.down, self.up = torch.nn.Linear(linear.in_features, 2), torch.nn.Linear(2, linear.out_features)

        def forward(self, x):
            return self.linear(x) + self.up(self.down(x))

    def build():
        model = torchaudio_model(form)
        torch.manual_seed(1)
        layers = model.encoder.transformer.layers
        layers[1].__class__ = Louder
        layers[2].feed_forward.intermediate_dense = LowRank(layers[2].feed_forward.intermediate_dense)
        layers[0].attention.attention.out_proj = LowRank(layers[0].attention.attention.out_proj)
        return model

    models = three(build)
    assert_theirs(models, states)
    assert isinstance(models.ours.encoder.transformer.layers[1], Louder)


@every_form
def test_nothing_of_theirs_is_slow(form):
    assert_nothing_is_slow(torchaudio_model(form))


@both_forms
def test_restore_is_exact(form):
    model = torchaudio_model(form)
    classes, before, state = kinds(model), states(model), copy.deepcopy(model.state_dict())
    own = [sorted(vars(m)) for m in model.modules()]
    states(wavlm_fast.accelerate(model))
    assert kinds(model) != classes
    assert list(model.state_dict()) == list(state)
    assert_same(dict(model.state_dict()), dict(state))
    assert wavlm_fast.restore(model) is model
    assert kinds(model) == classes
    assert [sorted(vars(m)) for m in model.modules()] == own
    assert_same(states(model), before)


@both_forms
def test_classes_answer_to_their_names_and_are_of_their_kind(form):
    theirs, ours, _ = of(form)
    for plain, fast in zip(theirs.modules(), ours.modules()):
        if not torch.nn.utils.parametrize.is_parametrized(plain):  # of these each has a class to itself
            assert isinstance(fast, type(plain))
        assert (type(fast).__name__, type(fast).__module__) == (type(plain).__name__, type(plain).__module__)


@both_forms
def test_copies(form):
    for model in of(form)[:2]:
        expected = states(model)
        twin = copy.deepcopy(model)
        assert_same(states(twin), expected)
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            pickle.dumps(model)
        conv = twin.encoder.transformer.pos_conv_embed.conv
        torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")
        conv._load_state_dict_pre_hooks.clear()
        expected = states(twin)
        assert_same(states(pickle.loads(pickle.dumps(twin))), expected)


@both_forms
def test_weights_follow_what_is_loaded_and_cast(form):
    models = of(form)
    for model in models:
        states(model)
        model.load_state_dict(torchaudio_model(form, seed=5).state_dict())
    assert_theirs(models, states)
    for model in models[:2]:
        model.half()
    models.exact.load_state_dict(torchaudio_model(form, seed=5).half().double().state_dict())
    assert_theirs(models, states)


@both_forms
def test_autocast(form):
    def call(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype != torch.float64):
            return model(heard(model))[0]

    with torch.no_grad():
        theirs, ours, exact = map(call, of(form))
    assert ours.dtype == theirs.dtype
    assert error_of(ours, exact) <= allowed_error(theirs, exact, torch.bfloat16)


@both_forms
def test_originals_that_are_not_kept(form):
    models = of(form)
    wavlm_fast.accelerate(models.ours, keep_originals=False)
    assert_theirs(models, states)
    with pytest.raises(RuntimeError, match="freed"):
        models.ours.state_dict()


class Bundled:
    """A bundle whose weights are not fetched from anywhere."""

    def _get_state_dict(self, dl_kwargs):
        state = torchaudio_state(plain_model("WavLMModel", config(self._form)).state_dict())
        generator = torch.Generator().manual_seed(0)
        sizes = {"aux.weight": (5, 64), "aux.bias": (5,)} if self._params["aux_num_out"] else {}
        return state | {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def bundle(form, cls, aux=None, **fields):
    kind = type(cls.__name__, (Bundled, cls), {"_form": form})
    return kind("none.pth", torchaudio_config(form, aux_num_out=aux), 16_000, form == "large", "WavLM", **fields)


@every_dtype
@both_forms
def test_bundles(form, dtype):
    models = three(bundle(form, Wav2Vec2Bundle).get_model, dtype)
    assert isinstance(models.theirs, utils._Wav2Vec2Model) == (form == "large")  # which normalises the waveform
    assert_theirs(models, lambda m: (m(heard(m)), m.extract_features(heard(m), num_layers=2)))
    # A batch is normalised as if it were one waveform; with lengths, at which theirs fails, each waveform is by itself.
    with torch.no_grad():
        found, frames = models.ours(heard(models.ours), torch.tensor([600, 400]))
        for i, end in enumerate((600, 400)):
            alone, truth = (m(heard(m)[[i], :end])[0] for m in (models.theirs, models.exact))
            assert_close_to_truth(found[[i], : frames[i]], alone, truth)


@both_forms
def test_recognition_bundles(form):
    made = bundle(form, Wav2Vec2ASRBundle, aux=5, _labels=("a", "b", "c", "d"))
    models = three(lambda: utils._extend_model(made.get_model(), form == "large", True, True))
    assert_theirs(models, lambda m: m(heard(m, 1)))


def test_the_size_that_is_published():
    torch.manual_seed(0)
    model = torchaudio.models.wavlm_base().eval()
    x = waveforms(1, 16_000)
    with torch.no_grad():
        before = model(x)[0]
        after = wavlm_fast.accelerate(model)(x)[0]
    assert error_of(after, before.double()) <= 1e-4 * before.abs().max()
    assert wavlm_fast.report(model).slow_modules == {}


@pytest.mark.parametrize("factory", ["hubert_base", "wav2vec2_base"])
def test_relatives_are_refused_by_one_sentence(factory):
    model = getattr(torchaudio.models, factory)()
    classes = kinds(model)
    with pytest.raises(TypeError, match="gated relative position bias") as refusal:
        wavlm_fast.accelerate(model)
    assert "\n" not in str(refusal.value) and ". " not in str(refusal.value)
    assert kinds(model) == classes


@both_forms
def test_installed_factories_build_fast_models(form):
    built = torchaudio.models.wavlm_model(**torchaudio_config(form))
    wavlm_fast.install()
    try:
        for namespace in (torchaudio.models, torchaudio.models.wav2vec2, torchaudio.models.wav2vec2.model):
            model = namespace.wavlm_model(**torchaudio_config(form)).eval()
            assert type(model.encoder.transformer.layers[0]) is not type(built.encoder.transformer.layers[0])
            assert wavlm_fast.report(model).slow_modules == {}
        bundled = bundle(form, Wav2Vec2Bundle).get_model()
        assert {type(m) for m in built.modules()} < {*kinds(built)} | {*kinds(bundled)}
    finally:
        wavlm_fast.uninstall()
    again = torchaudio.models.wavlm_model(**torchaudio_config(form))
    assert type(again.encoder.transformer.layers[0]) is type(built.encoder.transformer.layers[0])
