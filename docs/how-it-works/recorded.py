"""`python docs/how-it-works/recorded.py`: writes the tables of these pages that come from benchmarks/RESULTS.md.

A page says between which lines, and which columns and rows of a section's table it wants:

    <!-- recorded Single ops | op; dtype; over torch | waveform_conv 1×2 s -->
    <!-- /recorded -->

A row goes by its first cell, and where that is not enough by another one of its cells behind an @. tests/docs hold the
pages equal to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "RESULTS.md"
_PLACE = re.compile(r"<!-- recorded (?P<wanted>.*?) -->\n(?P<table>.*?)<!-- /recorded -->\n", re.DOTALL)

Row = list[str]


def _tables(section: str) -> Iterator[tuple[Row, list[Row]]]:
    """Head and rows of every table of a section."""
    text = RESULTS.read_text(encoding="utf-8")
    inside = text.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    for table in re.findall(r"(?:^\|.*\n)+", inside, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in table.splitlines()]
        yield lines[0], lines[2:]


def table(wanted: str) -> str:
    """The Markdown of what a page wants.

    Raises:
        LookupError: the record has no such section, column or row.
    """
    section, columns, names = ([part.strip() for part in field.split(";")] for field in wanted.split("|"))
    head, rows = next((h, rows) for h, rows in _tables(section[0]) if set(columns) <= set(h))
    places, found = [head.index(column) for column in columns], []
    for name in names:
        first, _, also = (part.strip() for part in name.partition("@"))
        chosen = [row for row in rows if row[0] == first and (not also or also in row[1:])]
        if not chosen:
            raise LookupError(f"RESULTS.md has no row {name!r} in {section[0]!r}")
        found += chosen
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *([row[place] for place in places] for row in found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def filled(text: str) -> str:
    """A page with its tables as they are recorded."""
    return _PLACE.sub(lambda m: m[0].replace(m["table"] + "<!-- /", table(m["wanted"]) + "<!-- /"), text)


if __name__ == "__main__":
    for page in HERE.glob("*.md"):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
