"""Times that a drifting machine does not decide, and errors that outliers do not hide."""

import math

import pytest
import torch

from wavlm_fast import measure


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
