"""`wavlm-fast bench` times only what is right, and keeps all that it measured."""

import copy
import dataclasses
import importlib.util

import pytest
import torch

from wavlm_fast.benchmarks.run import cases, flops, fresh, peaks, providers, regimes, rounds, suite, verify
from wavlm_fast.modules._originals import StandIn

THEIRS, OURS = "transformers fp32", "wavlm_fast fp32"


@pytest.fixture
def with_provider(monkeypatch):
    """Put a provider of the test's making beside, or in the place of, the others."""

    def put(name, build, like=THEIRS, **changes):
        found, absent = providers.providers()
        found[name] = dataclasses.replace(found[like], build=build, **changes)
        monkeypatch.setattr(suite, "providers", lambda device: (found, absent))

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
        assert row["ours"] == provider.startswith("wavlm_fast")
        assert row["batch"] == 1
        assert row["length"] == audio
        assert row["cls"] == ("WavLMModel" if row["model"] == "base" else "WavLMForXVector")
    about = ended.found
    assert about["command"].startswith("wavlm-fast bench --threads 1 --rounds 5 ")
    assert about["threads"] == 1
    assert about["machine"]
    assert about["date"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["peaks"] == {"fp32": 2e11, "bf16": 4e11, "how": "made up"}


def test_the_better_peak_counts(bench, monkeypatch):
    """Another process may have had a core while one of them was measured."""
    found = [peaks.Peaks(1e11, None, "made up"), peaks.Peaks(3e11, None, "made up"), peaks.Peaks(2e11, None, "made up")]
    monkeypatch.setattr(suite, "peaks", lambda device: found.pop(0))
    ended = bench("--case", "xvector 1x0.6")
    assert ended.found["peaks"] == {"fp32": 3e11, "bf16": None, "how": "made up"}
    assert ended.rows["xvector 1x0.6", OURS]["peak_gflops"] == 300
    assert ended.rows["xvector 1x0.6", "wavlm_fast bf16"]["share"] is None


def test_a_wrong_provider_gets_no_time(bench, with_provider):
    with_provider("transformers off", off_by(1e-3), family="another")
    ended = bench("--case", "base 1x0.5")
    assert ended.status == 0  # somebody else's mistake is a finding
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


REGIMES = {
    "no_grad": lambda model: not torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
    "grad": lambda model: torch.is_grad_enabled() and all(p.requires_grad for p in model.parameters()),
    "inference-built": lambda model: all(p.is_inference() for p in model.parameters()),
    "autocast": lambda model: torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled(),
    "to-waveform": lambda model: torch.is_grad_enabled() and not any(p.requires_grad for p in model.parameters()),
}


def test_regimes_are_cases():
    found = {case.name for case in cases.CASES.values() if case.group == "regimes"}
    assert found == {*(f"base {regime} 1x3" for regime in REGIMES), "base no_grad 1x0.025"}
    (frame,) = (case for case in cases.CASES.values() if case.lengths == (0.025,))
    assert flops.frames(cases.MODELS["base"].config, frame.samples)[-1] == 1


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_is_what_it_says(tiny, regime, fast):
    module = tiny().copy(fast=fast)
    seen = []
    module.model.encoder.register_forward_hook(lambda *args: seen.append(REGIMES[regime](module.model)))
    call = regimes.REGIMES[regime](module, cases.CASES[f"base {regime} 1x0.5"].inputs())
    first, again = call(), call()
    assert first.requires_grad == (regime == "grad")
    assert torch.equal(first, again)
    assert first.count_nonzero() > first.numel() / 2
    assert first.shape == ((1, 8000, 1) if regime == "to-waveform" else (1, 24, 32))


def test_regimes_are_verified_and_timed(bench):
    ended = bench("--filter", "base ", "--case", *(f"base {regime} 1x0.5" for regime in REGIMES))
    assert ended.status == 0, ended
    assert set(ended.rows) == {(f"base {regime} 1x0.5", name) for regime in REGIMES for name in (THEIRS, OURS)}
    for (case, provider), row in ended.rows.items():
        assert row["group"] == "regimes"
        assert 0 < row["error"] <= row["allowed"]
        assert row["seconds"]["rounds"] == 5
        assert bool(row["ours_faster"]) == (provider == THEIRS)
        assert row["gflop"] == pytest.approx(sum(cases.CASES[case].operations().values()) / 1e9)
    assert ended.rows["base to-waveform 1x0.5", OURS]["gflop"] == 2 * ended.rows["base grad 1x0.5", OURS]["gflop"]
    assert ended.rows["base autocast 1x0.5", OURS]["error"] > 1e-3 > ended.rows["base grad 1x0.5", OURS]["error"]


@pytest.mark.parametrize("regime", REGIMES)
def test_a_wrong_regime_gets_no_time(bench, monkeypatch, regime):
    """Off by what the hundredth of the largest value is, ours alone."""
    right = regimes.REGIMES[regime]

    def wrong(module, inputs):
        call = right(module, inputs)
        off = 1.05 if isinstance(module.model, StandIn) else 1.0
        return lambda: call().detach() * off

    monkeypatch.setitem(regimes.REGIMES, regime, wrong)
    ended = bench("--case", f"base {regime} 1x0.5")
    assert ended.status == 1
    row = ended.rows[f"base {regime} 1x0.5", OURS]
    assert row["wrong"]
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
    reason = "openvino not installed (pip install 'wavlm-fast[bench]')"
    assert ended.found["absent"]["OpenVINO f32"] == reason
    assert f"OpenVINO bf16 is left out: {reason}" in ended.out


@pytest.fixture
def processes(monkeypatch):
    """Runs in processes of their own, made in this one; who ran on how many layers."""
    ran = []

    def run(case, name, provider, subject):
        ran.append((name, case.model))
        if name == "transformers bf16":
            return "the process ended with status -9: no message"
        alone = dataclasses.replace(subject, module=copy.deepcopy(subject.module))
        result = torch.as_tensor(provider.build(alone)()).cpu()
        return fresh.Result(0.5 if provider.ours else 1.0, fresh.memory.Peak(3 * 10**9, 10**9), result)

    monkeypatch.setattr(fresh, "run", run)
    return ran


@pytest.mark.parametrize("exact", [True, False])
def test_long_cases_run_in_processes_of_their_own(bench, processes, monkeypatch, exact):
    """Held against float64 as they are where that is affordable, and otherwise on a narrow model."""
    monkeypatch.setattr(cases, "_FRESH", 0.9)
    if not exact:
        monkeypatch.setattr(verify, "_EXACT_LIMIT", 0)
        monkeypatch.setattr(verify, "_NARROW", {"hidden_size": 16, "num_hidden_layers": 1})
    ended = bench("--case", "base 1x1", "--rounds", "5")
    assert ended.status == 0, ended
    ours, theirs, failed = (ended.rows["base 1x1", name] for name in (OURS, THEIRS, "transformers bf16"))
    assert ours["seconds"]["rounds"] == 5
    assert theirs["ours_faster"]["median"] == 2
    assert 0 < ours["error"] <= ours["allowed"]
    assert failed["problem"] == "does not run this case: the process ended with status -9: no message"
    assert not failed["wrong"]
    assert {model for _, model in processes} == ({"base"} if exact else {"base", "base, narrow"})
    assert ("narrow model" in ours["note"]) != exact
    peaks = {row["provider"]: row for row in ended.found["memory"]}
    assert peaks[OURS]["peak_bytes"] == 3 * 10**9
    assert peaks["transformers bf16"]["peak_bytes"] is None


def test_a_wrong_provider_gets_no_time_in_a_process_of_its_own(bench, processes, with_provider, monkeypatch):
    monkeypatch.setattr(cases, "_FRESH", 0.9)
    with_provider("transformers off", off_by(1e-3), family="another")
    row = bench("--case", "base 1x1").rows["base 1x1", "transformers off"]
    assert row["wrong"]
    assert row["seconds"] is row["ours_faster"] is None


def test_who_needs_more_memory_than_there_is_does_not_start(tiny, monkeypatch):
    monkeypatch.setattr(fresh, "installed", lambda: 1000)
    case = cases.CASES["base 1x1"]
    subject = providers.Subject(tiny(), case.inputs(), None, 1)
    found = fresh.run(case, THEIRS, providers.providers()[0][THEIRS], subject)
    assert found.startswith("needs about 0 GB for attention weights, this machine has ")


def test_a_process_of_its_own(tiny, tmp_path):
    """For real, on our model with freed originals and on theirs: the same output as in this process."""
    case = cases.CASES["base 1x0.5"]
    subject = providers.Subject(tiny(), case.inputs(), tmp_path, 1)
    there = providers.providers()[0]
    expected = cases.bound(tiny(), case.inputs())()
    for name in ("transformers fp32", "wavlm_fast fp32, originals freed"):
        found = fresh.run(case, name, there[name], subject)
        torch.testing.assert_close(found.output, expected, atol=1e-3, rtol=1e-4)
        assert found.seconds > 0
        assert found.peak.total > found.peak.forward >= 0


def test_no_truth_without_a_reference_that_equals_transformers(tiny, monkeypatch):
    monkeypatch.setattr(verify, "_DENSE_LIMIT", 0)
    case = cases.CASES["base 1x1"]
    subject = providers.Subject(tiny(), case.inputs(), None, 1)
    verify.Judge(case, subject)
    weight = "model.encoder.layers.0.attention.q_proj.weight"
    monkeypatch.setattr(verify, "accelerate", lambda module: (module.get_parameter(weight).zero_(), module)[1])
    with torch.no_grad(), pytest.raises(AssertionError, match="there is no truth to trust"):
        verify.Judge(case, subject)


def test_interruption_keeps_what_was_measured(bench, monkeypatch):
    right = suite.run_case

    def run_case(case, *rest):
        found = right(case, *rest)
        yield next(found)
        if case.model == "xvector":
            raise KeyboardInterrupt
        yield from found

    monkeypatch.setattr(suite, "run_case", run_case)
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
    assert "| fp32 over transformers fp32 | " in text
    assert "base 1×0.5 s, wavlm_fast bf16, stage by stage" in text


def test_memory_is_measured_where_a_case_asks_for_it(bench, processes):
    ended = bench("--case", "base 1x1", "base 1x0.5", only=("--provider", "wavlm_fast fp32"))
    assert {(row["provider"], row["audio"]) for row in ended.found["memory"]} == {
        (OURS, 1.0), ("wavlm_fast fp32, originals freed", 1.0)}  # fmt: skip
    assert processes == [(OURS, "base"), ("wavlm_fast fp32, originals freed", "base")]


def test_quick_takes_no_processes_for_memory(bench, processes):
    ended = bench("--quick", "--case", "base 1x1", only=("--provider", "wavlm_fast fp32"))
    assert ended.rows["base 1x1", OURS]["seconds"]
    assert not ended.found["memory"]
    assert not processes


def test_errors_at_every_layer(bench):
    ended = bench("--case", "base 1x0.5")
    found = ended.found["layers"]
    assert {row["provider"] for row in found} == {THEIRS, OURS, "transformers bf16", "wavlm_fast bf16"}
    names = [row["layer"] for row in found if row["provider"] == OURS]
    assert names == ["conv features", "embedding", "layer 1", "layer 2", "output"]
    assert all(0 < row["error"] <= row["allowed"] for row in found)


def test_stages_of_ours(bench):
    ended = bench("--case", "base 1x0.5")
    assert {row["provider"] for row in ended.found["stages"]} == {OURS, "wavlm_fast bf16"}
    assert ended.found["stages"][-1]["stage"] == "in one piece"


def test_the_classes(bench):
    ended = bench("--filter", "1x0.6")
    assert ended.status == 0, ended
    assert {row["cls"] for row in ended.found["rows"]} == {
        "WavLMForCTC", "WavLMForSequenceClassification", "WavLMForAudioFrameClassification", "WavLMForXVector",
    }  # fmt: skip
    assert all(row["seconds"] for row in ended.found["rows"])


def test_every_output_of_a_run_is_written(bench, tmp_path):
    csv, page = tmp_path / "found.csv", tmp_path / "page"
    ended = bench("--case", "base 1x0.5", "--csv", str(csv), "--report", str(page))
    assert ended.status == 0, ended
    kinds = {line.partition(",")[0] for line in csv.read_text().splitlines()[1:]}
    assert {"case", "stage", "layer"} <= kinds
    assert "<svg" in (page / "index.html").read_text()


def test_own_cases_and_audio(bench, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    heard = tmp_path / "heard.wav"
    soundfile.write(heard, torch.rand(8000).numpy() - 0.5, 16_000)
    only = ("--provider", "transformers fp32", "wavlm_fast fp32")
    ended = bench("--batch", "1", "2", "--seconds", "0.3", "--audio", str(heard), only=only)
    assert {case for case, _ in ended.rows} == {"base 1x0.3", "base 2x0.3"}
    assert ended.found["audio"] == str(heard)
    one, two = (ended.rows[f"base {batch}x0.3", THEIRS] for batch in (1, 2))
    assert two["gflop"] == pytest.approx(2 * one["gflop"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--filter", "opera"), "no case's name contains 'opera'"),
        (("--case", "opera"), "a case of base 1x0.5, "),
        (("--provider", "opera"), "no provider is left"),
        (("--csv", "/nowhere/found.csv"), "the file /nowhere/found.csv cannot be written"),
    ],
)
def test_refusals_come_before_anything_runs(bench, monkeypatch, arguments, sentence):
    monkeypatch.setattr(suite, "_run", lambda *args: pytest.fail("it ran"))
    ended = bench(*arguments, only=())
    assert ended.status == 2
    assert sentence in ended.err


@pytest.mark.parametrize("name", ["ONNX Runtime fp32", "OpenVINO f32", "OpenVINO bf16"])
@pytest.mark.parametrize("case", ["base ragged", "xvector 1x0.6"])
def test_peers(bench, name, case):
    """They are traced at another length than they run at."""
    pytest.importorskip("openvino" if "OpenVINO" in name else "onnxruntime")
    row = bench("--case", case, only=("--provider", name)).rows[case, name]
    assert row["error"] < (0.1 if "bf16" in name else 1e-3)
    assert "does not run" not in (row["problem"] or "")
