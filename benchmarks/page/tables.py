"""Which tables the document of a run makes, the same for terminal, Markdown and HTML; and all of it as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from wavlm_fast import console

from ..gpu.card import tables as card
from ..gpu.card.record import Found as Card
from ..run.providers import ALONE, BASELINE, EXACT, OURS, UNIFORM
from ..run.stages import WHOLE
from .document import (
    OP,
    Found,
    Row,
    bare,
    entries,
    gains,
    is_ours,
    label,
    median,
    number,
    ours_beside,
    peers,
    split,
    title_of,
    which,
)
from .table import NONE, Table, as_error, as_gb, as_share, digits, figure, spread

PLAIN = ("latency", "throughput", "long", "length")  # groups of cases that batch and length tell apart
_EXACT = f"{OURS}, {EXACT}"
_MOST_COLUMNS = 8  # of cases side by side, that a page is wide enough


def of_case(rows: Sequence[Row]) -> Table:
    """One case, a provider a row; what kept a provider from being timed, and other remarks, below."""
    unit, scale = ("ms", 1e3) if max((median(r, "seconds") or 0 for r in rows), default=0) < 0.1 else ("seconds", 1.0)
    figures = (unit, "10-90 %", "rounds", "x real time", "GFLOP/s", "of peak", "ours is", "10-90 %")
    table = Table(_title(rows[0]), ("provider", "error", "allowed", *figures))

    def time(seconds: float) -> str:
        return digits(scale * seconds)

    for row in rows:
        timing, faster = row["seconds"], row["ours_faster"]
        table.rows.append((
            row["provider"], as_error(row["error"]), as_error(row["allowed"]),
            figure(median(row, "seconds"), time), spread(timing, time),
            figure((timing or {}).get("rounds"), str), figure(row["factor"], "{:.1f}".format),
            figure(row["gflops"], "{:.0f}".format), as_share(row["share"]),
            figure(median(row, "ours_faster"), "{:.2f} x".format), spread(faster, "{:.2f}".format),
        ))  # fmt: skip
        table.remarks += [f"{row['provider']}: {remark}" for remark in (row["problem"], row["note"]) if remark]
    return table.without_empty_columns()


def _title(row: Row) -> str:
    alike = row["group"] != "corpus"  # where some run more layers than others
    gflop = f", {digits(row['gflop'])} GFLOP" if alike and number(row["gflop"]) else ""
    if row["group"] == OP:
        return f"{row['case']}{gflop}"
    many = f"{row['batch']} utterance{'s' if row['batch'] > 1 else ''} of"
    kind = {
        "padded": f"up to {row['length']:g} s, padded, with mask",
        "ragged": f"up to {row['length']:g} s",
        "training": f"{row['length']:g} s, forward, backward and optimizer step",
        "regimes": f"{row['length']:g} s, as benchmarks/run/regimes.py runs it",
        "corpus": f"up to {row['length']:g} s, from audio files to files of features",
    }.get(row["group"], f"{row['length']:g} s")
    return f"{row['case']}: {row['cls']}, {many} {kind}{gflop}"


def of_stages(rows: Sequence[Row]) -> Table:
    """Where the time goes in one case of one provider."""
    columns = ("stage", "ops", "ms", "of time", "GFLOP", "GFLOP/s", "of peak")
    table = Table(f"{title_of(rows[0]['case'])}, {label(rows[0])}, stage by stage", columns, text=2)
    total = sum(number(row["seconds"]) or 0 for row in rows if row["stage"] != WHOLE)
    for row in rows:
        seconds, gflop = number(row["seconds"]), number(row["gflop"])
        rate = gflop / seconds if gflop and seconds else None
        peak = number(row["peak_gflops"])
        table.rows.append((
            row["stage"], row["ops"], figure(seconds, lambda s: f"{1e3 * s:.1f}"),
            as_share(seconds / total if seconds is not None and total > 0 else None),
            figure(gflop or None, "{:.2f}".format), figure(rate, "{:.0f}".format),
            as_share(rate / peak if rate and peak else None),
        ))  # fmt: skip
    return table


def of_memory(rows: Sequence[Row]) -> Table:
    """Peak memory of a process that runs one forward."""
    columns = ("provider", "utterances", "of, s", "peak, GB", "forward alone, GB")
    table = Table("Peak memory of a fresh process that runs one forward", columns)
    for row in rows:
        sizes = (as_gb(row["peak_bytes"]), as_gb(row["forward_bytes"]))
        table.rows.append((label(row), f"{row['batch']}", f"{row['audio']:g}", *sizes))
    for same in split((row for row in rows if row["problem"]), "provider", "dtype", "problem"):
        sizes = ", ".join(title_of(f"{row['batch']}x{row['audio']:g}") for row in same)
        table.remarks.append(f"{label(same[0])}, {sizes}: {same[0]['problem']}")
    return table


def of_corpus(rows: Sequence[Row]) -> Table:
    """What the process is like that extracts a corpus."""
    columns = ("provider", "the model's share of the time", "GB after a tenth of it", "at the end", "peak")
    table = Table(f"{title_of(rows[0]['case'])}, from files to files", columns)
    for row in rows:
        sizes = (as_gb(row[name]) for name in ("first_bytes", "last_bytes", "peak_bytes"))
        table.rows.append((row["provider"], as_share(row["busy"]), *sizes))
    return table


def of_scaling(rows: Sequence[Row]) -> list[Table]:
    """Time and memory against audio length and batch, a table of each, with the exponents of fitted powers."""
    units = {"length": ("audio length", "{:g} s"), "batch": ("batch", "×{:g}")}
    quantities = {
        "seconds": ("Seconds of one forward", digits),
        "memory": ("GB that one forward adds at its peak", as_gb),
    }
    tables = []
    for group in split(rows, "along", "quantity", "model", "at"):
        (along, head), (quantity, write) = units[group[0]["along"]], quantities[group[0]["quantity"]]
        ends = sorted({x for row in group for x, _ in row["points"]})
        columns = ("provider", *map(head.format, ends), "exponent", "of the last two")
        table = Table(f"{quantity} against {along}{which(group[0])}", columns)
        for row in group:
            points = dict(row["points"])
            exponents = (figure(row[name], "{:.2f}".format) for name in ("exponent", "local"))
            table.rows.append((label(row), *(figure(points.get(x), write) for x in ends), *exponents))
        tables.append(table)
    return tables


def of_layers(rows: Sequence[Row]) -> list[Table]:
    """max |x - truth| / max |truth| at every layer, a table for each case and dtype."""
    tables = []
    for group in split(rows, "case", "dtype"):
        found = {(row["layer"], row["provider"]): row for row in group}
        names = list(dict.fromkeys(row["provider"] for row in group))
        title = f"{title_of(group[0]['case'])} in {group[0]['dtype']}: max |x - truth| / max |truth|"
        table = Table(title, ("layer", "max |truth|", *names, "allowed"))
        for same in split(group, "layer"):
            layer = same[0]["layer"]
            errors = (as_error(found.get((layer, name), {}).get("error")) for name in names)
            allowed = max((a for row in same if (a := number(row["allowed"])) is not None), default=None)
            table.rows.append((layer, figure(same[0]["largest"], "{:.3g}".format), *errors, as_error(allowed)))
        tables.append(table.without_empty_columns())
    return tables


def of_ops(rows: Sequence[Row]) -> list[Table]:
    """Single ops, a row for each and dtype: ours, and over whom how many times as fast."""
    rows = [row for row in rows if row["group"] == OP]
    others = list(dict.fromkeys(bare(name) for name in peers(rows)))
    figures = ("error", "ms", "GFLOP/s", "of peak", *(f"over {name}" for name in others))
    table = Table("Ours in single ops, and how many times as fast as others", ("op", "dtype", *figures), text=2)
    for group in split(rows, "case", "dtype"):
        ours = ours_beside(group[0], group) or {}
        faster = {bare(row["provider"]): median(row, "ours_faster") for row in group if not is_ours(row)}
        figures = (
            as_error(ours.get("error")), figure(median(ours, "seconds"), lambda s: digits(1e3 * s)),
            figure(ours.get("gflops"), "{:.0f}".format), as_share(ours.get("share")),
        )  # fmt: skip
        over = (figure(faster.get(name), "{:.2f}".format) for name in others)
        table.rows.append((title_of(group[0]["case"].removeprefix(f"{OP} ")), group[0]["dtype"], *figures, *over))
    return [table.without_empty_columns()] if rows else []


def of_gains(found: Found) -> list[Table]:
    """What ours gains over everybody: the answer in one table."""
    speed, memory = ("cases", "times as fast", "least", "most"), ("its memory, GB", "ours, GB", "on audio of")
    table = Table("Ours over each of the others", ("over", *speed, "its error", "ours", *memory))
    for gain in gains(found):
        theirs, ours = gain.memory or ({}, {})
        on = title_of(f"{theirs['batch']}x{theirs['audio']:g}") if theirs else NONE
        ratios = (f"{x:.2f}" for x in (gain.median, min(gain.faster), max(gain.faster)))
        sizes = (as_gb(theirs.get("peak_bytes")), as_gb(ours.get("peak_bytes")))
        errors = (as_error(gain.error), as_error(gain.our_error))
        table.rows.append((gain.peer, f"{len(gain.faster)}", *ratios, *errors, *sizes, on))
    return [table.without_empty_columns()] if table.rows else []


def summaries(found: Found) -> list[Table]:
    """What the README shows: a column per case, a row per figure; batches and ops have tables of their own."""
    rows = [row for row in entries(found, "rows") if row["group"] not in (OP, "batch")]
    plain = sorted((r for r in rows if r["group"] in PLAIN), key=lambda row: (row["length"], row["batch"]))
    tables = []
    for group in split(plain, "model", "cls"):
        title = f"{group[0]['cls'].removesuffix('Model')}-{group[0]['model']}"
        tables += _summary(title, group, lambda row: title_of(f"{row['batch']}x{row['length']:g}"))
    houses, regimes = ([row for row in rows if row["group"] == group] for group in ("houses", "regimes"))
    ways = [group for group in split(rows, "case", "dtype") if any(row["family"] == _EXACT for row in group)]
    named = {row["case"] for group in ways for row in group}
    corpus = [row for row in rows if row["group"] == "corpus"]
    others = [r for r in rows if r["group"] not in (*PLAIN, "houses", "regimes", "corpus") and r["case"] not in named]
    tables += _summary("Other classes, padded batches, training", others, lambda row: title_of(row["case"]))
    tables += [_of_ways(ways)] if ways else []
    tables += _summary("From files to files", corpus, lambda row: title_of(row["case"]))
    tables += _summary("Classes of several houses, the same weights", houses, lambda row: title_of(row["case"]))
    return tables + _summary("Regimes", regimes, lambda row: title_of(row["case"]))


def _of_ways(groups: Sequence[Sequence[Row]]) -> Table:
    """Utterances that differ in length: an exact batch over the other ways to run them."""
    families = {
        f"over {BASELINE}, padded": BASELINE,
        "over ours, padded": OURS,
        "over ours, one at a time": f"{OURS}, {ALONE}",
        "over ours of one length": f"{OURS}, {UNIFORM}",
    }
    columns = ("case", "dtype", "x real time", *families)
    table = Table("Exact batches, and how many times as fast as other ways", columns, text=2)
    for group in groups:
        rows = {row["family"]: row for row in group}
        ratios = (figure(median(rows.get(name, {}), "ours_faster"), "{:.2f}".format) for name in families.values())
        factor = figure(rows[_EXACT]["factor"], "{:.1f}".format)
        table.rows.append((title_of(group[0]["case"]), group[0]["dtype"], factor, *ratios))
    return table.without_empty_columns()


def _summary(title: str, rows: Sequence[Row], head: Callable[[Row], str]) -> list[Table]:
    heads = {row["case"]: head(row) for row in rows}
    cases = list(heads)
    parts = [cases[i : i + _MOST_COLUMNS] for i in range(0, len(cases), _MOST_COLUMNS)]
    return [_of_cases(title, {case: heads[case] for case in part}, rows) for part in parts]


def _of_cases(title: str, heads: dict[str, str], rows: Sequence[Row]) -> Table:
    rows = [row for row in rows if row["case"] in heads]
    table = Table(title, ("", *heads.values()))
    found = {(row["case"], row["provider"]): row for row in rows}
    dtypes = {row["provider"]: row["dtype"] for row in rows}
    ours = list(dict.fromkeys(row["provider"] for row in rows if is_ours(row)))
    eager = list(dict.fromkeys(row["provider"] for row in rows if row["family"] == BASELINE))

    def add(text: str, providers: Iterable[str], cell: Callable[[Row], str]) -> None:
        for provider in providers:
            cells = [cell(found[case, provider]) if (case, provider) in found else NONE for case in heads]
            if any(c != NONE for c in cells):
                shown = ("" if c == NONE else c for c in cells)
                table.rows.append((text.format(provider, dtypes[provider]), *shown))

    add("{1} over {0}", peers(rows), lambda r: figure(median(r, "ours_faster"), "{:.2f}".format))
    table.rows += _over_the_best(rows, heads)
    add("{0}, seconds of audio per second", ours, lambda r: figure(r["factor"], "{:.1f}".format))
    add("{0}, share of the {1} peak", ours, lambda r: as_share(r["share"]))
    add("{0}, error", [*eager, *ours], lambda r: as_error(r["error"]))
    return table


def _over_the_best(rows: Sequence[Row], cases: Collection[str]) -> Iterator[tuple[str, ...]]:
    """Of each dtype that several others ran, a line: ours over the fastest of them in each case."""
    timed = [row for row in rows if not is_ours(row) and median(row, "ours_faster") is not None]
    for group in split(timed, "dtype"):
        ratios = [[median(row, "ours_faster") for row in group if row["case"] == case] for case in cases]
        if max(map(len, ratios)) > 1:
            yield f"{group[0]['dtype']} over the best of them", *(f"{min(r):.2f}" if r else "" for r in ratios)


_METHOD = {
    "gpu": "By `wavlm-fast gpu`: each by itself, the median of up to 30 runs by the device's own clock, with something "
    "else in its cache. Bytes are the inputs and outputs of each pass, once; operations those of the direct algorithm; "
    "shares are of the peaks measured there. “SDPA, no bias” computes something else: the limit of what attention "
    "without a bias takes. Ours is how many times as fast: the fastest of ours.",
    "gains": "Ratios are of runs side by side, in the same precision; a case counts where both were right and timed. "
    "Errors are the largest over these cases, max |x - truth| / max |truth| with the truth computed in float64.",
    "speed": "“fp32 over X” is how many times as fast ours is as X on the same input and threads: the median of the "
    "ratios of runs side by side. A gap: X was wrong, or does not run the case. The share of the peak counts the "
    "products of the direct algorithm; an algorithm with fewer of them may pass 100 %.",
    "scaling": "The exponent is that of a power of the length or the batch, fitted to all points (dotted in plots) "
    "and to the last two: 1 is cost in proportion, 2 with the square.",
    "memory": "The most that a process of its own held at any time, Python, libraries, weights and all; and how much "
    "of it the forward alone added.",
    "stages": "The ops of one forward, timed one by one. “In one piece” is the forward as everybody runs it. The peak "
    "is this machine's, measured.",
    "corpus": "The time is from the first step after everything is imported to the last file: loading of the model, "
    "decoding, the model, writing. The model's share is what it worked; the rest it waited. Memory is what the process "
    "held, Python, libraries, weights and all.",
    "layers": "Allowed is twice the error of transformers in the same dtype, and a few roundings.",
    "cases": "“Ours is” how many times as fast in the same dtype. Who is off by more than is allowed gets no time; the "
    "reason stands below the table.",
}


@dataclass(frozen=True)
class Section:
    """Tables under one heading, and how their figures came about; `key` is what plots are filed under."""

    key: str
    heading: str
    tables: list[Table]

    @property
    def method(self) -> str:
        return _METHOD.get(self.key, "")


def sections(found: Found) -> list[Section]:
    """Everything that a run found, in the order that people read it; sections of what it did not measure are empty."""
    rows, memory, stages = (entries(found, name) for name in ("rows", "memory", "stages"))
    shown = [
        Section("gains", "What ours gains", of_gains(found)),
        Section("speed", "Case by case", summaries(found)),
        Section("scaling", "Cost against audio length and batch", of_scaling(entries(found, "scaling"))),
        Section("memory", "Memory", [of_memory(memory)] if memory else []),
        Section("corpus", "A corpus", [of_corpus(g) for g in split(entries(found, "corpus"), "case")]),
        Section("stages", "Where the time goes", [of_stages(g) for g in split(stages, "case", "provider", "dtype")]),
        Section("layers", "Error by layer", of_layers(entries(found, "layers"))),
        Section("ops", "Single ops", of_ops(rows)),
        Section("cases", "Every measurement", [of_case(group) for group in split(rows, "case")]),
    ]
    if found.get("card"):  # a record of its own
        shown.append(Section("gpu", "On a GPU", card.tables(Card(**found["card"]))))
    return shown


def about(found: Found) -> list[tuple[str, str]]:
    """Where the figures come from: (what, text)."""
    versions = found.get("versions") or {}
    named = {name: version for name, version in versions.items() if version}
    device, features = found.get("device") or "cpu", found.get("features") or ()
    facts = {
        "command": found.get("command"),
        "date": found.get("date"),
        "machine": ", ".join(filter(None, (found.get("machine"), *features))),
        "device": "" if device == "cpu" else device,
        "threads": f"{found['threads']}" if found.get("threads") else "",
        "peaks": _peaks(found.get("peaks") or {}),
        "versions": ", ".join(f"{name} {version}" for name, version in named.items()),
        "environment": " ".join(f"{name}={value}" for name, value in (found.get("environment") or {}).items()),
        "weights": found.get("model") or "seeded, such that every part of the model matters",
        "audio": found.get("audio"),
    }
    absent = [(f"without {name}", reason) for name, reason in (found.get("absent") or {}).items()]
    return [(name, text) for name, text in [*facts.items(), *absent] if text]


def _peaks(peaks: dict[str, Any]) -> str:
    figures = (f"{name} {figure(peaks.get(name), lambda p: f'{p / 1e9:.0f} GFLOP/s')}" for name in ("fp32", "bf16"))
    return f"{', '.join(figures)} ({peaks['how']})" if peaks.get("how") else ""


def head(found: Found) -> str:
    """One paragraph on where the figures come from."""
    shown = ("python", "torch", "transformers", "onnxruntime", "openvino")
    versions = found.get("versions") or {}
    # OpenVINO's name of itself holds its commit and branch.
    named = ", ".join(f"{name} {versions[name].partition('-')[0]}" for name in shown if versions.get(name))
    where = found["machine"] if found.get("device", "cpu") == "cpu" else f"{found['device']}, {found['machine']}"
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
    return f"{where}, {threads}; {named}. Measured peaks: {_peaks(found.get('peaks') or {}) or NONE}."


_KINDS = {"rows": "case", "stages": "stage", "layers": "layer", "memory": "memory", "corpus": "corpus",
          "scaling": "scaling"}  # fmt: skip
_TIMINGS, _PARTS = ("seconds", "ours_faster"), ("median", "p10", "p90", "rounds")


def csv_rows(found: Found) -> str:
    """Every measurement as a line of CSV: its kind, then the columns of all kinds, empty where a kind lacks one."""
    lines = [
        {"kind": kind, **line}
        for name, kind in _KINDS.items()
        for row in entries(console.finite(found), name)
        for line in (_points(row) if kind == "scaling" else [_flat(row) if kind == "case" else row])
    ]
    columns = list(dict.fromkeys(column for line in lines for column in line)) or ["kind"]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(row: Row) -> Row:
    """A case's row with its timings as columns of their own."""
    flat = {name: value for name, value in row.items() if name not in _TIMINGS}
    timings = {(name, part): (row[name] or {}).get(part) for name in _TIMINGS for part in _PARTS}
    return flat | {f"{name}_{part}": value for (name, part), value in timings.items()}


def _points(row: Row) -> list[Row]:
    rest = {name: value for name, value in row.items() if name != "points"}
    return [{**rest, "x": x, "y": y} for x, y in row["points"]]
