"""pyannote's SSeRiouSS on ten seconds: a WavLM of torchaudio's, whose layers are summed, under an LSTM."""

from __future__ import annotations

import pytest
import torch
import torchaudio
from held_to_truth import DTYPES, assert_their_gradients, assert_theirs, three
from houses import torchaudio_config, torchaudio_model
from pyannote.audio.core.task import Problem, Resolution, Specifications
from pyannote.audio.models.segmentation.SSeRiouSS import SSeRiouSS
from torchaudio.pipelines import Wav2Vec2Bundle
from wavlm_cases import assert_same, waveforms

import wavlm_fast

both_forms = pytest.mark.parametrize("form", ["base", "large"])
SECONDS, RATE = 10, 16_000
# As many frames per second as the published models have.
STRIDES = [(16, 10, 5), (16, 3, 2), (16, 3, 2), (16, 3, 2), (16, 3, 2), (16, 2, 2), (24, 2, 2)]


@pytest.fixture
def segmentation(monkeypatch):
    """Makes SSeRiouSS of a bundle that nothing is fetched for."""

    def build(form, **options):
        torch.manual_seed(0)
        params = torchaudio_config(form, extractor_conv_layer_config=STRIDES)
        whole = torchaudio.models.wavlm_model(**params)
        known, own = torchaudio_model(form).state_dict(), whole.state_dict()
        same = {n: v for n, v in known.items() if own.get(n, v[:0]).shape == v.shape}
        bundle = Wav2Vec2Bundle("none.pth", params, RATE, form == "large", "WavLM")
        monkeypatch.setattr(Wav2Vec2Bundle, "_get_state_dict", lambda self, dl_kwargs: own | same)
        monkeypatch.setattr(torchaudio.pipelines, "TINY", bundle, raising=False)
        small = {"hidden_size": 8, "num_layers": 1}
        model = SSeRiouSS(wav2vec="TINY", lstm=small, linear=small, **options)
        model.specifications = Specifications(
            problem=Problem.MONO_LABEL_CLASSIFICATION,
            resolution=Resolution.FRAME,
            duration=float(SECONDS),
            classes=["first", "second", "third"],
            powerset_max_classes=2,
            permutation_invariant=True,
        )
        model.build()
        return model.eval()

    return build


def chunks(model, batch=1):
    return waveforms(batch, SECONDS * RATE).to(model.classifier.weight.dtype)[:, None]  # [B, 1, S]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@both_forms
@pytest.mark.parametrize("layer", [-1, 2], ids=["all layers", "layer 2"])
def test_scores_of_ten_seconds(form, dtype, layer, segmentation):
    models = three(lambda: segmentation(form, wav2vec_layer=layer), dtype)
    assert_theirs(models, lambda m: m(chunks(m)))
    with torch.no_grad():
        scores = models.ours(chunks(models.ours))
    assert scores.shape[:2] == (1, 499)
    if form == "base":  # pyannote does not look behind the module that normalises the waveform
        assert models.ours.num_frames(SECONDS * RATE) == 499
        assert models.ours.receptive_field_size(2) == models.theirs.receptive_field_size(2) == 720


@both_forms
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_training(form, frozen, segmentation):
    models = three(lambda: segmentation(form, wav2vec_frozen=frozen).train())
    assert any(p.requires_grad for p in models.ours.wav2vec.parameters()) != frozen
    assert_their_gradients(models, lambda m, x: m(x.repeat(1, 8)[:, None]))


@both_forms
def test_report_and_restore(form, segmentation):
    model = segmentation(form)
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        before = model(chunks(model))
        said = wavlm_fast.report(wavlm_fast.accelerate(model))
        model(chunks(model))
        assert said.slow_modules == {} and said.rows
        assert all(row.backend != "modules" for row in said.rows), str(said)
        assert [type(m) for m in model.modules()] != classes
        assert_same(wavlm_fast.restore(model)(chunks(model)), before)
    assert [type(m) for m in model.modules()] == classes
