"""The text of docs/benchmarks.md: what benchmarks/*.json hold, by the code that makes RESULTS.md of them."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

from wavlm_fast.benchmarks.page import plots, report, results, tables
from wavlm_fast.benchmarks.page.document import Found
from wavlm_fast.benchmarks.page.table import in_markdown

_SHOWN = ("speed", "scaling", "ops")  # sections of RESULTS.md of which a plot is shown
_ABOUT = ("machine", "threads", "versions", "date")
# What the other records tell of, and which of their sections is shown.
_OTHERS = {
    "ragged.json": ("Utterances of different lengths", "gains"),
    "houses.json": ("transformers', Microsoft's and torchaudio's classes", "gains"),
    "regimes.json": ("What people do besides", "gains"),
    "corpus.json": ("A folder of audio, from files to files", "corpus"),
}


def text() -> Iterator[str]:
    """The page from its first heading on."""
    found = results.read(results.SOURCE)
    yield from ("## In short", "", "| what | figure | printed by |", "|---|---|---|")
    for what, figure, command in results.recorded_headline():
        yield f"| {in_markdown(what)} | {in_markdown(figure)} | `{command}` |"
    yield from ("", " ".join(map(in_markdown, report.answer(found))), "", *_about(found))
    drawn = {plot.section: plot for plot in reversed(plots.plots(found))}  # the first of each
    for section in _SHOWN:
        yield from ("```{raw} html", *_figure(drawn[section], f"plot-{section}").splitlines(), "```", "")
    if "card" not in found:
        yield from ("No GPU has been measured so far.", "")
    yield from (f"Everything else of that run: {_link(results.SOURCE)}.", "")
    for file, (heading, section) in _OTHERS.items():
        yield from _other(results.SOURCE.with_name(file), heading, section)


def _other(source: Path, heading: str, key: str) -> Iterator[str]:
    found = results.read(source)
    yield from (f"## {heading}", "")
    for section in tables.sections(found):
        if section.key == key:
            yield from (in_markdown(section.method), "", *(table.markdown() for table in section.tables))
    yield from (*_about(found), f"Everything else of that run: {_link(source)}.", "")


def _about(found: Found) -> Iterator[str]:
    said = dict(tables.about(found))
    yield from (f"- {name}: {in_markdown(said[name])}" for name in _ABOUT if name in said)
    yield ""


def _link(source: Path) -> str:
    report = results.RECORDS[source].name
    return f"[benchmarks/{report}](../benchmarks/{report})"


def _figure(plot: plots.Plot, key: str) -> str:
    return f'<figure class="plot">\n{plot.svg(key)}\n<figcaption>{html.escape(plot.title)}</figcaption>\n</figure>'
