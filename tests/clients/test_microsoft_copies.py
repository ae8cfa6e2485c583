"""Copies of Microsoft's two files: each repository has its own, some renamed, and some with something else in them."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest
import torch
from held_to_truth import assert_their_gradients, assert_theirs, heard, three
from houses import LAYERS, MICROSOFT, config, microsoft_model, microsoft_name
from s3prl.upstream.wavlm import modules as microsoft_modules
from wavlm_cases import plain_model

import wavlm_fast

both_forms = pytest.mark.parametrize("form", ["base", "large"])
NAMES = {
    "TransformerSentenceEncoderLayer": "Block",
    "TransformerEncoder": "Blocks",
    "MultiheadAttention": "GatedAttention",
    "ConvFeatureExtractionModel": "FrontEnd",
}
# What somebody has changed in a copy.
CHANGES = {
    "a layer's forward": ("x = self.dropout1(x)", "x = 0.5 * self.dropout1(x)"),
    "a layer's feed-forward": ("x = self.dropout3(x)", "x = self.dropout3(x).tanh()"),
    "attention's gate": ("gate_a * (gate_b * self.grep_a - 1.0) + 2.0", "gate_a * (gate_b * self.grep_a - 1.0) + 1.0"),
    "attention's buckets": ("max_exact = num_buckets // 2", "max_exact = num_buckets // 4"),
    "attention's bias": ("values = values.permute([2, 0, 1])", "values = 2 * values.permute([2, 0, 1])"),
    "the loop of layers": ("if i == tgt_layer:", "x = 0.5 * x\n            if i == tgt_layer:"),
    "the sum with the positions": ("x = x + x_conv", "x = x + 2 * x_conv"),
    "what is cut off of the positions": ("x[:, :, : -self.remove]", "x[:, :, self.remove :]"),
    "the front end's forward": ("x = x.unsqueeze(1)", "x = x.unsqueeze(1) * 0.5 + 0.1"),
    "the front end's activation": ("nn.GELU()", "nn.ReLU()"),
    "the norms of the front end": ("            self.eps,\n", "            0.5,\n"),
    "the feed-forward's activation": ("gelu(x.float())", 'gelu(x.float(), approximate="tanh")'),
    "the model's forward": ("features = self.layer_norm(features)", "features = 1.5 * self.layer_norm(features)"),
    "the padding mask": ("padding_mask = padding_mask.all(-1)", "padding_mask = padding_mask.any(-1)"),
}

NOT_STOOD_IN_FOR = ("a layer's forward", "attention's gate", "the front end's forward")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Makes a package of Microsoft's files, with replacements, and imports it."""
    monkeypatch.syspath_prepend(tmp_path)

    def copy(*replacements):
        name = f"voices_{len(list(tmp_path.iterdir()))}"
        tmp_path.joinpath(name).mkdir()
        found = dict.fromkeys(replacements, 0)
        for module in (MICROSOFT, microsoft_modules):
            text = inspect.getsource(module)
            for old, new in replacements:
                found[old, new] += text.count(old)
                text = text.replace(old, new)
            tmp_path.joinpath(name, module.__name__.rpartition(".")[2] + ".py").write_text(text)
        assert all(found.values()), found
        importlib.invalidate_caches()
        return importlib.import_module(f"{name}.WavLM")

    yield copy
    for name in [n for n in sys.modules if n.startswith("voices_")]:
        del sys.modules[name]


def call(model):
    padded = torch.arange(600) >= torch.tensor([[600], [405]])
    return model.extract_features(heard(model), padded, output_layer=LAYERS, ret_layer_results=True)


@both_forms
def test_a_renamed_copy_is_recognised(form, copied):
    house = copied(*NAMES.items())
    models = three(lambda: microsoft_model(form, house))
    assert_theirs(models, call)
    said = wavlm_fast.report(models.ours)
    assert said.slow_modules == {} and all(row.backend != "modules" for row in said.rows), str(said)
    assert type(models.ours.encoder.layers[0]) is not house.Block
    assert type(models.ours.encoder.layers[0]).__name__ == "Block"
    wavlm_fast.restore(models.ours)
    assert type(models.ours.encoder.layers[0]) is house.Block


@both_forms
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_gives_its_own_numbers(form, change, copied):
    plain, changed = (three(lambda h=house: microsoft_model(form, h)) for house in (MICROSOFT, copied(CHANGES[change])))
    with torch.no_grad():
        unchanged, own = call(plain.exact)[0][0], call(changed.exact)[0][0]
    assert not torch.allclose(unchanged, own), "the change is none"
    assert_theirs(changed, call)


@both_forms
@pytest.mark.parametrize("change", NOT_STOOD_IN_FOR)
def test_report_says_what_has_been_changed(form, change, copied):
    house = copied(CHANGES[change])
    said = wavlm_fast.report(wavlm_fast.accelerate(microsoft_model(form, house)))
    assert said.slow_modules
    assert any("something else than the published one" in why for row in said.rows for why in row.reasons), str(said)


@both_forms
def test_a_change_that_shows_at_a_distance_alone(form, copied):
    # Beyond 80 frames, with the buckets that published models have.
    old = "* (num_buckets - max_exact)"
    sizes = {"num_buckets": 320, "max_distance": 800}
    houses = MICROSOFT, copied((old, f"{old} / 2"))
    plain, changed = (three(lambda h=house: microsoft_model(form, h, **sizes)) for house in houses)

    def long(model):
        return model.extract_features(heard(model, 1, 6000), output_layer=LAYERS, ret_layer_results=True)

    with torch.no_grad():
        assert not torch.allclose(long(plain.exact)[0][0], long(changed.exact)[0][0])
    assert_theirs(changed, long)


@both_forms
def test_a_change_that_shows_in_training_alone(form, copied):
    house = copied(("x = self.dropout1(x)", "x = self.dropout1(x) * (0.5 if self.training else 1.0)"))
    models = three(lambda: microsoft_model(form, house))
    for train in (False, True):
        for model in models:
            model.train(train)
        assert_theirs(models, call)


@both_forms
def test_a_change_that_shows_in_gradients_alone(form, copied):
    house = copied(("x = self.dropout1(x)", "x = self.dropout1(x).detach()"))
    names = {microsoft_name(n, form): n for n, _ in plain_model("WavLMModel", config(form)).named_parameters()}
    models = three(lambda: microsoft_model(form, house))
    assert_their_gradients(models, lambda m, x: m.extract_features(x)[0], names.get)
    assert models.theirs.encoder.layers[0].self_attn.v_proj.weight.grad is None


@both_forms
def test_two_copies_in_one_process(form, copied):
    first, second = copied(), copied(CHANGES["a layer's forward"])
    for house in (first, second, MICROSOFT):
        assert_theirs(three(lambda h=house: microsoft_model(form, h)), call)


@both_forms
@pytest.mark.parametrize("when", ["before", "after"])
def test_forwards_replaced_on_a_live_model(form, when):
    """On an instance, as some do with `types.MethodType`."""

    def patch(model):
        for name in ("encoder.layers.1", "encoder.layers.0.self_attn", "feature_extractor", "encoder.pos_conv"):
            module = model.get_submodule(name)
            original = module.forward
            module.forward = lambda *a, f=original, **k: halved(f(*a, **k))
        return model

    def halved(output):
        return (0.5 * output[0], *output[1:]) if isinstance(output, tuple) else 0.5 * output

    if when == "before":
        models = three(lambda: patch(microsoft_model(form)))
    else:
        models = three(lambda: microsoft_model(form))
        for model in models:
            patch(model)
    assert_theirs(models, call)


@both_forms
def test_subclasses_of_theirs(form, monkeypatch):
    class Louder(MICROSOFT.TransformerSentenceEncoderLayer):
        def forward(self, *arguments, **named):
            x, attention, bias = super().forward(*arguments, **named)
            return x + 1.0, attention, bias

    monkeypatch.setattr(MICROSOFT, "TransformerSentenceEncoderLayer", Louder)
    models = three(lambda: microsoft_model(form))
    assert_theirs(models, call)
    assert isinstance(models.ours.encoder.layers[0], Louder)


@both_forms
def test_a_class_patched_after_accelerating(form, monkeypatch):
    models = three(lambda: microsoft_model(form))
    assert_theirs(models, call)
    original = MICROSOFT.TransformerSentenceEncoderLayer.forward

    def louder(self, *arguments, **named):
        x, attention, bias = original(self, *arguments, **named)
        return x + 1.0, attention, bias

    monkeypatch.setattr(MICROSOFT.TransformerSentenceEncoderLayer, "forward", louder)
    assert_theirs(models, call)
