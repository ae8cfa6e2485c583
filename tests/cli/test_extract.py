"""`wavlm-fast extract` writes the model's hidden states, whole files or none."""

import json

import numpy as np
import pytest
import soundfile
import torch
from tiny_checkpoints import tiny_config
from transformers import WavLMModel

from wavlm_fast import audio, extract
from wavlm_fast.sensitive import make_sensitive


@pytest.fixture
def recordings(tmp_path):
    """Two recordings: 16 kHz mono, and 44.1 kHz stereo."""
    generator = np.random.default_rng(0)
    soundfile.write(tmp_path / "one.wav", generator.uniform(-0.3, 0.3, 8000), 16000)
    soundfile.write(tmp_path / "two.flac", generator.uniform(-0.3, 0.3, (22050, 2)), 44100)
    return tmp_path / "one.wav", tmp_path / "two.flac"


def expected(model, path, normalise=False):
    waveform, _ = audio.load(path)
    if normalise:
        waveform = (waveform - waveform.mean()) / (waveform.var(unbiased=False) + 1e-7).sqrt()
    with torch.inference_mode():
        states = WavLMModel.from_pretrained(model).eval()(waveform[None], output_hidden_states=True).hidden_states
    return torch.cat(states).numpy()


def close(value, truth):
    np.testing.assert_allclose(value, truth, atol=2e-4)


def test_all_layers_as_npz(command, tiny, recordings, tmp_path):
    out = tmp_path / "new" / "folder"
    ended = command("extract", *recordings, "--out", out, "--model", tiny)
    assert ended.status == 0, ended
    assert sorted(path.name for path in out.iterdir()) == ["one.npz", "two.npz"]
    for path in recordings:
        found = np.load(out / f"{path.stem}.npz")
        assert found["hidden_states"].shape == (3, 24, 32)
        close(found["hidden_states"], expected(tiny, path))
        assert str(found["audio"]) == str(path)
        assert str(found["layer"]) == "all"
        assert int(found["samples"]) == 8000
        assert str(found["model"]) == str(tiny)


@pytest.mark.parametrize(("asked", "layer"), [("0", 0), ("1", 1), ("2", 2), ("-1", 2), ("-3", 0)])
def test_one_layer_as_pt(command, tiny, recordings, tmp_path, asked, layer):
    ended = command(
        "extract", recordings[0], "--out", tmp_path / "out", "--model", tiny, f"--layer={asked}", "--format", "pt"
    )
    assert ended.status == 0, ended
    found = torch.load(tmp_path / "out" / "one.pt", weights_only=True)
    assert found["layer"] == str(layer)
    assert found["hidden_states"].shape == (24, 32)
    close(found["hidden_states"].numpy(), expected(tiny, recordings[0])[layer])


def test_bfloat16_stays_in_pt_and_widens_in_npz(command, tiny, recordings, tmp_path):
    for kind in ("pt", "npz"):
        arguments = ("--out", tmp_path, "--model", tiny, "--dtype", "bf16", "--format", kind)
        assert command("extract", recordings[0], *arguments).status == 0
    pt = torch.load(tmp_path / "one.pt", weights_only=True)["hidden_states"]
    assert pt.dtype == torch.bfloat16
    npz = np.load(tmp_path / "one.npz")["hidden_states"]
    assert npz.dtype == np.float32
    np.testing.assert_array_equal(npz, pt.float().numpy())


def test_utterances_are_normalised_where_the_checkpoint_wants_it(command, recordings, tmp_path):
    model = tmp_path / "model"
    config = tiny_config(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    make_sensitive(WavLMModel(config)).save_pretrained(model)
    samples, rate = soundfile.read(recordings[0])
    soundfile.write(recordings[0], 0.1 * samples + 0.5, rate)  # an offset, to which a norm over channels is not blind
    (model / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": True})
    )
    ended = command("extract", recordings[0], "--out", tmp_path / "out", "--model", model)
    assert "normalised to zero mean and unit variance" in ended.out
    found = np.load(tmp_path / "out" / "one.npz")["hidden_states"]
    close(found, expected(model, recordings[0], normalise=True))
    assert np.abs(found - expected(model, recordings[0])).max() > 1e-3


def test_existing_files_stay_unless_forced(command, tiny, recordings, tmp_path):
    target = tmp_path / "two.npz"
    target.write_text("precious")
    ended = command("extract", *recordings, "--out", tmp_path, "--model", tiny)
    assert ended.sentence() == f"wavlm-fast extract: {target} exists already; --force overwrites it"
    assert target.read_text() == "precious"
    assert not (tmp_path / "one.npz").exists()  # refused before the first is written
    assert command("extract", *recordings, "--out", tmp_path, "--model", tiny, "--force").status == 0
    assert np.load(target)["hidden_states"].shape == (3, 24, 32)


def test_two_files_of_one_name_are_refused(command, tiny, recordings, tmp_path):
    other = tmp_path / "one.flac"
    soundfile.write(other, np.zeros(1000), 16000)
    sentence = command("extract", recordings[0], other, "--out", tmp_path, "--model", tiny).sentence()
    assert f"{recordings[0]} and {other} share {tmp_path / 'one.npz'}" in sentence


@pytest.mark.parametrize("layer", ["3", "-4"])
def test_a_layer_that_the_model_lacks(command, tiny, recordings, tmp_path, layer):
    sentence = command("extract", recordings[0], "--out", tmp_path, "--model", tiny, f"--layer={layer}").sentence()
    assert sentence.endswith(f"--layer must lie in 0..2 for this model (or -3..-1, or 'all'), got {layer}")


def test_a_layer_that_is_no_number(command, recordings, tmp_path):
    sentence = command("extract", recordings[0], "--out", tmp_path, "--layer", "last").sentence()
    assert "a layer number or 'all' is wanted, got 'last'" in sentence


def test_a_bad_file_among_good_ones_is_found_before_any_work(command, tiny, recordings, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_text("no audio")
    sentence = command("extract", recordings[0], bad, "--out", tmp_path / "out", "--model", tiny).sentence()
    assert f"{bad} cannot be read as audio" in sentence
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(command, tiny, recordings, tmp_path):
    (tmp_path / "file").write_text("")
    sentence = command("extract", recordings[0], "--out", tmp_path / "file" / "out", "--model", tiny).sentence()
    assert "the output folder" in sentence
    assert sentence.endswith("cannot be made: Not a directory")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_nothing_half_written_remains(command, tiny, recordings, tmp_path, monkeypatch, error, status):
    """Interrupted while writing the second file: the first is whole, of the second there is nothing."""
    save, calls = np.savez, []

    def interrupted(file, **arrays):
        calls.append(file)
        if len(calls) == 1:
            return save(file, **arrays)
        file.write(b"half of a fi")
        file.flush()
        raise error

    monkeypatch.setattr(extract.np, "savez", interrupted)
    out = tmp_path / "out"
    ended = command("extract", *recordings, "--out", out, "--model", tiny)
    assert ended.status == status
    assert "Traceback" not in ended.err
    assert [path.name for path in out.iterdir()] == ["one.npz"]
    assert np.load(out / "one.npz")["hidden_states"].shape == (3, 24, 32)


def test_an_interrupted_overwrite_keeps_the_old_file(tmp_path):
    target = tmp_path / "kept"
    target.write_bytes(b"old")

    def save(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract.write_atomically(target, save)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_written_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    extract.write_atomically(tmp_path / "written", lambda file: file.write(b"x"))
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
