"""Copies of Microsoft's classes are tried before they are stood in for: what was changed keeps its own numbers."""

from __future__ import annotations

import copy
import random
import threading

import numpy as np
import pytest
import torch
from microsoft_cases import (
    CALLS,
    FrozenFrontEnd,
    InPlace,
    Louder,
    LouderWhileTraining,
    Normalising,
    OwnGate,
    OwnRun,
    Reading,
    Renamed,
    SameFrontEnd,
    SameLayer,
    SameModel,
    SomeLouder,
    TwoDimensional,
    check,
    drawn,
    fast,
    of_class,
    original,
)
from original_cases import original_config
from torch import nn
from wavlm_cases import assert_tensor_close, gradients, ours_only, small_config, truth_of, waveforms

from wavlm_fast import accelerate, report, restore
from wavlm_fast.families import _copies
from wavlm_fast.modules._originals import StandIn
from wavlm_fast.original import (
    ConvFeatureExtractionModel,
    MultiheadAttention,
    TransformerEncoder,
    TransformerSentenceEncoderLayer,
    WavLM,
)

pytestmark = ours_only


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    for table in ("_tried", "_calling"):
        monkeypatch.setattr(_copies, table, {})


def same(form="base", **options):
    """Somebody's copy that changes nothing."""
    model = original(form, **options)
    for cls, other in (
        (TransformerSentenceEncoderLayer, SameLayer),
        (ConvFeatureExtractionModel, SameFrontEnd),
        (MultiheadAttention, Reading),
        (WavLM, SameModel),
    ):
        of_class(model, cls, other)
    return model


def reasons(model):
    return "\n".join(reason for row in report(model).rows for reason in row.reasons)


def some_louder(model):
    of_class(model, TransformerSentenceEncoderLayer, SomeLouder)
    model.encoder.layers[1].louder = True
    return model


def own_front_end(model):
    model.feature_extractor = TwoDimensional(24)
    return model.eval()


CHANGED = {
    "adds something": (
        lambda m: of_class(m, TransformerSentenceEncoderLayer, Louder),
        "the forward of microsoft_cases.Louder computes something else than the published one",
    ),
    "trains otherwise": (
        lambda m: of_class(m, TransformerSentenceEncoderLayer, LouderWhileTraining),
        "the forward of microsoft_cases.LouderWhileTraining trains otherwise than the published one",
    ),
    "holds gradients back": (
        lambda m: of_class(m, ConvFeatureExtractionModel, FrozenFrontEnd),
        "the forward of microsoft_cases.FrozenFrontEnd trains otherwise than the published one",
    ),
    "one of its layers adds something": (
        some_louder,
        "the forward of microsoft_cases.SomeLouder computes something else than the published one",
    ),
    "a name of ours": (
        lambda m: of_class(m, MultiheadAttention, OwnGate),
        "OwnGate._gate has the name of something of ours",
    ),
    "another front end": (own_front_end, None),
    "adds in place": (lambda m: of_class(m, TransformerEncoder, InPlace), None),
}


@pytest.mark.parametrize("what", CHANGED)
@pytest.mark.parametrize("form", ["base", "large"])
def test_a_changed_copy_keeps_its_numbers(what, form):
    change, reason = CHANGED[what]
    plain = change(original(form))
    ours = fast(plain)
    if reason is not None:
        assert reason in reasons(ours)
    front_end = what == "another front end"  # which makes other numbers of frames
    check(plain, ours, calls={"last": {}, "a layer": {"output_layer": 2}} if front_end else CALLS)
    for training in (False, True):
        if what == "adds in place":  # no gradient can be had of it
            continue
        found, expected = (
            gradients(m.train(training), lambda m: drawn(lambda: m.extract_features(waveforms())[0]).square().mean())
            for m in (ours, plain)
        )
        assert set(found) == set(expected)
        for name, gradient in found.items():
            if not name.endswith("k_proj.bias"):
                error = (gradient - expected[name]).abs().max()
                assert error <= 1e-3 * expected[name].abs().max() + 1e-9, name


def test_what_is_not_changed_around_a_changed_class_is_fast():
    ours = fast(of_class(original(), TransformerSentenceEncoderLayer, Louder))
    assert not any(isinstance(layer, StandIn) for layer in ours.encoder.layers)
    assert all(isinstance(layer.self_attn, StandIn) for layer in ours.encoder.layers)
    assert isinstance(ours.encoder.pos_conv, StandIn) and isinstance(ours.feature_extractor, StandIn)
    assert report(ours).slow_modules == {"Louder": 3}
    assert [m.self_attn._gate() for m in fast(CHANGED["a name of ours"][0](original())).encoder.layers] == ["mine"] * 3


def test_names_of_a_model_of_ones_own_go_before_ours():
    ours = fast(of_class(original(), WavLM, OwnRun))
    assert ours.run() == "mine" and "OwnRun.run has the name of something of ours" in reasons(ours)
    model = same()
    model.encoder.layers[1].norm_first = "mine"  # on one module
    accelerate(model)
    assert model.encoder.layers[1].norm_first == "mine"
    assert [isinstance(layer, StandIn) for layer in model.encoder.layers] == [True, False, True]


def test_a_copy_that_is_the_same_is_fast():
    plain = same()
    ours = fast(plain, padding="exact")
    told = report(ours)
    assert not told.slow_modules and told.alone is None and not reasons(ours)
    check(plain, fast(plain))


def louder(forward):
    return lambda self, *args, **kwargs: (lambda out: (out[0] + 0.5, *out[1:]))(forward(self, *args, **kwargs))


@pytest.mark.parametrize("cls", [SameLayer, TransformerSentenceEncoderLayer], ids=["its own", "of its base"])
def test_a_forward_replaced_on_a_class_afterwards(cls, monkeypatch):
    plain = of_class(original(), TransformerSentenceEncoderLayer, SameLayer)
    ours = fast(plain)
    before = drawn(lambda: ours.extract_features(waveforms())[0])
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", louder(cls.forward))
        check(plain, ours, calls={"last": {}})
        assert "SameLayer.forward was replaced" in reasons(ours)
        check(plain, fast(plain), calls={"last": {}})
    assert torch.equal(drawn(lambda: ours.extract_features(waveforms())[0]), before)


def test_layers_replaced_afterwards_by_somebodys_own():
    plain = original()
    ours = fast(plain)
    for model in (plain, ours):
        own = [Louder(32, 48, 2, 0.0, 0.0, 0.0, "gelu", False, i == 0, 32, 20) for i in range(3)]
        for new, old in zip(own, model.encoder.layers, strict=True):
            new.load_state_dict(old.state_dict())
        model.encoder.layers = nn.ModuleList(own).eval()
    check(plain, ours)
    assert report(ours).slow_modules["Louder"] == 3


def test_a_subclass_that_calls_ours():
    model = of_class(original("large"), WavLM, Normalising)  # a group norm would undo it
    ours = fast(model, padding="exact")
    assert "the forward of microsoft_cases.Normalising computes something else" in report(ours).alone
    check(model, fast(model))


def test_a_model_of_other_arguments_is_fast_inside():
    plain = of_class(original(), WavLM, Renamed)
    ours = fast(plain)
    assert type(ours) is Renamed and isinstance(ours.feature_extractor, StandIn) and not report(ours).slow_modules
    check(plain, ours, calls={"last": {}, "a layer": {"layer": 2}})


def test_wrappers_are_not_taken_for_what_they_wrap():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    wrapped = Wrapper(original())
    wrapped.encoder.layers[1].self_attn = Wrapper(wrapped.encoder.layers[1].self_attn)
    kinds = [m for m in wrapped.modules() if type(m) is Wrapper]
    assert sum(report(wrapped).slow_modules.values()) > 0
    accelerate(wrapped)
    assert len(kinds) == 2 and all(type(m) is Wrapper for m in kinds)
    assert isinstance(wrapped.inner, StandIn) and isinstance(wrapped.encoder.layers[1].self_attn.inner, StandIn)


# The trial itself


def test_a_trial_touches_nothing():
    model = same()
    model.train()
    hooks = [module.register_forward_hook(lambda *args: pytest.fail("a hook fired")) for module in model.modules()]
    versions = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    attributes = {n: {k: id(v) for k, v in vars(m).items()} for n, m in model.named_modules()}
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2], random.getstate()
    accelerate(model, padding="exact")
    for hook in hooks:
        hook.remove()
    assert report(model).alone is None
    assert {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()} == versions
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[3]
    assert (np.random.get_state()[1] == before[1]).all() and np.random.get_state()[2] == before[2]
    for name, module in model.named_modules():
        found = {k: id(v) for k, v in vars(module).items() if k != "_wavlm_fast_padding"}
        assert found == attributes[name], name


def in_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def under(context):
    def run(call):
        with context():
            return call()

    return run


def on_default_device(call):
    torch.set_default_device("meta")
    try:
        return call()
    finally:
        torch.set_default_device(None)


PLACES = {
    "as usual": lambda call: call(),
    "without gradients": under(torch.no_grad),
    "in inference mode": under(torch.inference_mode),
    "under autocast": under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "with another default device": on_default_device,
    "in a thread": in_thread,
    "with fakes": under(lambda: torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)),
}


@pytest.mark.parametrize("where", PLACES)
def test_a_trial_works_wherever_it_is_made(where):
    plain = same()
    ours = copy.deepcopy(plain)
    PLACES[where](lambda: accelerate(ours, padding="exact"))
    assert PLACES[where](ours.why_alone) is None
    assert not report(ours).slow_modules and not reasons(ours)
    out, truth = (
        drawn(lambda m=m: m.extract_features(waveforms(dtype=m.mask_emb.dtype))[0]) for m in (plain, truth_of(plain))
    )
    assert_tensor_close(where, drawn(lambda: ours.extract_features(waveforms())[0]), out, truth)


def test_gradients_are_tried_in_inference_mode_too():
    model = of_class(original(), ConvFeatureExtractionModel, FrozenFrontEnd)
    with torch.inference_mode():
        accelerate(model)
    assert "FrozenFrontEnd trains otherwise" in reasons(model)


def test_a_changed_copy_takes_nothing_from_others():
    ours = fast(same("large"))
    assert not reasons(ours)
    fast(of_class(original("large"), ConvFeatureExtractionModel, FrozenFrontEnd))  # with the same norms
    assert not reasons(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_memory_is_tried(dtype):
    model = accelerate(same().to("meta", dtype))
    assert all(isinstance(layer, StandIn) and isinstance(layer.self_attn, StandIn) for layer in model.encoder.layers)
    with torch.device("meta"):
        assert isinstance(WavLM(original_config(small_config())).encoder.layers[0], StandIn)
    assert not reasons(WavLM(original_config(small_config())).eval())


def test_one_module_that_cannot_be_tried_says_nothing_of_others():
    odd = same()
    for layer in odd.encoder.layers:
        layer.fc1 = torch.ao.nn.quantized.dynamic.Linear(32, 48)
    assert "cannot be tried" in reasons(accelerate(odd))
    assert not reasons(fast(same()))


def test_a_class_is_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(
        _copies, "_why_not_alike", lambda base, module, original: tried.append((base.__name__, original.__name__))
    )
    for model in (same(), same(), same(encoder_layerdrop=0.1)):
        accelerate(model)
        report(model)
    # Of layers and attentions those with a position bias of their own, and those without.
    once = {"Positions": "Sequential", "FrontEnd": "SameFrontEnd", "Whole": "SameModel"}
    twice = {"ReadingAttention": "Reading", "Layer": "SameLayer"}
    assert sorted(tried) == sorted([*once.items(), *twice.items(), *twice.items()])


def test_restored_and_accelerated_over_and_over():
    model = same()
    x = waveforms()
    before = drawn(lambda: model.extract_features(x)[0])
    outputs = []
    for _ in range(3):
        outputs.append(drawn(lambda: accelerate(model).extract_features(x)[0]))
        assert torch.equal(drawn(lambda: restore(model).extract_features(x)[0]), before)
    assert all(torch.equal(out, outputs[0]) for out in outputs)
