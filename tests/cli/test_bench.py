"""`wavlm-fast bench` on a user's checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wavlm_fast.benchmarks.run import cases, fresh

THEIRS, OURS = "transformers fp32", "wavlm_fast fp32"


@pytest.fixture
def results(command, tiny, tmp_path, monkeypatch):
    def run(*arguments):
        path = tmp_path / "bench.json"
        ended = command(
            "bench", "--model", tiny, "--threads", "1", "--json", path, "--provider", THEIRS, OURS, *arguments
        )
        found = json.loads(path.read_text())
        return ended, {(row["case"], row["provider"]): row for row in found["rows"]}

    monkeypatch.setattr(fresh, "run", lambda *args: "not in this test")
    yield run
    cases.MODELS.pop("model", None)


def test_cases_are_the_grid(results):
    ended, rows = results("--seconds", "0.5", "1", "--batch", "1", "2", "--rounds", "5")
    assert ended.status == 0, ended
    names = {"model 1x0.5", "model 1x1", "model 2x0.5", "model 2x1"}
    assert set(rows) == {(case, provider) for case in names for provider in (THEIRS, OURS)}
    for (case, _), row in rows.items():
        batch, length = (float(part) for part in case.partition(" ")[2].split("x"))
        assert row["factor"] == pytest.approx(batch * length / row["seconds"]["median"])
    assert f"| {THEIRS}" in ended.out


def test_a_wrong_model_gets_no_time(results, monkeypatch):
    right = cases.accelerate

    def accelerate(module, **options):
        fast = right(module, **options)
        with torch.no_grad():
            embedding = fast.model.encoder.layers[0].attention.rel_attn_embed
            embedding.weight = torch.nn.Parameter(torch.zeros_like(embedding.weight))
        return fast

    monkeypatch.setattr(cases, "accelerate", accelerate)
    ended, rows = results("--seconds", "0.5", "--batch", "1")
    assert ended.status == 1
    row = rows["model 1x0.5", OURS]
    assert row["wrong"]
    assert row["problem"].startswith("wrong: off by ")
    assert row["seconds"] is row["factor"] is None
    assert f"{OURS}: wrong: off by " in ended.out
    assert rows["model 1x0.5", THEIRS]["seconds"]["rounds"] == 7


def test_too_few_rounds(command):
    assert "at least 5 rounds are wanted for a median, got 3" in command("bench", "--rounds", "3").sentence()


def test_the_folder_runs_the_command():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "benchmarks", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("wavlm-fast bench: argument --rounds: at least 5 rounds are wanted")
