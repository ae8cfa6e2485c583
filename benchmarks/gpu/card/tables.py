"""What a run found, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from wavlm_fast.parity.rule import FAIL, PASS, SKIPPED

from ...page.document import Row, median, number, split
from ...page.table import NONE, Table, as_error, as_gb, as_share, digits, figure
from .record import Found
from .steps import ATTENTION, MODELS, PARITY, PEAKS, STAGES, TUNING

_MOST_NAMED = 12


def tables(found: Found) -> list[Table]:
    """Everything, in the order in which it was measured; none for what was not."""
    made = (
        _device(found), _parity(found.rows(PARITY)), _ops("Attention", found.rows(ATTENTION)),
        _ops("Front end and positional convolution", found.rows(STAGES)), _models(found.rows(MODELS)),
        _tuning(found.rows(TUNING)),
    )  # fmt: skip
    return [table for table in made if table.rows or table.remarks]


def faults(found: Found) -> list[Row]:
    """Rows of ours that are wrong, or could not be measured."""
    return [
        row
        for row in found.rows(PARITY, ATTENTION, STAGES, MODELS)
        if row.get("verdict") == FAIL or (row.get("ours") and row.get("problem"))
    ]


def counted(found: Found) -> tuple[int, int]:
    """Comparisons that passed, and all that were made."""
    rows = found.rows(PARITY)
    judged = [row for row in rows if row.get("verdict") != SKIPPED]
    return sum(row.get("verdict") == PASS for row in judged), len(judged)


def one_line(line: Row) -> str:
    """A step as it is told while the run goes on."""
    said = [_said(row) for row in line["rows"]]
    return f"{line['took']:6.1f} s  {line['step']}: {'; '.join(dict.fromkeys(said))}"


def _said(row: Row) -> str:
    if row.get("problem"):
        return row["problem"]
    if row.get("rate"):
        return f"{row['rate'] / 1e12:.3g} T{row['how']}"
    if row.get("verdict"):
        return " ".join(filter(None, (row["verdict"], row["reason"])))
    if "before" in row:
        return f"{1e3 * row['before']:.3f} ms, then {1e3 * row['after']:.3f} ms"
    share = f", {as_share(row['share'])} of {row['bound']}" if row.get("share") else ""
    return f"{_ms(row)} ms{share}"


def _device(found: Found) -> Table:
    table = Table("The device", ("what", "figure"), text=2)
    table.rows += [(name, str(value)) for name, value in found.head.items() if value]
    for row in found.rows(PEAKS):
        table.rows.append((f"{row['step']}, measured", _said(row)))
    if found.runs:
        last, took = found.runs[-1], sum(run["seconds"] for run in found.runs)
        runs = f"{took / 60:.1f} minutes in {len(found.runs)} run{'s' if len(found.runs) > 1 else ''}"
        table.rows.append(("time", f"{runs}, the last of {last['date']}"))
    left = found.left_out
    if left:
        named = "; ".join(left[:_MOST_NAMED])
        more = f"; and {len(left) - _MOST_NAMED} more" if len(left) > _MOST_NAMED else ""
        table.remarks.append(f"left out, since there was no time for them ({len(left)}): {named}{more}")
    return table


def _parity(rows: Sequence[Row]) -> Table:
    """A row for each op or model, quantity and dtype: the worst of its cases."""
    columns = ("what", "computed", "dtype", "cases", "error", "allowed", "verdict")
    table = Table("Right, against float64", columns, text=3)
    table.remarks += _problems(rows)
    for group in split((row for row in rows if "verdict" in row), "level", "name", "quantity", "dtype"):
        judged = [row for row in group if row["verdict"] != SKIPPED]
        table.remarks += [f"{row['step']}: {row['reason']}" for row in group if row["reason"]]
        if judged:
            worst = max(judged, key=lambda row: (row["verdict"] == FAIL, _excess(row)))
            table.rows.append((
                worst["name"], worst["quantity"], worst["dtype"], f"{len(judged)}", as_error(worst["error"]),
                as_error(worst["allowed"]), worst["verdict"],
            ))  # fmt: skip
    table.remarks = list(dict.fromkeys(table.remarks))
    return table


def _excess(row: Row) -> float:
    error, allowed = number(row["error"]), number(row["allowed"])
    return error / allowed if error is not None and allowed else 0.0


def _ops(title: str, rows: Sequence[Row]) -> Table:
    columns = ("op", "computed", "by", "error", "allowed", "ms", "MB", "of bandwidth", "of products", "ours is")
    table = Table(title, columns, text=3, remarks=_problems(rows))
    for row in chain(*split((row for row in rows if "case" in row), "case", "what")):
        moved = figure(row.get("bytes"), lambda size: f"{size / 1e6:.1f}")
        table.rows.append((
            row["case"].removeprefix("op "), row["what"], row["provider"], as_error(row.get("error")),
            as_error(row.get("allowed")), _ms(row), moved, as_share(row.get("of bandwidth")),
            as_share(row.get("of products")), _gain(row, rows, "case", "what"),
        ))  # fmt: skip
    return table


def _models(rows: Sequence[Row]) -> Table:
    columns = ("model", "what", "by", "dtype", "error", "allowed", "ms", "x real time", "peak, GB", "ours is")
    table = Table("Whole models", columns, text=4, remarks=_problems(rows))
    for row in chain(*split((row for row in rows if "model" in row), "model", "batch", "what")):
        table.rows.append((
            f"{row['model']} {row['batch']}×{row['length']:g} s", row["what"], row["provider"], row["dtype"],
            as_error(row.get("error")), as_error(row.get("allowed")), _ms(row),
            figure(row.get("factor"), "{:.0f}".format), as_gb(row.get("peak bytes")),
            _gain(row, rows, "model", "batch", "what"),
        ))  # fmt: skip
    return table


def _tuning(rows: Sequence[Row]) -> Table:
    table = Table("Searched for faster configurations", ("of", "ms", "then", "choices"), remarks=_problems(rows))
    for row in (row for row in rows if "before" in row):
        times = (digits(1e3 * row[name]) for name in ("before", "after"))
        table.rows.append((row["of"], *times, f"{len(row['choices'])}"))
    return table


def gain(row: Row, rows: Iterable[Row], *keys: str) -> float | None:
    """How many times as fast the fastest of ours is as a row of somebody else's."""
    same = [r for r in rows if r.get("ours") and all(r.get(key) == row[key] for key in keys)]
    ours = min(filter(None, (median(r, "seconds") for r in same)), default=None)
    theirs = median(row, "seconds")
    return theirs / ours if theirs and ours and not row.get("ours") else None


def _gain(row: Row, rows: Sequence[Row], *keys: str) -> str:
    return figure(gain(row, rows, *keys), "{:.2f} x".format)


def _ms(row: Row) -> str:
    seconds = median(row, "seconds")
    return NONE if seconds is None else digits(1e3 * seconds)


def _problems(rows: Iterable[Row]) -> list[str]:
    return [f"{row['step']}: {row['problem']}" for row in rows if row.get("problem")]
