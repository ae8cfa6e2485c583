"""The document of a run as a page of HTML that needs nothing around it: no network, no script, no other file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from wavlm_fast import console
from wavlm_fast.errors import UserError

from . import tables
from .document import Found, Gain, gains
from .plots import Plot, plots

_STYLE = """
:root { --ink: #1a1a1a; --quiet: #595959; --line: #d4d4d4; }
body { margin: 0; color: var(--ink); background: #fff; }
body { font: 15px/1.45 "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; padding-top: .5rem; border-top: 1px solid var(--ink); }
p { max-width: 46rem; margin: .5rem 0; }
.lead { font-size: 1.07rem; }
.method, .remarks { color: var(--quiet); font-size: .87rem; }
nav { font-size: .87rem; margin: 1rem 0 0; }
nav a { color: inherit; margin-right: 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 1rem 0 0; font-size: .87rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
.tables { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.wide { overflow-x: auto; max-width: 100%; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; line-height: 1.35; }
caption, figcaption { text-align: left; font-weight: 600; font-size: .84rem; padding: .2rem 0 .35rem; }
caption { white-space: nowrap; font-size: inherit; }
th, td { text-align: left; padding: .18rem .7rem .18rem 0; font-weight: 400; vertical-align: top; white-space: nowrap; }
thead th, thead td { border-bottom: 1px solid var(--ink); color: var(--quiet); vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
.n { text-align: right; padding-right: 0; padding-left: .9rem; }
.remarks { margin: .4rem 0; padding-left: 1.1rem; max-width: 54rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.4rem; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font-family: inherit !important; }
@page { size: A4; margin: 14mm 13mm; }
@media print {
  body { font-size: 9.5pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2, .method, caption, thead, figcaption { break-after: avoid; }
  figure, tr, .wide, .method { break-inside: avoid; }
  svg { max-height: 235mm; }
  .tables { display: block; }
  .wide { overflow: visible; }
  table, .remarks { font-size: 7.6pt; }
  th, td { white-space: normal; }
  td.n { white-space: nowrap; }
  .n { padding-left: .45rem; }
}
"""


def write_report(found: Found, folder: Path) -> Path:
    """Write `index.html` into the folder, which is made where it is missing.

    Args:
        found: the document of a run, whole or cut short.
        folder: where to.

    Returns:
        The page's path.

    Raises:
        UserError: the folder cannot be written.
    """
    path = Path(folder) / "index.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the report folder {folder} cannot be made: {error.strerror or error}") from error
    console.write_file(path, page(found), "report")
    return path


def page(found: Found) -> str:
    """The page as text."""
    found = console.finite(found)
    drawn, missing = _drawn(plots(found))
    shown = [section for section in tables.sections(found) if section.tables or section.key in drawn]
    facts = "".join(f"<dt>{html.escape(what)}</dt><dd>{html.escape(text)}</dd>\n" for what, text in tables.about(found))
    links = " ".join(f'<a href="#{section.key}">{html.escape(section.heading)}</a>' for section in shown)
    device = found.get("device") or "cpu"
    heading = html.escape(f"WavLM on {found.get('machine') or 'this machine' if device == 'cpu' else device}")
    parts = (
        f"<header>\n<h1>{heading}</h1>",
        *(f'<p class="lead">{html.escape(sentence)}</p>' for sentence in answer(found)),
        f"<dl>\n{facts}</dl>",
        missing,
        f"<nav>{links}</nav>\n</header>" if shown else "</header>\n<p>Nothing was measured.</p>",
        *(_section(section, drawn.get(section.key, [])) for section in shown),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}: wavlm_fast and others</title>\n<style>{_STYLE}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(filter(None, parts)) + "\n</main>\n</body>\n</html>\n"
    )


def _section(section: tables.Section, figures: Sequence[str]) -> str:
    heading = f'<section id="{section.key}">\n<h2>{html.escape(section.heading)}</h2>\n'
    method = f'<p class="method">{html.escape(section.method)}</p>\n' if section.method else ""
    shown = "".join(table.html() for table in section.tables)
    return f'{heading}{method}{"".join(figures)}<div class="tables">\n{shown}</div>\n</section>\n'


def _drawn(wanted: Sequence[Plot]) -> tuple[dict[str, list[str]], str]:
    """The plots as HTML by section; without matplotlib none, and a paragraph that names them."""
    drawn: dict[str, list[str]] = {}
    try:
        for index, plot in enumerate(wanted):
            caption = f"<figcaption>{html.escape(plot.title)}</figcaption>"
            figure = f"<figure>\n{caption}\n{plot.svg(f'plot{index}')}\n</figure>\n"
            drawn.setdefault(plot.section, []).append(figure)
    except ImportError as error:
        names = "; ".join(plot.title for plot in wanted)
        reason = f"matplotlib cannot be imported ({error}; it comes with the extra 'bench'), so these plots are missing"
        return {}, f'<p class="method">{html.escape(f"{reason}: {names}.")}</p>'
    return drawn, ""


def answer(found: Found) -> list[str]:
    """What a user gains, in sentences; none where ours was timed beside nobody."""
    known = gains(found)
    if not known:
        return []
    first, *others = known
    spread = f"{min(first.faster):.2f} to {max(first.faster):.2f}"
    said = f"On this machine wavlm_fast is {first.median:.2f} times as fast as {first.peer} ({_of(first)}, {spread})"
    if others:
        nearest = min(others, key=lambda gain: gain.median)
        said += f", and {nearest.median:.2f} times as fast as {nearest.peer} ({_of(nearest)})"
        said += f", the nearest of {len(others)} others" if len(others) > 1 else ""
    return [f"{said}.", *filter(None, (_on_memory(known), _on_errors(first)))]


def _of(gain: Gain) -> str:
    many = len(gain.faster)
    return f"median of {many} cases" if many > 1 else "one case"


def _on_memory(known: Sequence[Gain]) -> str:
    gain = next((gain for gain in known if gain.memory), None)
    if gain is None:
        return ""
    theirs, ours = gain.memory
    batch = "" if theirs["batch"] == 1 else f"{theirs['batch']} times "
    needs, need = (f"{row['peak_bytes'] / 1e9:.2f} GB" for row in (ours, theirs))
    audio = f"{batch}{theirs['audio']:g} s of audio"
    return f"For {audio} its process needs {needs} where that of {gain.peer} needs {need}."


def _on_errors(gain: Gain) -> str:
    if gain.error is None or gain.our_error is None:
        return ""
    return (
        f"In {gain.dtype} it is off by at most {gain.our_error:.1e} of the largest value, "
        f"{gain.peer} by {gain.error:.1e}, against float64."
    )
