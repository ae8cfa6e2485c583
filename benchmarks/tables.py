"""Measurements as tables, for the terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from wavlm_fast import console

from .cases import CASES, Case
from .peaks import Peaks
from .providers import BASELINE, OURS
from .rounds import Row
from .stages import WHOLE, Stage


@dataclass
class Table:
    """Cells of text under a title."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    text: int = 1  # how many columns at the left are text

    def show(self, out: Console) -> None:
        shown = console.table(*self.columns, text=self.text)
        for row in self.rows:
            shown.add_row(*row)
        console.print_table(out, self.title, shown)

    def markdown(self) -> str:
        rule = ["---" if i < self.text else "---:" for i in range(len(self.columns))]
        lines = (" | ".join(cells) for cells in (self.columns, rule, *self.rows))
        return f"{self.title}\n\n" + "".join(f"| {line} |\n" for line in lines)


def of_case(case: Case, rows: Sequence[Row]) -> Table:
    """One case, a provider a row."""
    many = len(case.seconds)
    length = f"{min(case.seconds):g} to {max(case.seconds):g}" if case.ragged else f"{case.seconds[0]:g}"
    kind = ", forward and backward" if case.train else ", padded, with mask" if case.ragged else ""
    what = f"{many} utterance{'s' if many > 1 else ''} of {length} s{kind}, {rows[0].gflop:.1f} GFLOP"
    figures = ("seconds", "10-90 %", "x real time", "GFLOP/s", "of peak", "ours is", "10-90 %")
    table = Table(f"{case.name}: {what}", ("provider", "error", "allowed", *figures))
    for row in rows:
        verdict = tuple("-" if e is None else f"{e:.1e}" for e in (row.error, row.allowed))
        if row.seconds is None:
            table.rows.append((row.provider, *verdict, *["-"] * 7))
            continue
        t, faster = row.seconds, row.ours_faster
        ours = (f"{faster.median:.2f} x", f"{faster.p10:.2f}-{faster.p90:.2f}") if faster else ("", "")
        times = (f"{t.median:.3f}", f"{t.p10:.3f}-{t.p90:.3f}", f"{row.factor:.1f}", f"{row.gflops:.0f}")
        table.rows.append((row.provider, *verdict, *times, _percent(row.share), *ours))
    return table


def of_stages(case: str, dtype: str, stages: Sequence[Stage], peak_gflops: float | None) -> Table:
    """Where the time of ours goes in one case."""
    columns = ("stage", "ops", "ms", "of time", "GFLOP", "GFLOP/s", "of peak")
    table = Table(f"{case}, ours in {dtype}, stage by stage", columns, text=2)
    total = sum(s.seconds for s in stages if s.name != WHOLE)
    for stage in stages:
        table.rows.append((stage.name, stage.ops, *_rates(stage.seconds, total, stage.operations, peak_gflops)))
    return table


def _rates(seconds: float, total: float, operations: float | None, peak_gflops: float | None) -> tuple[str, ...]:
    times = (f"{1e3 * seconds:.1f}", _percent(seconds / total))
    if not operations or not seconds:
        return (*times, "-", "-", "-")
    rate = operations / seconds / 1e9
    return (*times, f"{operations / 1e9:.2f}", f"{rate:.0f}", _percent(rate / peak_gflops if peak_gflops else None))


def of_memory(found: Iterable[dict]) -> Table:
    """Peak memory of a process that runs one forward."""
    table = Table(
        "Peak memory of a process, WavLM-base, fp32", ("provider", "audio, s", "peak, GB", "forward alone, GB")
    )
    for row in found:
        sizes = (row["peak_bytes"], row["forward_bytes"])
        cells = ["-" if size is None else f"{size / 1e9:.2f}" for size in sizes]
        table.rows.append((row["provider"], f"{row['audio']:g}", *cells))
    return table


def summaries(rows: Sequence[Row]) -> list[Table]:
    """What the README shows: a column per case, a row per figure of ours."""
    names = list(dict.fromkeys(row.case for row in rows))
    plain = [n for n in names if CASES[n].model == "base" and not CASES[n].ragged]
    plain.sort(key=lambda n: (max(CASES[n].seconds), len(CASES[n].seconds)))
    groups = (("WavLM-base", plain, True), ("Others", [n for n in names if n not in plain], False))
    return [_summary(title, cases, rows, short) for title, cases, short in groups if cases]


def _summary(title: str, cases: Sequence[str], rows: Sequence[Row], short: bool) -> Table:
    heads = (re.sub(r"(\d)x(\d)", r"\1×\2", name.partition(" ")[2] if short else name) + " s" for name in cases)
    table = Table("", (title, *heads))
    found = {(row.case, row.provider): row for row in rows}
    providers = list(dict.fromkeys(row.provider for row in rows))
    dtypes = {row.provider: row.dtype for row in rows}
    ours = [p for p in providers if p.startswith(OURS)]

    def add(label: str, providers: Iterable[str], cell: Callable[[Row], str]) -> None:
        for provider in providers:
            cells = [cell(found[name, provider]) if (name, provider) in found else "" for name in cases]
            if any(cells):
                table.rows.append((label.format(provider, dtypes[provider]), *cells))

    peers = [p for p in providers if p not in ours]
    eager = [p for p in peers if p.startswith(BASELINE)]
    add("{1} over {0}", peers, lambda r: f"{r.ours_faster.median:.2f}" if r.ours_faster else "")
    add("{0}, seconds of audio per second", ours, lambda r: f"{r.factor:.1f}" if r.factor else "")
    add("{0}, share of the {1} peak", ours, lambda r: _percent(r.share) if r.share else "")
    add("{0}, error", [*eager, *ours], lambda r: "" if r.error is None else f"{r.error:.1e}")
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def head(machine: str, threads: int, versions: dict[str, str], peaks: Peaks) -> str:
    """One paragraph on where the figures come from."""
    shown = ("python", "torch", "transformers", "onnxruntime", "openvino")
    # OpenVINO's name of itself holds its commit and branch.
    found = ", ".join(f"{name} {versions[name].partition('-')[0]}" for name in shown if versions.get(name))
    return f"{machine}, {threads} threads; {found}. Measured peaks: {peaks}."
