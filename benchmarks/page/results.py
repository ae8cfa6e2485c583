"""`python -m benchmarks.results`: the document of a run as Markdown, and the figures that the README takes from it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from wavlm_fast import console
from wavlm_fast.errors import UserError, show_everything

from ..gpu.card import record
from ..run.providers import BASELINE, EXACT, OURS
from . import adopted, speed, tables
from .document import Found, Row, entries, is_ours, median, memory_beside, ours_beside
from .report import write_report
from .table import in_markdown

_HERE = Path(__file__).parents[1]
SOURCE = _HERE / "results.json"  # the latest full run
# What was recorded -> the document made of it.
RECORDS = {
    SOURCE: _HERE / "RESULTS.md",
    _HERE / "regimes.json": _HERE / "REGIMES.md",
    _HERE / "houses.json": _HERE / "HOUSES.md",
    _HERE / "ragged.json": _HERE / "RAGGED.md",
    _HERE / "corpus.json": _HERE / "CORPUS.md",
}
FIGURE = _HERE.parent / "docs" / "figures" / "speed.svg"  # the README's plot of that run
_USER_ERROR = 2
_FIRST_LINE = "<!-- By `python -m benchmarks.results` from benchmarks/results.json, or another .json beside it. -->"
_MEMORY_SECONDS = 120
_RAGGED_CASE = "base ragged 8x2-15"


def markdown(found: Found) -> str:
    """All tables of a run, after what it ran on."""
    found = console.finite(found)
    about = "".join(f"- {in_markdown(what)}: {in_markdown(text)}\n" for what, text in tables.about(found))
    parts = [_FIRST_LINE, "# Results", about.strip() or "Nothing was measured."]
    for section in (section for section in tables.sections(found) if section.tables):
        parts += [f"## {section.heading}", in_markdown(section.method)]
        parts += [table.markdown().strip() for table in section.tables]
    return "\n\n".join(filter(None, parts)) + "\n"


def headline(found: Found) -> list[tuple[str, str, str]]:
    """The figures that the README shows, as far as the run has them: (what, figure, the command that prints it)."""
    found = console.finite(found)
    shown = (_over_baseline(found), _over_fastest(found), _memory(found), _exact(found))
    return [figure for figure in shown if figure is not None]


def _over_baseline(found: Found) -> tuple[str, str, str] | None:
    compared = (r for r in _compared(found, batch=1) if r["family"] == BASELINE)
    row = next(compared, None)
    return row and (f"over {BASELINE}, fp32, one utterance of 10 s", _ratio(row), _command(row["case"]))


def _over_fastest(found: Found) -> tuple[str, str, str] | None:
    compared = _compared(found, batch=8)
    row = min(compared, key=lambda r: median(r, "ours_faster"), default=None)
    return row and (
        f"over {row['provider']}, the fastest of {len(compared)} others, fp32, 8 utterances of 10 s",
        _ratio(row),
        _command(row["case"]),
    )


def _compared(found: Found, batch: int) -> list[Row]:
    """Everybody else who was timed beside ours on the base model, in float32 on utterances of ten seconds."""
    wanted = {"model": "base", "cls": "WavLMModel", "dtype": "fp32", "batch": batch, "length": 10}
    rows = [
        row
        for row in entries(found, "rows")
        if row["group"] in tables.PLAIN and all(row[name] == value for name, value in wanted.items())
    ]
    return [r for r in rows if not is_ours(r) and median(r, "ours_faster") and ours_beside(r, rows)]


def _memory(found: Found) -> tuple[str, str, str] | None:
    measured = [r for r in entries(found, "memory") if r["audio"] == _MEMORY_SECONDS and r["batch"] == 1]
    pair = memory_beside(measured, (BASELINE, f"{BASELINE} fp32"), "fp32")
    if pair is None:
        return None
    theirs, ours = (f"{row['peak_bytes'] / 1e9:.2f} GB" for row in pair)
    what = f"peak memory, fp32, {_MEMORY_SECONDS} s of audio"
    return what, f"{ours} (transformers: {theirs})", _command(f"base 1x{_MEMORY_SECONDS}")


def _exact(found: Found) -> tuple[str, str, str] | None:
    rows = [row for row in entries(found, "rows") if row["case"] == _RAGGED_CASE and row["dtype"] == "fp32"]
    if not any(row["family"] == f"{OURS}, {EXACT}" for row in rows):
        return None
    row = next((row for row in rows if row["family"] == BASELINE and median(row, "ours_faster")), None)
    what = f"an exact batch over {BASELINE} on the padded one, fp32, 8 utterances of 2 to 15 s"
    return row and (what, _ratio(row), _command(row["case"]))


def _ratio(row: Row) -> str:
    return f"{median(row, 'ours_faster'):.2f} times as fast"


def _command(case: str) -> str:
    return shlex.join(["wavlm-fast", "bench", "--case", case])


def read(path: Path) -> Found:
    """The document in a file; that of the latest full run has the record of a GPU with it, where there is one.

    Raises:
        UserError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the results {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the results {path} are no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise UserError(f'the results {path} are not what `wavlm-fast bench --json` writes: there is no list "rows"')
    card = path.with_name(adopted.CARD)
    if path == SOURCE and card.exists():
        found["card"] = asdict(record.read(card))
    return found


def recorded_headline() -> list[tuple[str, str, str]]:
    """The figures of all records."""
    return [figure for source in RECORDS for figure in headline(read(source))]


def _text(path: Path, figures: bool) -> str:
    found = read(path)
    try:
        if figures:
            shown = recorded_headline() if path == SOURCE else headline(found)
            return "".join(f"{what}: {figure}\n    {command}\n" for what, figure, command in shown)
        return markdown(found)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if path in RECORDS:
            raise
        raise UserError(
            f"the results {path} are not what `wavlm-fast bench --json` writes: {type(error).__name__}, {error}"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after a user's error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    records = " and ".join(f"those of {made_of.name} to {to.name}" for made_of, to in RECORDS.items())
    written = f"else write {records}, and the README's plot of {SOURCE.name} to {FIGURE.name}"
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help=f"print its tables; {written}")
    parser.add_argument("--headline", action="store_true", help="print the README's figures instead")
    parser.add_argument(
        "--gpu",
        type=Path,
        metavar="FILE",
        help=f"take the record of `wavlm-fast gpu` in: as {adopted.CARD}, as a section of RESULTS.md and of a "
        "page beside FILE, as what the README says of GPUs, and its tuned choices as what ships",
    )
    args = parser.parse_args(arguments)
    show_everything()
    try:
        if args.gpu:
            adopted.adopt(args.gpu, SOURCE.parent)
            console.write_file(RECORDS[SOURCE], _text(SOURCE, False), "results")
            write_report(read(SOURCE), args.gpu.parent)
            return 0
        if args.file or args.headline:
            print(_text(args.file or SOURCE, args.headline), end="")
            return 0
        texts = {to: _text(made_of, False) for made_of, to in RECORDS.items()}
        texts[FIGURE] = speed.svg(read(SOURCE))
        for target, text in texts.items():
            console.write_file(target, text, "results")
    except UserError as error:
        print(f"python -m benchmarks.results: {error}", file=sys.stderr)
        return _USER_ERROR
    return 0
