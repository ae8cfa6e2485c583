"""Tables say what the document says, and nothing else."""

import copy
import csv
import io
import math
import random
import re

import made_up
import pytest
from rich.console import Console

from wavlm_fast.benchmarks.page import document, tables
from wavlm_fast.benchmarks.page.table import Table

# What no figure shows by itself: other figures and names hold it.
SILENT = ("audio", "batch", "length", "peak_gflops")


def numbers(found):
    """Paths to every measured number: ("rows", 3, "seconds", "median")."""

    def walk(value, path):
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, (*path, key))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from walk(item, (*path, index))
        elif isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
            yield path

    for name in ("rows", "layers", "stages", "memory", "corpus", "scaling"):
        yield from walk(found[name], (name,))


def change(found, path, how):
    """Change one number in its place; returns what it was."""
    for key in path[:-1]:
        found = found[key]
    before = found[path[-1]]
    found[path[-1]] = how(before)
    return before


def cells(found):
    """Titles and cells of all tables by their place."""
    return {
        (section.key, n, i, j): cell
        for section in tables.sections(found)
        for n, table in enumerate(section.tables)
        for i, row in enumerate([(table.title,), *table.rows])
        for j, cell in enumerate(row)
    }


def shows(path):
    """Whether some table shows a number of itself."""
    if path[0] == "scaling" and path[2] == "points":
        return path[4] == 1
    if path[-1] == "gflop" and path[0] == "rows":
        return path[1] % len(made_up.PROVIDERS) == 0  # once in the title of a case
    if path[-1] == "largest":
        return path[1] < 2 * len(made_up.LARGEST)  # once for a dtype: those of the first two providers
    return path[-1] not in SILENT and path[-2:] != ("ours_faster", "rounds")


def test_every_number_of_the_document_is_in_a_table():
    found = made_up.document()
    before = cells(found)
    paths = [path for path in numbers(found) if shows(path)]
    assert len(paths) > 500
    for path in paths:
        was = change(found, path, lambda x: x * 7 + 3)
        assert cells(found) != before, path
        change(found, path, lambda x, was=was: was)


def test_every_number_of_a_table_is_from_the_document():
    """With every number of it changed, each by a factor of its own, no figure stays as it was."""
    found, draw = made_up.document(), random.Random(1)
    other = copy.deepcopy(found)
    for path in numbers(found):
        if shows(path):
            change(other, path, lambda x: x * (7 if isinstance(x, int) else draw.uniform(3, 7)))
    before, after = cells(found), cells(other)
    assert set(before) == set(after)
    figures = {at for at, cell in before.items() if re.fullmatch(r"\d[\d.e+-]*( %| x)?", cell)}
    assert len(figures) > 500
    same = {at: before[at] for at in figures if before[at] == after[at]}
    # How many cases there are, and how many utterances of how many seconds.
    counts = {at for at in same if (at[0] == "gains" and at[3] == 1) or (at[0] == "memory" and at[3] in (1, 2))}
    assert set(same) == counts


def test_a_case():
    found = made_up.document()
    rows = [r for r in found["rows"] if r["case"] == "base 8x10"]
    row = made_up.row(found, "base 8x10", "transformers fp32")
    row |= {"error": 4.4e-7, "allowed": 9e-7, "factor": 12.34, "gflops": 123.4, "share": 0.614, "gflop": 1186.2}
    row["seconds"] = {"median": 6.4837, "p10": 6.4, "p90": 6.61, "rounds": 7}
    row["ours_faster"] = {"median": 2.444, "p10": 2.4, "p90": 2.5, "rounds": 7}
    table = tables.of_case(rows)
    assert table.title == "base 8x10: WavLMModel, 8 utterances of 10 s, 1186 GFLOP"
    assert table.rows[0][:6] == ("transformers fp32", "4.4e-07", "9.0e-07", "6.484", "6.400-6.610", "7")
    assert table.rows[0][6:] == ("12.3", "123", "61 %", "2.44 x", "2.40-2.50")
    assert table.rows[-1][-1] == "-"  # ours is not compared with itself


@pytest.mark.parametrize(
    ("case", "title"),
    [
        ("base 1x10", r"1 utterance of 10 s, \S+ GFLOP"),
        ("base ragged 8x2-15", "8 utterances of up to 15 s, padded, with mask, "),
        ("train 4x5", "4 utterances of 5 s, forward, backward and optimizer step, "),
        ("op gated_attention 8x10", r"^op gated_attention 8x10, \S+ GFLOP$"),
        ("xvector 1x10", "xvector 1x10: WavLMForXVector, "),
    ],
)
def test_titles_of_cases(case, title):
    rows = [r for r in made_up.document()["rows"] if r["case"] == case]
    assert re.search(title, tables.of_case(rows).title)


def test_short_times_are_in_milliseconds():
    rows = [r for r in made_up.document()["rows"] if r["group"] == "op"]
    rows[0]["seconds"]["median"] = 0.00123456
    table = tables.of_case(rows)
    assert table.columns[3] == "ms"
    assert table.rows[0][3] == "1.235"
    assert "x real time" not in table.columns  # an op hears no seconds of audio


def test_who_got_no_time_says_why():
    rows = [r for r in made_up.document()["rows"] if r["case"] == "base 1x10"]
    nothing = dict.fromkeys(("seconds", "factor", "gflops", "share", "ours_faster"))
    rows[2] |= {**nothing, "problem": "wrong: off by 1e-2, 1e-6 is allowed", "wrong": True, "error": 1e-2}
    rows[3]["note"] = "this CPU has no such instructions"
    table = tables.of_case(rows)
    assert table.rows[2][:3] == ("OpenVINO f32", "1.0e-02", table.rows[2][2])
    assert set(table.rows[2][3:]) == {"-"}
    assert table.remarks == [
        "OpenVINO f32: wrong: off by 1e-2, 1e-6 is allowed",
        "wavlm_fast fp32: this CPU has no such instructions",
    ]
    file = io.StringIO()
    table.show(Console(file=file, width=120))
    for text in (table.markdown(), table.html(), file.getvalue()):
        assert "OpenVINO f32: wrong: off by 1e-2, 1e-6 is allowed" in text


def test_summaries():
    found = made_up.document()
    made_up.row(found, "base 8x10", "transformers fp32")["ours_faster"]["median"] = 2.444
    made_up.row(found, "base 1x10", "transformers fp32").update(seconds=None, ours_faster=None)
    base, others = tables.summaries(found)
    assert (base.title, base.columns) == ("WavLM-base", ("", "1×3 s", "1×10 s", "8×10 s", "1×120 s"))
    assert base.rows[0][2:4] == ("", "2.44")
    assert others.columns == ("", "xvector 1×10 s", "base ragged 8×2-15 s", "train 4×5 s")


def test_summaries_say_how_ours_stands_to_the_best_of_the_others():
    found = made_up.document()
    for provider, ratio in (("transformers fp32", 1.5), ("OpenVINO f32", 1.25), ("transformers bf16", 2.0)):
        made_up.row(found, "base 1x10", provider)["ours_faster"]["median"] = ratio
    made_up.row(found, "base 8x10", "OpenVINO f32").update(seconds=None, ours_faster=None)
    made_up.row(found, "base 8x10", "transformers fp32")["ours_faster"]["median"] = 2.444
    for provider in ("transformers fp32", "OpenVINO f32"):
        made_up.row(found, "base 1x120", provider).update(seconds=None, ours_faster=None)
    rows = {row[0]: row[2:] for row in tables.summaries(found)[0].rows}
    assert rows["fp32 over the best of them"] == ("1.25", "2.44", "")
    assert "bf16 over the best of them" not in rows  # transformers is the only one


def test_summaries_of_many_cases_go_on_in_another_table():
    found = made_up.document()
    rows = [r for r in found["rows"] if r["case"] == "base 1x10"]
    for seconds in range(20, 31):
        found["rows"] += [{**r, "case": f"base 1x{seconds}", "length": float(seconds)} for r in rows]
    titles = [(t.title, len(t.columns)) for t in tables.summaries(found)]
    assert titles == [("WavLM-base", 9), ("WavLM-base", 8), ("Other classes, padded batches, training", 4)]


def test_gains():
    found = made_up.only("rows", "memory")
    for case, ratio in zip(made_up.CASES, (1.5, 2.5, 4.0, 1.0, 2.0, 3.0, 2.0, 2.0, 77.0)):
        made_up.row(found, case, "transformers fp32")["ours_faster"]["median"] = ratio
        made_up.row(found, case, "transformers fp32")["error"] = 1e-7 * ratio
        made_up.row(found, case, "wavlm_fast fp32")["error"] = 2e-7 * ratio
    found["memory"] = [{**r, "peak_bytes": 1e9 * (i + 1)} for i, r in enumerate(found["memory"])]
    (table,) = tables.of_gains(found)
    # Ops are no cases: 77 is not in it.
    assert table.rows[0] == (
        "transformers fp32", "8", "2.00", "1.00", "4.00", "4.0e-07", "8.0e-07", "2.00", "4.00", "1×120 s",
    )  # fmt: skip
    assert [row[0] for row in table.rows] == ["transformers fp32", "transformers bf16", "OpenVINO f32"]
    assert table.rows[1][-3:] == ("-", "-", "-")


def test_stages():
    rows = made_up.document()["stages"]
    rows[0] |= {"seconds": 0.1, "gflop": 9.18, "peak_gflops": 200.0}
    for stage in rows[1:]:
        stage["seconds"] = 0.1
    table = tables.of_stages(rows)
    assert table.title == "base 1×10 s, wavlm_fast fp32, stage by stage"
    assert table.rows[0] == ("attention", "12 gated_attention", "100.0", "25 %", "9.18", "92", "46 %")
    assert table.rows[2][4:] == ("-", "-", "-")
    rows[0]["peak_gflops"] = None
    assert tables.of_stages(rows).rows[0][-2:] == ("92", "-")
    rows[3]["seconds"] = -0.5  # the clock's own cost was taken off, and is not known that well
    assert {row[3] for row in tables.of_stages(rows).rows} == {"-"}


def test_memory_that_was_not_measured():
    rows = made_up.document()["memory"]
    for row in rows[:2]:
        row |= {"peak_bytes": None, "forward_bytes": None, "problem": "ended with status 9"}
    table = tables.of_memory(rows)
    assert table.rows[1] == ("transformers fp32", "1", "120", "-", "-")
    assert table.remarks == ["transformers fp32, 1×10 s, 1×120 s: ended with status 9"]


def test_scaling_has_a_column_for_every_length():
    rows = made_up.document()["scaling"]
    rows[0] |= {"points": [[1.0, 0.5], [60.0, 30.25]], "exponent": 1.254, "local": None}
    lengths, memory, batch = tables.of_scaling(rows)
    assert lengths.columns == ("provider", "1 s", "4 s", "16 s", "60 s", "exponent", "of the last two")
    assert lengths.rows[0] == ("transformers fp32", "0.500", "-", "-", "30.25", "1.25", "-")
    assert memory.title == "GB that one forward adds at its peak against audio length"
    assert batch.columns[1:4] == ("×1", "×4", "×16")


def test_scaling_of_several_models_and_lengths():
    rows = made_up.document()["scaling"][-1:]
    rows += [{**rows[0], "model": "large", "at": 2.0}, {**rows[0], "model": "large", "at": 10.0}]
    titles = [table.title for table in tables.of_scaling(rows)]
    assert titles == [f"Seconds of one forward against batch{which}" for which in
                      ("", ", large, of 2 s each", ", large, of 10 s each")]  # fmt: skip


def test_of_several_of_ours_the_first_that_was_timed_counts():
    rows = [r for r in made_up.document()["rows"] if r["group"] == "op" and r["dtype"] == "fp32"]
    rows[-1]["seconds"]["median"] = 0.0125
    refused = {**rows[-1], "provider": "wavlm_fast triton fp32", "seconds": None, "problem": "refused"}
    slow = {**rows[-1], "provider": "wavlm_fast reference fp32", "seconds": {**rows[-1]["seconds"], "median": 9.0}}
    ((row,),) = (table.rows for table in tables.of_ops([*rows[:-1], refused, rows[-1], slow]))
    assert row[:2] == ("gated_attention 8×10 s", "fp32")
    assert row[3] == "12.50"


def test_an_op_without_arithmetic():
    rows = [r for r in made_up.document()["rows"] if r["group"] == "op"]
    for row in rows:
        row |= {"gflop": 0.0, "gflops": None, "share": None}
    assert tables.of_case(rows).title == "op gated_attention 8x10"


def test_numbers_that_are_none():
    """NaN before it was written as JSON, null after."""
    found = made_up.document()
    for nothing in (None, math.nan, math.inf):
        other = copy.deepcopy(found)
        for path in numbers(found):
            if path[0] != "scaling" and path[-1] not in SILENT:
                change(other, path, lambda _, nothing=nothing: nothing)
        assert not re.search(r"\b(nan|inf|None)\b", "".join(cells(other).values()))
        assert tables.of_gains(other) == []


def test_text_of_a_document_is_only_text():
    found = made_up.document()
    name = "torch <b>|[bold]*x*`"
    for row in found["rows"]:
        row["provider"] = row["provider"].replace("OpenVINO", name)
        row["note"] = "[red]a | b\n<script>"
    table = next(s for s in tables.sections(found) if s.key == "cases").tables[0]
    file = io.StringIO()
    table.show(Console(file=file, width=200))
    assert any(line.lstrip("| ").startswith(f"{name} f32 ") for line in file.getvalue().splitlines())
    assert "[red]a | b" in file.getvalue()
    assert "torch &lt;b&gt;\\|\\[bold\\]\\*x\\*\\` f32 |" in table.markdown()
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.markdown().splitlines() if line.startswith("|")}
    assert widths == {len(table.columns) + 1}
    assert "<b>" not in table.html()
    assert "<script>" not in table.html() + table.markdown()


def test_csv_has_every_number():
    found = made_up.document()
    lines = list(csv.DictReader(io.StringIO(tables.csv_rows(found))))
    assert next(iter(lines[0])) == "kind"
    kinds = {"case": "rows", "layer": "layers", "stage": "stages", "memory": "memory", "corpus": "corpus"}
    for kind, name in kinds.items():
        own = [line for line in lines if line["kind"] == kind]
        assert len(own) == len(found[name])
        for line, row in zip(own, found[name]):
            for key, value in row.items():
                parts = {f"{key}_{part}": v for part, v in value.items()} if isinstance(value, dict) else {key: value}
                for column, v in parts.items():
                    assert line.get(column, "") == ("" if v is None else str(v))
    points = [line for line in lines if line["kind"] == "scaling"]
    assert len(points) == sum(len(row["points"]) for row in found["scaling"])
    x, y = found["scaling"][0]["points"][1]
    assert (points[1]["x"], points[1]["y"], points[1]["along"]) == (str(x), str(y), "length")
    assert tables.csv_rows({}) == "kind\n"


def test_csv_has_no_nan():
    found = made_up.document()
    found["rows"][0]["error"] = math.nan
    (line, *_) = csv.DictReader(io.StringIO(tables.csv_rows(found)))
    assert line["error"] == ""


def test_head():
    found = made_up.document()
    assert tables.head(found) == (
        "Made Up CPU, 3 threads; python 3.11.7, torch 2.13.0, transformers 5.23.0. "
        "Measured peaks: fp32 200 GFLOP/s, bf16 400 GFLOP/s (made up)."
    )
    found |= {"device": "Made Up GPU", "peaks": {"fp32": None, "bf16": None, "how": "not measured: no compiler"}}
    assert tables.head(found).startswith("Made Up GPU, Made Up CPU, 3 threads; ")
    assert tables.head(found).endswith("fp32 -, bf16 - (not measured: no compiler).")


def test_names():
    assert document.label({"provider": "wavlm_fast", "dtype": "fp32"}) == "wavlm_fast fp32"
    assert document.label({"provider": "OpenVINO f32", "dtype": "fp32"}) == "OpenVINO f32"
    assert document.label({"provider": "x fp32, freed", "dtype": "fp32"}) == "x fp32, freed"
    assert document.bare("OpenVINO bf16") == document.bare("OpenVINO") == "OpenVINO"
    assert document.bare("x fp32, freed") == "x, freed"
    assert document.title_of("base ragged 8x2-15") == "base ragged 8×2-15 s"
    assert document.title_of("base ragged") == "base ragged"


def test_an_empty_table_is_one():
    assert Table("t", ("a", "b")).without_empty_columns().columns == ("a",)
