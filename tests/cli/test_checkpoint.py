"""--model: what is taken, and one sentence for what is not."""

import contextlib
import json
import shutil

import pytest
import torch
from tiny_checkpoints import tiny_config
from transformers import WavLMForCTC, WavLMModel

import wavlm_fast
from wavlm_fast import checkpoint
from wavlm_fast.errors import UserError


def refused(name):
    with pytest.raises(UserError) as raised:
        checkpoint.load(str(name))
    assert "\n" not in str(raised.value)
    assert str(name) in str(raised.value)
    return str(raised.value)


@pytest.fixture
def copied(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copied")


def test_a_folder_is_loaded_as_transformers_own(tiny):
    model, source = checkpoint.load(str(tiny))
    assert type(model) is WavLMModel
    assert not model.training
    assert not source.normalise
    saved = WavLMModel.from_pretrained(tiny).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_a_model_with_a_head_is_loaded_without_it(tmp_path):
    head = WavLMForCTC(tiny_config(vocab_size=12))
    head.save_pretrained(tmp_path)
    model, _ = checkpoint.load(str(tmp_path))
    weights = head.wavlm.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_while_installed_it_is_still_transformers_own(tiny):
    wavlm_fast.install()
    try:
        model, _ = checkpoint.load(str(tiny))
    finally:
        wavlm_fast.uninstall()
    assert type(model) is WavLMModel
    fast = checkpoint.accelerated(model)
    assert type(model) is WavLMModel
    assert type(fast) is not WavLMModel


def test_missing_paths(tmp_path):
    for name in (tmp_path / "nothing", "./nothing/here", "a/b/c"):
        assert refused(name) == f"a model folder or hub id is wanted, but {name} does not exist"


def test_a_file(copied):
    path = copied / "config.json"
    assert refused(path) == f"a model folder or hub id is wanted, but {path} is a file"


def test_a_folder_without_a_config(tmp_path):
    assert refused(tmp_path) == f"a model folder is wanted, but {tmp_path} has no config.json"


def test_another_architecture(other_architecture):
    assert refused(other_architecture) == f"a WavLM checkpoint is wanted, but {other_architecture} is wav2vec2"


def test_a_config_that_is_no_json(copied):
    (copied / "config.json").write_text("{")
    assert refused(copied).startswith(f"the model {copied} cannot be read: ")


@pytest.mark.parametrize("content", ["[1]", '"wavlm"', "3", "null", "true"])
def test_a_config_that_holds_no_object(copied, content):
    (copied / "config.json").write_text(content)
    assert refused(copied) == f"a config.json that holds an object is wanted, but that of {copied} holds something else"


@pytest.mark.parametrize("content", [b"", b"\xe9", b"\xef\xbb\xbf{}", b"\0" * 9, "{}".encode("utf-16"), b"[" * 100_000])
def test_a_config_that_cannot_be_decoded(copied, content):
    (copied / "config.json").write_bytes(content)
    assert refused(copied).startswith(f"the model {copied} cannot be read: ")


def test_a_config_that_is_a_folder(copied):
    (copied / "config.json").unlink()
    (copied / "config.json").mkdir()
    assert refused(copied) == f"a model folder is wanted, but {copied} has no config.json"


@pytest.mark.parametrize("value", [None, "x", [1, "x"], {"a": 1}, -1])
@pytest.mark.parametrize("key", ["hidden_size", "conv_kernel", "num_attention_heads", "hidden_act", "layer_norm_eps"])
def test_a_config_whose_entries_are_of_another_kind(copied, key, value):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, key: value}))
    with contextlib.suppress(UserError):  # not everything matters to every version
        checkpoint.load(str(copied))


@pytest.mark.parametrize("content", [b"[1]", b'"x"', b"null", b"{", b"", b"\xe9", b"[" * 100_000])
def test_a_preprocessor_config_that_does_not_say_is_not_taken_for_none(copied, content):
    (copied / "preprocessor_config.json").write_bytes(content)
    assert "preprocessor_config.json" in refused(copied)


@pytest.mark.parametrize("value", ["false", None, 1])
def test_whether_to_normalise_is_true_or_false(copied, value):
    (copied / "preprocessor_config.json").write_text(json.dumps({"do_normalize": value}))
    assert refused(copied) == (
        f"do_normalize in the preprocessor_config.json of {copied} must be true or false, got {value!r}"
    )


@pytest.mark.parametrize(("content", "normalises"), [({}, True), ({"do_normalize": False}, False)])
def test_the_preprocessor_config_says_whether_to_normalise(copied, content, normalises):
    (copied / "preprocessor_config.json").write_text(json.dumps(content))
    assert checkpoint.source(str(copied)).normalise == normalises


def test_a_config_whose_convolutions_disagree(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "conv_stride": [5, 2]}))
    assert refused(copied).startswith(f"the config of {copied} is not valid: ")


def test_weights_that_are_missing_or_broken(copied):
    (copied / "model.safetensors").write_bytes(b"broken")
    assert refused(copied).startswith(f"the WavLM checkpoint {copied} cannot be loaded: ")
    (copied / "model.safetensors").unlink()
    assert refused(copied).startswith(f"the WavLM checkpoint {copied} cannot be loaded: ")


def test_weights_that_are_incomplete(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert refused(copied).startswith(
        f"a complete WavLM checkpoint is wanted, but {copied} lacks 19 parameters, such as "
    )


def test_weights_of_another_shape(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    refused(copied)


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    def offline(name, **options):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(checkpoint.transformers.PretrainedConfig, "get_config_dict", offline)
    assert refused("somebody/wavlm") == (
        "the model somebody/wavlm cannot be found locally or fetched from the hub: We couldn't connect to the hub"
    )


def test_seeded_weights_leave_the_global_generator_alone(monkeypatch):
    monkeypatch.setattr(checkpoint, "WavLMConfig", tiny_config)
    before = torch.get_rng_state()
    first, source = checkpoint.load(None)
    assert torch.equal(torch.get_rng_state(), before)
    second, _ = checkpoint.load(None)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert source.name is None
