"""The Markdown of a run, and the figures that the README takes from it."""

import json
import math
import re

import made_up
import pytest

from wavlm_fast.benchmarks.page import results, speed, tables


def test_the_first_line_says_who_wrote_it():
    first, *rest = results.markdown(made_up.document()).splitlines()
    assert re.fullmatch(r"<!-- .*`python -m benchmarks.results`.*benchmarks/results.json.* -->", first)
    assert rest[1] == "# Results"


def test_every_table_is_there():
    found = made_up.document()
    text = results.markdown(found)
    for section in tables.sections(found):
        assert section.tables
        assert f"\n## {section.heading}\n" in text
        for table in section.tables:
            assert table.markdown() in text + "\n"
    for fact in ("- machine: Made Up CPU, AVX2, FMA\n", "- command: wavlm-fast bench --json found.json\n",
                 "- date: 2026-05-04T03:02:01+00:00\n", "torch 2.13.0", "- without ONNX Runtime fp32: "):  # fmt: skip
        assert fact in text


def test_one_number_changed_changes_what_shows_it():
    found = made_up.document()
    before = results.markdown(found).splitlines()
    made_up.row(found, "base 8x10", "OpenVINO f32")["ours_faster"]["median"] = 1.2345
    after = results.markdown(found).splitlines()
    changed = [new for old, new in zip(before, after) if old != new]
    assert len(before) == len(after)
    names = [line.split(" | ")[0].strip("| ") for line in changed]
    # Among all gains, twice in the summary, and in the case.
    assert names == ["OpenVINO f32", "fp32 over OpenVINO f32", "fp32 over the best of them", "OpenVINO f32"]
    assert all("1.23" in line for line in changed)


@pytest.mark.parametrize("name", ["rows", "layers", "stages", "memory", "corpus", "scaling"])
def test_a_part_of_a_document(name):
    found = made_up.only(name)
    headings = re.findall(r"^## (.*)$", results.markdown(found), re.MULTILINE)
    assert headings == [section.heading for section in tables.sections(found) if section.tables]
    assert headings


def test_nothing_at_all():
    assert results.markdown({}).startswith("<!--")
    assert results.headline({}) == []


def test_no_nan():
    found = made_up.document()
    for row in found["rows"]:
        row |= {"error": math.nan, "factor": math.inf}
    assert not re.search(r"\b(nan|inf)\b", results.markdown(found))


def test_headline():
    found = made_up.document()
    made_up.row(found, "base 1x10", "transformers fp32")["ours_faster"]["median"] = 1.587
    made_up.row(found, "base 8x10", "transformers fp32")["ours_faster"]["median"] = 2.4
    made_up.row(found, "base 8x10", "OpenVINO f32")["ours_faster"]["median"] = 1.314
    made_up.row(found, "base 8x10", "transformers bf16")["ours_faster"]["median"] = 1.1
    found["memory"] = [{**r, "peak_bytes": 1.004e9 * (i + 1)} for i, r in enumerate(found["memory"])]
    assert results.headline(found) == [
        (
            "over transformers, fp32, one utterance of 10 s",
            "1.59 times as fast",
            "wavlm-fast bench --case 'base 1x10'",
        ),
        (
            "over OpenVINO f32, the fastest of 2 others, fp32, 8 utterances of 10 s",
            "1.31 times as fast",
            "wavlm-fast bench --case 'base 8x10'",
        ),
        (
            "peak memory, fp32, 120 s of audio",
            "4.02 GB (transformers: 2.01 GB)",
            "wavlm-fast bench --case 'base 1x120'",
        ),
    ]


def test_the_headline_of_exact_batches():
    found = made_up.document()
    theirs = made_up.row(found, "base ragged 8x2-15", "transformers fp32")
    theirs["ours_faster"]["median"] = 3.456
    usual = len(results.headline(found))
    found["rows"].append({**theirs, "provider": "wavlm_fast fp32, exact", "family": "wavlm_fast, exact", "ours": True})
    *_, (what, figure, command) = results.headline(found)
    assert len(results.headline(found)) == usual + 1
    assert what.startswith("an exact batch over transformers on the padded one, fp32")
    assert (figure, command) == ("3.46 times as fast", "wavlm-fast bench --case 'base ragged 8x2-15'")


def test_a_headline_that_was_not_measured_is_left_out():
    found = made_up.document()
    made_up.row(found, "base 1x10", "transformers fp32")["ours_faster"] = None
    assert len(results.headline(found)) == 2
    found["memory"] = [row for row in found["memory"] if row["provider"] != "transformers"]
    assert [what for what, _, _ in results.headline(found)] == [results.headline(made_up.document())[1][0]]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "SOURCE", tmp_path / "results.json")
    records = {tmp_path / name: tmp_path / f"{name}.md" for name in ("results.json", "other")}
    monkeypatch.setattr(results, "RECORDS", records)
    monkeypatch.setattr(results, "FIGURE", tmp_path / "speed.svg")
    return tmp_path


def test_the_command_writes_the_file(files, capsys):
    for source in results.RECORDS:
        source.write_text(json.dumps(made_up.document()))
    assert results.main([]) == 0
    for target in results.RECORDS.values():
        assert target.read_text(encoding="utf-8") == results.markdown(made_up.document())
    assert results.FIGURE.read_text(encoding="utf-8") == speed.svg(made_up.document())
    assert capsys.readouterr().out == ""


def test_the_command_prints_another_file(files, capsys):
    path = files / "other.json"
    path.write_text(json.dumps(made_up.document()))
    assert results.main([str(path)]) == 0
    assert capsys.readouterr().out == results.markdown(made_up.document())
    assert not any(target.exists() for target in results.RECORDS.values())


def test_the_command_prints_the_headline(files, capsys):
    for source in results.RECORDS:
        source.write_text(json.dumps(made_up.document()))
    assert results.main(["--headline"]) == 0
    out = capsys.readouterr().out
    for figure in results.headline(made_up.document()):
        assert all(part in out for part in figure)
    assert not any(target.exists() for target in results.RECORDS.values())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        ("{", "are no JSON"),
        ("[]", "are not what `wavlm-fast bench --json` writes"),
        ('{"rows": 1}', "are not what `wavlm-fast bench --json` writes"),
    ],
)
def test_a_file_that_is_none(files, capsys, content, says):
    if content is not None:
        results.SOURCE.write_text(content)
    assert results.main([]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.splitlines()) == 1
    assert not any(target.exists() for target in results.RECORDS.values())
