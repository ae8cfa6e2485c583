"""Models with other attention, or compiled, compute what transformers computes."""

import copy
import os
import re
import shutil

import pytest
import torch
from tiny_models import SIZES

from wavlm_fast import accelerate
from wavlm_fast.benchmarks.run import cases, peers

LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
WITH = {"sdpa": peers.with_sdpa, "flex": peers.with_flex}
SAME = 1e-12  # float64, relative

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),  # transformers, with a mask
]


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as torch runs it without a compiler: slowly, in float64 too."""
    monkeypatch.setattr(peers, "_compiled_flex", lambda: peers._flex)


def model(form=None, dtype=torch.float64, **options):
    return cases.Spec(options={**SIZES, **(form or {}), **options}).build().to(dtype)


def inputs(ragged, dtype=torch.float64):
    waveforms = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    if not ragged:
        return {"input_values": waveforms}
    mask = (torch.arange(5000) < torch.tensor([5000, 1700, 3000])[:, None]).long()
    return {"input_values": waveforms * mask, "attention_mask": mask}


def off(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", WITH)
@pytest.mark.parametrize("form", [{}, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("ragged", [False, True])
def test_equal_to_transformers(uncompiled, name, form, ragged):
    theirs = model(form)
    other = WITH[name](theirs)
    with torch.inference_mode():
        expected = theirs(**inputs(ragged)).last_hidden_state
        assert off(other(**inputs(ragged)).last_hidden_state, expected) < SAME


@pytest.mark.parametrize("name", WITH)
@pytest.mark.parametrize("what", ["gate", "bias", "mask"])
def test_nothing_is_left_out(uncompiled, name, what):
    """Each of these shows in the output, so that the comparison above has seen it."""
    theirs = model()
    ragged = inputs(True)
    changed = WITH[name](copy.deepcopy(theirs))
    first = changed.encoder.layers[0].attention
    with torch.inference_mode():
        expected = theirs(**ragged).last_hidden_state
        if what == "gate":
            first.gru_rel_pos_const += 0.01
        elif what == "bias":
            first.rel_attn_embed.weight += torch.linspace(0, 0.01, len(first.rel_attn_embed.weight))[:, None]
        else:
            ragged["attention_mask"][1, 1700:2400] = 1
        assert off(changed(**ragged).last_hidden_state[1, :4], expected[1, :4]) > 1e-6


def test_gradients_of_sdpa_are_those_of_transformers():
    """Dropout is off, and the model trains."""
    theirs = model(cases.MODELS["train"].options).train()
    found = []
    for m in (theirs, peers.with_sdpa(copy.deepcopy(theirs))):
        m(**inputs(True)).last_hidden_state.square().mean().backward()
        found.append({name: p.grad for name, p in m.named_parameters() if p.grad is not None})
    expected, other = found
    assert other.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        assert (other[name] - gradient).abs().max() / largest < SAME, name


@pytest.mark.parametrize("name", WITH)
def test_a_copy_on_the_same_parameters(name):
    theirs = model()
    other = WITH[name](theirs)
    assert {p.data_ptr() for p in other.parameters()} == {p.data_ptr() for p in theirs.parameters()}
    assert list(other.state_dict()) == list(theirs.state_dict())
    assert not any(type(m) in (peers.SdpaAttention, peers.FlexAttention) for m in theirs.modules())


@pytest.mark.parametrize("name", WITH)
def test_no_model_of_transformers(name):
    with pytest.raises(ValueError, match="a transformers WavLM is wanted, WavLMModel has no WavLMAttention"):
        WITH[name](accelerate(model()))


def test_flex_has_no_dropout(uncompiled):
    with pytest.raises(ValueError, match=re.escape("FlexAttention has no dropout, attention_dropout is 0.1")):
        peers.with_flex(model(attention_dropout=0.1)).train()(**inputs(False))


def test_flex_computes_no_gradients_on_cpus(uncompiled):
    """If this changes, so does what its providers refuse."""
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        peers.with_flex(model())(**inputs(False))


@pytest.mark.slow
def test_compiled_flex():
    """The one compilation among the tests: of the attention alone, of which the model has one in every layer."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler")
    theirs = model(dtype=torch.float32)
    with torch.inference_mode():
        truth = theirs.double()(**inputs(True)).last_hidden_state
        usual = theirs.float()(**inputs(True, torch.float32)).last_hidden_state
        found = peers.with_flex(theirs)(**inputs(True, torch.float32)).last_hidden_state
    assert off(found.double(), truth) <= 2 * off(usual.double(), truth) + 1e-6


def test_compiled_inference_on_cpus_freezes_weights(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options))
    for training in (False, True):
        peers.compiled(model(), training)
    assert [o["options"]["freezing"] for o in asked] == [True, False]
    assert all(o["dynamic"] is False for o in asked)
    assert torch._dynamo.config.fail_on_recompile_limit_hit
