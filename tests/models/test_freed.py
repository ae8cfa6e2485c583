"""accelerate(model, keep_originals=False): inference as before, and a clear refusal of everything else."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from wavlm_cases import FORMS, MODELS, SAMPLES, ours_only, plain_model, ragged_mask, small_config, subject, waveforms

from wavlm_fast.backends import cpu, use_backend
from wavlm_fast.freed import FreedWeight

pytestmark = [ours_only, pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))]

REFUSAL = r"needs the values of a weight .*keep_originals=False\) has freed"


def small(name="WavLMModel", form="base", dtype=torch.float32):
    return subject.accelerate(plain_model(name, small_config(form)).eval().to(dtype))


def freed(*args):
    return subject.accelerate(small(*args), keep_originals=False)


def outputs(model, **kwargs):
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(waveforms().to(dtype), attention_mask=ragged_mask(SAMPLES, 400), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers(name, form, dtype):
    model = small(name, form, dtype)
    expected = outputs(model, output_hidden_states=True)
    assert subject.accelerate(model, keep_originals=False) is model
    got = outputs(model, output_hidden_states=True)
    assert torch.equal(got[0], expected[0])
    assert all(map(torch.equal, got.hidden_states, expected.hidden_states))
    assert not model(waveforms().to(dtype))[0].requires_grad


def test_large_weights_are_freed():
    plain = small("WavLMForCTC")
    weights = {n: tuple(p.shape) for n, p in plain.named_parameters()}
    model = freed("WavLMForCTC")
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == weights
    kept = [n for n, p in model.named_parameters() if p.dim() > 1 and type(p) is not FreedWeight]
    # The embedding, the gate and the first convolution are read as they are, those of the positional convolution by
    # weight norm; the head is transformers' own.
    allowed = ("rel_attn_embed", "gru_rel_pos", "conv_layers.0.", "pos_conv_embed", "lm_head")
    assert all(any(part in n for part in allowed) for n in kept), kept
    with torch._C.DisableTorchFunctionSubclass():
        assert {p.untyped_storage().nbytes() for p in model.parameters() if type(p) is FreedWeight} == {4}
    assert subject.report(model).derived_bytes == subject.report(small_after_a_run()).derived_bytes


def small_after_a_run():
    model = small("WavLMForCTC")
    with torch.no_grad():
        model(torch.zeros(1, 16000))
    return model


def pickled(model):
    pickle.dumps(model)


def gradient_of_the_input(model):
    model(waveforms().requires_grad_())


def on_the_reference(model):
    with use_backend("reference"):
        outputs(model)


def autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        outputs(model)


REFUSED = {
    "train": lambda model: model.train(),
    "train of a part": lambda model: model.encoder.layers[0].train(),
    "learn": lambda model: model.requires_grad_(True),
    "gradient of the input": gradient_of_the_input,
    "state_dict": lambda model: model.state_dict(),
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "pickle": pickled,
    "deepcopy": copy.deepcopy,
    "load": lambda model: model.load_state_dict(plain_model("WavLMModel", small_config("base")).state_dict()),
    "half": lambda model: model.half(),
    "to a dtype": lambda model: model.to(torch.float64),
    "to a device": lambda model: model.to("meta"),
    "attention weights": lambda model: outputs(model, output_attentions=True),
    "reference": on_the_reference,
    "autocast": autocast,
    "restore": lambda model: subject.restore(model),
    "values": lambda model: model.encoder.layers[0].attention.q_proj.weight.sum(),
    "indexing": lambda model: model.encoder.layers[0].attention.q_proj.weight[0],
    "numpy": lambda model: model.encoder.layers[0].attention.q_proj.weight.numpy(),
    "assignment": lambda model: model.encoder.layers[0].attention.q_proj.weight.data.zero_(),
}


@pytest.mark.parametrize("use", REFUSED)
def test_whatever_needs_originals_is_refused_and_changes_nothing(use):
    model = freed()
    expected = outputs(model)[0]
    types = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(RuntimeError, match=REFUSAL):
        REFUSED[use](model)
    assert not any(m.training for m in model.modules())
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert torch.equal(outputs(model)[0], expected)


def test_save_pretrained_writes_no_weights(tmp_path):
    with pytest.raises(RuntimeError, match=REFUSAL):
        freed().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_changes_nothing_is_allowed():
    model = freed()
    expected = outputs(model)[0]
    assert model.to("cpu").to(torch.float32).float().eval().requires_grad_(False) is model
    model.zero_grad()
    assert subject.accelerate(model, keep_originals=False) is model
    assert "FreedWeight" in repr(model.encoder.layers[0].attention.q_proj.weight)
    assert torch.equal(outputs(model)[0], expected)


def test_inside_a_model_of_ones_own():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.wavlm = plain_model("WavLMModel", small_config("base"))
            self.head = nn.Linear(self.wavlm.config.hidden_size, 3)

    tagger = subject.accelerate(Tagger().eval(), keep_originals=False)
    assert type(tagger.wavlm.encoder.layers[0].attention.q_proj.weight) is FreedWeight
    assert tagger.head.weight.requires_grad and type(tagger.head.weight) is nn.Parameter


def test_a_model_that_trains_is_refused():
    model = small().train()
    with pytest.raises(ValueError, match="call eval"):
        subject.accelerate(model, keep_originals=False)
    assert not any(type(p) is FreedWeight for p in model.parameters())


def test_nothing_is_freed_where_nothing_is_packed():
    with use_backend("reference"):
        model = freed()
        model.state_dict()
        outputs(model)
    assert not any(type(p) is FreedWeight for p in model.parameters())
