"""speechbrain's wrapper around transformers' model, and a loss that reaches through it to the waveform."""

from __future__ import annotations

import pytest
import torch
from held_to_truth import DTYPES, assert_their_gradients, assert_theirs, heard, three
from houses import LAYERS, config
from speechbrain.integrations.huggingface.wavlm import WavLM
from transformers import Wav2Vec2FeatureExtractor
from wavlm_cases import assert_same, plain_model

import wavlm_fast

both_forms = pytest.mark.parametrize("form", ["base", "large"])
SHARES = torch.tensor([1.0, 0.625])  # of the longest, as speechbrain tells lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = {}
    for form in ("base", "large"):
        found[form] = str(tmp_path_factory.mktemp(form))
        plain_model("WavLMModel", config(form)).save_pretrained(found[form])
        masked = form == "large"
        Wav2Vec2FeatureExtractor(do_normalize=masked, return_attention_mask=masked).save_pretrained(found[form])
    return found


@pytest.fixture
def wrapped(folder, tmp_path):
    return lambda form, **options: WavLM(folder[form], save_path=str(tmp_path), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_forms
@pytest.mark.parametrize("every_state", [True, False], ids=["all hiddens", "last"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_features(form, dtype, every_state, frozen, wrapped):
    options = {"output_all_hiddens": every_state, "freeze": frozen, "output_norm": frozen}
    models = three(lambda: wrapped(form, **options), dtype)
    assert models.ours.model.training != frozen
    for shares in (None, SHARES):
        assert_theirs(models, lambda m, s=shares: m(heard(m), s))
    features = models.ours(heard(models.ours))
    assert features.requires_grad != frozen
    assert features.shape[:-2] == ((LAYERS + 1, 2) if every_state else (2,))


@both_forms
@pytest.mark.parametrize("front", [True, False], ids=["front end frozen", "all trained"])
def test_a_training_step(form, front, wrapped):
    # While the front end trains, transformers' own demands a waveform that nothing comes before.
    models = three(lambda: wrapped(form, freeze_feature_extractor=front, output_all_hiddens=True))
    assert_their_gradients(models, lambda m, x: m(x, SHARES), lambda n: n.removeprefix("model."), to_waveform=front)
    for model in models:
        torch.optim.SGD(model.parameters(), lr=1e-6).step()
    assert_theirs(models, lambda m: m(heard(m)))


@both_forms
def test_a_loss_between_states_reaches_the_waveform(form, wrapped):
    # StyleTTS2's: the states of real speech are a target, and a frozen model passes the gradient on.
    def distance(model, x):
        with torch.no_grad():
            real = torch.stack(model.model(x.detach().flip(0), output_hidden_states=True).hidden_states)
        made = torch.stack(model.model(x, output_hidden_states=True).hidden_states)
        return (made - real).abs()

    models = three(lambda: wrapped(form))
    for model in models:
        model.model.eval().requires_grad_(False)
        model.register_parameter("scale", torch.nn.Parameter(heard(model).new_ones(1)))
    assert_their_gradients(models, lambda m, x: m.scale * distance(m, x))


@both_forms
def test_report_and_restore(form, wrapped):
    model = wrapped(form, freeze=True)
    before = model(heard(model))
    said = wavlm_fast.report(wavlm_fast.accelerate(model))
    model(heard(model))
    assert said.slow_modules == {} and said.rows
    assert all(row.backend != "modules" for row in said.rows), str(said)
    assert_same(wavlm_fast.restore(model)(heard(model)), before)


@both_forms
def test_installed_it_is_fast_from_the_start(form, wrapped):
    plain = type(wrapped(form).model)
    wavlm_fast.install()
    try:
        model = wrapped(form, freeze=True)
    finally:
        wavlm_fast.uninstall()
    assert isinstance(model.model, wavlm_fast.WavLMModel) and type(model.model) is not plain
    assert type(wrapped(form).model) is plain
