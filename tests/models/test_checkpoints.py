"""Checkpoints go both ways between transformers and ours, byte for byte."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers
from wavlm_cases import (
    HEADS,
    MODELS,
    TRANSFORMERS_5,
    assert_same,
    check_forward,
    fast_like,
    is_one_of,
    ours_only,
    plain_model,
    small_config,
    subject,
    waveforms,
)

every_model = pytest.mark.parametrize("name", MODELS)
both_forms = pytest.mark.parametrize("form", ["base", "large"])


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@every_model
@both_forms
def test_saved_files_are_those_of_transformers(name, form, tmp_path):
    plain = plain_model(name, small_config(form))
    ours = fast_like(plain)
    with torch.no_grad():
        ours(waveforms())
    plain.save_pretrained(tmp_path / "plain")
    ours.save_pretrained(tmp_path / "ours")
    expected = contents(tmp_path / "plain")
    assert {"config.json", "model.safetensors"} <= set(expected)
    assert contents(tmp_path / "ours") == expected
    assert json.loads(expected["config.json"])["architectures"] == [name]


@every_model
@both_forms
def test_each_loads_what_the_other_saved(name, form, tmp_path):
    plain = plain_model(name, small_config(form))
    plain.save_pretrained(tmp_path / "plain")
    ours, info = getattr(subject, name).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values())
    assert is_one_of(ours, name) and not ours.training
    assert_same(ours.state_dict(), plain.state_dict())
    check_forward(plain, waveforms(), ours)
    ours.save_pretrained(tmp_path / "ours")
    assert contents(tmp_path / "ours")["model.safetensors"] == contents(tmp_path / "plain")["model.safetensors"]
    back, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert_same(back.state_dict(), plain.state_dict())


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {"variant": "best"},
                                     {"max_shard_size": "20KB", "variant": "best"}])
def test_shards_and_variants(options, tmp_path):
    plain = plain_model("WavLMForXVector")
    plain.save_pretrained(tmp_path / "plain", **options)
    fast_like(plain).save_pretrained(tmp_path / "ours", **options)
    assert contents(tmp_path / "ours") == contents(tmp_path / "plain")
    assert len(contents(tmp_path / "ours")) > (3 if "max_shard_size" in options else 1)
    load = {"variant": "best"} if "variant" in options else {}
    ours = subject.WavLMForXVector.from_pretrained(tmp_path / "plain", **load)
    assert_same(ours.state_dict(), plain.state_dict())
    check_forward(plain, waveforms(), ours)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_bin_checkpoint(sharded, tmp_path):
    plain = plain_model("WavLMForCTC")
    plain.config.save_pretrained(tmp_path)
    state = plain.state_dict()
    if sharded:
        names = list(state)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, keys in parts.items():
            torch.save({k: state[k] for k in keys}, tmp_path / file)
        index = {"metadata": {}, "weight_map": {k: file for file, keys in parts.items() for k in keys}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    ours = subject.WavLMForCTC.from_pretrained(tmp_path)
    assert_same(ours.state_dict(), state)
    check_forward(plain, waveforms(), ours)


def old_names(state):
    parametrized = "parametrizations.weight.original"
    return {
        k.replace(f"{parametrized}0", "weight_g").replace(f"{parametrized}1", "weight_v"): v.contiguous()
        for k, v in state.items()
    }


@pytest.mark.parametrize("file", ["bin", "safetensors"])
def test_old_names_of_the_weight_norm(file, tmp_path):
    # Published checkpoints carry weight_g and weight_v.
    from safetensors.torch import save_file

    plain = plain_model("WavLMModel")
    plain.config.save_pretrained(tmp_path)
    renamed = old_names(plain.state_dict())
    assert "encoder.pos_conv_embed.conv.weight_g" in renamed
    if file == "bin":
        torch.save(renamed, tmp_path / "pytorch_model.bin")
    else:
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, info = subject.WavLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(ours.state_dict(), plain.state_dict())
    check_forward(plain, waveforms(), ours)
    direct = subject.WavLMModel(small_config())
    direct.load_state_dict(renamed)
    assert_same(direct.state_dict(), plain.state_dict())


def test_old_names_given_to_a_model_that_has_run():
    plain = plain_model("WavLMModel")
    ours = fast_like(plain_model("WavLMModel", seed=1))
    with torch.no_grad():
        ours(waveforms())
    ours.load_state_dict(old_names(plain.state_dict()))
    check_forward(plain, waveforms(), ours)


DTYPE_WORDS = ("dtype", "torch_dtype")


@pytest.mark.parametrize("word", DTYPE_WORDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, "bfloat16", "auto"])
def test_from_pretrained_in_a_dtype(word, dtype, tmp_path):
    plain_model("WavLMForCTC").to(torch.bfloat16).save_pretrained(tmp_path)
    plain = transformers.WavLMForCTC.from_pretrained(tmp_path, **{word: dtype})
    ours = subject.WavLMForCTC.from_pretrained(tmp_path, **{word: dtype})
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in plain.named_parameters()}
    assert ours.dtype == plain.dtype
    assert_same(ours.state_dict(), plain.state_dict())
    with torch.no_grad():
        assert ours(waveforms(dtype=ours.dtype)).logits.dtype == ours.dtype


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"wavlm": "cpu", "lm_head": "cpu"}])
def test_from_pretrained_with_a_device_map(device_map, tmp_path):
    pytest.importorskip("accelerate")
    plain = plain_model("WavLMForCTC")
    plain.save_pretrained(tmp_path)
    ours = subject.WavLMForCTC.from_pretrained(tmp_path, device_map=device_map)
    assert all(p.device.type == "cpu" for p in ours.parameters())
    check_forward(plain, waveforms(), ours)


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"low_cpu_mem_usage": False},
                                     {"use_safetensors": True}, {"attn_implementation": "eager"},
                                     {"local_files_only": True}])
def test_other_loading_options(options, tmp_path):
    plain = plain_model("WavLMForCTC")
    plain.save_pretrained(tmp_path)
    check_forward(plain, waveforms(), subject.WavLMForCTC.from_pretrained(tmp_path, **options))


def test_config_changes_at_loading(tmp_path):
    plain_model("WavLMForSequenceClassification").save_pretrained(tmp_path)
    changes = {"hidden_dropout": 0.25, "layerdrop": 0.5, "mask_time_prob": 0.0}
    for module in (transformers, subject):
        model = module.WavLMForSequenceClassification.from_pretrained(tmp_path, **changes)
        assert {k: getattr(model.config, k) for k in changes} == changes
        assert model.wavlm.encoder.layers[0].dropout.p == 0.25
    config = subject.WavLMConfig.from_pretrained(tmp_path, output_hidden_states=True)
    assert subject.WavLMForSequenceClassification.from_pretrained(tmp_path, config=config)(waveforms()).hidden_states


def initialised(state):
    """Without what version 4 leaves in uninitialised memory when a checkpoint lacks it."""
    forgotten = ("objective.weight", "masked_spec_embed", "gru_rel_pos_const", "rel_attn_embed.weight")
    return {name: value for name, value in state.items() if TRANSFORMERS_5 or not name.endswith(forgotten)}


@pytest.mark.parametrize("name", HEADS)
@both_forms
def test_a_missing_head_is_initialised_as_in_transformers(name, form, tmp_path):
    plain_model("WavLMModel", small_config(form)).save_pretrained(tmp_path)
    states, missing = [], []
    for module in (transformers, subject):
        torch.manual_seed(21)
        model, info = getattr(module, name).from_pretrained(tmp_path, output_loading_info=True)
        states.append(model.state_dict())
        missing.append(info)
    assert set(missing[0]["missing_keys"]) == set(missing[1]["missing_keys"]) != set()
    assert_same(initialised(states[1]), initialised(states[0]))


@pytest.mark.parametrize("name", HEADS)
def test_a_head_into_the_base_model(name, tmp_path):
    plain = plain_model(name)
    plain.save_pretrained(tmp_path)
    ours = subject.WavLMModel.from_pretrained(tmp_path)
    assert_same(ours.state_dict(), plain.wavlm.state_dict())


def test_a_missing_base_is_initialised_as_in_transformers(tmp_path):
    plain = plain_model("WavLMModel", small_config(mask_time_prob=0.1))
    dropped = (
        "masked_spec_embed",
        "feature_projection.projection.weight",
        "encoder.layers.0.attention.rel_attn_embed.weight",
        "encoder.layers.1.attention.gru_rel_pos_const",
        "encoder.layers.2.final_layer_norm.weight",
    )
    plain.config.save_pretrained(tmp_path)
    torch.save({k: v for k, v in plain.state_dict().items() if k not in dropped}, tmp_path / "pytorch_model.bin")
    states = []
    for module in (transformers, subject):
        torch.manual_seed(22)
        states.append(module.WavLMModel.from_pretrained(tmp_path).state_dict())
    assert_same(initialised(states[1]), initialised(states[0]))


def test_ignore_mismatched_sizes(tmp_path):
    plain_model("WavLMForSequenceClassification").save_pretrained(tmp_path)
    states = []
    for module in (transformers, subject):
        cls = module.WavLMForSequenceClassification
        with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
            cls.from_pretrained(tmp_path, num_labels=9)
        torch.manual_seed(23)
        model, info = cls.from_pretrained(
            tmp_path, num_labels=9, ignore_mismatched_sizes=True, output_loading_info=True
        )
        mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
        assert mismatched == {"classifier.weight", "classifier.bias"}
        states.append(model.state_dict())
    assert_same(states[1], states[0])


@ours_only
def test_an_accelerated_model_saves_what_it_saved_before(tmp_path):
    model = plain_model("WavLMForCTC")
    model.save_pretrained(tmp_path / "before")
    subject.accelerate(model).save_pretrained(tmp_path / "fast")
    subject.restore(model).save_pretrained(tmp_path / "restored")
    assert contents(tmp_path / "before") == contents(tmp_path / "fast") == contents(tmp_path / "restored")


def test_loading_is_quiet(tmp_path, caplog):
    plain_model("WavLMForCTC").save_pretrained(tmp_path)
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            subject.WavLMForCTC.from_pretrained(tmp_path)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not [r for r in caplog.records if "newly initialized" in r.getMessage() or "not used" in r.getMessage()]


def test_a_state_dict_has_no_derived_weights():
    plain = plain_model("WavLMForXVector")
    ours = fast_like(plain)
    with torch.no_grad():
        ours(waveforms())
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in plain.named_buffers()]
    missing = ours.load_state_dict(plain.state_dict(), strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys


@pytest.mark.skipif(not TRANSFORMERS_5, reason="version 4 loads into real memory first")
def test_construction_on_the_meta_device():
    with torch.device("meta"):
        ours = subject.WavLMForXVector(small_config())
    assert all(p.is_meta for p in ours.parameters())
    plain = plain_model("WavLMForXVector")
    ours.load_state_dict(plain.state_dict(), assign=True)
    check_forward(plain, waveforms(), ours.eval())
