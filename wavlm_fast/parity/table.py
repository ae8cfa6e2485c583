"""What the user sees: one row per op or class, quantity, backend and dtype; failures in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..console import table
from .mutation_check import Verdict
from .rule import FAIL, SKIPPED, Result

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("what", "computed", "backend", "dtype", "cases", "error", "allowed", "verdict")


def _worst(group: Sequence[Result]) -> Result:
    return max(group, key=lambda r: (r.verdict == FAIL, r.excess))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def results_table(results: Sequence[Result]) -> Table:
    """Of each group the case that comes closest to its allowance, or exceeds it most."""
    made = table(*_COLUMNS, text=4)
    groups: dict[tuple, list[Result]] = {}
    for r in results:
        if r.verdict != SKIPPED:
            groups.setdefault((r.name, r.quantity, r.backend, r.dtype), []).append(r)
    for key, group in groups.items():
        worst = _worst(group)
        made.add_row(*key, str(len(group)), _number(worst.error), _number(worst.allowed), worst.verdict)
    return made


def skipped_lines(results: Sequence[Result]) -> list[str]:
    """What did not run, by backend and reason."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        if r.verdict == SKIPPED:
            groups.setdefault((r.backend, r.reason), []).append(r)
    lines = []
    for (backend, reason), group in groups.items():
        names, dtypes = (list(dict.fromkeys(values)) for values in ((r.name for r in group), (r.dtype for r in group)))
        what = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"
        what = f"gradient of {what}" if all(r.quantity == "gradient" for r in group) else what
        lines.append(f"{backend}: {what} in {', '.join(dtypes)}: skipped: {reason}")
    return lines


def failure_lines(results: Sequence[Result]) -> list[str]:
    """Every failure with its case."""
    lines = []
    for r in results:
        if r.verdict == FAIL:
            said = r.reason or f"{r.tensor} is off by {r.error:.3e}, allowed is {r.allowed:.3e}"
            lines.append(f"{r.name} {r.quantity} on {r.backend} in {r.dtype}, case {r.case!r}: {said}")
    return lines


def summary(results: Sequence[Result]) -> str:
    """One line: what was compared, and how it went."""
    failed = sum(r.verdict == FAIL for r in results)
    skipped = sum(r.verdict == SKIPPED for r in results)
    compared = len(results) - skipped
    if not compared:
        return f"nothing was compared: {skipped} comparisons skipped"
    verdict = f"{failed} failed" if failed else "all within what is allowed"
    return f"{compared} comparisons with float64: {verdict}; {skipped} skipped"


def self_test_table(verdicts: Sequence[Verdict]) -> Table:
    """One row per mutation."""
    made = table("op", "mistake", "verdict", text=3)
    for v in verdicts:
        made.add_row(v.op, v.mutation, "caught" if v.caught else "UNNOTICED")
    return made
