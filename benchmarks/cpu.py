"""`python -m benchmarks.cpu`: WavLM on a processor, by transformers, ONNX Runtime, OpenVINO and ours.

Everybody gets the same inputs and as many threads, is compared with float64 first, and runs in turn with all others.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from wavlm_fast import audio, console, machine, memory
from wavlm_fast.errors import UserError

from . import tables
from .cases import CASES, MODELS, QUICK, Case, Output
from .peaks import Peaks, peaks
from .providers import OURS, Provider, Subject, providers
from .rounds import Meter, Row, run_case, run_stages

# Who, whether with the original weights, and seconds of audio.
MEMORY = (("transformers", True, 120), (OURS, True, 120), (OURS, False, 120), (OURS, True, 600), (OURS, False, 600))
_INTERRUPTED, _WRONG, _USER_ERROR = 130, 1, 2
_STAGE_RUNS = 16
_PEERS = ("openvino", "onnxruntime", "onnx")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    names = (*CASES, "memory")
    made.add_argument("--case", nargs="+", choices=names, metavar="CASE", help=f"of: {', '.join(names)} (default: all)")
    made.add_argument("--filter", metavar="TEXT", help="only cases whose name contains TEXT")
    made.add_argument("--provider", nargs="+", metavar="TEXT", help="only providers whose name contains one of these")
    made.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK)}, 5 rounds")
    made.add_argument(
        "--rounds", type=console.rounds, metavar="N", help="timed runs of each (default: 11 to 5, by length)"
    )
    made.add_argument("--threads", type=console.positive_int, default=2, metavar="N", help="of everybody (default: 2)")
    made.add_argument("--json", metavar="FILE", help='write everything measured to FILE ("-": standard output)')
    made.add_argument("--markdown", metavar="FILE", help="write the summary to FILE, as the README has it")
    return made


class Report:
    """What a run has found so far; all of it is kept when the run is cut short."""

    def __init__(self, out: Console, arguments: Sequence[str], peaks: Peaks, absent: dict[str, str]) -> None:
        self.out, self.peaks, self.absent = out, peaks, absent
        self.command = shlex.join(["python", "-m", "benchmarks.cpu", *arguments])
        self.date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.versions = machine.versions(_PEERS)
        self.rows: list[Row] = []
        self.stages: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        self.tables: list[tables.Table] = []

    @property
    def head(self) -> str:
        return tables.head(machine.cpu_name(), torch.get_num_threads(), self.versions, self.peaks)

    def show(self, table: tables.Table) -> None:
        self.tables.append(table)
        table.show(self.out)

    def measured_peaks(self) -> Peaks:
        """The machine's peaks now; the best of a run are the machine's."""
        now = peaks()
        self.peaks = self.peaks.best(now)
        return now

    def add(self, case: Case, rows: list[Row]) -> None:
        """A case, as far as it came."""
        self.rows += rows
        self.show(tables.of_case(case, rows))
        for row in rows:
            for remark in filter(None, (row.problem, row.note)):
                self.say(f"{row.provider}: {remark}")
        self.say("")

    def say(self, text: str) -> None:
        self.out.print(text, markup=False, soft_wrap=True)

    def as_dict(self) -> dict[str, Any]:
        about = {
            "command": self.command, "date": self.date, "machine": machine.cpu_name(),
            "features": machine.cpu_features(), "threads": torch.get_num_threads(), "versions": self.versions,
            "environment": machine.environment(), "peaks": self.peaks.as_dict(), "absent": self.absent,
        }  # fmt: skip
        return {**about, "rows": [r.as_dict() for r in self.rows], "stages": self.stages, "memory": self.memory}

    def markdown(self) -> str:
        shown = [*tables.summaries(self.rows), *self.tables]
        return "\n".join([f"`{self.command}` on {self.date[:10]}. {self.head}\n", *(t.markdown() for t in shown)])


class Bar(Meter):
    """A progress bar on standard error. It is drawn between runs only: drawing takes time."""

    def __init__(self, progress: Progress, total: float) -> None:
        self._progress, self._task = progress, progress.add_task("", total=total)

    def doing(self, what: str) -> None:
        self._progress.update(self._task, description=what, refresh=True)

    def done(self, seconds: float) -> None:
        self._progress.update(self._task, advance=seconds, refresh=True)


@contextlib.contextmanager
def bar(total: float) -> Iterator[Meter]:
    """The progress bar where there is a terminal to draw it on."""
    where = Console(stderr=True)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    options = {"transient": True, "auto_refresh": False, "redirect_stdout": sys.stdout.isatty()}
    with Progress(*columns, console=where, disable=not where.is_terminal, **options) as shown:
        yield Bar(shown, total)


def selected(args: argparse.Namespace) -> tuple[list[Case], bool]:
    """The cases to run, and whether memory is measured.

    Raises:
        UserError: the filter leaves nothing.
    """
    names = list(args.case or (QUICK if args.quick else (*CASES, "memory")))
    names = [n for n in names if args.filter is None or args.filter in n]
    if not names:
        raise UserError(f"no case's name contains {args.filter!r}: there are {', '.join((*CASES, 'memory'))}")
    return [case for name, case in CASES.items() if name in names], "memory" in names


def run(args: argparse.Namespace, report: Report, found: dict[str, Provider]) -> None:
    """Measure everything that was asked for, into the report."""
    cases, wants_memory = selected(args)
    rounds = {c.name: args.rounds or (5 if args.quick else c.rounds) for c in cases}
    runs = {c.name: _runs(c, rounds[c.name], len(found)) for c in cases}
    total = sum(c.audio * runs[c.name] for c in cases) + wants_memory * sum(s for _, _, s in MEMORY)
    with tempfile.TemporaryDirectory() as folder, bar(total) as meter:
        module, model = None, ""
        for case in cases:
            if case.model != model:
                module, model = None, case.model
                gc.collect()
                meter.doing(f"building {model}")
                module = Output(MODELS[model].build(), MODELS[model].output)
            exports = Path(folder, model)
            exports.mkdir(exist_ok=True)
            _case(case, Subject(module, case.inputs(), exports, args.threads), found, rounds[case.name], report, meter)
        module = None
        memory.give_back_freed()
        for provider, keeps, seconds in MEMORY if wants_memory else ():
            meter.doing(f"memory: {provider}, {seconds} s")
            report.memory.append(_memory(provider, keeps, seconds, args.threads))
            meter.done(seconds)


def _runs(case: Case, rounds: int, providers: int) -> int:
    """Forwards through a model, about: what the progress bar counts in."""
    calls = rounds + 1 + case.warms_up
    return calls * (2 if case.train else providers) + case.alone * 3 * rounds + case.stages * 2 * _STAGE_RUNS


def _case(case: Case, subject: Subject, found: dict[str, Provider], rounds: int, report: Report, meter: Meter) -> None:
    rows: list[Row] = []
    try:
        for rows in run_case(case, subject, found, report.measured_peaks, rounds, meter):  # noqa: B007 - the last is what there is
            pass
    finally:
        for row in rows:
            if row.seconds is None and row.problem is None:
                row.problem = "not timed: the run was cut short"
        report.add(case, rows)
    for row in rows if case.stages else ():
        if found[row.provider].ours and row.seconds is not None:
            meter.doing(f"{case.name}: stages of {row.provider}")
            stages = run_stages(case, subject, found[row.provider].dtype)
            meter.done(_STAGE_RUNS * case.audio)
            report.stages += [{"case": case.name, "dtype": row.dtype, **s.as_dict()} for s in stages]
            report.show(tables.of_stages(case.name, row.dtype, stages, row.peak_gflops))


def _memory(provider: str, keeps: bool, seconds: float, threads: int) -> dict[str, Any]:
    name = provider if keeps else f"{provider}, originals freed"
    row = {"provider": name, "audio": float(seconds), "dtype": "fp32", "peak_bytes": None, "forward_bytes": None}
    try:
        samples = int(seconds * audio.RATE)
        peak = memory.measure(provider, audio=None, samples=samples, threads=threads, keep_originals=keeps)
    except UserError as error:
        return {**row, "problem": str(error)}
    return {**row, "peak_bytes": peak.total, "forward_bytes": peak.forward, "problem": None}


def _write(target: str, text: str) -> None:
    try:
        Path(target).write_text(text)
    except OSError as error:
        raise UserError(f"the file {target} cannot be written: {error.strerror or error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when every provider was right, 1 when one was wrong, 2 after a user's error, 130 after Ctrl-C, when what was
        measured until then is written all the same.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")  # transformers, with a mask
    out = console.console() if args.json != "-" else Console(stderr=True, highlight=False)
    try:
        selected(args)
        found, absent = providers()
        if args.provider:
            found = {n: p for n, p in found.items() if any(text in n for text in args.provider)}
        report = Report(out, arguments, peaks(), absent)
        report.say(report.head)
        for name, reason in absent.items():
            report.say(f"{name} is left out: {reason}")
        report.say("")
        status = 0
        try:
            run(args, report, found)
        except KeyboardInterrupt:
            report.say("\ninterrupted; this is what was measured until then\n")
            status = _INTERRUPTED
        if report.memory:
            report.show(tables.of_memory(report.memory))
        for table in tables.summaries(report.rows):
            table.show(out)
        if args.json:
            console.write_json(args.json, report.as_dict())
        if args.markdown:
            _write(args.markdown, report.markdown())
    except UserError as error:
        print(f"python -m benchmarks.cpu: {error}", file=sys.stderr)
        return _USER_ERROR
    return status or (_WRONG if any(row.wrong for row in report.rows) else 0)


if __name__ == "__main__":
    sys.exit(main())
