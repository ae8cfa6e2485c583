"""`python docs/how-it-works/recorded.py`: writes the tables of these pages that RESULTS.md has too, of the same record.

A page says between which lines, and which columns and rows of a section's table it wants:

    <!-- recorded Single ops | op; dtype; over torch | waveform_conv 1×2 s -->
    <!-- /recorded -->

A row goes by its first cell, and where that is not enough by another one of its cells behind an @. tests/docs hold the
pages equal to it.
"""

from __future__ import annotations

import re
from pathlib import Path

from wavlm_fast.benchmarks.page import results, tables
from wavlm_fast.benchmarks.page.table import Table

HERE = Path(__file__).parent
_PLACE = re.compile(r"<!-- recorded (?P<wanted>.*?) -->\n(?P<table>.*?)<!-- /recorded -->\n", re.DOTALL)


def table(wanted: str) -> str:
    """The Markdown of what a page wants.

    Raises:
        LookupError: the record has no such section, column or row.
    """
    (section,), columns, names = ([part.strip() for part in field.split(";")] for field in wanted.split("|"))
    recorded = (s for s in tables.sections(results.read(results.SOURCE)) if s.heading == section)
    whole = next((t for s in recorded for t in s.tables if set(columns) <= set(t.columns)), None)
    if whole is None:
        raise LookupError(f"the record has no table {section!r} with the columns {', '.join(columns)}")
    places, shown = [whole.columns.index(column) for column in columns], Table("", tuple(columns))
    for name in names:
        first, _, also = (part.strip() for part in name.partition("@"))
        chosen = [row for row in whole.rows if row[0] == first and (not also or also in row[1:])]
        if not chosen:
            raise LookupError(f"the record has no row {name!r} in {section!r}")
        shown.rows += [tuple(row[place] for place in places) for row in chosen]
    return shown.markdown()


def filled(text: str) -> str:
    """A page with its tables as they are recorded."""
    return _PLACE.sub(lambda m: m[0].replace(m["table"] + "<!-- /", table(m["wanted"]) + "<!-- /"), text)


if __name__ == "__main__":
    for page in HERE.glob("*.md"):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
