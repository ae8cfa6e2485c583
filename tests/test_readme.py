"""What the README says of the code is read off the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from wavlm_fast import backends
from wavlm_fast.cli import COMMANDS, main
from wavlm_fast.extraction.wanted import CLASSES, CONVENTIONS
from wavlm_fast.extraction.writers import FORMATS
from wavlm_fast.ops import references

README = Path(__file__).parent.parent.joinpath("README.md").read_text()


def _rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _op_table() -> list[list[str]]:
    return _rows(re.search(r"<!-- ops -->\n(.*?)<!-- /ops -->", README, re.DOTALL).group(1))


def test_every_op_has_its_row() -> None:
    assert [row[0].strip("`") for row in _op_table()] == sorted(references)


@pytest.mark.parametrize(("column", "backend"), [(1, "cpu"), (2, "triton")])
def test_the_table_says_which_backend_has_which_op(column: int, backend: str) -> None:
    table = backends.load(backend).TABLE
    for row in _op_table():
        op, cell = row[0].strip("`"), row[column]
        assert (cell != "-") == (op in table), f"{op} on {backend}: the README says {cell!r}"
        backward = op in table and f"{op}_backward" in table
        assert ("backward" in cell) == backward, f"{op}'s gradient on {backend}: the README says {cell!r}"


def test_every_command_is_in_the_readme() -> None:
    for command in COMMANDS:
        assert f"`wavlm-fast {command}" in README


def test_the_readme_shows_what_the_command_on_batches_prints(capsys) -> None:
    assert main(["batches", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    shown = _rows(re.search(r"<!-- batches -->\n(.*?)<!-- /batches -->", README, re.DOTALL).group(1))
    theirs, exact = "transformers", "ours, padding='exact'"
    assert shown == [[f"{r['seconds']:.2f} s", _percent(r["off"][theirs]), _percent(r["off"][exact])] for r in found]


def test_the_readme_names_all_that_can_be_extracted() -> None:
    section = re.search(r"### A folder of audio\n(.*?)\n### ", README, re.DOTALL).group(1)
    for names in (CLASSES, FORMATS, CONVENTIONS):
        for name in names:
            assert f"`{name}`" in section or f"`{name} " in section or f".{name}`" in section, name


def _percent(part: float) -> str:
    return "below 0.001 %" if part < 1e-5 else f"{100 * part:.0f} %"
