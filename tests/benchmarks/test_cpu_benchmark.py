"""`python -m benchmarks.cpu` times only what is right, and keeps all that it measured."""

import dataclasses
import importlib.util

import pytest
import torch

from benchmarks import cases, cpu, peaks, providers, rounds, verify
from wavlm_fast import use_backend

THEIRS, OURS = "transformers fp32", "wavlm_fast fp32"


@pytest.fixture
def with_provider(monkeypatch):
    """Put a provider of the test's making beside, or in the place of, the others."""

    def put(name, build, like=THEIRS, **changes):
        found, absent = providers.providers()
        found[name] = dataclasses.replace(found[like], build=build, **changes)
        monkeypatch.setattr(cpu, "providers", lambda: (found, absent))

    return put


def off_by(amount, dtype=torch.float32):
    """transformers with an error."""

    def build(subject):
        call = cases.bound(subject.module.copy(dtype), subject.inputs)
        return lambda: call() + amount

    return build


def test_rows(bench):
    ended = bench("--case", "base 1x0.5", "xvector 1x0.6")
    assert ended.status == 0, ended
    assert {case for case, _ in ended.rows} == {"base 1x0.5", "xvector 1x0.6"}
    assert len(ended.rows) == 8
    for (case, provider), row in ended.rows.items():
        assert set(row) == {field.name for field in dataclasses.fields(rounds.Row)}
        assert row["problem"] is None
        assert not row["wrong"]
        seconds, audio = row["seconds"], float(case.partition("x")[2][-3:])
        assert seconds["rounds"] == 5
        assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
        assert row["factor"] == pytest.approx(audio / seconds["median"])
        assert row["gflop"] == pytest.approx(sum(cases.CASES[case].operations().values()) / 1e9)
        assert row["gflops"] == pytest.approx(row["gflop"] / seconds["median"])
        assert row["peak_gflops"] == (200 if row["dtype"] == "fp32" else 400)
        assert row["share"] == pytest.approx(row["gflops"] / row["peak_gflops"])
        assert 0 < row["error"] <= row["allowed"]
        assert bool(row["ours_faster"]) == provider.startswith("transformers")
    about = ended.found
    assert about["command"].startswith("python -m benchmarks.cpu --threads 1 --rounds 5 ")
    assert about["threads"] == 1
    assert about["machine"]
    assert about["date"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["peaks"] == {"fp32": 2e11, "bf16": 4e11, "how": "made up"}


def test_the_better_peak_counts(bench, monkeypatch):
    """Another process may have had a core while one of them was measured."""
    found = [peaks.Peaks(1e11, None, "made up"), peaks.Peaks(3e11, None, "made up"), peaks.Peaks(2e11, None, "made up")]
    monkeypatch.setattr(cpu, "peaks", lambda: found.pop(0))
    ended = bench("--case", "xvector 1x0.6")
    assert ended.found["peaks"] == {"fp32": 3e11, "bf16": None, "how": "made up"}
    assert ended.rows["xvector 1x0.6", OURS]["peak_gflops"] == 300
    assert ended.rows["xvector 1x0.6", "wavlm_fast bf16"]["share"] is None


def test_a_wrong_provider_gets_no_time(bench, with_provider):
    with_provider("transformers off", off_by(1e-3), family="another")
    ended = bench("--case", "base 1x0.5")
    assert ended.status == 1
    row = ended.rows["base 1x0.5", "transformers off"]
    assert row["wrong"]
    assert row["problem"].startswith("wrong: off by 1.0")
    assert row["error"] > row["allowed"]
    assert row["seconds"] is row["factor"] is row["gflops"] is row["share"] is row["ours_faster"] is None
    assert f"transformers off: {row['problem']}" in ended.out
    assert ended.rows["base 1x0.5", OURS]["seconds"]


def test_ours_wrong_in_ordinary_channels_gets_no_time(bench, with_provider):
    """In bfloat16 the outliers' roundings are larger than this error."""
    with_provider("wavlm_fast bf16", off_by(0.2, torch.bfloat16), like="wavlm_fast bf16")
    ended = bench("--case", "base 1x0.5")
    row = ended.rows["base 1x0.5", "wavlm_fast bf16"]
    assert row["error"] < row["allowed"]
    assert row["problem"].startswith("wrong: off by ")
    assert "where channels are ordinary" in row["problem"]
    assert row["seconds"] is None
    assert ended.rows["base 1x0.5", "transformers bf16"]["ours_faster"] is None
    assert ended.status == 1


def test_wrong_gradients_get_no_time(bench, monkeypatch):
    right = rounds.bound_step

    def bound_step(module, inputs):
        call = right(module, inputs)

        def wrong():
            found = call()
            next(iter(found.values())).mul_(1.01)
            return found

        return wrong

    ended = bench("--case", "train 1x0.5")
    assert ended.status == 0, ended
    assert set(ended.rows) == {("train 1x0.5", THEIRS), ("train 1x0.5", OURS)}
    assert ended.rows["train 1x0.5", THEIRS]["ours_faster"]["rounds"] == 5
    usual = verify.bound_step
    assert usual is right
    monkeypatch.setattr(rounds, "bound_step", bound_step)
    ended = bench("--case", "train 1x0.5", only=("--provider", "wavlm_fast fp32"))
    (row,) = ended.rows.values()
    assert row["problem"].startswith("wrong: the gradient of ")
    assert row["seconds"] is None


def test_a_provider_that_fails_says_why(bench, with_provider):
    def build(subject):
        raise RuntimeError("it rains\nin Spain")

    with_provider("transformers wet", build, family="another")
    ended = bench("--case", "base 1x0.5")
    row = ended.rows["base 1x0.5", "transformers wet"]
    assert row["problem"] == "does not run this case: it rains"
    assert row["seconds"] is row["error"] is None
    assert ended.status == 0  # it is not ours


def test_absent_providers_are_listed_with_the_reason(bench, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "openvino" in name else find(name))
    ended = bench("--case", "base 1x0.5")
    reason = "openvino not installed (they come with the extra 'peers')"
    assert ended.found["absent"]["OpenVINO f32"] == reason
    assert f"OpenVINO bf16 is left out: {reason}" in ended.out


def test_long_cases_meet_ours_peer_by_peer(bench, with_provider, monkeypatch):
    """With the truth of our own reference, where transformers' float64 takes too much memory."""
    monkeypatch.setattr(verify, "_DENSE_LIMIT", 0)
    with_provider("transformers again", off_by(0), family="another")
    ended = bench("--case", "base 1x1")
    assert ended.status == 0, ended
    rounds_of = {name: row["seconds"]["rounds"] for (_, name), row in ended.rows.items()}
    assert rounds_of == {THEIRS: 5, "transformers bf16": 5, "transformers again": 5, OURS: 10, "wavlm_fast bf16": 5}


def test_no_truth_without_a_reference_that_equals_transformers(tiny, monkeypatch):
    monkeypatch.setattr(verify, "_DENSE_LIMIT", 0)
    case = cases.CASES["base 1x1"]
    verify.Judge(case, tiny(), case.inputs())
    monkeypatch.setattr(
        verify, "accelerate", lambda module: module.model.encoder.layers[0].attention.q_proj.weight.zero_()
    )
    with use_backend("auto"), torch.no_grad(), pytest.raises(AssertionError, match="there is no truth to trust"):
        verify.Judge(case, tiny(), case.inputs())


def test_interruption_keeps_what_was_measured(bench, monkeypatch):
    right = cpu.run_case

    def run_case(case, *rest):
        found = right(case, *rest)
        yield next(found)
        if case.model == "xvector":
            raise KeyboardInterrupt
        yield from found

    monkeypatch.setattr(cpu, "run_case", run_case)
    ended = bench("--case", "base 1x0.5", "xvector 1x0.6")
    assert ended.status == 130
    assert ended.rows["base 1x0.5", OURS]["seconds"]
    assert ended.rows["xvector 1x0.6", OURS]["problem"] == "not timed: the run was cut short"
    assert "interrupted" in ended.out


def test_ragged_utterances_are_padded_and_masked(tiny):
    inputs = cases.CASES["base ragged"].inputs()
    waveforms, mask = inputs["input_values"], inputs["attention_mask"]
    assert mask.sum(1).tolist() == [8000, 4800]
    assert waveforms[1, 4800:].eq(0).all()
    assert waveforms[:, :4800].square().mean() > 0


def test_ragged_case(bench):
    assert bench("--case", "base ragged").status == 0


def test_markdown_holds_the_summary(bench, tmp_path):
    path = tmp_path / "found.md"
    bench("--case", "base 1x0.5", "--markdown", str(path))
    text = path.read_text()
    assert "| WavLM-base | 1×0.5 s |\n| --- | ---: |\n" in text
    assert "| fp32 over transformers fp32 | " in text
    assert "base 1x0.5, ours in bf16, stage by stage" in text


def test_memory_is_measured_in_processes_of_their_own(bench, monkeypatch):
    peak = cpu.memory.Peak(3 * 10**9, 10**9)
    asked = []
    monkeypatch.setattr(cpu.memory, "measure", lambda provider, **options: asked.append((provider, options)) or peak)
    ended = bench("--case", "memory")
    assert [(who, o["keep_originals"], o["samples"] // 16_000, o["threads"]) for who, o in asked] == [
        ("transformers", True, 120, 1), ("wavlm_fast", True, 120, 1), ("wavlm_fast", False, 120, 1),
        ("wavlm_fast", True, 600, 1), ("wavlm_fast", False, 600, 1)]  # fmt: skip
    assert ended.found["memory"][2]["peak_bytes"] == 3 * 10**9
    assert "| wavlm_fast, originals freed |      600 |     3.00 |" in ended.out


def test_a_filter_that_leaves_nothing(bench, capsys):
    assert bench("--filter", "opera").status == 2


@pytest.mark.parametrize("name", ["ONNX Runtime fp32", "OpenVINO f32", "OpenVINO bf16"])
@pytest.mark.parametrize("case", ["base ragged", "xvector 1x0.6"])
def test_peers(bench, name, case):
    """They are traced at another length than they run at."""
    pytest.importorskip("openvino" if "OpenVINO" in name else "onnxruntime")
    row = bench("--case", case, only=("--provider", name)).rows[case, name]
    assert row["error"] < (0.1 if "bf16" in name else 1e-3)
    assert "does not run" not in (row["problem"] or "")
