"""`wavlm-fast bench`: how much faster, how much memory, how equal, against everything that could be used instead.

Everybody gets the same inputs and as many threads, is compared with float64 first, and runs in turn with all others.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import shlex
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from wavlm_fast import audio, console, machine, memory
from wavlm_fast.errors import UserError

from ..ops.cases import OpCase, op_cases, run_op
from ..ops.providers import OpProvider, op_providers
from ..page import report, results, tables
from . import corpus, fresh, scaling
from .cases import CASES, CORPUS, MODELS, QUICK, Case, Output, Spec, grid
from .houses import HOUSES
from .peaks import Peaks, peaks
from .progress import Meter, bar
from .providers import OURS, PADDED, Provider, Subject, of_houses, providers
from .rounds import RAGGED, Row, run_case, run_fresh, run_layers, run_stages

_INTERRUPTED, _WRONG = 130, 1
_STAGE_RUNS = 16
_PEERS = ("openvino", "onnxruntime", "onnx", "s3prl", "torchaudio")
_OP_SECONDS, _OP_ROUNDS, _OP_BUDGET = 2.0, 7, 2.0  # of audio, and seconds after which no further round starts
_OWN = "model"  # what a user's checkpoint is called in the names of cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `wavlm-fast bench`."""
    console.add_model_arguments(parser, many_dtypes=True)
    parser.add_argument("--audio", metavar="FILE", help="what the models hear (default: a clip of real speech)")
    console.add_truncated_argument(parser)
    parser.add_argument("--batch", type=console.positive_int, nargs="+", metavar="B", help="own cases: utterances")
    parser.add_argument(
        "--seconds",
        type=console.positive("seconds"),
        nargs="+",
        metavar="S",
        help="own cases: seconds of each utterance",
    )
    parser.add_argument("--case", nargs="+", metavar="CASE", help=f"only these of: {', '.join(CASES)}, ops")
    parser.add_argument("--filter", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--provider", nargs="+", metavar="TEXT", help="only providers whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK)}, in less than a minute")
    parser.add_argument(
        "--rounds", type=console.rounds, metavar="N", help="timed runs of each (default: 7, 3 or 1, by length)"
    )
    parser.add_argument("--json", metavar="FILE", help='write everything measured to FILE ("-": standard output)')
    parser.add_argument("--csv", metavar="FILE", help="write one line per measurement to FILE")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--report", metavar="DIR", help="write a page with plots to DIR/index.html")


class Found:
    """What a run has found so far; all of it is kept when the run is cut short."""

    def __init__(self, out: Console, args: argparse.Namespace, absent: dict[str, str]) -> None:
        self.out = out
        self._where = args.device
        self.peaks = peaks(args.device)
        self.head = {
            "command": shlex.join(["wavlm-fast", *args.arguments]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine.cpu_name(),
            "device": "cpu" if args.device == "cpu" else machine.device_name(args.device),
            "features": machine.cpu_features(),
            "threads": torch.get_num_threads(),
            "versions": machine.versions(_PEERS),
            "environment": machine.environment(),
            "audio": args.audio or "the clip of the package",
            "model": args.model,
            "absent": absent,
        }
        self.rows: list[dict[str, Any]] = []
        self.layers: list[dict[str, Any]] = []
        self.stages: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        self.corpus: list[dict[str, Any]] = []

    def measured_peaks(self) -> Peaks:
        """The machine's peaks now; the best of a run are the machine's."""
        now = peaks(self._where)
        self.peaks = self.peaks.best(now)
        return now

    def add(self, rows: list[dict[str, Any]]) -> None:
        """A case, as far as it came; without rows where it is for nobody who was asked for."""
        self.rows += rows
        if rows:
            self.show(tables.of_case(rows))

    def show(self, table: tables.Table) -> None:
        table.show(self.out)

    def say(self, text: str) -> None:
        self.out.print(text, markup=False, soft_wrap=True)

    def as_dict(self) -> dict[str, Any]:
        """The document: what --json, --csv, --markdown and --report are made of."""
        lists = {"rows": self.rows, "layers": self.layers, "stages": self.stages, "memory": self.memory}
        lists["corpus"] = self.corpus
        return console.finite({**self.head, "peaks": self.peaks.as_dict(), **lists, "scaling": scaling.scaling(lists)})


def run(args: argparse.Namespace) -> int:
    """Measure.

    Returns:
        0, 1 when one of ours was wrong, 130 after Ctrl-C, when what was measured until then is written all the same.
    """
    console.apply_threads(args.threads)
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")  # transformers, with a mask
    out = console.console() if args.json != "-" else Console(stderr=True, highlight=False)
    cases = selected(args)
    writable(args)
    available, absent = providers(args.device)
    everybody = {**of_houses(args.device), **available}
    available = {n: p for n, p in everybody.items() if _asked(args, n, p)}
    if not available:
        raise UserError("no provider is left: " + ", ".join(everybody) + " are there")
    left_out = _left_out(cases)
    cases, absent = [case for case in cases if case.name not in left_out], {**absent, **left_out}
    heard = audio.load(args.audio, allow_truncated=args.allow_truncated)[1] if args.audio else None
    found = Found(out, args, absent)
    found.say(tables.head(found.as_dict()))
    if heard is not None and heard.incomplete:
        found.say(str(heard))
    for name, reason in absent.items():
        found.say(f"{name} is left out: {reason}")
    found.say("")
    status = 0
    try:
        _run(cases, available, args, found)
    except KeyboardInterrupt:
        found.say("\ninterrupted; this is what was measured until then\n")
        status = _INTERRUPTED
    _finish(found, args)
    return status or (_WRONG if any(row["wrong"] and row["ours"] for row in found.rows) else 0)


def selected(args: argparse.Namespace) -> list[Case | OpCase]:
    """The cases to run.

    Raises:
        UserError: there is no such case, or the filter leaves nothing.
    """
    own = bool(args.model or args.batch or args.seconds)
    if own:
        if args.model:
            MODELS[_OWN] = Spec(path=args.model)
        there = grid(_OWN if args.model else "base", args.batch or [1, 8], args.seconds or [2.0, 10.0, 30.0])
    else:
        there = dict(CASES)
    of_ops = {case.name: case for case in op_cases("base", 1, _OP_SECONDS)}
    # Groups that are measured by themselves: with them a full run would not fit in half an hour.
    groups_apart = ("regimes", "houses", RAGGED, CORPUS)
    apart = {group: [n for n, case in there.items() if case.group == group] for group in groups_apart}
    groups = {"ops": list(of_ops), **apart}
    rest = [name for name in there if not any(name in names for names in apart.values())]
    asked = args.case or (there if own else QUICK if args.quick else [*rest, "ops"])
    unknown = [name for name in asked if name not in there and name not in of_ops and name not in groups]
    if unknown:
        raise UserError(f"a case of {', '.join((*there, *groups))} is wanted, got {unknown[0]!r}")
    names = [name for asking in asked for name in groups.get(asking, [asking])]
    names = [name for name in names if args.filter is None or args.filter in name]
    if not names:
        raise UserError(f"no case's name contains {args.filter!r}: there are {', '.join((*there, *of_ops))}")
    found = [{**there, **of_ops}[name] for name in dict.fromkeys(names)]
    if args.quick:  # memory takes a process of each provider
        found = [replace(case, memory=False) if isinstance(case, Case) else case for case in found]
    return found


def _left_out(cases: Sequence[Case | OpCase]) -> dict[str, str]:
    """Names of the cases of houses whose class cannot be had, and the reasons."""
    whole = (case for case in cases if isinstance(case, Case) and case.house)
    return {case.name: reason for case in whole if (reason := HOUSES[case.house].why_not()) is not None}


def writable(args: argparse.Namespace) -> None:
    """Refuse before anything is measured what could not be written afterwards."""
    for target in (args.json, args.csv, args.markdown):
        if target and target != "-" and not Path(target).absolute().parent.is_dir():
            raise UserError(f"the file {target} cannot be written: there is no folder {Path(target).parent}")
    if args.report and Path(args.report).exists() and not Path(args.report).is_dir():
        raise UserError(f"a folder for the report is wanted, {args.report} is a file")


def _asked(args: argparse.Namespace, name: str, provider: Provider | OpProvider) -> bool:
    dtypes = [console.DTYPES[name] for name in args.dtype or ()]
    return (not dtypes or provider.dtype in dtypes) and (
        not args.provider or any(text in name for text in args.provider)
    )


def _run(
    cases: Sequence[Case | OpCase], available: dict[str, Provider], args: argparse.Namespace, found: Found
) -> None:
    whole = [case for case in cases if isinstance(case, Case)]
    rounds = {c.name: args.rounds or (5 if args.quick else c.rounds) for c in whole}
    with tempfile.TemporaryDirectory() as folder, bar(sum(_runs(c, rounds[c.name], available) for c in whole)) as meter:
        module, model = None, ""
        for case in whole:
            if case.model != model:
                module, model = None, case.model
                gc.collect()
                meter.doing(f"building {model}")
                module = Output.of(model)
            if case.group == CORPUS:
                _corpus(case, module, Path(folder), args, rounds[case.name], found, meter)
                continue
            exports = Path(folder, model)
            exports.mkdir(exist_ok=True)
            inputs = case.inputs(args.audio, args.allow_truncated)
            subject = Subject(module, inputs, exports, torch.get_num_threads(), args.device, case.house)
            _case(case, subject, _for(case, available), rounds[case.name], found, meter)
        module = None
        memory.give_back_freed()
        of_ops = [case for case in cases if isinstance(case, OpCase)]
        there = op_providers(args.device)[0] if of_ops else {}
        there = {n: p for n, p in there.items() if (p.everywhere or args.provider) and _asked(args, n, p)}
        for case in of_ops:
            rounds = args.rounds or _OP_ROUNDS
            found.add(run_op(case, there, rounds, found.measured_peaks, _OP_BUDGET, meter.doing))


def _for(case: Case, available: Mapping[str, Provider]) -> dict[str, Provider]:
    """The providers of a case."""
    there = corpus.providers() if case.group == CORPUS else available
    families = (HOUSES[case.house].family, OURS) if case.house else case.families
    return {
        name: p
        for name, p in there.items()
        if (p.everywhere or case.everybody)
        and (not families or p.family in families)
        and p.house in ("", case.house)
        and (not case.dtypes or p.dtype in case.dtypes)
        and (not p.memory or case.memory)
        and (p.way == PADDED or case.group == RAGGED)
        and (p.trains is not None or not (case.train or case.regime))
    }


def _runs(case: Case, rounds: int, available: Mapping[str, Provider]) -> float:
    """Seconds of audio that pass through models, about: what the progress bar counts in."""
    calls = len(_for(case, available)) * (rounds if case.fresh else rounds + 2 + case.memory)
    return case.audio * (calls + case.stages * 2 * _STAGE_RUNS)


def _case(case: Case, subject: Subject, chosen: dict[str, Provider], rounds: int, found: Found, meter: Meter) -> None:
    if case.fresh:
        _fresh(case, subject, chosen, rounds, found, meter)
        return
    timed = {name: p for name, p in chosen.items() if not p.memory}
    rows: list[Row] = []
    try:
        for rows in run_case(case, subject, timed, found.measured_peaks, rounds, meter):  # noqa: B007 - the last counts
            pass
    finally:
        found.add(_ended(rows))
    right = {row.provider: row for row in rows if row.seconds is not None}
    if case.layers and right:
        meter.doing(f"{case.name}: errors at every layer")
        found.layers += run_layers(case, subject, {name: chosen[name] for name in right})
    for name, row in right.items():
        if case.stages and chosen[name].family == OURS:
            meter.doing(f"{case.name}: stages of {name}")
            stages = run_stages(case, subject, name, chosen[name].dtype, row.peak_gflops)
            meter.done(_STAGE_RUNS * case.audio)
            found.stages += stages
            found.show(tables.of_stages(stages))
    for name, provider in chosen.items() if case.memory else ():
        if provider.memory or (provider.everywhere and name in right):
            meter.doing(f"{case.name}: memory of {name}")
            found.memory.append(fresh.row(case, name, provider, fresh.run(case, name, provider, subject)))
            meter.done(case.audio)


def _fresh(case: Case, subject: Subject, chosen: dict[str, Provider], rounds: int, found: Found, meter: Meter) -> None:
    rows, peaks = [], []
    try:
        for rows, peaks in run_fresh(case, subject, chosen, rounds, meter):  # noqa: B007 - the last counts
            pass
    finally:
        found.add(_ended(rows))
        found.memory += peaks


def _corpus(
    case: Case, module: Output, folder: Path, args: argparse.Namespace, rounds: int, found: Found, meter: Meter
) -> None:
    chosen = [name for name, provider in corpus.providers().items() if _asked(args, name, provider)]
    rows, told = [], []
    meter.doing(f"{case.name}: files")
    made = corpus.Corpus(case, module, folder / case.name)
    try:
        threads, peaks = torch.get_num_threads(), found.measured_peaks
        for rows, told in corpus.run(made, chosen, peaks, rounds, threads, args.device, meter):  # noqa: B007
            pass
    finally:
        found.add(_ended(rows))
        found.corpus += told
        if told:
            found.show(tables.of_corpus(told))


def _ended(rows: list[Row]) -> list[dict[str, Any]]:
    for row in rows:
        if row.seconds is None and row.problem is None:
            row.problem = "not timed: the run was cut short"
    return [row.as_dict() for row in rows]


def _finish(found: Found, args: argparse.Namespace) -> None:
    """Show what is made of everything, and write what was asked for."""
    document = found.as_dict()
    if document["memory"]:
        found.show(tables.of_memory(document["memory"]))
    for table in (*tables.of_scaling(document["scaling"]), *tables.summaries(document), *tables.of_gains(document)):
        found.show(table)
    if args.json:
        console.write_json(args.json, document)
    if args.csv:
        console.write_file(Path(args.csv), tables.csv_rows(document), "CSV file")
    if args.markdown:
        console.write_file(Path(args.markdown), results.markdown(document), "Markdown file")
    if args.report:
        found.say(f"the report is {report.write_report(document, Path(args.report))}")
