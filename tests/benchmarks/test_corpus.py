"""A corpus from files to files: verified as it was written, then timed."""

import numpy as np
import pytest
import torch

from wavlm_fast.benchmarks.page import results
from wavlm_fast.benchmarks.run import cases, corpus, extracting

ALONE, SORTED, OURS = corpus.providers()


@pytest.fixture
def in_this_process(monkeypatch):
    """Spares starting a process for every run, which takes seconds of imports."""
    monkeypatch.setattr(extracting, "run", extracting.here)


def test_everybody_is_verified_and_timed(bench, in_this_process):
    ended = bench("--case", "corpus")
    assert ended.status == 0, ended
    rows = {provider: row for (_, provider), row in ended.rows.items()}
    assert list(rows) == [ALONE, SORTED, OURS]
    for name, row in rows.items():
        assert 0 < row["error"] <= row["allowed"]
        assert row["seconds"]["rounds"] == 5
        assert bool(row["ours_faster"]) == (name != OURS)
    assert "each utterance alone" in rows[SORTED]["note"]
    told = {row["provider"]: row for row in ended.found["corpus"]}
    assert told.keys() == rows.keys()
    for row in told.values():
        assert 0 < row["busy"] < 1
        assert 0 < row["first_bytes"] < 1.1 * row["peak_bytes"]  # Linux counts neither to the page
    shown = results.markdown(ended.found)
    assert "the model's share of the time" in shown
    assert OURS in ended.out


@pytest.mark.parametrize("wrong", ["values", "frames", "missing"])
def test_what_is_wrong_gets_no_time(bench, in_this_process, monkeypatch, wrong):
    def damaged(job):
        busy = right(job)
        for path in extracting.Path(job.out).glob("*.npy"):
            features = np.load(path)
            path.unlink()
            if wrong != "missing":
                np.save(path, features * 1.001 if wrong == "values" else features[1:])
        return busy

    right = extracting.WAYS["extract"]
    monkeypatch.setitem(extracting.WAYS, "extract", damaged)
    ended = bench("--case", "corpus", "--provider", "wavlm_fast")
    assert ended.status == 1
    (row,) = ended.rows.values()
    assert row["wrong"] and row["seconds"] is None


def test_a_way_in_a_process_of_its_own(tiny, tmp_path):
    case = next(case for case in cases.CASES.values() if case.group == "corpus")
    made = corpus.Corpus(case, tiny(), tmp_path)
    ran, out = made.run("extract", 1, "cpu")
    assert 0 < ran.busy < ran.seconds
    assert len(ran.tenths) == 10
    assert max(ran.tenths) < 1.1 * ran.peak
    with torch.no_grad():
        waveform = torch.from_numpy(corpus.soundfile.read(made.audio / "00003.flac", dtype="float32")[0])
        alone = made.model(waveform[None], output_hidden_states=True).hidden_states[case.layer][0]
    torch.testing.assert_close(torch.from_numpy(made.features(out, 3)), alone, rtol=1e-4, atol=1e-4)
