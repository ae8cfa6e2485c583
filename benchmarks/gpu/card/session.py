"""What comes next, and whether there is time for it."""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from wavlm_fast import memory
from wavlm_fast.errors import first_line

from .steps import ATTENTION, MODELS, PARITY, PEAKS, STAGES, TUNING, Row, Step

Message = dict[str, Any]
# By which part of the time a phase has to be through, while later ones wait. What is left of it comes after all others.
UNTIL = {PEAKS: 1.0, PARITY: 0.4, ATTENTION: 0.6, STAGES: 0.72, MODELS: 0.95, TUNING: 1.0}
_RECENT = 5
_MARGIN = 2.0  # seconds to be early


class Pace:
    """How long steps take, beside what was thought: as the slowest of the latest of its phase."""

    def __init__(self) -> None:
        self._ratios: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))

    def seconds(self, step: Step) -> float:
        """An estimate."""
        return step.seconds * max(self._ratios[step.phase], default=1.0)

    def took(self, step: Step, seconds: float) -> None:
        """One is through."""
        self._ratios[step.phase].append(seconds / step.seconds)


class Session:
    """Runs steps until the deadline.

    Args:
        done: the names of those that need not be run.
        rows: what they measured; what is measured is added.
        clock: seconds since some time.
        deadline: of that clock, by which the last has to be through.
    """

    def __init__(self, done: Iterable[str], rows: list[Row], clock: Callable[[], float], deadline: float) -> None:
        self._done, self._rows, self._clock = set(done), rows, clock
        self._begin, self._deadline = clock(), deadline
        self._pace = Pace()
        self.broken = False

    def run(self, steps: Iterable[Step]) -> Iterator[Message]:
        """The plan, and what becomes of it: a message before each step and after.

        Phases keep to their part of the time; then whatever is left over of them has the rest.
        """
        pending = [step for step in steps if step.name not in self._done]
        yield {"plan": [step.name for step in pending]}
        for shared in (True, False):
            for step in list(pending):
                if self.broken:
                    return
                if self._clock() + self._pace.seconds(step) <= self._until(step, shared) - _MARGIN:
                    pending.remove(step)
                    yield {"start": step.name, "phase": step.phase, "seconds": self._pace.seconds(step)}
                    yield self._ran(step)

    def _until(self, step: Step, shared: bool) -> float:
        part = UNTIL[step.phase] if shared else 1.0
        return self._begin + part * (self._deadline - self._begin)

    def _ran(self, step: Step) -> Message:
        begin = self._clock()
        try:
            rows = step.run()
        except Exception as error:  # whatever a device, a compiler or a library raises: the next step may fare better
            rows = [fault(step.phase, step.name, _said(error))]
            del error
            self.broken = not _alive()
        gc.collect()
        memory.give_back_freed()
        took = self._clock() - begin
        self._pace.took(step, took)
        self._done.add(step.name)
        self._rows += [{"step": step.name, "phase": step.phase, **row} for row in rows]
        return {"step": step.name, "phase": step.phase, "took": took, "rows": rows}


def fault(phase: str, name: str, why: str) -> Row:
    """The row of a step that measured nothing."""
    return {"problem": why, "ours": phase in (PARITY, TUNING) or ": wavlm_fast" in name, "fault": True}


def _said(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {first_line(error)}"
    return f"{type(error).__name__}: {first_line(error)}"


def _alive() -> bool:
    """Whether the device still answers: after an access out of bounds it never does again in this process."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True
