"""`wavlm-fast demo` shows what it promises and fails when a layer is wrong."""

import json

import numpy as np
import pytest
import soundfile
import torch
from tiny_checkpoints import tiny_config
from transformers import WavLMModel

from wavlm_fast import audio, checkpoint, memory


@pytest.fixture
def broken(monkeypatch):
    """Makes our copy of the model wrong: broken(change) with change(model)."""
    right = checkpoint.accelerated

    def install(change):
        def accelerated(model):
            fast = right(model)
            with torch.no_grad():
                change(fast)
            return fast

        monkeypatch.setattr(checkpoint, "accelerated", accelerated)

    return install


def test_demo_on_the_clip(command, tiny, no_probe, tmp_path):
    results = tmp_path / "results.json"
    ended = command("demo", "--model", tiny, "--threads", "1", "--json", results)
    assert ended.status == 0, ended
    for said in (str(tiny), "7.10 s, FLAC PCM_16, 16000 Hz, mono", "[1, 113600] -> 354 frames", "encoder_layer"):
        assert said in ended.out
    assert "EQUAL: all 5 layers" in ended.out
    found = json.loads(results.read_text())
    assert found["ok"]
    assert found["threads"] == 1
    (result,) = found["results"]
    assert [row["layer"] for row in result["layers"]] == ["conv features", "embedding", "layer 1", "layer 2", "output"]
    for row in result["layers"]:
        for errors in (row["all"], row["ordinary"]):
            assert 0 < errors["ours"] <= errors["allowed"] < 1e-3
            assert 0 < errors["theirs"] < 1e-4
        assert row["ordinary"]["theirs"] <= row["all"]["theirs"]
        assert row["ok"]
    for provider in ("transformers", "wavlm_fast"):
        timing = result["seconds"][provider]
        assert 0 < timing["p10"] <= timing["median"] <= timing["p90"]
        assert timing["rounds"] >= 5
        assert result["peak_bytes"][provider] == {"total": 3 * 2**20, "forward": 2**20}
    assert result["times_faster"]["median"] > 0
    assert [provider for provider, _ in no_probe] == ["transformers", "wavlm_fast"]
    assert no_probe[0][1]["samples"] == 113600


def test_output_in_a_pipe_is_plain_and_of_stable_width(command, tiny, no_probe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = command("demo", "--model", tiny, "--max-seconds", "1").out.splitlines()
    assert not any("\x1b" in line or line != line.rstrip() for line in lines)
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 7 + 4
    assert len({len(line) for line in tables[:7]}) == 1
    assert all(len(line) <= 120 for line in tables)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.encoder.layers[0].attention.rel_attn_embed.weight.zero_(),
        lambda model: model.encoder.layers[1].attention.gru_rel_pos_const.zero_(),
        lambda model: model.encoder.layers[1].feed_forward.output_dense.bias[0].add_(1e-2),
        lambda model: model.feature_projection.layer_norm.weight.mul_(float("nan")),
    ],
    ids=["no relative bias", "no gate", "a small shift", "NaN"],
)
def test_a_wrong_layer_fails(command, tiny, no_probe, broken, tmp_path, change):
    broken(change)
    results = tmp_path / "results.json"
    ended = command("demo", "--model", tiny, "--max-seconds", "1", "--json", results)
    assert ended.status == 1
    assert "FAILED: " in ended.out
    assert "EQUAL" not in ended.out
    found = json.loads(results.read_text())  # NaN would not be JSON
    assert not found["ok"]
    assert not found["results"][0]["layers"][-1]["ok"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_held_to_half_precision(command, tiny, no_probe, broken, dtype):
    assert command("demo", "--model", tiny, "--dtype", dtype, "--max-seconds", "2").status == 0
    broken(lambda model: model.feature_extractor.conv_layers[1].conv.weight.mul_(-3))
    assert command("demo", "--model", tiny, "--dtype", dtype, "--max-seconds", "2").status == 1


def test_audio_of_the_user(command, tiny, no_probe, tmp_path):
    rate = 44100
    stereo = np.random.default_rng(0).uniform(-0.3, 0.3, (3 * rate, 2))
    for name in ("one.ogg", "two.wav"):
        soundfile.write(tmp_path / name, stereo, rate)
    ended = command("demo", tmp_path / "one.ogg", tmp_path / "two.wav", "--model", tiny, "--max-seconds", "1.5")
    assert ended.status == 0, ended
    assert "one.ogg: 3.00 s, OGG VORBIS, 44100 Hz, stereo" in ended.out
    assert "two.wav: 3.00 s, WAV PCM_16, 44100 Hz, stereo" in ended.out
    assert ended.out.count("waveform [1, 24000] -> 74 frames (the first 1.50 s; --max-seconds takes more)") == 2
    assert "EQUAL: all 10 layers" in ended.out
    assert [options["audio"] for _, options in no_probe] == [str(tmp_path / "one.ogg")] * 2 + [
        str(tmp_path / "two.wav")
    ] * 2


def test_bad_audio_is_refused_before_anything_is_compared(command, tiny, tmp_path):
    short = tmp_path / "short.wav"
    soundfile.write(short, np.zeros(10), 16000)
    ended = command("demo", audio.clip(), short, "--model", tiny)
    assert "at least 400 samples at 16000 Hz are needed" in ended.sentence()
    assert ended.out == ""


def test_the_receptive_field_is_the_model_s(command, tmp_path, no_probe):
    folder = tmp_path / "wide"
    WavLMModel(tiny_config(conv_kernel=(10, 3, 3, 3, 3, 2, 4))).save_pretrained(folder)
    short = tmp_path / "short.wav"
    soundfile.write(short, np.zeros(719), 16000)
    assert "at least 720 samples" in command("demo", short, "--model", folder).sentence()


def test_json_to_standard_output_is_all_there_is(command, tiny, no_probe):
    ended = command("demo", "--model", tiny, "--max-seconds", "1", "--json", "-")
    assert json.loads(ended.out)["ok"]
    assert "EQUAL" in ended.err


def test_json_that_cannot_be_written(command, tiny, no_probe, tmp_path):
    ended = command("demo", "--model", tiny, "--max-seconds", "1", "--json", tmp_path / "missing" / "results.json")
    assert "results.json cannot be written: No such file or directory" in ended.err
    assert ended.status == 2


def test_without_a_model_it_says_what_it_runs(command, no_probe, monkeypatch, tiny):
    """The seeded model, shrunk: WavLM-base itself takes its time."""
    monkeypatch.setattr(checkpoint, "WavLMConfig", tiny_config)
    ended = command("demo", "--max-seconds", "1")
    assert ended.status == 0, ended
    assert "WavLM-base, seeded sensitive weights (no --model given: not a trained model)" in ended.out


def test_memory_is_measured_in_fresh_processes(tiny):
    """transformers holds [T, T] matrices: twice the frames cost it more than twice the memory."""
    options = {"audio": None, "model": str(tiny), "threads": 1}
    short, long = (memory.measure("transformers", samples=s * 16000, **options) for s in (10, 40))
    assert short.total > 100 * 2**20  # Python and torch
    assert 0 < short.forward < long.forward < long.total
    assert long.forward > 4 * short.forward
    ours = memory.measure("wavlm_fast", samples=10 * 16000, **options)
    assert 0 < ours.forward < ours.total
    freed = memory.measure("wavlm_fast", samples=10 * 16000, keep_originals=False, **options)
    assert freed.forward < ours.forward  # what is packed is packed before


def test_a_memory_process_that_fails_says_so(tmp_path):
    with pytest.raises(memory.UserError, match=r"memory of transformers ended with status 1: .*does not exist"):
        memory.measure("transformers", audio=None, samples=16000, model=str(tmp_path / "no" / "model"))
