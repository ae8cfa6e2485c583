"""What the repository says of a GPU, from a record that nothing measured."""

import json
import shutil
from pathlib import Path

import made_up
import pytest

from wavlm_fast.benchmarks.gpu.card.record import read
from wavlm_fast.benchmarks.page import adopted, report, results
from wavlm_fast.kernels import _tuned

ROOT = Path(__file__).parents[2]
HEAD = {"device": "NVIDIA Made Up (CUDA sm_90, 80 GiB)", "sizes": "full", "torch": "2.13.0", "kernels": "0123456789ab"}
SOURCE = _tuned._source("gated_attention")
CHOICE = f"NVIDIA Made Up | triton 3.7.1 | gated_attention.forward_configs | {SOURCE} | 0123456789ab | ()"


def timing(median):
    return {"median": median, "p10": 0.9 * median, "p90": 1.1 * median, "rounds": 30}


def result(name, quantity, error, verdict="pass", reason=""):
    return {"level": "op", "name": name, "quantity": quantity, "backend": "triton", "dtype": "bfloat16", "case": "a",
            "tensor": "out", "error": error, "allowed": 0.02, "verdict": verdict, "reason": reason}  # fmt: skip


def of_op(provider, seconds, ours=False, **more):
    return {"op": "gated_attention", "case": "gated_attention T=500", "what": "forward", "provider": provider,
            "ours": ours, "limit": False, "error": 0.001, "allowed": 0.004, "problem": None, "note": "",
            "seconds": timing(seconds), "bytes": 12_300_000, "operations": 1e9, "of bandwidth": 0.21,
            "of products": 0.47, "share": 0.47, "bound": "products", **more}  # fmt: skip


def of_model(provider, seconds, ours=False, what="inference", dtype="bf16"):
    return {"model": "base", "batch": 8, "length": 10, "what": what, "provider": provider, "dtype": dtype,
            "ours": ours, "problem": None, "error": 0.001, "allowed": 0.004, "seconds": timing(seconds),
            "factor": 80 / seconds, "peak bytes": 2_500_000_000}  # fmt: skip


def lines():
    steps = [
        ("peaks", "peak bandwidth", [{"what": "bandwidth", "rate": 2.5e12, "how": "bytes/s, a copy"}]),
        ("parity", "parity of gated_attention", [
            result("gated_attention", "forward", 0.004), result("gated_attention", "gradient", 0.013)]),
        ("attention", "attention: wavlm_fast triton", [of_op("wavlm_fast triton", 0.0004, True)]),
        ("attention", "attention: FlexAttention", [of_op("FlexAttention", 0.0006)]),
        ("attention", "attention: SDPA, dense bias", [
            {"problem": "out of memory: tried 80 GiB", "ours": False, "fault": True}]),
        ("models", "base 8x10: wavlm_fast", [of_model("wavlm_fast", 0.010, True)]),
        ("models", "base 8x10: wavlm_fast, graph", [of_model("wavlm_fast, graph", 0.008, True)]),
        ("models", "base 8x10: transformers", [of_model("transformers", 0.02)]),
        ("models", "base 8x10 training: wavlm_fast", [of_model("wavlm_fast", 0.04, True, "training step")]),
        ("models", "base 8x10 training: transformers", [of_model("transformers", 0.06, what="training step")]),
        ("tuning", "tuning of attention", [
            {"of": "attention", "before": 0.0004, "after": 0.0003, "choices": {CHOICE: {"BLOCK_M": 64}}}]),
    ]  # fmt: skip
    run = {"date": "2026-05-04T03:02:01+00:00", "minutes": 10.0, "seconds": 590.5, "stopped": None}
    run["left out"] = ["large 32x10"]
    made = [{"step": name, "phase": phase, "took": 3.2, "rows": rows} for phase, name, rows in steps]
    return [{"head": {**HEAD}}, *made, {"run": run}]


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A copy of the repository's documents, and a record: card(lines) -> its file."""
    monkeypatch.setattr(results, "SOURCE", tmp_path / "results.json")
    monkeypatch.setattr(results, "RECORDS", {tmp_path / "results.json": tmp_path / "RESULTS.md"})
    monkeypatch.setattr(adopted, "README", tmp_path / "README.md")
    monkeypatch.setattr(adopted, "GUIDE", tmp_path / "gpu.md")
    monkeypatch.setattr(_tuned, "SHIPPED", tmp_path / "tuned.json")
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copy(ROOT / "docs" / "guides" / "gpu.md", tmp_path)
    results.SOURCE.write_text(json.dumps(made_up.document()))
    out = tmp_path / "out"
    out.mkdir()

    def write(content):
        path = out / "card.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
        return path

    return write


def test_the_command_takes_a_record_in(card, tmp_path, capsys):
    file = card(lines())
    before = (tmp_path / "README.md").read_text()
    assert results.main(["--gpu", str(file)]) == 0
    assert capsys.readouterr() == ("", "")
    assert read(tmp_path / "card.jsonl") == read(file)

    text = (tmp_path / "RESULTS.md").read_text()
    assert text == results.markdown(results.read(results.SOURCE))
    section = text.partition("\n## On a GPU\n")[2]
    for shown in ("| NVIDIA Made Up (CUDA", "| gated_attention | forward | bfloat16 | 1 | 4.0e-03 | 2.0e-02 | pass |",
                  "SDPA, dense bias: out of memory: tried 80 GiB", "large 32x10", "1.50 x", "47 %", "12.3"):
        assert shown in section, shown
    page = (file.parent / "index.html").read_text()
    assert page == report.page(results.read(results.SOURCE))
    assert "On a GPU</h2>" in page
    assert "NVIDIA Made Up" in page

    changed = (tmp_path / "README.md").read_text()
    assert "not yet" not in changed.partition("### Triton kernels")[2].partition("\n## ")[0]
    for said in ("has run on a GPU yet", "never run on a GPU"):
        assert said in before
        assert said not in changed
    assert "<!-- gpu-where -->run on an NVIDIA Made Up; for others" in changed
    assert (
        "<!-- gpu -->**measured on an NVIDIA Made Up**: 2 of 2 comparisons right; inference of base, 8 × 10 s, bf16: "
        "2.50 times as fast as transformers; training of base, 8 × 10 s, bf16: 1.50 times as fast as transformers"
        "<!-- /gpu -->"
    ) in changed
    guide = (tmp_path / "gpu.md").read_text()
    assert "has run on a GPU yet" not in guide
    assert "they have run on an NVIDIA Made Up, where all of 2 comparisons with float64 are right" in guide
    old, new = before.splitlines(), changed.splitlines()
    assert sum(a != b for a, b in zip(old, new, strict=True)) == 5


def test_another_record_takes_the_place_of_the_first(card, tmp_path):
    assert results.main(["--gpu", str(card(lines()))]) == 0
    again = lines()
    again[2]["rows"][0] |= {"verdict": "FAIL", "error": 0.5}
    assert results.main(["--gpu", str(card(again))]) == 0
    changed = (tmp_path / "README.md").read_text()
    assert "**: 1 of 2 comparisons right" in changed
    assert "where 1 of 2 comparisons with float64 are right" in changed
    assert "FAIL" in (tmp_path / "RESULTS.md").read_text()


def test_what_its_search_found_ships_beside_that_of_other_cards(card, tmp_path):
    other = CHOICE.replace("Made Up", "Other")
    stale = CHOICE.replace(SOURCE, "ba9876543210")
    _tuned.SHIPPED.write_text(json.dumps({other: {"BLOCK_M": 32}, CHOICE: {"BLOCK_M": 16}, stale: {"BLOCK_M": 8}}))
    assert results.main(["--gpu", str(card(lines()))]) == 0
    assert json.loads(_tuned.SHIPPED.read_text()) == {CHOICE: {"BLOCK_M": 64}, other: {"BLOCK_M": 32}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found[-2]["rows"][0].update(choices={"a": 3}), "choices of tuning of attention are not what"),
        (lambda found: found[0]["head"].update(sizes="tiny"), "is of toy sizes"),
        (lambda found: found.pop(2), "has no comparison with float64 in it"),
        (lambda found: found.pop(0), "is not what `wavlm-fast gpu` writes"),
    ],
)
def test_a_record_that_says_nothing_of_a_gpu_changes_nothing(card, tmp_path, capsys, change, says):
    found = lines()
    change(found)
    assert results.main(["--gpu", str(card(found))]) == 2
    assert says in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert not (tmp_path / "card.jsonl").exists()
    assert not (tmp_path / "RESULTS.md").exists()
    assert not _tuned.SHIPPED.exists()


def test_a_readme_without_its_places_is_refused(card, tmp_path, capsys):
    (tmp_path / "README.md").write_text("# nothing\n")
    assert results.main(["--gpu", str(card(lines()))]) == 2
    assert "the README has 0 places <!-- gpu-first -->" in capsys.readouterr().err
    assert not (tmp_path / "card.jsonl").exists()


def test_the_readme_says_what_the_repository_s_record_says():
    text, guide = (ROOT / "README.md").read_text(), (ROOT / "docs" / "guides" / "gpu.md").read_text()
    record = ROOT / "benchmarks" / "card.jsonl"
    if record.exists():
        assert text == adopted.readme(text, read(record))
        assert guide == adopted.guide_to(guide, read(record))
    else:
        assert "<!-- gpu -->**measured on a GPU: not yet**<!-- /gpu -->" in text
        assert "<!-- gpu-ran -->**none of the kernels has run on a GPU yet.**" in guide
