"""All of the public API as a user writes it, with the types that a checker is to find; test_types.py runs it too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import WavLMModel
from transformers.modeling_outputs import (
    CausalLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
    Wav2Vec2BaseModelOutput,
    XVectorOutput,
)
from typing_extensions import assert_type

import wavlm_fast
from wavlm_fast import original
from wavlm_fast.backends import BackendUnavailable
from wavlm_fast.errors import UserError
from wavlm_fast.graphed import Graphed
from wavlm_fast.report import Report, Row

SAMPLES = torch.zeros(1, 1600)
WAVEFORMS = [torch.zeros(1600), torch.zeros(900)]


def classes(folder: Path) -> None:
    assert_type(wavlm_fast.WavLMModel.from_pretrained(folder), wavlm_fast.WavLMModel)
    assert_type(wavlm_fast.WavLMForCTC.from_pretrained(str(folder), padding="exact"), wavlm_fast.WavLMForCTC)
    loaded = wavlm_fast.WavLMModel.from_pretrained(folder, output_loading_info=True)
    assert_type(loaded, tuple[wavlm_fast.WavLMModel, dict[str, Any]])
    config = wavlm_fast.WavLMConfig.from_pretrained(folder)
    model = wavlm_fast.WavLMModel(config)
    assert_type(model.eval(), wavlm_fast.WavLMModel)
    assert_type(model.train(), wavlm_fast.WavLMModel)
    theirs: list[WavLMModel] = [model]
    assert_type(wavlm_fast.accelerate(theirs[0]), WavLMModel)


def live_models(plain: WavLMModel) -> None:
    assert_type(wavlm_fast.accelerate(plain), WavLMModel)
    assert_type(wavlm_fast.accelerate(plain, padding="exact"), WavLMModel)
    assert_type(wavlm_fast.restore(plain), WavLMModel)
    wrapped = nn.Sequential(plain)
    assert_type(wavlm_fast.accelerate(wrapped, padding=None), nn.Sequential)
    assert_type(wavlm_fast.restore(wrapped), nn.Sequential)
    assert_type(wavlm_fast.truncate(plain, layers=1), WavLMModel)
    wavlm_fast.accelerate(plain.eval(), keep_originals=False)


def installed(padding: Literal["transformers", "exact"]) -> None:
    wavlm_fast.install(padding=padding)
    wavlm_fast.uninstall()
    wavlm_fast.empty_cache()


def backends(model: wavlm_fast.WavLMModel) -> None:
    with wavlm_fast.use_backend("reference") as nothing:
        model(SAMPLES)
    assert_type(nothing, None)
    try:
        with wavlm_fast.use_backend("triton"):
            model(SAMPLES)
    except BackendUnavailable as error:
        assert_type(error, BackendUnavailable)


def reported(model: wavlm_fast.WavLMModel) -> None:
    found = wavlm_fast.report(model)
    assert_type(found, Report)
    assert_type(found.rows, tuple[Row, ...])
    assert_type(found.rows[0].reasons, tuple[str, ...])
    assert_type(found.slow_modules, dict[str, int])
    assert_type(found.padding, Literal["transformers", "exact"])
    assert_type(found.alone, str | None)
    assert_type(str(found), str)


def ragged(config: wavlm_fast.WavLMConfig) -> None:
    states = wavlm_fast.forward_ragged(wavlm_fast.WavLMModel(config).eval(), WAVEFORMS, output_hidden_states=True)
    assert_type(states, list[Wav2Vec2BaseModelOutput])
    last: Tensor | None = states[0].last_hidden_state
    assert last is not None
    spoken = wavlm_fast.WavLMForCTC(config).eval()
    assert_type(wavlm_fast.forward_ragged(spoken, WAVEFORMS), list[CausalLMOutput])
    assert_type(wavlm_fast.forward_ragged(spoken, WAVEFORMS, return_dict=False), list[tuple[Any, ...]])
    classified = wavlm_fast.WavLMForSequenceClassification(config).eval()
    assert_type(wavlm_fast.forward_ragged(classified, WAVEFORMS), list[SequenceClassifierOutput])
    framed = wavlm_fast.WavLMForAudioFrameClassification(config).eval()
    assert_type(wavlm_fast.forward_ragged(framed, WAVEFORMS), list[TokenClassifierOutput])
    voice = wavlm_fast.forward_ragged(wavlm_fast.WavLMForXVector(config).eval(), WAVEFORMS)
    assert_type(voice, list[XVectorOutput])
    embeddings: Tensor | None = voice[0].embeddings
    assert embeddings is not None


def replayed(model: wavlm_fast.WavLMModel) -> None:
    fast = wavlm_fast.graphed(model, {"input_values": SAMPLES}, clone=False)
    assert_type(fast, Graphed)
    fast(SAMPLES)
    assert_type(fast.fallbacks, Counter[str])
    assert_type(wavlm_fast.graphed(model, [{"input_values": SAMPLES}]), Graphed)


def extracted(model: nn.Module, folder: Path) -> None:
    by_name = wavlm_fast.Extractor(str(folder), what="hidden", layers=[0, -1], average=["frames"], device="cpu")
    assert_type(by_name({"audio": WAVEFORMS}), dict[str, Any])
    live = wavlm_fast.Extractor(model, layers=1, average="layers", convention="s3prl", device=torch.device("cpu"))
    assert_type(live.outputs(WAVEFORMS), list[Tensor | str | Exception])
    assert_type(live.dimensions, int)
    try:
        live({})
    except UserError as error:
        assert_type(error, UserError)


def microsofts(entries: dict[str, Any]) -> None:
    cfg = original.WavLMConfig(entries)
    assert_type(cfg.encoder_layers, int)
    model = original.WavLM(cfg)
    assert_type(model.eval(), original.WavLM)
    assert_type(model.extract_features(SAMPLES), tuple[Tensor, Tensor | None])
    (frames, layers), _ = model.extract_features(SAMPLES, output_layer=1, ret_layer_results=True)
    assert_type(frames, Tensor)
    assert_type(layers, list[tuple[Tensor, None]])
    assert_type(wavlm_fast.truncate(wavlm_fast.restore(model), 1), original.WavLM)
    assert_type(wavlm_fast.forward_ragged(wavlm_fast.accelerate(model.eval()), WAVEFORMS), list[Any])


def everything(folder: Path, entries: dict[str, Any]) -> None:
    """Run it all on a tiny checkpoint."""
    classes(folder)
    live_models(WavLMModel.from_pretrained(folder))
    installed("exact")
    model = wavlm_fast.WavLMModel.from_pretrained(folder)
    backends(model)
    reported(model)
    ragged(model.config)
    replayed(model)
    extracted(model, folder)
    microsofts(entries)
    print("wavlm_fast", wavlm_fast.__version__)
