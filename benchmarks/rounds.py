"""One case through all providers: verified, then timed in turn."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from wavlm_fast import measure, memory

from .cases import Case, bound, bound_step
from .peaks import Peaks
from .providers import BASELINE, SHORT, Call, Provider, Subject
from .stages import Stage, breakdown
from .verify import Judge

_STAGE_ROUNDS, _BRIEF = 7, 8000  # forwards, and samples of one that is nearly nothing but Python
_SETTLE = 0.02  # seconds in which the idle threads of one runtime stop spinning before another one runs


@dataclass
class Row:
    """One provider in one case. Without `problem` it has times."""

    case: str
    provider: str
    family: str
    dtype: str
    audio: float  # seconds, of all utterances
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

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        timings = {name: getattr(self, name) and getattr(self, name).as_dict() for name in ("seconds", "ours_faster")}
        return {**vars(self), **timings}


class Meter:
    """What a run tells of its progress; this one tells nobody."""

    def doing(self, what: str) -> None:
        """Name the step that begins."""

    def done(self, seconds: float) -> None:
        """Some seconds of audio have passed through a model."""


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
        providers: by name; a training step is for those of them that train, in float32. Whoever fails gets a row
            that says why.
        peaks: measures the machine's, which is done before and after every timing.
        rounds: timed runs of each.
        meter: told of every run.

    Yields:
        A row for each provider, in their order; again, with more in them, whenever some have been timed.
    """
    operations = sum(case.operations().values())
    if case.train:
        providers = {n: p for n, p in providers.items() if p.fast is not None and p.dtype == torch.float32}
    rows = {
        name: Row(case.name, name, p.family, SHORT[p.dtype], case.audio, operations / 1e9, note=p.note())
        for name, p in providers.items()
    }
    yield list(rows.values())
    meter.doing(f"{case.name}: float64")
    judge = Judge(case, subject.module, subject.inputs)
    ours: dict[str, Call] = {}  # meets peer after peer
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for group in _groups(case, providers):
        calls: dict[str, Call] = {}
        for name in group:
            call = ours.get(name)
            if call is None and rows[name].problem is None:
                meter.doing(f"{case.name}: {name}")
                call = _verified(case, rows[name], providers[name], subject, judge)
                meter.done(case.audio)
            if call is not None:
                calls[name] = call
        ours |= {name: call for name, call in calls.items() if providers[name].ours}
        meter.doing(f"{case.name}: timing {len(calls)} providers in turn")
        before = peaks()
        between = partial(_between, case, subject, meter)
        found = measure.interleave(calls, rounds, warm_up=case.warms_up, between=between)
        _compare(rows, providers, found)
        peak = before.best(peaks())
        for name, times in found.items():
            seconds[name] += times
            _fill(rows[name], seconds[name], peak.of(providers[name].dtype))
        yield list(rows.values())
        del calls, call
        memory.give_back_freed()


def _groups(case: Case, providers: Mapping[str, Provider]) -> Iterator[list[str]]:
    """Who is timed in turn with whom: all with all, or each peer with ours of its dtype."""
    ours = [name for name, p in providers.items() if p.ours]
    peers = [name for name in providers if name not in ours]
    if not case.alone or not peers:
        yield list(providers)
        return
    for peer in peers:
        yield [peer, *(name for name in ours if providers[name].dtype == providers[peer].dtype)]


def _verified(case: Case, row: Row, provider: Provider, subject: Subject, judge: Judge) -> Call | None:
    """The provider's call, and in `row` how right it is; None, and in `row` why, if it is not to be timed."""
    try:
        call = _step(provider, subject) if case.train else provider.build(subject)
        result = call()
    except Exception as error:  # whatever a runtime raises at what it cannot do
        lines = str(error).strip().splitlines() or [type(error).__name__]
        row.problem = f"does not run this case: {lines[0]}"
        row.wrong = provider.ours or provider.family == BASELINE
        return None
    if provider.family == BASELINE:
        judge.note(provider.dtype, result)
    verdict = judge.verdict(provider.dtype, result)
    row.error, row.allowed, row.problem = verdict.error, verdict.allowed, verdict.problem
    row.note = "; ".join(filter(None, (row.note, verdict.remark)))
    if provider.ours and verdict.remark:  # of ours more is asked: outliers must not hide what they do to the rest
        row.problem = f"wrong: {verdict.remark}"
    row.wrong = row.problem is not None
    return None if row.wrong else call


def _step(provider: Provider, subject: Subject) -> Call:
    return bound_step(subject.module.copy(provider.dtype, bool(provider.fast)), subject.inputs)


def _between(case: Case, subject: Subject, meter: Meter) -> None:
    """Between two runs, off the clock."""
    meter.done(case.audio)
    time.sleep(_SETTLE)
    if case.train:
        # As after an optimizer's step: the weights count as new, and whoever packs them must pack them again.
        with torch.no_grad():
            for parameter in subject.module.parameters():
                parameter.mul_(1.0)


def _compare(rows: dict[str, Row], providers: Mapping[str, Provider], found: Mapping[str, list[float]]) -> None:
    """Ours over the others, in the same precision."""
    for ours in (name for name in found if providers[name].ours):
        for name in found:
            if not providers[name].ours and providers[name].dtype == providers[ours].dtype:
                rows[name].ours_faster = measure.ratio(found[name], found[ours])


def _fill(row: Row, times: list[float], peak: float | None) -> None:
    row.seconds = measure.Timing.of(times)
    row.factor = row.audio / row.seconds.median
    row.gflops = row.gflop / row.seconds.median
    if peak is not None:
        row.peak_gflops, row.share = peak / 1e9, row.gflops / (peak / 1e9)


def run_stages(case: Case, subject: Subject, dtype: torch.dtype) -> list[Stage]:
    """Where the time of ours goes."""
    module = subject.module.copy(dtype, fast=True)
    brief = {name: value[:1, :_BRIEF] for name, value in subject.inputs.items()}
    return breakdown(module, bound(module, subject.inputs), bound(module, brief), case.operations(), _STAGE_ROUNDS)
