"""accelerate and restore on live models, install and uninstall on transformers itself."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.models.wavlm import modeling_wavlm
from wavlm_cases import (
    FORMS,
    HEADS,
    MODELS,
    SAMPLES,
    assert_same,
    check_forward,
    is_one_of,
    ours_only,
    plain_model,
    ragged_mask,
    small_config,
    subject,
    waveforms,
    with_labels,
)

from wavlm_fast.backends import cpu
from wavlm_fast.modules._originals import StandIn

pytestmark = ours_only

all_forms = pytest.mark.parametrize("form", list(FORMS))
AUTO = {
    "WavLMModel": "AutoModel",
    "WavLMForCTC": "AutoModelForCTC",
    "WavLMForSequenceClassification": "AutoModelForAudioClassification",
    "WavLMForAudioFrameClassification": "AutoModelForAudioFrameClassification",
    "WavLMForXVector": "AutoModelForAudioXVector",
}


def types(model):
    return {name: type(module) for name, module in model.named_modules()}


def output(model, **kwargs):
    with torch.no_grad():
        return model(waveforms(), attention_mask=ragged_mask(SAMPLES, 400), **kwargs)


@pytest.mark.parametrize("name", MODELS)
@all_forms
def test_accelerate_changes_classes_and_nothing_else(name, form):
    plain = plain_model(name, small_config(form))
    model = copy.deepcopy(plain)
    parameters = {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}
    modules, attributes = dict(model.named_modules()), {n: set(vars(m)) for n, m in model.named_modules()}
    config = model.config
    assert subject.accelerate(model) is model
    assert isinstance(model, getattr(subject, name)) and isinstance(model, getattr(transformers, name))
    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == parameters
    assert list(dict(model.named_modules())) == list(modules)
    assert all(modules[n] is m for n, m in model.named_modules())
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert model.config is config
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same(model.state_dict(), plain.state_dict())
    check_forward(plain, waveforms(), model, **with_labels(name, plain.config))


@pytest.mark.parametrize("name", MODELS)
@all_forms
def test_every_class_is_a_subclass_of_the_one_it_replaces(name, form):
    model = plain_model(name, small_config(form))
    before = types(model)
    after = types(subject.accelerate(model))
    swapped = {n for n in before if after[n] is not before[n]}
    assert all(issubclass(after[n], before[n]) for n in before)
    assert all(before[n].__module__.startswith("transformers.") for n in swapped)
    stages = ("feature_extractor", "feature_projection", "encoder.pos_conv_embed", "encoder", "encoder.layers.0",
              "encoder.layers.2.attention", "feature_extractor.conv_layers.1")
    prefix = "" if name == "WavLMModel" else "wavlm."
    assert {prefix + stage for stage in stages} <= swapped


@pytest.mark.parametrize("name", MODELS)
@all_forms
def test_restore_is_exact(name, form):
    model = plain_model(name, small_config(form))
    before, kinds, state = output(model), types(model), copy.deepcopy(model.state_dict())
    subject.accelerate(model)
    output(model)
    output(model, output_hidden_states=True)
    assert subject.restore(model) is model
    assert types(model) == kinds
    assert_same(model.state_dict(), state)
    assert_same(output(model), before)


def test_restore_of_our_own_class_is_the_transformers_class():
    model = subject.WavLMForCTC(small_config())
    subject.restore(model)
    assert type(model) is transformers.WavLMForCTC and type(model.wavlm) is transformers.WavLMModel
    assert not any(issubclass(t, StandIn) for t in types(model).values())


def test_restore_leaves_other_modules_alone():
    model = nn.Sequential(nn.Linear(2, 2))
    assert subject.restore(model) is model
    plain = plain_model("WavLMModel")
    kinds = types(plain)
    assert types(subject.restore(plain)) == kinds


def test_modes_flags_and_hooks_are_kept_both_ways():
    model = plain_model("WavLMForCTC").train()
    model.wavlm.encoder.layers[1].eval()
    model.freeze_feature_encoder()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fired = []
    model.wavlm.encoder.layers[1].attention.register_forward_hook(lambda *a: fired.append(1))
    model.wavlm.register_buffer("mine", torch.ones(1), persistent=False)
    model.note = "kept"
    modes = [m.training for m in model.modules()]
    for change in (subject.accelerate, subject.restore):
        change(model)
        assert [m.training for m in model.modules()] == modes
        assert model.is_gradient_checkpointing
        assert not model.wavlm.feature_extractor._requires_grad
        assert model.note == "kept" and torch.equal(model.wavlm.mine, torch.ones(1))
        fired.clear()
        model(waveforms())
        assert fired
    # Hidden states are collected by hooks in transformers 5: they must be there after either change.
    for change in (subject.accelerate, subject.restore):
        change(model)
        assert len(model(waveforms(), output_hidden_states=True, output_attentions=True).hidden_states) == 4


def test_hidden_states_after_accelerating_a_model_that_collected_them_before():
    for name in ("WavLMModel", "WavLMForXVector"):
        plain = plain_model(name)
        model = copy.deepcopy(plain)
        output(model, output_hidden_states=True, output_attentions=True)
        subject.accelerate(model)
        check_forward(plain, waveforms(), model, output_hidden_states=True, output_attentions=True)
        check_forward(plain, waveforms(), model)


def test_accelerate_on_a_fast_model_does_nothing():
    model = subject.WavLMForXVector(small_config())
    kinds = types(model)
    assert subject.accelerate(model) is model
    assert types(subject.accelerate(model)) == kinds
    model = subject.accelerate(plain_model("WavLMForXVector"))
    kinds = types(model)
    assert types(subject.accelerate(model)) == kinds


def test_accelerate_and_restore_over_and_over():
    plain = plain_model("WavLMForSequenceClassification")
    model = copy.deepcopy(plain)
    fast = output(subject.accelerate(model))
    for _ in range(3):
        assert_same(output(subject.restore(model)), output(plain))
        assert_same(output(subject.accelerate(model)), fast)


def test_a_copy_is_restored_by_itself():
    model = subject.accelerate(plain_model("WavLMModel"))
    twin = copy.deepcopy(model)
    subject.restore(model)
    assert is_one_of(twin, "WavLMModel") and type(model) is transformers.WavLMModel


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "wavlm", None, 3, small_config(), nn.Sequential()])
def test_accelerate_says_what_it_was_given(thing):
    with pytest.raises(TypeError, match=rf"WavLM.*{type(thing).__name__}"):
        subject.accelerate(thing)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        ("Wav2Vec2Model", "wav2vec 2.0"),
        ("HubertForCTC", "HuBERT"),
        ("Data2VecAudioModel", "data2vec"),
        ("UniSpeechSatModel", "UniSpeech-SAT"),
    ],
)
def test_accelerate_refuses_a_sibling_architecture(cls, name):
    cls = getattr(transformers, cls)
    model = cls(
        cls.config_class(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8],
            conv_stride=[5], conv_kernel=[10], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    )  # fmt: skip
    with pytest.raises(TypeError, match=rf"{cls.__name__}.*WavLM") as raised:
        subject.accelerate(model)
    assert str(raised.value).endswith(
        f"this is a {name} of transformers' code: no gated relative position bias in its attention, nothing of it is "
        "WavLM"
    )


def test_accelerate_inside_a_users_module():
    class Diarizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = plain_model("WavLMModel")
            self.other = plain_model("WavLMModel", seed=1)
            self.head = nn.Linear(32, 2)

        def forward(self, x):
            return self.head(self.encoder(x).last_hidden_state + self.other(x).last_hidden_state)

    model = Diarizer()
    before = model(waveforms())
    subject.accelerate(model)
    assert type(model) is Diarizer
    assert isinstance(model.encoder, subject.WavLMModel) and isinstance(model.other, subject.WavLMModel)
    torch.testing.assert_close(model(waveforms()), before, rtol=1e-3, atol=1e-3)


def test_accelerate_on_part_of_a_model():
    plain = plain_model("WavLMForCTC")
    model = copy.deepcopy(plain)
    subject.accelerate(model.wavlm.encoder.layers[1])
    check_forward(plain, waveforms(), model, output_hidden_states=True, output_attentions=True)
    subject.accelerate(model.wavlm.encoder)
    check_forward(plain, waveforms(), model)
    subject.restore(model.wavlm.encoder.layers[0])
    check_forward(plain, waveforms(), model, attention_mask=ragged_mask(SAMPLES, 400))


class Mine(transformers.WavLMForCTC):
    def __init__(self, config):
        super().__init__(config)
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)


def test_accelerate_on_a_users_subclass():
    model = Mine(small_config()).eval()
    model.load_state_dict(plain_model("WavLMForCTC").state_dict())
    expected = output(model).logits
    subject.accelerate(model)
    assert isinstance(model, Mine) and isinstance(model.wavlm, subject.WavLMModel)
    torch.testing.assert_close(output(model).logits, expected, rtol=1e-3, atol=1e-2)
    assert model.calls == 2
    subject.restore(model)
    assert type(model) is Mine and type(model.wavlm) is transformers.WavLMModel
    assert torch.equal(output(model).logits, expected)


def test_a_users_subclass_of_ours():
    class Probe(subject.WavLMForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Linear(5, 2)

        def forward(self, *args, **kwargs):
            return self.extra(super().forward(*args, **kwargs).logits)

    model = Probe(small_config()).eval()
    assert output(model).shape == (2, 2)
    assert is_one_of(model.wavlm, "WavLMModel")
    assert isinstance(subject.accelerate(model), Probe)


def test_replaced_attention_classes_are_left_alone():
    class Attention(modeling_wavlm.WavLMAttention):
        def forward(self, hidden_states, *args, **kwargs):
            out = super().forward(hidden_states, *args, **kwargs)
            return (out[0] * 2, *out[1:])

    plain = plain_model("WavLMModel")
    for layer in plain.encoder.layers:
        layer.attention.__class__ = Attention
    model = subject.accelerate(copy.deepcopy(plain))
    assert all(isinstance(layer.attention, Attention) for layer in model.encoder.layers)
    check_forward(plain, waveforms(), model)


@pytest.fixture
def installed():
    subject.install()
    yield
    subject.uninstall()


NAMES = [*MODELS]


@pytest.mark.parametrize("name", NAMES)
def test_install_and_uninstall_offer_the_classes(name):
    own = getattr(transformers, name)
    fast = getattr(subject, name)
    assert own is not fast
    for _ in range(2):
        subject.install()
        subject.install()
        assert getattr(transformers, name) is fast
        assert getattr(modeling_wavlm, name) is fast
        assert getattr(transformers.models.wavlm, name) is fast
        subject.uninstall()
        assert getattr(transformers, name) is own
        assert getattr(modeling_wavlm, name) is own
        subject.uninstall()
        assert getattr(transformers, name) is own


@pytest.mark.parametrize("name", MODELS)
def test_auto_classes_build_fast_models(name, installed, tmp_path):
    auto = getattr(transformers, AUTO[name])
    model = auto.from_config(small_config())
    assert is_one_of(model, name)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert is_one_of(loaded, name)
    assert_same(loaded.state_dict(), model.state_dict())
    assert_same(output(loaded), output(model.eval()))
    subject.uninstall()
    assert type(auto.from_config(small_config())) is getattr(transformers, name)
    assert type(auto.from_pretrained(tmp_path)) is getattr(transformers, name)


def test_auto_classes_used_before_install(tmp_path):
    # The mapping of the Auto classes caches what it has imported.
    assert type(transformers.AutoModel.from_config(small_config())) is transformers.WavLMModel
    subject.install()
    try:
        assert is_one_of(transformers.AutoModel.from_config(small_config()), "WavLMModel")
    finally:
        subject.uninstall()
    assert type(transformers.AutoModel.from_config(small_config())) is transformers.WavLMModel


def test_install_puts_our_class_over_transformers_own(installed):
    order = type(transformers.AutoModel.from_config(small_config())).__mro__
    own = type(plain_model("WavLMModel").feature_extractor).__module__  # where transformers' own classes live
    theirs = next(i for i, c in enumerate(order) if c.__module__ == own and not issubclass(c, StandIn))
    assert order.index(subject.WavLMModel) < theirs


def test_from_pretrained_through_the_installed_names(installed, tmp_path):
    transformers.WavLMForCTC(small_config()).save_pretrained(tmp_path)
    loaded = transformers.WavLMForCTC.from_pretrained(tmp_path)
    assert is_one_of(loaded, "WavLMForCTC") and is_one_of(loaded.wavlm, "WavLMModel")


def test_models_that_exist_at_install_stay_as_they_are():
    model = plain_model("WavLMForCTC")
    kinds, before = types(model), output(model)
    subject.install()
    try:
        assert types(model) == kinds
        assert_same(output(model), before)
        built = transformers.WavLMForCTC(small_config())
    finally:
        subject.uninstall()
    assert is_one_of(built, "WavLMForCTC")
    assert type(subject.restore(built)) is modeling_wavlm.WavLMForCTC


def test_other_architectures_are_untouched_by_install(installed):
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                                     vocab_size=9)
    assert type(transformers.AutoModel.from_config(config)) is transformers.BertModel


@pytest.mark.parametrize("name", HEADS)
def test_report_names_every_op_of_a_head(name):
    model = subject.accelerate(plain_model(name)).train()
    report = subject.report(model)
    ops = {row.op for row in report.rows}
    assert {"waveform_conv", "strided_conv", "positional_conv", "linear_act", "gated_attention"} <= ops
    assert not {"feature_encoder", "encoder_layer"} & ops
    if cpu.extension.problem() is None:
        counts = {row.op: row.count for row in subject.report(model.eval()).rows}
        assert counts["feature_encoder"] == 1
        assert counts["encoder_layer"] == model.config.num_hidden_layers
        assert not {"waveform_conv", "strided_conv", "gated_attention", "add_layer_norm"} & counts.keys()
    assert ("tdnn" in ops) == (name == "WavLMForXVector")
    assert all(row.count > 0 and row.backend for row in report.rows)
    for op in ops:
        assert op in str(report)


def test_report_says_why_a_hooked_module_is_called():
    model = subject.accelerate(plain_model("WavLMModel"))
    model.encoder.layers[1].feed_forward.intermediate_dense.register_forward_hook(lambda *a: None)
    slow = [r for r in subject.report(model).rows if any("intermediate_dense" in reason for reason in r.reasons)]
    assert slow and sum(r.count for r in slow) == 1
    assert any("hook" in reason for r in slow for reason in r.reasons)
