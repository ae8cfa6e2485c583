"""Utterances of different lengths in several ways: each is held against what it has to equal, then timed."""

import pytest
import torch

from wavlm_fast.benchmarks.page import tables
from wavlm_fast.benchmarks.run import cases, providers, ragged, rounds

WAYS = {
    "transformers fp32": "transformers",
    "wavlm_fast fp32": "wavlm_fast",
    "wavlm_fast fp32, exact": "wavlm_fast, exact",
    "wavlm_fast fp32, one at a time": "wavlm_fast, one at a time",
    "wavlm_fast fp32, uniform": "wavlm_fast, uniform",
}
EXACT = "wavlm_fast fp32, exact"
OURS_AND_THEIRS = ("--provider", "transformers", "wavlm_fast")


def run(bench, *more, **options):
    return bench("--dtype", "float32", *more, *OURS_AND_THEIRS, **options)


@pytest.mark.parametrize("model", ["base", "xvector", "train-ctc"])
def test_every_way_is_verified_and_timed(bench, model):
    ended = run(bench, "--case", f"{model} in all ways")
    assert ended.status == 0, ended
    rows = {provider: row for (_, provider), row in ended.rows.items()}
    assert {name: row["family"] for name, row in rows.items()} == WAYS
    for name, row in rows.items():
        assert row["group"] == "ragged"
        assert 0 < row["error"] <= row["allowed"]
        assert bool(row["ours_faster"]) == (name != EXACT)
    padded, exact = (rows[name]["gflop"] for name in ("wavlm_fast fp32", EXACT))
    assert exact < 0.7 * padded


def test_what_costs_too_much_in_float64_is_verified_on_a_narrow_model(bench, monkeypatch):
    monkeypatch.setattr(rounds, "affordable", lambda case, truths: False)
    ended = run(bench, "--case", "base in all ways")
    assert ended.status == 0, ended
    for row in ended.rows.values():
        assert "narrow model" in row["note"]
        assert 0 < row["error"] <= row["allowed"]
        assert row["seconds"]


def test_an_exact_batch_that_padding_reaches_gets_no_time(bench, monkeypatch):
    right = cases.accelerate
    monkeypatch.setattr(cases, "accelerate", lambda model, **options: right(model))  # in transformers' mode
    ended = run(bench, "--case", "base in all ways")
    assert ended.status == 1
    rows = {provider: row for (_, provider), row in ended.rows.items()}
    assert rows[EXACT]["wrong"] and rows[EXACT]["seconds"] is None
    assert not rows["wavlm_fast fp32, one at a time"]["wrong"]


def test_one_at_a_time_is_transformers_without_padding(tiny):
    module, case = tiny(), cases.CASES["base in all ways"]
    inputs = case.inputs()
    with torch.no_grad():
        found = ragged.Alone(module.model, module.output)(**inputs)
        for row, seconds in enumerate(case.lengths):
            alone = module(inputs["input_values"][row : row + 1, : int(seconds * 16_000)])[0]
            assert torch.equal(found[row, : len(alone)], alone)
            assert not found[row, len(alone) :].any()


def test_a_uniform_batch_is_as_much_audio():
    for case in (case for case in cases.CASES.values() if case.group == "ragged"):
        assert case.uniform.audio == pytest.approx(case.audio)
        assert len(set(case.uniform.lengths)) == 1 < len(set(case.lengths))


def test_other_cases_run_in_one_way(bench):
    ended = run(bench, "--case", "base ragged")
    assert {provider for _, provider in ended.rows} == {"transformers fp32", "wavlm_fast fp32"}


def test_the_table_of_ways(bench):
    ended = run(bench, "--case", "ragged")
    (table,) = [t for t in tables.summaries({"rows": list(ended.rows.values())}) if t.title.startswith("Exact batches")]
    assert [row[0] for row in table.rows] == ["base in all ways", "xvector in all ways", "train-ctc in all ways"]
    assert all(all(cell != "-" for cell in row) for row in table.rows)
    assert providers.EXACT == "exact"
