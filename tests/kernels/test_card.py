"""The search for configurations that `wavlm-fast gpu` ends with."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from cases import DEVICE

from wavlm_fast.benchmarks.gpu.card import stages, tuning
from wavlm_fast.benchmarks.gpu.card.roof import Roof
from wavlm_fast.benchmarks.gpu.card.steps import TUNING, Scale, Step
from wavlm_fast.benchmarks.run import cases
from wavlm_fast.kernels import _tuned, _tuning

pytestmark = pytest.mark.skipif("ttsem" in sys.modules, reason="emulated kernels have no time")


@pytest.fixture
def scale(monkeypatch):
    before = dict(cases.MODELS)
    made = Scale(torch.device(DEVICE), tiny=True)
    made.prepare()
    yield made
    cases.MODELS.clear()
    cases.MODELS.update(before)


@pytest.fixture
def searchable(monkeypatch):
    """A search that finds the last configuration fastest, without timing any."""

    def measure(launches):
        for launch in launches:
            launch()
        return [float(len(launches) - index) for index in range(len(launches))]

    monkeypatch.setattr(_tuning, "_can_tune", lambda device: True)
    monkeypatch.setattr(_tuning, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield
    for tunable in _tuning.TUNABLES:
        tunable.forget()


def test_a_search_leaves_its_choices_in_the_folder(scale, searchable, tmp_path, monkeypatch):
    monkeypatch.setenv(_tuned.FOLDER, str(tmp_path / "untuned"))
    step = next(s for s in stages.steps(scale, lambda: Roof([])) if "strided_conv" in s.name and s.tuned)
    row = tuning.search(scale, tmp_path, step.name, step.tuned)
    assert row["choices"]
    assert json.loads((tmp_path / "tuned.json").read_text()) == row["choices"]
    assert all(key.startswith("a device | triton ") and "_frames_product" in key for key in row["choices"])
    assert row["before"] > 0
    assert row["after"] > 0
    assert not (tmp_path / "untuned").exists()
    assert os.environ[_tuned.FOLDER] == str(tmp_path / "untuned")
    assert _tuning.AUTOTUNE not in os.environ


def test_the_furthest_from_the_peak_comes_first(scale):
    def step(name, tuned=True):
        return Step("stages", name, 1, list, (lambda: None) if tuned else None)

    found = [step("near"), step("far"), step("theirs", tuned=False), step("not measured")]
    rows = [
        {"step": "near", "ours": True, "share": 0.8},
        {"step": "far", "ours": True, "share": 0.1},
        {"step": "theirs", "ours": False, "share": 0.01},
        {"step": "not measured", "ours": True, "problem": "out of memory"},
    ]
    steps = list(tuning.steps(scale, Path(), found, rows))
    assert [s.name for s in steps] == ["tuning of far", "tuning of near"]
    assert {s.phase for s in steps} == {TUNING}
