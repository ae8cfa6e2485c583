"""The same weights in the classes of several houses: each is held against transformers' model, then timed."""

import importlib
import importlib.util
import sys

import pytest
import torch

from wavlm_fast import original
from wavlm_fast.benchmarks.page import tables
from wavlm_fast.benchmarks.run import cases, houses, providers
from wavlm_fast.modules._originals import StandIn

FAMILIES = {"transformers": "transformers", "original": "Microsoft", "torchaudio": "torchaudio"}
CLASSES = {"transformers": "WavLMModel", "original": "WavLM", "torchaudio": "Wav2Vec2Model"}
ALL = tuple(FAMILIES.values())


@pytest.fixture(params=FAMILIES)
def house(request):
    if request.param == "torchaudio":
        pytest.importorskip("torchaudio")
    return request.param


@pytest.fixture
def without(monkeypatch):
    """Have no package of this name."""

    def hide(package):
        loaded = [name for name in sys.modules if name.partition(".")[0] == package]
        for name in {package, *loaded}:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def run(bench, *names, only=(*ALL, "wavlm_fast")):
    return bench("--case", *names, only=("--provider", *only))


def subject_of(tiny, house):
    case = cases.CASES[f"{house} 1x0.5"]
    return providers.Subject(tiny(), case.inputs(), None, 1, house=case.house)


def test_theirs_and_ours_are_verified_and_timed(bench, house):
    ended = run(bench, f"{house} 1x0.5")
    assert ended.status == 0, ended
    theirs = FAMILIES[house]
    names = [f"{family} {dtype}" for family in (theirs, "wavlm_fast") for dtype in ("fp32", "bf16")]
    assert list(ended.rows) == [(f"{house} 1x0.5", name) for name in names]
    for (_, name), row in ended.rows.items():
        assert (row["group"], row["model"], row["cls"]) == ("houses", "base", CLASSES[house])
        assert 0 < row["error"] <= row["allowed"]
        assert row["seconds"]["rounds"] == 5
        assert bool(row["ours_faster"]) == name.startswith(theirs)
        assert row["ours"] == name.startswith("wavlm_fast")
        assert row["gflop"] == pytest.approx(sum(cases.CASES["base 1x0.5"].operations().values()) / 1e9)
        assert (row["note"] != "") == name.startswith("Microsoft")


@pytest.mark.parametrize("fast", [False, True])
def test_the_class_is_the_houses_with_the_same_weights(tiny, house, fast):
    subject = subject_of(tiny, house)
    made = subject.copy(torch.float64, fast)
    assert type(made.model).__name__ == CLASSES[house]
    assert any(isinstance(module, StandIn) for module in made.modules()) == fast
    expected = cases.bound(tiny().copy(torch.float64), subject.inputs)()
    found = cases.bound(made, subject.inputs)()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # some have norms in float32
    assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in subject.module.parameters()}


def test_a_model_with_other_weights_gets_no_time(bench, monkeypatch):
    right = houses.conversion.to_microsoft

    def wrong(*args):
        made = right(*args)
        name = "encoder.layers.1.self_attn.grep_linear.weight"
        return made._replace(state={**made.state, name: made.state[name] * 1.01})

    monkeypatch.setattr(houses.conversion, "to_microsoft", wrong)
    ended = run(bench, "original 1x0.5", only=("fp32",))
    assert ended.status == 1
    for name in ("Microsoft fp32", "wavlm_fast fp32"):
        row = ended.rows["original 1x0.5", name]
        assert row["problem"].startswith("wrong: off by ")
        assert row["seconds"] is None


def test_ours_that_computes_something_else_gets_no_time(bench, monkeypatch):
    right = providers.accelerate

    def wrong(module):
        module.model.encoder.layers[1].self_attn.grep_linear.weight.data.mul_(1.01)
        return right(module)

    monkeypatch.setattr(providers, "accelerate", wrong)
    ended = run(bench, "original 1x0.5", only=("fp32",))
    assert ended.status == 1
    assert ended.rows["original 1x0.5", "wavlm_fast fp32"]["wrong"]
    assert ended.rows["original 1x0.5", "Microsoft fp32"]["seconds"]


def test_without_s3prl_ours_stands_for_microsofts_class(tiny, without):
    without("s3prl")
    made = subject_of(tiny, "original").copy(torch.float32)
    assert type(made.model) is original.WavLM
    assert not any(isinstance(module, StandIn) for module in made.modules())
    note = providers.of_houses()["Microsoft fp32"].note()
    ours = "wavlm_fast.original.WavLM restored to plain torch"
    assert note.startswith(f"{ours}, in place of s3prl.upstream.wavlm.WavLM: ")


def test_s3prls_class(tiny):
    theirs = pytest.importorskip("s3prl.upstream.wavlm.WavLM")
    made = subject_of(tiny, "original").copy(torch.float32)
    assert type(made.model) is theirs.WavLM
    assert providers.of_houses()["Microsoft fp32"].note() == "s3prl.upstream.wavlm.WavLM, a copy of Microsoft's class"


def test_without_torchaudio_its_case_is_left_out(bench, without):
    without("torchaudio")
    ended = run(bench, "torchaudio 1x0.5", "transformers 1x0.5", only=("fp32",))
    assert ended.status == 0
    assert {case for case, _ in ended.rows} == {"transformers 1x0.5"}
    reason = "torchaudio not installed (make test-clients makes an environment that has it)"
    assert ended.found["absent"]["torchaudio 1x0.5"] == reason
    assert f"torchaudio 1x0.5 is left out: {reason}" in ended.out


def test_a_torchaudio_that_cannot_be_imported(bench, monkeypatch):
    def fails(name, package=None):
        if name == "torchaudio":
            raise OSError("libcudart.so is missing\nin Spain")
        return right(name, package)

    right, find = importlib.import_module, importlib.util.find_spec
    monkeypatch.setattr(importlib, "import_module", fails)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "torchaudio" or find(name))
    ended = run(bench, "torchaudio 1x0.5", "transformers 1x0.5", only=("fp32",))
    assert ended.found["absent"]["torchaudio 1x0.5"] == "import torchaudio fails: libcudart.so is missing"


def test_their_classes_run_in_their_cases_alone(bench):
    names = ("transformers fp32", "Microsoft fp32", "wavlm_fast fp32")
    ended = run(bench, "ctc 1x0.6", "original 1x0.5", "transformers 1x0.5", only=names)
    theirs = {(case, name) for case, name in ended.rows if not name.startswith("wavlm_fast")}
    assert theirs == {
        ("ctc 1x0.6", "transformers fp32"),
        ("transformers 1x0.5", "transformers fp32"),
        ("original 1x0.5", "Microsoft fp32"),
    }


@pytest.mark.parametrize(("device", "dtypes"), [("cpu", ["fp32", "bf16"]), ("cuda", ["fp32", "fp16", "bf16"])])
def test_they_run_in_the_precisions_of_ours(device, dtypes):
    found = providers.of_houses(device)
    assert list(found) == [f"{family} {dtype}" for family in ("Microsoft", "torchaudio") for dtype in dtypes]


def test_a_full_run_has_no_houses(bench):
    assert "no case's name contains 'original'" in bench("--filter", "original").err


def test_the_table_of_houses(bench):
    ended = bench("--case", "houses", only=("--provider", *ALL, "wavlm_fast", "--dtype", "float32"))
    there = [name for name in FAMILIES if name not in str(ended.found["absent"])]
    titled = {table.title: table for table in tables.summaries({"rows": list(ended.rows.values())})}
    table = titled["Classes of several houses, the same weights"]
    assert table.columns == ("", *(f"{name} 1×0.5 s" for name in there))
    ratios = [row for row in table.rows if " over " in row[0]]
    assert [row[0] for row in ratios] == [f"fp32 over {FAMILIES[name]} fp32" for name in there]
    for index, row in enumerate(ratios):
        assert [cell != "" for cell in row[1:]] == [at == index for at in range(len(there))]
