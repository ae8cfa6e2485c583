"""Whether what "auto" runs of an op is slower than plain torch: two calls side by side, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from wavlm_fast import measure

MOST = 0.03  # by which ours may be slower
_ROUNDS, _SECONDS = 200, 0.25  # of a first look
_AGAIN = 4  # times as many rounds of a second one, whose word counts


@dataclass(frozen=True)
class Compared:
    """Seconds of a call, the medians, and how many times as fast ours is: the median of the rounds."""

    op: str
    dtype: str
    ours: float
    torch: float
    ratio: float

    @classmethod
    def of(cls, op: str, dtype: str, ours: Sequence[float], torch: Sequence[float]) -> Compared:
        """From the seconds of each round."""
        medians = (measure.Timing.of(list(seconds)).median for seconds in (ours, torch))
        return cls(op, dtype, *medians, measure.ratio(list(torch), list(ours)).median)

    @property
    def loses(self) -> bool:
        return self.ratio < 1 / (1 + MOST)

    def __str__(self) -> str:
        return f"{self.op:<48} {self.dtype}  {1e3 * self.ours:9.3f}  {1e3 * self.torch:9.3f}  {self.ratio:5.2f}"


FOUND: list[Compared] = []  # by this session of pytest
HEAD = f"{'op':<48} {'':4}  {'ours, ms':>9}  {'torch, ms':>9}  ratio"


def compare(op: str, dtype: str, ours: Callable[[], Any], torch: Callable[[], Any], patience: float = 1.0) -> Compared:
    """Run both in turn; who seems to lose is measured anew, for longer, before it counts.

    Args:
        op, dtype: what they are called.
        ours, torch: the calls.
        patience: by how much to lengthen everything.
    """
    for times in (1, _AGAIN):
        most, budget = round(_ROUNDS * times * patience), _SECONDS * times * patience
        seconds = measure.interleave({"ours": ours, "torch": torch}, most, budget=budget)
        found = Compared.of(op, dtype, seconds["ours"], seconds["torch"])
        if not found.loses:
            break
    return found


def told(compared: Sequence[Compared]) -> list[str]:
    """A heading, and who lost, the worst first."""
    losers = sorted((c for c in compared if c.loses), key=lambda c: c.ratio)
    heading = f"{len(losers)} of {len(compared)} ops are slower than plain torch"
    return [heading, *((HEAD, *map(str, losers)) if losers else ())]
