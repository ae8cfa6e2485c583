"""What every subcommand does with audio that is cut, and with names that are no UTF-8."""

import json
import os
import sys

import numpy as np
import pytest
import soundfile

from wavlm_fast import memory
from wavlm_fast.benchmarks.page import results
from wavlm_fast.benchmarks.run import cases, fresh

ON_AUDIO = [
    ["extract", "{audio}", "--out", "{out}", "--model", "{model}"],
    ["demo", "{audio}", "--model", "{model}", "--max-seconds", "0.5", "--json", "{out}"],
    ["parity", "{audio}", "--model", "{model}", "--dtype", "fp32", "--backend", "reference"],
    ["bench", "--audio", "{audio}", "--model", "{model}", "--provider", "wavlm_fast fp32", "--batch", "1"],
]
NAMES = [words[0] for words in ON_AUDIO]
REFUSING = {"argvalues": ON_AUDIO[1:], "ids": NAMES[1:]}  # extract goes on with the next file


def speechlike(path, **options):
    soundfile.write(os.fsencode(path), np.random.default_rng(0).uniform(-0.3, 0.3, 16000), 16000, format="WAV")
    return path


@pytest.fixture
def cut(tmp_path):
    path = speechlike(tmp_path / "cut.wav")
    path.write_bytes(path.read_bytes()[:20044])
    return path


@pytest.fixture
def on_audio(command, tiny, tmp_path):
    def run(words, path, *more):
        places = {"audio": str(path), "model": str(tiny), "out": str(tmp_path / "out")}
        return command(*(word.format(**places) for word in words), *more)

    return run


@pytest.mark.parametrize("words", **REFUSING)
def test_audio_that_is_cut_is_refused(on_audio, cut, tmp_path, words):
    sentence = on_audio(words, cut).sentence()
    assert f"{cut} is cut or damaged: its header announces 32000 bytes of audio, and 20000 are there" in sentence
    assert "--allow-truncated, takes it as far as it goes" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", ON_AUDIO[1:3], ids=NAMES[1:3])
def test_audio_that_is_cut_is_taken_where_that_is_allowed(on_audio, cut, no_probe, words):
    ended = on_audio(words, cut, "--allow-truncated")
    assert ended.status == 0, ended
    assert f"{cut}: 0.62 s, WAV PCM_16, 16000 Hz, mono; taken as far as it goes: its header announces" in ended.out
    assert [options["allow_truncated"] for _, options in no_probe] == [True] * len(no_probe)


def test_bench_on_audio_that_is_cut(on_audio, cut, monkeypatch):
    monkeypatch.setattr(fresh, "run", lambda *args: "not in this test")
    ended = on_audio(
        ON_AUDIO[3], cut, "--allow-truncated", "--seconds", "0.5", "--rounds", "5", "--case", "model 1x0.5"
    )
    cases.MODELS.pop("model")
    assert ended.status == 0, ended
    assert "taken as far as it goes: its header announces" in ended.out


def test_the_process_that_measures_memory_is_told(tiny, cut, monkeypatch, capsys):
    def here(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        capsys.readouterr()
        memory.main()
        return capsys.readouterr().out

    monkeypatch.setattr(memory, "in_new_process", here)
    options = {"audio": str(cut), "samples": 8000, "model": str(tiny)}
    with pytest.raises(memory.UserError, match="is cut or damaged"):
        memory.measure("transformers", **options)
    assert memory.measure("transformers", **options, allow_truncated=True).total > 0


@pytest.fixture
def strange(tmp_path):
    """A recording whose name, and that of its folder, is no UTF-8."""
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9")
    try:
        folder.mkdir()
        return speechlike(folder / os.fsdecode(b"caf\xe9.wav"))
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 only")


@pytest.mark.parametrize("words", ON_AUDIO[:3], ids=NAMES[:3])
def test_names_that_are_no_utf_8(on_audio, strange, no_probe, words):
    ended = on_audio(words, strange)
    assert ended.status == 0, ended
    assert "\udce9" not in ended.out
    assert r"caf\udce9" in ended.out or words[0] in ("parity", "extract")  # which name none where all is well


def test_what_is_extracted_tells_the_name_as_it_is(command, tiny, strange):
    arguments = ("--out", strange.parent, "--model", tiny, "--format", "npz")
    assert command("extract", strange, *arguments).status == 0
    path = strange.with_suffix(".npz")
    assert os.fsencode(path).endswith(b"/caf\xe9.npz")
    with open(path, "rb") as file:
        assert os.fsencode(np.load(file)["audio"].item()) == os.fsencode(strange)
    settings, record = map(json.loads, (strange.parent / "manifest.jsonl").read_text().splitlines())
    assert os.fsencode(record["audio"]) == os.fsencode(strange)
    assert settings["settings"]["format"] == "npz"
    strange.write_bytes(b"no audio")
    ended = command("extract", strange, *arguments, "--force")
    assert ended.status == 3
    assert r"such as: " in ended.out
    assert r"caf\udce9.wav cannot be read as audio" in ended.out


@pytest.mark.parametrize("words", **REFUSING)
def test_errors_about_names_that_are_no_utf_8(on_audio, strange, words):
    strange.write_bytes(b"no audio")
    assert r"caf\udce9.wav cannot be read as audio" in on_audio(words, strange).sentence()


def test_doctor_writes_to_a_name_that_is_no_utf_8(command, strange, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_CACHE_DIR", str(strange.parent))
    target = strange.with_suffix(".json")
    ended = command("doctor", "--json", target)
    assert r"\udce9t\udce9" in ended.out
    assert os.fsencode(json.loads(target.read_text())["environment"]["WAVLM_FAST_CACHE_DIR"]) == os.fsencode(
        strange.parent
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xe9",
        b"[" * 100_000,
        b"[]",
        b"3",
        b'{"rows": 1}',
        b'{"rows": [1]}',
        b'{"rows": [{}]}',
        b'{"rows": [], "versions": 1}',
    ],
)
def test_results_that_are_none(tmp_path, capsys, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    assert results.main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"python -m benchmarks.results: the results {path} are no")
    assert said.count("\n") == 1


def test_results_that_name_what_is_no_utf_8(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps({"rows": [], "audio": "caf\udce9.wav", "command": "wavlm-fast bench --audio caf\udce9.wav"})
    )
    assert results.main([str(path)]) == 0
    assert r"caf\udce9.wav" in capsys.readouterr().out
