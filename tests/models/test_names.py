"""Fast classes answer to the names by which tools find transformers' own."""

from __future__ import annotations

import pickle

import pytest
import torch
from wavlm_cases import FORMS, MODELS, is_one_of, ours_only, plain_model, small_config, subject, waveforms

from wavlm_fast.modules._originals import StandIn
from wavlm_fast.swap import FAST_CLASSES

pytestmark = ours_only


@pytest.mark.parametrize("original", FAST_CLASSES, ids=lambda cls: cls.__name__)
def test_a_twin_answers_to_its_originals_name(original):
    twin = FAST_CLASSES[original]
    assert issubclass(twin, original) and twin is not original
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(twin, name) == getattr(original, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_module_of_a_model_has_its_old_name(name, form):
    """What optimum infers a library from, FSDP a wrapping and device maps a split."""
    plain = plain_model(name, small_config(form))
    before = [(type(m).__module__, type(m).__qualname__) for m in plain.modules()]
    for model in (subject.accelerate(plain), getattr(subject, name)(small_config(form))):
        assert [(type(m).__module__, type(m).__qualname__) for m in model.modules()] == before
        assert any(isinstance(m, StandIn) for m in model.modules())


def test_repr_and_report_tell_which_is_which():
    model = plain_model("WavLMModel")
    assert "Fast" not in repr(model) and "is not a class we stand in for" in str(subject.report(model))
    subject.accelerate(model)
    assert "FastWavLMAttention(" in repr(model) and "stand in for" not in str(subject.report(model))


def test_the_public_classes_are_imported_and_pickled_by_their_own_module():
    for name in MODELS:
        cls = getattr(subject, name)
        assert cls.__module__ == "wavlm_fast.models"
        assert pickle.loads(pickle.dumps(cls)) is cls


def test_a_pickled_module_is_fast_again():
    layer = subject.accelerate(plain_model("WavLMModel")).encoder.layers[0]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(layer, protocol))
        assert type(loaded) is type(layer) and isinstance(loaded.attention, StandIn)
        x = torch.randn(1, 9, 32)
        assert torch.equal(loaded(x)[0], layer(x)[0])


def test_a_users_subclass_keeps_its_own_name_and_pickles_as_itself():
    for cls in (Mine, MyAttention):
        assert cls.__module__ == __name__
    model = Mine(small_config())
    assert type(model) is Mine and repr(model).startswith("Mine(")
    assert is_one_of(subject.WavLMModel(small_config()), "WavLMModel")
    attention = subject.accelerate(plain_model("WavLMModel")).encoder.layers[1].attention
    attention.__class__ = MyAttention
    assert type(pickle.loads(pickle.dumps(attention))) is MyAttention and repr(attention).startswith("MyAttention(")


class Mine(subject.WavLMModel):
    pass


class MyAttention(next(twin for original, twin in FAST_CLASSES.items() if original.__name__ == "WavLMAttention")):
    pass


def test_fsdp_finds_layers_by_class_name():
    accelerate = pytest.importorskip("accelerate")
    model = subject.accelerate(plain_model("WavLMModel"))
    plugin = accelerate.FullyShardedDataParallelPlugin(
        auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["WavLMEncoderLayer"]
    )
    plugin.set_auto_wrap_policy(model)
    policy = plugin.auto_wrap_policy
    wrapped = [m for m in model.modules() if policy(m, recurse=False, nonwrapped_numel=0)]
    assert wrapped == list(model.encoder.layers)


def test_a_device_map_does_not_split_layers():
    accelerate = pytest.importorskip("accelerate")
    model, plain = subject.accelerate(plain_model("WavLMModel")), plain_model("WavLMModel")
    options = {"max_memory": {0: 40_000, "cpu": 10**9}, "no_split_module_classes": ["WavLMEncoderLayer"]}
    found = accelerate.infer_auto_device_map(model, **options)
    assert found == accelerate.infer_auto_device_map(plain, **options)
    assert len(set(found.values())) == 2, "everything fits on one device: nothing could be split"
    assert not any(name.startswith("encoder.layers.0.") for name in found)


def test_a_module_says_in_full_what_it_is_not():
    class Linear(torch.nn.Linear):
        pass

    model = subject.accelerate(plain_model("WavLMModel"))
    model.encoder.layers[0].attention.q_proj.__class__ = Linear
    model(waveforms())
    text = str(subject.report(model))
    assert f"it is a {__name__}.{Linear.__qualname__}, not a plain torch.nn.modules.linear.Linear" in text
