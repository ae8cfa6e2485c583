"""`wavlm-fast extract` writes features of whole corpora; what is done stays, what failed is named."""

import hashlib
import io
import json
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from tiny_checkpoints import tiny_config
from transformers import WavLMModel

from wavlm_fast import audio, checkpoint, files
from wavlm_fast.extraction import worker, writers
from wavlm_fast.sensitive import make_sensitive


@pytest.fixture
def recordings(tmp_path):
    """Two recordings: 16 kHz mono, and 44.1 kHz stereo."""
    generator = np.random.default_rng(0)
    soundfile.write(tmp_path / "one.wav", generator.uniform(-0.3, 0.3, 8000), 16000)
    soundfile.write(tmp_path / "two.flac", generator.uniform(-0.3, 0.3, (22050, 2)), 44100)
    return tmp_path / "one.wav", tmp_path / "two.flac"


@pytest.fixture
def corpus(tmp_path):
    """A tree of a dozen recordings, of which some share a name and some have strange ones."""
    root = tmp_path / "corpus"
    generator = np.random.default_rng(1)
    for name in ("a/1", "a/2", "b/1", "b/two words", "b/new\nline", "b/c/dé", "b/c/x.y", "b/c/1", "c", "d", "e", "f"):
        path = root / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, generator.uniform(-0.3, 0.3, int(generator.uniform(1000, 20000))), 16000)
    return root


def expected(model, path, normalise=False):
    waveform, _ = audio.load(path)
    if normalise:
        waveform = (waveform - waveform.mean()) / (waveform.var(unbiased=False) + 1e-7).sqrt()
    with torch.inference_mode():
        out = WavLMModel.from_pretrained(model).eval()(waveform[None], output_hidden_states=True)
    return torch.cat([*out.hidden_states[:-1], out.last_hidden_state]).numpy()


def close(value, truth):
    np.testing.assert_allclose(value, truth, atol=2e-4)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest_of(out):
    settings, *records = lines(out / "manifest.jsonl")
    return settings["settings"], records


def tree(folder):
    """The bytes of every file, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def features(out):
    return {name: data for name, data in tree(out).items() if not name.endswith(".jsonl") and "settings" not in name}


def test_a_file_for_each_utterance_and_a_manifest(command, tiny, corpus, tmp_path):
    out = tmp_path / "new" / "folder"
    ended = command("extract", corpus, "--out", out, "--model", tiny, "--layer", "1")
    assert ended.status == 0, ended
    settings, records = manifest_of(out)
    assert settings["layers"] == [1]
    assert settings["model"] == str(tiny)
    assert [r["id"] for r in records] == sorted(r["id"] for r in records)
    assert len(records) == 12
    for record in records:
        path = corpus / f"{record['id']}.wav"
        found = np.load(out / record["file"])
        assert record["file"] == f"{record['id']}.npy"
        assert record["audio"] == str(path)
        assert record["shape"] == list(found.shape)
        assert record["frames"] == len(found)
        assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert record["seconds"] == soundfile.info(path).frames / 16000
        close(found, expected(tiny, path)[1])
    assert not (out / "errors.jsonl").exists()


def test_all_layers_as_npz(command, tiny, recordings, tmp_path):
    out = tmp_path / "out"
    ended = command("extract", *recordings, "--out", out, "--model", tiny, "--format", "npz")
    assert ended.status == 0, ended
    for path in recordings:
        found = np.load(out / f"{path.stem}.npz")
        assert found["hidden_states"].shape == (3, 24, 32)
        close(found["hidden_states"], expected(tiny, path))
        assert str(found["audio"]) == str(path)
        assert str(found["layer"]) == "all"
        assert str(found["model"]) == str(tiny)


@pytest.mark.parametrize(("asked", "layer"), [("0", 0), ("1", 1), ("2", 2), ("-1", 2), ("-3", 0)])
def test_one_layer_as_pt(command, tiny, recordings, tmp_path, asked, layer):
    out = tmp_path / "out"
    arguments = ("--out", out, "--model", tiny, f"--layer={asked}", "--format", "pt", "--dtype-out", "float16")
    assert command("extract", recordings[0], *arguments).status == 0
    found = torch.load(out / "one.pt", weights_only=True)
    assert found.dtype == torch.float16
    np.testing.assert_allclose(found.float(), expected(tiny, recordings[0])[layer], atol=2e-3, rtol=2e-3)
    assert (out / "one.pt").stat().st_size < 24 * 32 * 2 + 2000  # not the storage of which it is a view


def test_bfloat16_stays_in_pt_and_widens_in_npy(command, tiny, recordings, tmp_path):
    for kind in ("pt", "npy"):
        arguments = ("--out", tmp_path / kind, "--model", tiny, "--dtype", "bf16", "--format", kind)
        assert command("extract", recordings[0], *arguments).status == 0
    pt = torch.load(tmp_path / "pt" / "one.pt", weights_only=True)
    assert pt.dtype == torch.bfloat16
    npy = np.load(tmp_path / "npy" / "one.npy")
    assert npy.dtype == np.float32
    np.testing.assert_array_equal(npy, pt.float().numpy())


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
    found = np.load(tmp_path / "out" / "one.npy")
    close(found, expected(model, recordings[0], normalise=True))
    assert np.abs(found - expected(model, recordings[0])).max() > 1e-3


def arguments_of(corpus, tiny, out, *more):
    return ("extract", corpus, "--out", out, "--model", tiny, "--layer", "1", "--batch-seconds", "1.5", *more)


def test_a_model_is_loaded_once_and_its_config_is_not_read_for_every_utterance(
    command, tiny, corpus, tmp_path, monkeypatch
):
    counts = dict.fromkeys(("load", "config"), 0)

    def counted(name, call):
        def counting(*args, **kwargs):
            counts[name] += 1
            return call(*args, **kwargs)

        return counting

    for name in counts:
        monkeypatch.setattr(checkpoint, name, counted(name, getattr(checkpoint, name)))
    assert command(*arguments_of(corpus, tiny, tmp_path / "out")).status == 0
    assert counts["load"] == 1
    assert counts["config"] < 12


def test_weights_that_cannot_be_loaded_are_no_fault_of_the_audio(command, tiny, corpus, tmp_path):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    ended = command(*arguments_of(corpus, broken, tmp_path / "out"))
    assert ended.status == 2
    assert "the WavLM checkpoint" in ended.err and "cannot be loaded" in ended.err
    assert not (tmp_path / "out" / "errors.jsonl").exists()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of few utterances, so that a small corpus has several."""
    monkeypatch.setattr("wavlm_fast.extract._MOST_SECONDS", 2.0)


@pytest.mark.parametrize("kind", ["npy", "webdataset"])
def test_the_same_command_again_does_nothing(command, tiny, corpus, tmp_path, small_blocks, monkeypatch, kind):
    out = tmp_path / "out"
    assert command(*arguments_of(corpus, tiny, out, "--format", kind)).status == 0
    before, times = tree(out), {p: p.stat().st_mtime_ns for p in out.rglob("*.npy")}
    monkeypatch.setattr(worker.Worker, "computed", None)
    ended = command(*arguments_of(corpus, tiny, out, "--format", kind))
    assert ended.status == 0
    assert "0 extracted, 12 kept, 0 failed" in ended.out
    assert tree(out) == before
    assert all(p.stat().st_mtime_ns == time for p, time in times.items())


@pytest.mark.parametrize("kind", ["npy", "webdataset"])
def test_what_is_lost_is_extracted_again(command, tiny, corpus, tmp_path, small_blocks, kind):
    out = tmp_path / "out"
    command(*arguments_of(corpus, tiny, out, "--format", kind))
    before = tree(out)
    victim = next(out.rglob("*.npy" if kind == "npy" else "*.tar"))
    victim.write_bytes(victim.read_bytes()[:-1])
    ended = command(*arguments_of(corpus, tiny, out, "--format", kind))
    assert " 0 extracted" not in ended.out
    assert tree(out) == before


def test_a_longer_list_adds_what_is_new(command, tiny, corpus, tmp_path, small_blocks):
    out = tmp_path / "out"
    late = [corpus / "a" / "2.wav", corpus / "d.wav"]
    for path in late:
        path.rename(path.with_suffix(".late"))
    assert command(*arguments_of(corpus, tiny, out)).status == 0
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.npy")}
    for path in late:
        path.with_suffix(".late").rename(path)
    ended = command(*arguments_of(corpus, tiny, out))
    assert all(p.stat().st_mtime_ns == time for p, time in times.items())
    assert len(manifest_of(out)[1]) == 12
    once = tmp_path / "once"
    command(*arguments_of(corpus, tiny, once))
    assert [r["id"] for r in manifest_of(out)[1]] == [r["id"] for r in manifest_of(once)[1]]
    assert ended.status == 0


def test_a_shorter_list_leaves_no_shard_behind(command, tiny, corpus, tmp_path, small_blocks):
    out, once = tmp_path / "out", tmp_path / "once"
    command(*arguments_of(corpus, tiny, out, "--format", "webdataset"))
    shutil.rmtree(corpus / "b")
    assert command(*arguments_of(corpus, tiny, out, "--format", "webdataset")).status == 0
    command(*arguments_of(corpus, tiny, once, "--format", "webdataset"))
    assert tree(out) == tree(once)


def test_other_settings_on_the_same_output(command, tiny, corpus, tmp_path):
    out = tmp_path / "out"
    command(*arguments_of(corpus, tiny, out))
    before = tree(out)
    for more, sentence in (
        (("--layer", "2"), f"{out} was extracted with layers [1], and [2] is asked for: take another --out,"),
        (("--convention", "knn-vc"), "was extracted with convention 'hf', and 'knn-vc' is asked for"),
        (("--dtype-out", "float16"), "was extracted with dtype_out 'float32', and 'float16' is asked for"),
    ):
        assert sentence in command(*arguments_of(corpus, tiny, out, *more)).sentence()
    assert tree(out) == before
    assert command(*arguments_of(corpus, tiny, out, "--layer", "2", "--force")).status == 0
    close(np.load(out / "c.npy"), expected(tiny, corpus / "c.wav")[2])


def test_other_weights_under_the_same_name(command, corpus, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    for seed in (0, 1):
        make_sensitive(WavLMModel(tiny_config()), seed).save_pretrained(model)
        ended = command(*arguments_of(corpus, model, out))
        assert ended.status == (0, 2)[seed]
    assert "was extracted with weights" in ended.sentence()


def test_broken_files_are_named_and_the_run_goes_on(command, tiny, corpus, tmp_path):
    out = tmp_path / "out"
    (corpus / "text.wav").write_text("no audio")
    soundfile.write(corpus / "short.wav", np.zeros(300), 16000)
    soundfile.write(corpus / "empty.wav", np.zeros(0), 16000)
    soundfile.write(corpus / "nan.wav", np.full(4000, np.nan), 16000, subtype="FLOAT")
    (corpus / "cut.wav").write_bytes((corpus / "c.wav").read_bytes()[:-100])
    ended = command(*arguments_of(corpus, tiny, out))
    assert ended.status == 3
    assert "12 extracted, 0 kept, 5 failed" in ended.out
    errors = {e["id"]: e["error"] for e in lines(out / "errors.jsonl")}
    assert sorted(errors) == ["cut", "empty", "nan", "short", "text"]
    assert all("\n" not in sentence and f"{name}.wav" in sentence for name, sentence in errors.items())
    assert len(manifest_of(out)[1]) == 12
    assert command(*arguments_of(corpus, tiny, out)).status == 3  # still
    soundfile.write(corpus / "text.wav", np.linspace(-0.1, 0.1, 4000), 16000)
    ended = command(*arguments_of(corpus, tiny, out))
    assert len(lines(out / "errors.jsonl")) == 4
    assert len(manifest_of(out)[1]) == 13


def test_a_run_that_fails_too_often_stops(command, tiny, corpus, tmp_path, small_blocks):
    for i in range(6):
        (corpus / f"a/bad{i}.wav").write_text("no audio")
    ended = command(*arguments_of(corpus, tiny, tmp_path / "out", "--max-errors", "2"))
    assert ended.status == 3
    assert "stopped: more than 2 failed" in ended.out
    assert len(manifest_of(tmp_path / "out")[1]) < 12


@pytest.mark.parametrize("kind", ["npy", "webdataset"])
def test_a_run_that_stops_early_keeps_what_it_did_not_come_to(command, tiny, corpus, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("wavlm_fast.extract._MOST_SECONDS", 1.5)
    out = tmp_path / "out"
    words = arguments_of(corpus, tiny, out, "--format", kind)
    assert command(*words).status == 0
    before = tree(out)
    assert sum(name.startswith(".wavlm-fast/blocks/") for name in before) > 5
    for path in [*out.rglob("*.npy"), *out.rglob("*.tar")]:  # all is to be done again
        path.write_bytes(path.read_bytes() + b"x")
    for record in manifest_of(out)[1][:3]:
        path = corpus / f"{record['id']}.wav"
        soundfile.write(path, np.full(soundfile.info(path).frames, np.nan), 16000, subtype="FLOAT")
    ended = command(*words, "--max-errors", "1")
    assert ended.status == 3
    assert "stopped: more than 1 failed" in ended.out
    assert before.keys() - tree(out).keys() <= {"shard-000000.tar", "shard-000001.tar"}  # all of such a block failed
    assert len(manifest_of(out)[1]) >= 9


def test_shares_merge(command, tiny, corpus, tmp_path, small_blocks):
    whole, shares = tmp_path / "whole", tmp_path / "shares"
    command(*arguments_of(corpus, tiny, whole))
    for share in (2, 0, 1):
        assert len(manifest_of(shares)[1] if shares.exists() else []) < 12
        assert command(*arguments_of(corpus, tiny, shares, "--shard", f"{share}/3")).status == 0
    assert tree(shares).keys() - tree(whole).keys() <= {f".wavlm-fast/share-{i}-of-3.lock" for i in range(3)}
    assert features(shares).items() >= {n: d for n, d in features(whole).items() if ".lock" not in n}.items()
    assert (shares / "manifest.jsonl").read_bytes() == (whole / "manifest.jsonl").read_bytes()


def test_two_runs_on_one_output(command, tiny, corpus, tmp_path):
    out = tmp_path / "out"
    command(*arguments_of(corpus, tiny, out))
    with files.locked(out / ".wavlm-fast" / "share-0-of-1.lock") as ours:
        assert ours
        assert command(*arguments_of(corpus, tiny, out)).sentence().endswith(f"another run is writing into {out}")


def test_a_log_for_machines(command, tiny, corpus, tmp_path, small_blocks):
    log = tmp_path / "log"
    command(*arguments_of(corpus, tiny, tmp_path / "out", "--log", log))
    events = lines(log)
    assert sum(e["utterances"] for e in events) == 12
    assert [e["block"] for e in events] == list(range(len(events)))
    assert all(0 < e["busy"] <= e["wall"] for e in events)
    sentence = command(*arguments_of(corpus, tiny, tmp_path / "o2", "--log", tmp_path / "no" / "log")).sentence()
    assert "the log" in sentence
    assert sentence.endswith("cannot be written: No such file or directory")


def test_a_bad_line_of_a_manifest_is_told_before_any_work(command, tiny, recordings, tmp_path):
    manifest, out = tmp_path / "list.jsonl", tmp_path / "out"
    good = {"audio_filepath": str(recordings[0]), "offset": 0.1, "duration": 0.3}
    manifest.write_text(json.dumps(good) + "\n" + json.dumps({**good, "offset": -1}) + "\n")
    sentence = command("extract", manifest, "--out", out, "--model", tiny).sentence()
    assert sentence.startswith(f"wavlm-fast extract: {manifest}:2: as start a number of seconds from 0 on is wanted")
    assert not out.exists()
    manifest.write_text(json.dumps(good) + "\n")
    assert command("extract", manifest, "--out", out, "--model", tiny, "--layer", "1").status == 0
    (record,) = manifest_of(out)[1]
    assert (record["start"], record["duration"], record["seconds"]) == (0.1, 0.3, 0.3)
    waveform, _ = soundfile.read(recordings[0], dtype="float32")
    with torch.inference_mode():
        piece = torch.tensor(waveform[1600:6400])[None]
        states = WavLMModel.from_pretrained(tiny).eval()(piece, output_hidden_states=True).hidden_states
    close(np.load(out / record["file"]), states[1][0])


def test_a_list_on_standard_input(command, tiny, recordings, tmp_path, monkeypatch):
    listed = "".join(f"{path}\n" for path in recordings).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    assert command("extract", "-", "--out", tmp_path / "out", "--model", tiny, "--layer", "1").status == 0
    assert [record["audio"] for record in manifest_of(tmp_path / "out")[1]] == list(map(str, recordings))


@pytest.mark.parametrize("layer", ["3", "-4"])
def test_a_layer_that_the_model_lacks(command, tiny, recordings, tmp_path, layer):
    sentence = command("extract", recordings[0], "--out", tmp_path, "--model", tiny, f"--layer={layer}").sentence()
    assert sentence.endswith(f"--layer must lie in 0..2 for this model (or -3..-1, or 'all'), got {layer}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--layer", "last"), "a layer number or 'all' is wanted, got 'last'"),
        (("--shard", "2/2"), "a share I/N with 0 <= I < N is wanted, such as 0/4, got '2/2'"),
        (("--format", "parquet"), "the format parquet goes with --out NAME.parquet, got --format parquet and --out"),
        (("--format", "txt"), "hidden can be written as npy, npz, pt, safetensors, kaldi, parquet, webdataset, lhotse"),
        (("--format", "lhotse"), "lhotse holds features of one layer, got several: --layer N or --average layers"),
        (("--dtype-out", "bf16"), "npy has no bfloat16: --dtype-out float32 or float16"),
        (("--what", "xvector"), "xvector needs a checkpoint of WavLMForXVector, but"),
        (("--what", "frames", "--layer", "1"), "layers and averages are of hidden states"),
    ],
)
def test_arguments_that_do_not_fit(command, tiny, recordings, tmp_path, arguments, sentence):
    out = tmp_path / "out"
    assert sentence in command("extract", recordings[0], "--out", out, "--model", tiny, *arguments).sentence()
    assert not out.exists()


def test_a_package_that_is_missing(command, tiny, recordings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldiio", None)
    arguments = ("--out", tmp_path / "out", "--model", tiny, "--format", "kaldi", "--layer", "1")
    sentence = command("extract", recordings[0], *arguments).sentence()
    assert sentence.endswith(
        "the format kaldi needs the package kaldiio, which is not installed: pip install 'wavlm-fast[extract]'"
    )


def test_a_folder_that_cannot_be_made(command, tiny, recordings, tmp_path):
    (tmp_path / "file").write_text("")
    sentence = command("extract", recordings[0], "--out", tmp_path / "file" / "out", "--model", tiny).sentence()
    assert "the output folder" in sentence
    assert sentence.endswith("cannot be made: Not a directory")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_nothing_half_written_remains(command, tiny, recordings, tmp_path, monkeypatch, error, status):
    """Stopped while the second file is written: the first is whole, of the second there is nothing."""
    save, calls = writers.write_atomically, []

    def interrupted(target, write, **options):
        calls.append(target)
        if len(calls) == 1:
            return save(target, write, **options)

        def half(file):
            file.write(b"half of a fi")
            file.flush()
            raise error

        return save(target, half, **options)

    monkeypatch.setattr(writers, "write_atomically", interrupted)
    out = tmp_path / "out"
    ended = command("extract", *recordings, "--out", out, "--model", tiny)
    assert ended.status == status
    assert "Traceback" not in ended.err
    assert [path.name for path in out.iterdir() if not path.name.startswith(".wavlm-fast")] == [calls[0].name]
    assert np.load(out / calls[0].name).shape == (3, 24, 32)
    monkeypatch.undo()
    assert command("extract", *recordings, "--out", out, "--model", tiny).status == 0
    assert sorted(path.name for path in out.glob("*.npy")) == ["one.npy", "two.npy"]


def test_an_interrupted_overwrite_keeps_the_old_file(tmp_path):
    target = tmp_path / "kept"
    target.write_bytes(b"old")

    def save(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(target, save)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_written_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    files.write_atomically(tmp_path / "written", lambda file: file.write(b"x"))
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
