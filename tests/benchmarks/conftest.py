"""A model of thousands of weights, in the place of those that take minutes."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_models import SIZES

from wavlm_fast import cli
from wavlm_fast.benchmarks.run import cases, peaks, suite

PEAKS = peaks.Peaks(2e11, 4e11, "made up")
OURS_AND_THEIRS = ("--provider", "transformers", "wavlm_fast")


@pytest.fixture
def tiny(monkeypatch):
    """Put cases of a tiny model in place of all others: tiny() -> the model `Output`, transformers' own."""
    models = {
        "base": cases.Spec(options=SIZES),
        "ctc": cases.Spec("WavLMForCTC", SIZES, "logits"),
        "classification": cases.Spec("WavLMForSequenceClassification", SIZES, "logits"),
        "frames": cases.Spec("WavLMForAudioFrameClassification", SIZES, "logits"),
        "xvector": cases.Spec("WavLMForXVector", SIZES, "embeddings"),
        "train": cases.Spec(options={**SIZES, **cases.NOTHING_RANDOM}),
        "lora": cases.Spec(options={**SIZES, **cases.NOTHING_RANDOM}, rank=2),
        "train-ctc": cases.Spec("WavLMForCTC", {**SIZES, **cases.NOTHING_RANDOM, "final_dropout": 0.0}, "logits"),
    }
    made = [
        cases.of("base", 1, 0.5, "latency", stages=True, layers=True),
        cases.Case("base", (0.5, 0.3), "padded", ragged="ragged"),
        *(
            cases.Case(model, (0.45, 0.9, 0.4), "ragged", ragged="in all ways", train=model == "train-ctc")
            for model in ("base", "xvector", "train-ctc")
        ),
        *(cases.of(model, 1, 0.6, "classes") for model in ("ctc", "classification", "frames", "xvector")),
        *(cases.of(model, 1, 0.5, "training", train=True) for model in ("train", "lora")),
        cases.of("base", 1, 1, "length", memory=True),
        cases.corpus("base", 12, 0.2, 1.0, layer=1),
        *(replace(case, lengths=(0.5,)) for case in cases.CASES.values() if case.group in ("regimes", "houses")),
    ]
    for name, found in (("MODELS", models), ("CASES", {case.name: case for case in made})):
        getattr(cases, name).clear()
        getattr(cases, name).update(found)
    monkeypatch.setattr(suite, "peaks", lambda device: PEAKS)
    return lambda name="base": cases.Output.of(name)


@pytest.fixture(autouse=True)
def restored():
    """Whatever a test does to the cases and to torch's threads is undone."""
    before = dict(cases.MODELS), dict(cases.CASES), torch.get_num_threads()
    yield
    for table, content in zip((cases.MODELS, cases.CASES), before):
        table.clear()
        table.update(content)
    torch.set_num_threads(before[2])


@dataclass
class Ended:
    """How the command ended, what it said, and its JSON."""

    status: int
    out: str
    err: str
    found: dict

    @property
    def rows(self):
        return {(row["case"], row["provider"]): row for row in self.found["rows"]}


@pytest.fixture
def bench(tiny, capsys, tmp_path):
    """Calls the command: bench("--case", "base 1x0.5") -> Ended."""

    def call(*arguments, only=OURS_AND_THEIRS):
        path = tmp_path / "found.json"
        path.unlink(missing_ok=True)
        status = cli.main(["bench", "--threads", "1", "--rounds", "5", "--json", str(path), *only, *arguments])
        said = capsys.readouterr()
        return Ended(status, said.out, said.err, json.loads(path.read_text()) if path.exists() else {})

    return call
