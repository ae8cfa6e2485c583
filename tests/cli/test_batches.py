"""`wavlm-fast batches`: an utterance in a batch beside the utterance alone."""

import json

import numpy as np
import soundfile

from wavlm_fast import batches


def test_on_a_tiny_model(command, tiny, tmp_path):
    to = tmp_path / "found.json"
    ended = command("batches", "--model", tiny, "--threads", "1", "--json", to)
    assert ended.status == 0, ended
    assert "max |in a padded batch - alone| / max |alone|" in ended.out
    found = json.loads(to.read_text())
    assert found["ok"]
    first, *padded = found["rows"]
    assert [row["seconds"] for row in padded] == [first["seconds"] / part for part in (2, 4, 8)]
    exact, default = "ours, padding='exact'", "ours, padding='transformers'"
    for row in padded:
        assert row["off"]["transformers"] > 1e-3 and row["off"][default] > 1e-3
        assert row["off"][exact] < 1e-5
        assert row["error"] <= row["allowed"]


def test_a_batch_that_is_not_exact_fails(command, tiny, monkeypatch):
    monkeypatch.setitem(batches._OURS, "ours, padding='exact'", "transformers")
    ended = command("batches", "--model", tiny)
    assert ended.status == 1
    assert "FAIL" in ended.out


def test_audio_that_is_too_short(command, tiny, tmp_path):
    path = tmp_path / "short.wav"
    soundfile.write(path, np.zeros(900), 16_000)
    assert "short.wav" in command("batches", "--model", tiny, path).sentence()
