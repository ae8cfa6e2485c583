"""The page holds what the document holds, stands by itself, and is HTML whatever the document has in it."""

import copy
import math
import re
import sys
from html.parser import HTMLParser

import made_up
import pytest

from wavlm_fast.benchmarks.page import plots, report, tables
from wavlm_fast.errors import UserError

VOID = {"meta", "br", "hr", "img", "link", "input"}
LISTS = ("rows", "layers", "stages", "memory", "corpus", "scaling")


class Page(HTMLParser):
    """Elements with their attributes and text; complains about what is left open or closed twice."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.cells, self.captions = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag in ("caption", "figcaption"):
            self.captions.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data
        if self.open and self.open[-1] in ("caption", "figcaption"):
            self.captions[-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def figures(found):
    return [plot.title for plot in plots.plots(found)]


@pytest.fixture(scope="module")
def whole():
    pytest.importorskip("matplotlib")
    return report.page(made_up.document())


def test_the_page_stands_by_itself(whole):
    page = Page(whole)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "data", "srcset"):
                assert value.startswith("#")
            assert "http" not in (value or ""), (tag, name, value)
            assert not re.search(r"url\((?!#)", value or "")
    style = re.search(r"<style>(.*?)</style>", whole, re.DOTALL).group(1)
    assert "@import" not in whole
    assert "url(" not in style
    assert "@media print" in style


def test_every_table_is_on_the_page(whole):
    found = made_up.document()
    shown = [table for section in tables.sections(found) for table in section.tables]
    page = Page(whole)
    assert len(page.all("table")) == len(shown)
    assert all(table.title in page.captions for table in shown)
    expected = [cell for table in shown for row in (filter(None, table.columns), *table.rows) for cell in row]
    assert [cell for cell in page.cells if cell] == [cell for cell in expected if cell]


def test_figures_are_to_the_right(whole):
    page = Page(whole)
    kinds = dict(zip(page.cells, [(tag, a.get("class")) for tag, a in page.elements if tag in ("td", "th")]))
    assert kinds["times as fast"] == ("th", "n")
    assert kinds["stage"] == kinds["attention"] == ("th", None)
    assert kinds["12 gated_attention"] == ("td", None)
    (share,) = {kind for cell, kind in kinds.items() if re.fullmatch(r"\d+ %", cell)}
    assert share == ("td", "n")


def test_names_are_unique_and_references_meet_one(whole):
    page = Page(whole)
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert len(names) == len(set(names))
    values = " ".join(value or "" for _, a in page.elements for value in a.values())
    used = set(re.findall(r"url\(#(.*?)\)", values))
    used |= {a["href"][1:] for _, a in page.elements if "href" in a}
    used |= {name for _, a in page.elements for name in a.get("aria-labelledby", "").split()}
    assert len(used) > 20
    assert used <= set(names)


def test_every_plot_has_a_title_and_words_for_it(whole):
    page = Page(whole)
    wanted = plots.plots(made_up.document())
    assert len(page.all("svg")) == len(wanted) == len(page.all("figure"))
    for attributes in page.all("svg"):
        assert attributes["role"] == "img"
        for name in attributes["aria-labelledby"].split():
            assert re.search(rf'<(title|desc) id="{name}">[^<]+<', whole)
    for plot in wanted:
        assert plot.title in page.captions


def test_plots_where_there_is_data():
    assert figures(made_up.document()) == [
        "Ours over each of the others, case by case",
        "Cost against audio length",
        "Cost against batch",
        "base 1×10 s, wavlm_fast fp32, stage by stage",
        "base 1×10 s in fp32: error by layer",
        "base 1×10 s in bf16: error by layer",
        "Ours over each of the others, op by op",
    ]
    assert figures({}) == []
    for name in LISTS:
        drawn = name not in ("memory", "corpus")
        assert (figures({**made_up.document(), name: []}) != figures(made_up.document())) == drawn
    assert figures(made_up.only("memory", "corpus")) == []


def test_axes_have_units(whole):
    texts = set(re.findall(r"<text[^>]*>([^<]+)</text>", whole))
    assert {
        "times as fast (log scale)",
        "audio length, s (log scale)",
        "time of one forward, s (log scale)",
        "memory that one forward adds, GB (log scale)",
        "utterances in a batch (log scale)",
        "time, ms (share of all stages)",
        "share of the measured peak, 200 GFLOP/s",
        "max |x - truth| / max |truth| (log scale)",
    } <= texts


def test_an_op_that_is_several_stages_leaves_room_for_its_bar():
    pytest.importorskip("matplotlib")
    found = made_up.only("stages")
    found["stages"][0]["stage"] = "qkv + gate + attention + out proj + norms"
    (plot,) = plots.plots(found)
    assert "qkv + … + norms" in plot.svg("p")
    assert "qkv + gate + attention + out proj + norms" in report.page(found)


def test_plots_show_the_document():
    """One number changed changes the plot that shows it."""
    pytest.importorskip("matplotlib")
    found = made_up.document()
    changes = {
        0: lambda d: made_up.row(d, "base 1x10", "OpenVINO f32")["ours_faster"].update(p90=7.0),
        1: lambda d: d["scaling"][3].update(exponent=1.77),
        2: lambda d: d["scaling"][-1]["points"][0].__setitem__(1, 5.0),
        3: lambda d: d["stages"][1].update(gflop=77.0),
        4: lambda d: d["layers"][0].update(error=3e-4),
        6: lambda d: d["rows"][-3]["ours_faster"].update(median=4.4),
    }
    for index, change in changes.items():
        other = copy.deepcopy(found)
        change(other)
        again, before, after = (plots.plots(d)[index].svg("p") for d in (copy.deepcopy(found), found, other))
        assert again == before != after


def test_everybody_looks_the_same_in_all_plots_and_unlike_the_others():
    found = made_up.document()
    look = plots.Look(found)
    providers = {"transformers": "fp32", "OpenVINO": "fp32", "wavlm_fast": "fp32"}
    looks = [look.of(*item) for item in providers.items()]
    assert len({style["color"] for style in looks}) == len({style["marker"] for style in looks}) == 3
    assert look.of("OpenVINO f32", "fp32") == look.of("OpenVINO", "fp32")
    half = look.of("OpenVINO bf16", "bf16")
    assert half["marker"] == look.of("OpenVINO", "fp32")["marker"]
    assert half["linestyle"] != look.of("OpenVINO", "fp32")["linestyle"]
    # Whoever is not in a run changes nobody's look.
    found["rows"] = [row for row in found["rows"] if row["family"] != "transformers"]
    assert plots.Look(found).of("wavlm_fast", "fp32") == look.of("wavlm_fast", "fp32")


@pytest.mark.parametrize("name", LISTS)
def test_a_part_of_a_document(name):
    found = made_up.only(name)
    page = Page(report.page(found))
    assert len(page.all("table")) == sum(len(section.tables) for section in tables.sections(found)) > 0
    assert len(page.all("svg")) == len(plots.plots(found))


def test_a_plot_without_a_table_is_shown():
    pytest.importorskip("matplotlib")
    found = made_up.only("rows")
    found["rows"] = [row for row in found["rows"] if row["group"] == "batch"]
    assert len(Page(report.page(found)).all("svg")) == 1


def test_only_wrong_providers():
    found = made_up.only("rows")
    nothing = dict.fromkeys(("seconds", "factor", "gflops", "share", "ours_faster"))
    for row in found["rows"]:
        row.update(nothing, wrong=True, problem="wrong: off by 0.1, 0.01 is allowed", error=math.nan)
    page = Page(report.page(found))
    assert not page.all("svg")
    assert "wrong: off by 0.1, 0.01 is allowed" in report.page(found)
    assert report.answer(found) == []


def test_nothing_at_all():
    found = {name: value for name, value in made_up.document().items() if name not in LISTS}
    assert "Nothing was measured." in report.page(found)
    Page(report.page(found))
    Page(report.page({}))


def test_numbers_that_are_none_and_bars_without_length():
    pytest.importorskip("matplotlib")
    found = made_up.document()
    for row in found["rows"][::2]:
        row["ours_faster"] = row["ours_faster"] and {"median": math.nan, "p10": None, "p90": math.inf, "rounds": 5}
    for row in (*found["stages"][:2], *found["layers"][::2]):
        row |= {"gflop": None, "error": math.nan, "allowed": None, "seconds": 0.0}
    for row in found["scaling"]:
        row |= {"exponent": None, "local": math.nan, "points": [*row["points"], [64.0, None]]}
    text = report.page(found)
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert len(Page(text).all("svg")) == 7


def test_text_of_a_document_is_only_text():
    found = made_up.document()
    evil = '<script>alert("&")</script>'
    found |= {"machine": evil, "command": evil, "absent": {evil: evil}, "audio": evil}
    for name in LISTS:
        for row in found[name]:
            row["provider"] = row["provider"].replace("OpenVINO", evil)
    for row in found["rows"]:
        row |= {"problem": evil, "note": evil, "case": row["case"].replace("base", evil)}
    text = report.page(found)
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text
    assert Page(text).all("table")


def test_the_head_says_where_the_figures_come_from(whole):
    for text in ("Made Up CPU, AVX2, FMA", "torch 2.13.0", "wavlm-fast bench --json found.json", "OMP_NUM_THREADS=3",
                 "2026-05-04T03:02:01+00:00", "without ONNX Runtime fp32", "onnxruntime not installed",
                 "fp32 200 GFLOP/s, bf16 400 GFLOP/s (made up)", "a clip of speech"):  # fmt: skip
        assert text in whole
    assert "<h1>WavLM on Made Up CPU</h1>" in whole
    assert "<h1>WavLM on Made Up GPU</h1>" in report.page({**made_up.only("memory"), "device": "Made Up GPU"})


def test_the_answer_comes_first(whole):
    assert 0 < whole.index(report.answer(made_up.document())[0]) < whole.index("<table")


def test_the_answer():
    found = made_up.only("rows", "memory")
    for case, ratio in zip(made_up.CASES, (1.5, 2.5, 4.0, 1.0, 2.0, 3.0, 2.0, 2.0, 77.0)):
        for provider, of_this in (("transformers fp32", 1), ("transformers bf16", 2), ("OpenVINO f32", 0.7)):
            made_up.row(found, case, provider)["ours_faster"]["median"] = ratio * of_this
        made_up.row(found, case, "transformers fp32")["error"] = 1e-7 * ratio
        made_up.row(found, case, "wavlm_fast fp32")["error"] = 2e-7 * ratio
    found["memory"] = [{**r, "peak_bytes": 1e9 * (i + 1)} for i, r in enumerate(found["memory"])]
    assert report.answer(found) == [
        "On this machine wavlm_fast is 2.00 times as fast as transformers fp32 (median of 8 cases, 1.00 to 4.00), "
        "and 1.40 times as fast as OpenVINO f32 (median of 8 cases), the nearest of 2 others.",
        "For 120 s of audio its process needs 4.00 GB where that of transformers fp32 needs 2.00 GB.",
        "In fp32 it is off by at most 8.0e-07 of the largest value, transformers fp32 by 4.0e-07, against float64.",
    ]


def test_the_answer_of_one_case():
    found = made_up.only("rows")
    found["rows"] = [row for row in found["rows"] if row["case"] == "base 1x10" and "bf16" not in row["provider"]]
    made_up.row(found, "base 1x10", "transformers fp32")["ours_faster"]["median"] = 2.0
    made_up.row(found, "base 1x10", "OpenVINO f32")["ours_faster"]["median"] = 3.0
    assert report.answer(found)[0] == (
        "On this machine wavlm_fast is 2.00 times as fast as transformers fp32 (one case, 2.00 to 2.00), "
        "and 3.00 times as fast as OpenVINO f32 (one case)."
    )
    found["rows"] = [row for row in found["rows"] if row["family"] != "OpenVINO"]
    assert report.answer(found)[0].endswith("transformers fp32 (one case, 2.00 to 2.00).")
    found["rows"] = [row for row in found["rows"] if row["ours"]]
    assert report.answer(found) == []


def test_without_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    found = made_up.document()
    text = report.page(found)
    page = Page(text)
    assert not page.all("svg")
    assert len(page.all("table")) == sum(len(section.tables) for section in tables.sections(found))
    assert "matplotlib cannot be imported" in text
    assert "extra &#x27;bench&#x27;" in text
    for title in figures(found):
        assert title in text
    assert "matplotlib" not in report.page(made_up.only("memory"))  # no plot is missed there


def test_the_file(tmp_path):
    folder = tmp_path / "a" / "report"
    found = made_up.only("memory")
    path = report.write_report(found, folder)
    assert path == folder / "index.html"
    assert path.read_text(encoding="utf-8") == report.page(found)
    path.write_text("an older one")
    report.write_report(found, folder)
    assert path.read_text(encoding="utf-8") == report.page(found)
    assert list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the report folder .*file.* cannot be made: "):
        report.write_report(made_up.only("memory"), tmp_path / "file")
    with pytest.raises(UserError, match="cannot be made: Not a directory"):
        report.write_report(made_up.only("memory"), tmp_path / "file" / "below")
    (tmp_path / "index.html").mkdir()
    with pytest.raises(UserError, match="the report .*index.html cannot be written: Is a directory"):
        report.write_report(made_up.only("memory"), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "index.html"]
