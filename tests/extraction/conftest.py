"""Tiny checkpoints on disk, with every head, and waveforms."""

import json

import pytest
import torch
import transformers
from transformers import WavLMConfig

from wavlm_fast.sensitive import make_sensitive

CLASSES = (
    "WavLMModel",
    "WavLMForXVector",
    "WavLMForSequenceClassification",
    "WavLMForAudioFrameClassification",
    "WavLMForCTC",
)
FORMS = {
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}


def tiny(form, **options):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": (16,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "tdnn_dim": (16, 16, 16, 16, 24),
        "xvector_output_dim": 8,
        "classifier_proj_size": 16,
        "num_labels": 3,
        "vocab_size": 8,
        "pad_token_id": 0,
    }
    return WavLMConfig(**{**sizes, **FORMS[form], **options})


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of checkpoints by form and class; those of CTC with a tokenizer."""
    folders = {}
    for form in FORMS:
        for name in CLASSES:
            folder = tmp_path_factory.mktemp(f"{form}-{name}")
            make_sensitive(getattr(transformers, name)(tiny(form))).save_pretrained(folder)
            kind = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": form == "large"}
            (folder / "preprocessor_config.json").write_text(json.dumps(kind))
            if name == "WavLMForCTC":
                tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C"]
                (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
                transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json").save_pretrained(folder)
            folders[form, name] = str(folder)
    return folders


@pytest.fixture(scope="session")
def waveforms():
    """Utterances of very different lengths, not in order."""
    generator = torch.Generator().manual_seed(3)
    return [0.1 * torch.randn(n, generator=generator) for n in (4000, 16000, 700, 6400, 9001)]


@pytest.fixture(scope="session")
def plain():
    """plain(folder, class) -> transformers' own model of a checkpoint."""
    loaded = {}

    def load(folder, name="WavLMModel"):
        if folder not in loaded:
            loaded[folder] = getattr(transformers, name).from_pretrained(folder).eval()
        return loaded[folder]

    return load

