"""Exponents are those of the points."""

import pytest

from wavlm_fast.benchmarks.run import scaling


def row(provider="ours", batch=1, length=1.0, seconds=1.0, **changes):
    took = {"median": seconds}
    head = {"provider": provider, "dtype": "fp32", "model": "base", "cls": "WavLMModel", "group": "length"}
    return {**head, "batch": batch, "length": length, "seconds": took, **changes}


def test_exponent():
    assert scaling.exponent([(2, 12), (4, 48), (8, 192)]) == pytest.approx(2)
    assert scaling.exponent([(1, 5), (10, 5), (100, 5)]) == pytest.approx(0)


def test_along_length_batch_and_memory():
    rows = [row(length=t, seconds=3 * t**1.5) for t in (16, 1, 4)]
    rows += [row(batch=b, seconds=3 * b) for b in (2, 8)]
    rows += [row("theirs", length=t, seconds=t**2) for t in (1, 2)]  # two points make no fit
    rows += [row(length=64, seconds=1, group="ragged"), row(length=99, seconds=1, cls="WavLMForCTC")]
    rows += [row(length=4, seconds=1, group="houses")]
    rows += [row(length=200, seconds=None)]
    rows[-1]["seconds"] = None
    memory = [
        {"model": "base", "provider": "ours", "dtype": "fp32", "batch": 1, "audio": t, "forward_bytes": 7 * t}
        for t in (1.0, 2.0, 4.0)
    ]
    found = {(r["along"], r["quantity"]): r for r in scaling.scaling({"rows": rows, "memory": memory})}
    assert set(found) == {("length", "seconds"), ("batch", "seconds"), ("length", "memory")}
    length = found["length", "seconds"]
    assert length["points"] == [(1, 3), (4, 24), (16, 192)]
    assert length["exponent"] == length["local"] == pytest.approx(1.5)
    assert found["batch", "seconds"]["at"] == 1
    assert found["batch", "seconds"]["exponent"] == pytest.approx(1)
    assert found["length", "memory"]["exponent"] == pytest.approx(1)
