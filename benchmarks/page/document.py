"""What a run leaves, read: one dict, as `--json` writes it. Nothing here computes a measurement."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..run.providers import BASELINE, OURS

Found = dict[str, Any]  # the whole document
Row = dict[str, Any]  # an entry of one of its lists

OP = "op"  # the group of cases that are single ops
_DTYPE = re.compile(r"\s*\b(?:b?f|fp)(?:16|32)\b")


def entries(found: Found, name: str) -> list[Row]:
    """One of the document's lists; a run that was cut short may not have it."""
    return found.get(name) or []


def split(rows: Iterable[Row], *keys: str) -> list[list[Row]]:
    """Rows that agree in the keys, or in lacking one, together; in order of appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return list(groups.values())


def number(value: Any) -> float | None:
    """A finite number; None for whatever else stands there."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def median(row: Row, name: str) -> float | None:
    """The median of one of a row's timings, `seconds` or `ours_faster`."""
    return number((row.get(name) or {}).get("median"))


def label(row: Row) -> str:
    """The provider with its dtype, which most names hold already."""
    return row["provider"] if _DTYPE.search(row["provider"]) else f"{row['provider']} {row['dtype']}"


def bare(provider: str) -> str:
    """The provider's name without a dtype."""
    return _DTYPE.sub("", provider)


def is_ours(row: Row) -> bool:
    """Whether it is ours that was measured; lists other than `rows` tell by the name only."""
    return row.get("ours", row["provider"].startswith(OURS))


def peers(rows: Iterable[Row]) -> list[str]:
    """The providers that are not ours, transformers first."""
    names = {row["provider"]: row["family"] != BASELINE for row in rows if not is_ours(row)}
    return sorted(names, key=lambda name: names[name])


def title_of(case: str) -> str:
    """A case's name as people write it: base 1×10 s."""
    return re.sub(r"\b(\d+)x([\d.-]+)$", r"\1×\2 s", case)


def which(row: Row) -> str:
    """Of what a row of the scaling tells, as far as it says."""
    at = f"of {row['at']:g} s each" if row.get("along") == "batch" and number(row.get("at")) else ""
    return "".join(f", {text}" for text in (row.get("model"), at) if text)


@dataclass(frozen=True)
class Gain:
    """What ours gains over one peer, in the peer's dtype."""

    peer: str
    dtype: str
    faster: tuple[float, ...]  # one for each case in which both were timed
    error: float | None  # the peer's largest over these cases
    our_error: float | None
    memory: tuple[Row, Row] | None  # the peer's and ours, at the most audio on which both were measured

    @property
    def median(self) -> float:
        return statistics.median(self.faster)


def gains(found: Found) -> list[Gain]:
    """Ours over every peer that was timed beside it on whole models."""
    rows = [row for row in entries(found, "rows") if row["group"] != OP]
    return [gain for name in peers(rows) if (gain := _gain(name, rows, entries(found, "memory"))).faster]


def _gain(peer: str, rows: Sequence[Row], memory: Sequence[Row]) -> Gain:
    compared = [row for row in rows if row["provider"] == peer and median(row, "ours_faster") is not None]
    ours = [our for row in compared if (our := ours_beside(row, rows))]
    dtype = next((row["dtype"] for row in rows if row["provider"] == peer), "")
    family = next((row["family"] for row in rows if row["provider"] == peer), "")
    return Gain(
        peer=peer,
        dtype=dtype,
        faster=tuple(median(row, "ours_faster") for row in compared),
        error=_largest(row["error"] for row in compared),
        our_error=_largest(row["error"] for row in ours),
        memory=memory_beside(memory, (peer, family), dtype),
    )


def _largest(values: Iterable[Any]) -> float | None:
    return max((value for value in values if number(value) is not None), default=None)


def ours_beside(row: Row, rows: Iterable[Row]) -> Row | None:
    """Ours in the row's case and dtype: of several the first that was timed."""
    same = [r for r in rows if is_ours(r) and r["case"] == row["case"] and r["dtype"] == row["dtype"]]
    return next((r for r in same if r["seconds"]), same[0] if same else None)


def memory_beside(memory: Sequence[Row], peer: Sequence[str], dtype: str) -> tuple[Row, Row] | None:
    """The peer's memory, by one of its names, and ours on as much audio, the most there is."""
    measured = [row for row in memory if number(row["peak_bytes"]) and row["dtype"] == dtype]
    pairs = [
        (theirs, ours)
        for theirs in measured
        if theirs["provider"] in peer and not is_ours(theirs)
        for ours in measured
        if is_ours(ours) and (ours["batch"], ours["audio"]) == (theirs["batch"], theirs["audio"])
    ]
    return max(pairs, key=lambda pair: pair[0]["batch"] * pair[0]["audio"], default=None)
