"""`wavlm-fast bench` verifies before it times, and measures what it says."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wavlm_fast import backends, bench, checkpoint, measure


@pytest.fixture
def results(command, tiny, tmp_path):
    def run(*arguments):
        path = tmp_path / "bench.json"
        ended = command("bench", "--model", tiny, "--threads", "1", "--json", path, *arguments)
        found = json.loads(path.read_text())
        return ended, {(row["case"], row["provider"]): row for row in found["rows"]}

    return run


def test_rows(results):
    ended, rows = results("--seconds", "1", "2", "--batch", "1", "2", "--rounds", "5")
    assert ended.status == 0, ended
    assert {case for case, _ in rows} == {"1 x 1 s", "1 x 2 s", "2 x 1 s", "2 x 2 s"}
    for (case, provider), row in rows.items():
        if row["problem"]:
            assert row["seconds"] is None
            continue
        seconds = row["seconds"]
        assert seconds["rounds"] == 5
        assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
        batch, length = (float(part) for part in case.removesuffix(" s").split(" x "))
        assert row["factor"] == pytest.approx(batch * length / seconds["median"])
        assert 0 < row["error"] < 1e-3
        if provider == bench.BASELINE:
            assert row["faster"]["median"] == 1
    assert f"| {bench.BASELINE}" in ended.out
    assert "wavlm_fast auto" in ended.out


def test_a_wrong_provider_gets_no_time(results, monkeypatch):
    right = checkpoint.accelerated

    def accelerated(model):
        fast = right(model)
        with torch.no_grad():
            fast.encoder.layers[0].attention.rel_attn_embed.weight.zero_()
        return fast

    monkeypatch.setattr(checkpoint, "accelerated", accelerated)
    ended, rows = results("--quick")
    assert ended.status == 1
    row = rows["1 x 2 s", "wavlm_fast auto"]
    assert row["wrong"]
    assert row["problem"].startswith("wrong: layer 1 is off by ")
    assert row["seconds"] is row["factor"] is row["faster"] is None
    assert "wavlm_fast auto is not timed: wrong: layer 1 is off by " in ended.out
    assert rows["1 x 2 s", bench.BASELINE]["seconds"]["rounds"] == 5


def test_a_provider_that_refuses_says_why(results, monkeypatch):
    refusing = backends.Implementation(lambda *args: None, lambda *args: "it rains")
    monkeypatch.setattr(backends.load("cpu"), "TABLE", {"position_gate": refusing})
    ended, rows = results("--quick")
    assert ended.status == 0  # no error: auto falls back
    row = rows["1 x 2 s", "wavlm_fast cpu"]
    assert row["problem"] == "refused: position_gate cannot run on the cpu backend: it rains"
    assert row["seconds"] is None
    assert rows["1 x 2 s", "wavlm_fast auto"]["seconds"]


def test_too_few_rounds(command):
    assert "at least 5 rounds are wanted for a median, got 3" in command("bench", "--rounds", "3").sentence()


def test_utterances_of_a_batch_differ_and_are_speech(tiny):
    model, _ = checkpoint.load(str(tiny))
    waveforms = bench._utterances(3, 16000 * 9, False, model)
    assert waveforms.shape == (3, 16000 * 9)
    assert not torch.equal(waveforms[0], waveforms[1])
    assert waveforms.square().mean(1).sqrt().min() > 0.02


def test_the_folder_runs_the_command():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "benchmarks", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("wavlm-fast bench: argument --rounds: at least 5 rounds are wanted")


def test_interleaving_alternates_and_warms_up(monkeypatch):
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "ab"}
    seconds = measure.interleave(calls, 3)
    assert "".join(ran) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_a_spent_budget_leaves_three_rounds():
    seconds = measure.interleave({"a": lambda: None}, 10, budget=0.0)
    assert len(seconds["a"]) == 3


def test_ratios_are_taken_round_by_round():
    found = measure.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])
    assert found.median == 3.0
    assert (found.p10, found.p90) == (pytest.approx(2.2), pytest.approx(3.8))


def test_the_rule():
    truth = torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = (truth + 1e-5).float()
    assert measure.errors(plain, (truth + 1.9e-5).float(), truth).ok
    assert not measure.errors(plain, (truth + 5e-5).float(), truth).ok
    assert not measure.errors(plain, torch.full_like(plain, math.nan), truth).ok
    assert not measure.errors(plain, plain[:, :-1], truth).ok


def test_outlier_channels_hide_nothing():
    """An error in the ordinary channels that is below the rounding of the outlier."""
    truth = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth[..., 3] *= 60
    plain = truth.bfloat16()
    ours = plain.clone()
    ours[..., 5] += 0.15
    (row,) = measure.compare({"x": plain}, {"x": ours}, {"x": truth})
    assert row.all.ok
    assert not row.ordinary.ok
    assert not row.ok
    (same,) = measure.compare({"x": plain}, {"x": plain}, {"x": truth})
    assert same.ok
