"""What the repository says of its speed is what its recorded run found, to the letter."""

import re
import shlex
from pathlib import Path

import pytest

from wavlm_fast import cli
from wavlm_fast.benchmarks.page import results, speed
from wavlm_fast.benchmarks.run import suite
from wavlm_fast.benchmarks.run.cases import CASES

ROOT = Path(__file__).parents[2]
RECORDS = {source: results.read(source) for source in results.RECORDS}


@pytest.mark.parametrize("source", RECORDS, ids=lambda path: path.name)
def test_results_are_rendered_from_the_record(source):
    assert results.RECORDS[source].read_text() == results.markdown(RECORDS[source])


def test_the_readme_s_plot_is_drawn_from_the_record():
    assert results.FIGURE.read_text(encoding="utf-8") == speed.svg(RECORDS[results.SOURCE])
    assert f"({results.FIGURE.relative_to(ROOT)})" in (ROOT / "README.md").read_text()


def test_the_readme_shows_the_figures_of_the_records():
    shown = re.search(r"<!-- figures -->\n(.*?)<!-- /figures -->", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in shown.splitlines()[2:]]
    assert rows == [[what, figure, f"`{command}`"] for what, figure, command in results.recorded_headline()]
    assert len(rows) == 4


@pytest.mark.parametrize("name", CASES)
def test_the_record_is_of_every_case(name):
    rows = [row for found in RECORDS.values() for row in found["rows"]]
    timed = {row["provider"] for row in rows if row["case"] == name and row["seconds"]}
    assert any(provider.startswith("wavlm_fast") for provider in timed)


@pytest.mark.parametrize("source", RECORDS, ids=lambda path: path.name)
def test_nobody_was_wrong_unnoticed(source):
    assert RECORDS[source]["command"].startswith("wavlm-fast bench")
    for row in RECORDS[source]["rows"]:
        assert row["seconds"] is None or (row["error"] <= row["allowed"] and not row["wrong"])


def test_the_commands_of_the_figures_exist(monkeypatch):
    """They are followed as far as choosing their cases."""
    chosen = []
    monkeypatch.setattr(suite, "_run", lambda cases, *rest: chosen.append(cases))
    monkeypatch.setattr(suite, "peaks", lambda device: suite.Peaks(None, None, "not measured"))
    commands = [command for _, _, command in results.recorded_headline()]
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0
    assert all(chosen)
    assert len(chosen) == len(commands)
