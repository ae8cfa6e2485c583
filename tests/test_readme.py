"""What the README and the pages it leads to say of the code is read off the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from wavlm_fast import backends
from wavlm_fast.benchmarks.gpu.architectures import ARCHITECTURES
from wavlm_fast.cli import COMMANDS, main
from wavlm_fast.extraction.wanted import CLASSES, CONVENTIONS
from wavlm_fast.extraction.writers import FORMATS
from wavlm_fast.ops import references
from wavlm_fast.parity.mutation_check import MUTATIONS

ROOT = Path(__file__).parent.parent
README = ROOT.joinpath("README.md").read_text()


def _rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _between(name: str, text: str) -> str:
    """What a page has between the marks of a name."""
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL).group(1)


def _page(name: str) -> str:
    return ROOT.joinpath("docs", name).read_text()


def _op_table() -> list[list[str]]:
    return _rows(_between("ops", README))


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


def test_the_readme_says_how_many_mistakes_the_harness_is_shown() -> None:
    assert f"some\n{round(len(MUTATIONS), -1)} mistakes" in README


def test_the_guide_shows_what_the_command_on_batches_prints(capsys) -> None:
    assert main(["batches", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    shown = _rows(_between("batches", _page("guides/batches.md")))
    theirs, exact = "transformers", "ours, padding='exact'"
    assert shown == [[f"{r['seconds']:.2f} s", _percent(r["off"][theirs]), _percent(r["off"][exact])] for r in found]


def test_the_guide_names_all_that_can_be_extracted() -> None:
    guide = _page("guides/extraction.md")
    for names in (CLASSES, FORMATS, CONVENTIONS):
        for name in names:
            assert f"`{name}`" in guide or f"`{name} " in guide or f".{name}`" in guide, name


def _versions(text: str) -> set[str]:
    return set(re.findall(r"\b\d+\.\d+", text))


def test_versions_that_are_called_tested_were() -> None:
    """By the matrix, or by the run that is recorded."""
    platforms = {row[0]: row[2] for row in _rows(_between("platforms", README))}
    matrix = _rows(_between("matrix", ROOT.joinpath("CONTRIBUTING.md").read_text()))
    ran = [row for row in matrix if row[3].startswith(("passed", "as above"))]
    assert ran
    recorded = json.loads(ROOT.joinpath("benchmarks", "results.json").read_text())["versions"]
    python, never = platforms["Python"].split("; never")
    torch, transformers = platforms["torch, transformers"].split(", transformers")
    for column, (name, said) in enumerate((("python", python), ("torch", torch), ("transformers", transformers))):
        found = set.union(*(_versions(row[column]) for row in ran), _versions(recorded[name]))
        assert _versions(said), name
        assert _versions(said) <= found, name
    assert _versions(never) == set.union(*(_versions(row[0]) for row in matrix if row[3].startswith("left out")))


def test_gpus_that_are_named_are_compiled_for() -> None:
    cell = next(row[2] for row in _rows(_between("platforms", README)) if row[0].startswith("CUDA"))
    assert set(re.findall(r"\b(?:sm_|gfx)\w+", cell)) <= set(ARCHITECTURES)


def test_getting_started_reads_what_doctor_prints(capsys) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    section = _page("getting-started.md").split("## See what is there\n")[1].split("\n## ")[0]
    named = re.findall(r"^- `([\w ]+)`:", section, re.MULTILINE)
    assert len(named) == 3
    for name in named:
        assert re.search(rf"^{name}\b", printed, re.MULTILINE), name
    assert set(re.findall(r"^ {13}(\w+):", section, re.MULTILINE)) == set(backends.names())


def _percent(part: float) -> str:
    return "below 0.001 %" if part < 1e-5 else f"{100 * part:.0f} %"
