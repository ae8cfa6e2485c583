"""One case through all providers: verified, then timed in turn."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from wavlm_fast import measure, memory
from wavlm_fast.errors import first_line

from . import fresh
from .cases import MODELS, Case, bound, bound_step
from .houses import HOUSES
from .peaks import Peaks
from .providers import BASELINE, EXACT, OURS, PADDED, SHORT, Call, Provider, Subject
from .ragged import judged, seen
from .regimes import REGIMES
from .stages import breakdown
from .verify import Judge, affordable, narrow

if TYPE_CHECKING:  # it draws, with a library that an op's measurement has no use for
    from .progress import Meter

RAGGED = "ragged"  # the group of cases in which utterances run in several ways
_STAGE_ROUNDS, _BRIEF = 7, 8000  # forwards, and samples of one that is nearly nothing but Python
_SETTLE = 0.02  # seconds in which the idle threads of one runtime stop spinning before another one runs


@dataclass
class Row:
    """One provider in one case. Without `problem` it has times."""

    case: str
    group: str
    model: str
    cls: str
    batch: int
    length: float  # seconds of the longest utterance
    provider: str
    family: str
    dtype: str
    ours: bool
    audio: float | None  # seconds, of all utterances; of an op, none
    gflop: float  # by the direct algorithm
    error: float | None = None  # largest, relative to the largest value of the truth
    allowed: float | None = None
    problem: str | None = None
    wrong: bool = False  # it ran and its result is not to be trusted
    note: str = ""
    seconds: measure.Timing | None = None
    factor: float | None = None  # seconds of audio per second
    gflops: float | None = None
    peak_gflops: float | None = None  # of this machine in this dtype, measured before and after
    share: float | None = None  # of that peak
    ours_faster: measure.Timing | None = None  # ours in the same dtype over this, round by round

    @classmethod
    def of(cls, case: Case, name: str, provider: Provider) -> Row:
        """A row to be filled."""
        made_of = HOUSES[case.house].cls if case.house else MODELS[case.model].cls
        return cls(
            case.name, case.group, case.model, made_of, len(case.lengths), max(case.lengths),
            name, provider.family, SHORT[provider.dtype], provider.ours,
            case.audio, sum(case.operations(provider.way == PADDED).values()) / 1e9, note=provider.note(),
        )  # fmt: skip

    def timed(self, times: list[float], peak: float | None) -> None:
        """Fill in what follows from the seconds of each round, with the machine's peak in operations per second."""
        self.seconds = measure.Timing.of(times)
        if self.audio is not None:
            self.factor = self.audio / self.seconds.median
        if not self.gflop:
            return
        self.gflops = self.gflop / self.seconds.median
        if peak is not None:
            self.peak_gflops, self.share = peak / 1e9, self.gflops / (peak / 1e9)

    def failed(self, why: str, wrong: bool) -> None:
        """It does not run this case; `wrong` where it should."""
        self.problem, self.wrong = f"does not run this case: {why}", wrong

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        timings = {name: getattr(self, name) and getattr(self, name).as_dict() for name in ("seconds", "ours_faster")}
        return {**vars(self), **timings}


def run_case(
    case: Case,
    subject: Subject,
    providers: Mapping[str, Provider],
    peaks: Callable[[], Peaks],
    rounds: int,
    meter: Meter,
) -> Iterator[list[Row]]:
    """Verify and time every provider.

    Args:
        case: what is run.
        subject: its model and inputs.
        providers: by name. Whoever fails gets a row that says why.
        peaks: measures the machine's, which is done before and after the timing.
        rounds: timed runs of each.
        meter: told of every run.

    Yields:
        A row for each provider, in their order: first empty, then with what was measured.
    """
    rows = {name: Row.of(case, name, p) for name, p in providers.items()}
    yield list(rows.values())
    whole = case.group != RAGGED or affordable(case, truths=3)
    checked, checker = (case, subject) if whole else narrow(case, subject)
    judges: dict[str, Judge] = {}
    calls: dict[str, Call] = {}
    for name, provider in providers.items():
        if provider.way not in judges:
            meter.doing(f"{case.name}: float64")
            judges[provider.way] = Judge(checked, judged(checked, checker, provider.way))
        meter.doing(f"{case.name}: {name}")
        call = _verified(checked, rows[name], provider, checker, judges[provider.way])
        if call is not None and checked is not case:
            rows[name].note = "held against float64 on a narrow model of these lengths"
            call = _call(case, provider, subject)
        meter.done(case.audio)
        if call is not None:
            calls[name] = call
    meter.doing(f"{case.name}: timing {len(calls)} providers in turn")
    before = peaks()
    between = partial(_between, case, meter)
    found = measure.interleave(calls, rounds, subject.device, warm_up=case.audio <= 30, between=between)
    _compare(rows, providers, found)
    peak = before.best(peaks())
    for name, times in found.items():
        rows[name].timed(times, peak.of(providers[name].dtype))
    yield list(rows.values())
    calls.clear()
    memory.give_back_freed()


def run_fresh(
    case: Case, subject: Subject, providers: Mapping[str, Provider], rounds: int, meter: Meter
) -> Iterator[tuple[list[Row], list[dict[str, Any]]]]:
    """`run_case` where every run has a process of its own, which tells its peak of memory too.

    Yields:
        Rows and memory, first without times; again after every round.
    """
    rows = {name: Row.of(case, name, p) for name, p in providers.items()}
    peaks: dict[str, dict[str, Any]] = {}
    shown = [row for row in rows.values() if not providers[row.provider].memory]
    yield shown, []
    meter.doing(f"{case.name}: float64")
    checked, checker = (case, subject) if affordable(case) else narrow(case, subject)
    judge = Judge(checked, checker)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for index in range(rounds):
        for name in measure.order(providers, index):
            row, provider = rows[name], providers[name]
            if row.problem is not None:
                continue
            meter.doing(f"{case.name}: {name}, in a process of its own")
            result = fresh.run(case, name, provider, subject)
            meter.done(case.audio)
            peaks[name] = fresh.worst(peaks.get(name), fresh.row(case, name, provider, result))
            if isinstance(result, str):
                row.failed(result, wrong=False)
                continue
            seconds[name].append(result.seconds)
            if index == 0:
                if checked is not case:
                    row.note = "held against float64 on a narrow model of this length"
                    result = fresh.run(checked, name, provider, checker)
                if isinstance(result, str):
                    row.failed(result, _expected(provider))
                else:
                    _judge(row, provider, judge, result.output)
        timed = {n: s for n, s in seconds.items() if rows[n].problem is None and not providers[n].memory}
        _compare(rows, providers, timed)
        for name, times in timed.items():
            rows[name].timed(times, None)
        yield shown, list(peaks.values())


def _verified(case: Case, row: Row, provider: Provider, subject: Subject, judge: Judge) -> Call | None:
    """The provider's call, and in `row` how right it is; None, and in `row` why, if it is not to be timed."""
    try:
        call = _call(case, provider, subject)
        result = call()
    except Exception as error:  # whatever a runtime raises at what it cannot do
        row.failed(first_line(error), _expected(provider))
        return None
    _judge(row, provider, judge, result)
    return None if row.wrong else call


def _call(case: Case, provider: Provider, subject: Subject) -> Call:
    subject = seen(case, subject, provider.way)
    if case.train:
        return bound_step(provider.trains(subject), subject.inputs, provider.dtype)
    if case.regime:
        return REGIMES[case.regime](provider.trains(subject), subject.inputs)
    return provider.build(subject)


def _expected(provider: Provider) -> bool:
    """Whether it has to run every case that it is asked for."""
    return provider.ours or provider.family == BASELINE


def _judge(row: Row, provider: Provider, judge: Judge, result: Any) -> None:
    """Fill in the error, and the problem of a result that is wrong."""
    if provider.family == BASELINE:
        judge.note(provider.dtype, result)
    verdict = judge.verdict(provider.dtype, result)
    row.error, row.allowed, row.problem = verdict.error, verdict.allowed, verdict.problem
    row.note = "; ".join(filter(None, (row.note, verdict.remark)))
    if provider.ours and verdict.remark:  # of ours more is asked: outliers must not hide what they do to the rest
        row.problem = f"wrong: {verdict.remark}"
    row.wrong = row.problem is not None


def _between(case: Case, meter: Meter) -> None:
    """Between two runs, off the clock."""
    meter.done(case.audio)
    time.sleep(_SETTLE)


def _compare(rows: dict[str, Row], providers: Mapping[str, Provider], found: Mapping[str, list[float]]) -> None:
    """Ours as users get it over all others, in the same precision; exact batches, where utterances differ in length."""
    ways = {providers[name].way for name in found}
    family = f"{OURS}, {EXACT}" if EXACT in ways else OURS
    for ours in (name for name in found if providers[name].family == family):
        for name in found:
            if name != ours and providers[name].dtype == providers[ours].dtype:
                rows[name].ours_faster = measure.ratio(found[name], found[ours])


def run_stages(
    case: Case, subject: Subject, provider: str, dtype: torch.dtype, peak: float | None
) -> list[dict[str, Any]]:
    """Where the time of ours goes: rows for --json, with the machine's peak in GFLOP/s."""
    module = subject.copy(dtype, fast=True)
    brief = {name: value[:1, :_BRIEF] for name, value in subject.inputs.items()}
    found = breakdown(module, bound(module, subject.inputs), bound(module, brief), case.operations(), _STAGE_ROUNDS)
    head = {"case": case.name, "provider": provider, "dtype": SHORT[dtype]}
    return [{**head, **stage.as_dict(), "peak_gflops": peak} for stage in found]


def run_layers(case: Case, subject: Subject, providers: Mapping[str, Provider]) -> list[dict[str, Any]]:
    """The error at every layer, relative to its largest value, of transformers and ours."""
    waveform = subject.inputs["input_values"]
    truth = measure.layers(subject.module.copy(torch.float64).model, waveform)
    rows = []
    for dtype in dict.fromkeys(p.dtype for p in providers.values()):
        theirs, ours = (measure.layers(subject.copy(dtype, fast).model, waveform) for fast in (False, True))
        for layer in measure.compare(theirs, ours, truth):
            for family, error in ((BASELINE, layer.all.theirs), (OURS, layer.all.ours)):
                head = {"case": case.name, "provider": f"{family} {SHORT[dtype]}", "dtype": SHORT[dtype]}
                sizes = {"error": error / layer.largest, "allowed": layer.all.allowed / layer.largest}
                rows.append({**head, "layer": layer.layer, "largest": layer.largest, **sizes})
    return rows
