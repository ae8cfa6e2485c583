"""What a page finds: a hub cache of tiny models under the real ids, and a folder with audio and checkpoints in it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import soundfile
import transformers
from transformers import PreTrainedModel, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

from wavlm_fast import audio, cli
from wavlm_fast.sensitive import make_sensitive

sys.path.append(str(Path(__file__).parents[1] / "cli"))
from tiny_checkpoints import tiny_config

# So many layers that pages can ask for the sixth; each takes its time to export and compile.
_LARGE = {"num_hidden_layers": 9, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
_BASE = {"num_hidden_layers": 7}
_VECTORS = {"tdnn_dim": (16, 16, 16, 16, 24), "xvector_output_dim": 12, "num_labels": 4}
CTC = "patrickvonplaten/wavlm-libri-clean-100h-base-plus"
_LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", *"abcdefghijklmnopqrstuvwxyz"]
# Hub id -> class, what differs from the tiny configuration, whether utterances are normalised.
MODELS = {
    "microsoft/wavlm-base": ("WavLMModel", _BASE, False),
    "microsoft/wavlm-base-plus": ("WavLMModel", _BASE, False),
    "microsoft/wavlm-large": ("WavLMModel", _LARGE, True),
    "microsoft/wavlm-base-sv": ("WavLMForXVector", _BASE | _VECTORS, False),
    "microsoft/wavlm-base-plus-sv": ("WavLMForXVector", _BASE | _VECTORS, False),
    "microsoft/wavlm-base-sd": ("WavLMForAudioFrameClassification", _BASE | {"num_labels": 2}, False),
    "microsoft/wavlm-base-plus-sd": ("WavLMForAudioFrameClassification", _BASE | {"num_labels": 2}, False),
    CTC: ("WavLMForCTC", _BASE | {"vocab_size": len(_LETTERS), "pad_token_id": 0}, True),
}


def write_hub(cache: Path) -> None:
    """Lay the models down as huggingface_hub keeps what it has fetched."""
    for name, (architecture, options, normalise) in MODELS.items():
        commit = hashlib.sha1(name.encode()).hexdigest()
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        folder.joinpath("refs").mkdir(parents=True)
        folder.joinpath("refs", "main").write_text(commit)
        _model(architecture, options).save_pretrained(snapshot)
        extractor = Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=normalise)
        if name == CTC:
            _processor(extractor, snapshot)
        else:
            extractor.save_pretrained(snapshot)


def _model(architecture: str, options: dict) -> PreTrainedModel:
    return make_sensitive(getattr(transformers, architecture)(tiny_config(**options)))


def _processor(extractor: Wav2Vec2FeatureExtractor, snapshot: Path) -> None:
    vocabulary = snapshot / "vocab.json"
    vocabulary.write_text(json.dumps({letter: i for i, letter in enumerate(_LETTERS)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(vocabulary), word_delimiter_token="|")
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(snapshot)


def write_folder(folder: Path) -> None:
    """What lies in the folder in which a page's blocks run: speech.wav, corpus/ and a checkpoint of Microsoft's."""
    waveform, rate = soundfile.read(audio.clip())
    soundfile.write(folder / "speech.wav", waveform, rate, "PCM_16")
    for name, begin, end in (("anna/1.wav", 0.5, 1.5), ("anna/2.wav", 2.0, 2.8), ("ben/3.wav", 3.0, 4.2)):
        file = folder / "corpus" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, waveform[int(begin * rate) : int(end * rate)], rate, "PCM_16")
    assert cli.main(["convert", "--no-check", "microsoft/wavlm-base-plus", str(folder / "WavLM-Base+.pt")]) == 0
