"""s3prl's upstream: hidden states by hooks on layers, from a checkpoint in Microsoft's format."""

from __future__ import annotations

import inspect

import pytest
import torch
from held_to_truth import DTYPES, assert_their_gradients, assert_theirs, three
from houses import LAYERS, config, microsoft_config, microsoft_model, microsoft_name, microsoft_state
from s3prl.upstream.hubert.hubert_model import HubertConfig, HubertModel, HubertPretrainingConfig
from s3prl.upstream.interfaces import Featurizer
from s3prl.upstream.wav2vec2.wav2vec2_model import Wav2Vec2Config, Wav2Vec2Model
from s3prl.upstream.wavlm.expert import UpstreamExpert
from wavlm_cases import assert_same, plain_model, waveforms

import wavlm_fast

both_forms = pytest.mark.parametrize("form", ["base", "large"])
LENGTHS = (600, 401, 333)


@pytest.fixture
def upstream(tmp_path):
    def build(form):
        path = tmp_path / f"{form}.pt"
        torch.save({"cfg": microsoft_config(form), "model": microsoft_state(form)}, path)
        return UpstreamExpert(str(path)).eval()

    return build


def heard(model):
    dtype = next(model.parameters()).dtype
    return [row[:end].to(dtype) for row, end in zip(waveforms(len(LENGTHS)), LENGTHS)]


def hidden_states(model):
    return model(heard(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_forms
def test_hidden_states(form, dtype, upstream):
    models = three(lambda: upstream(form), dtype)
    assert_theirs(models, hidden_states)
    assert len(hidden_states(models.ours)["hidden_states"]) == LAYERS + 1


@both_forms
def test_no_module_of_theirs_is_slow(form, upstream):
    said = wavlm_fast.report(wavlm_fast.accelerate(upstream(form)))
    assert said.slow_modules == {} and said.rows
    assert all(row.backend != "modules" for row in said.rows), str(said)


@both_forms
def test_restore(form, upstream):
    model = upstream(form)
    with torch.no_grad():
        before = hidden_states(model)
        hidden_states(wavlm_fast.accelerate(model))
        assert_same(hidden_states(wavlm_fast.restore(model)), before)


@both_forms
def test_a_weighted_sum_of_layers_is_trained(form, upstream):
    # The upstream trains too, but for its front end, through which it lets no gradient.
    featurizer = Featurizer(upstream(form), upstream_device="cpu")
    featurizer.downsample_rate = 20
    torch.nn.init.normal_(featurizer.weights)

    def summed(model, x):
        rows = featurizer.to(x.dtype)([*x], model.train()([*x]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    whole = plain_model("WavLMModel", config(form))
    names = {f"model.{microsoft_name(n, form)}": n for n, _ in whole.named_parameters()}
    assert_their_gradients(three(lambda: upstream(form)), summed, names.get)


def of_the_same_house(cls, conf, *others):
    """A small model of one of fairseq's classes, from which Microsoft's descends."""
    wanted = microsoft_config("base")
    for name in inspect.signature(type(conf)).parameters:
        if name in wanted and name != "extractor_mode":
            setattr(conf, name, wanted[name])
    return cls(conf, *others)


RELATIVES = {
    "HuBERT": lambda: of_the_same_house(HubertModel, HubertConfig(label_rate=50), HubertPretrainingConfig(), [None]),
    "wav2vec 2.0": lambda: of_the_same_house(Wav2Vec2Model, Wav2Vec2Config()),
    "no relative positions": lambda: microsoft_model("base", relative_position_embedding=False, gru_rel_pos=False),
    "no gate": lambda: microsoft_model("base", gru_rel_pos=False),
}


@pytest.mark.parametrize("relative", RELATIVES)
def test_what_has_no_relative_positions_is_refused_by_one_sentence(relative):
    model = RELATIVES[relative]()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="gated relative position bias") as refusal:
        wavlm_fast.accelerate(model)
    assert "\n" not in str(refusal.value) and ". " not in str(refusal.value)
    assert [type(m) for m in model.modules()] == classes
