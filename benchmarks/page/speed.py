"""The README's plot: how much audio a second of time takes care of, in transformers, other runtimes and ours.

The SVG is written as text, without a plotting library, so that the same record gives the same bytes everywhere. It
brings its own background, since it cannot know which one is around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from wavlm_fast import console

from ..run.providers import BASELINE, OURS
from .document import Found, Row, entries, median, number, split
from .tables import PLAIN

_SHOWN = (BASELINE, "ONNX Runtime", "OpenVINO", OURS)
_WIDTH, _MARGIN, _GAP = 800, 16, 28
_LABEL, _FIGURE = 96, 116  # room for a name before a bar, and for its figures behind it
_BAR, _PITCH, _HEAD = 11, 16, 24  # a bar, from one to the next, and a case's heading
_TOP, _BOTTOM = 58, 12
_COLUMNS = 2
_STYLE = """
text { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 14px; font-weight: 600 } .head { font-weight: 600 } .right { text-anchor: end }
.faint { fill: #59636e } .card { fill: #ffffff; stroke: #d1d9e0 } .theirs { fill: #a8b1bb } .ours { fill: #0072b2 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .faint { fill: #9198a1 } .card { fill: #0d1117; stroke: #3d444d }
  .theirs { fill: #656c76 } .ours { fill: #56b4e9 }
}
"""


def svg(found: Found) -> str:
    """The plot of a run, as an SVG file; without bars where the run has none of the cases."""
    found = console.finite(found)
    cases = _cases(found)
    per_column = -(-len(cases) // _COLUMNS)
    columns = [cases[i : i + per_column] for i in range(0, len(cases), max(1, per_column))]
    longest = max((row["factor"] for case in cases for row in case), default=1.0)
    height = _TOP + max((sum(_HEAD + _PITCH * len(case) for case in column) for column in columns), default=0) + _BOTTOM
    title = "Seconds of audio per second of time, float32 (longer is faster)"
    where = f"{found.get('machine', 'CPU')}, {found.get('threads', '?')} threads; in brackets how many times as fast"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(" ".join(_told(cases)))}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="6"/>',
        f'<text class="title" x="{_MARGIN}" y="24">{escape(title)}</text>',
        f'<text class="faint" x="{_MARGIN}" y="42">{escape(f"{where} as {BASELINE}")}</text>',
    ]
    width = (_WIDTH - 2 * _MARGIN - _GAP * (_COLUMNS - 1)) // _COLUMNS
    for place, column in enumerate(columns):
        parts += _column(column, _MARGIN + place * (width + _GAP), width, longest)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cases(found: Found) -> list[list[Row]]:
    """Whole models in float32, a list a case, in which transformers and ours were both timed."""
    timed = [
        row
        for row in entries(found, "rows")
        if (row["cls"], row["dtype"]) == ("WavLMModel", "fp32") and row["group"] in PLAIN and row["family"] in _SHOWN
        if number(row["factor"])
    ]
    cases = [sorted(case, key=lambda row: _SHOWN.index(row["family"])) for case in split(timed, "case")]
    cases = [case for case in cases if case[0]["family"] == BASELINE and case[-1]["family"] == OURS]
    return sorted(cases, key=lambda case: (case[0]["model"], case[0]["batch"], case[0]["length"]))


def _column(cases: Sequence[Sequence[Row]], left: int, width: int, longest: float) -> Iterator[str]:
    y = _TOP
    for case in cases:
        yield f'<text class="head" x="{left}" y="{y + 15}">{escape(_title(case[0]))}</text>'
        y += _HEAD
        for row in case:
            ours = row["family"] == OURS
            bar = row["factor"] / longest * (width - _LABEL - _FIGURE)
            x, middle = left + _LABEL, y + _BAR - 1
            yield f'<text class="right" x="{x - 6}" y="{middle}">{escape(_name(row))}</text>'
            kind = "ours" if ours else "theirs"
            yield f'<rect class="{kind}" x="{x}" y="{y}" width="{bar:.1f}" height="{_BAR}"/>'
            times = f" ({_faster(case):.2f} times)" if ours and _faster(case) else ""
            yield f'<text x="{x + bar + 5:.1f}" y="{middle}">{row["factor"]:.1f}{times}</text>'
            y += _PITCH


def _faster(case: Sequence[Row]) -> float | None:
    """How many times as fast ours is as transformers: the first row, as `_cases` has them."""
    return median(case[0], "ours_faster")


def _name(row: Row) -> str:
    return "wavlm-fast" if row["family"] == OURS else row["family"]


def _title(row: Row) -> str:
    many = "one utterance" if row["batch"] == 1 else f"{row['batch']} utterances"
    return f"WavLM-{row['model']}, {many} of {row['length']:g} s"


def _told(cases: Sequence[Sequence[Row]]) -> Iterator[str]:
    """The same in words, for those who do not see it."""
    for case in cases:
        figures = (f"{_name(row)} {row['factor']:.1f}" for row in case)
        yield f"{_title(case[0])}: {', '.join(figures)}."
