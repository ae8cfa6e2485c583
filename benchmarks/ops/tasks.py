"""`python -m benchmarks.tasks`: what ops are cut into for more threads than this machine has, and what that is worth.

A call runs on one thread, loop by loop as it would be cut for so many, and each task's time is taken (csrc/task_log.h).
From these follows when the last of so many threads would be done. Threads that wait for memory or for each other longer
than `--barrier` says are not in it: it is what the cut allows, no less and no more.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wavlm_fast.backends.cpu import extension
from wavlm_fast.errors import UserError

from ..run.cases import MODELS
from .cases import BoundOp, OpCase, op_cases
from .providers import op_providers

_RUNS = 3  # of each call; of loops and of what is outside of them the fastest counts


@dataclass(frozen=True)
class Loop:
    """One loop of a call, after which threads wait for each other.

    Attributes:
        before: seconds that one thread was alone since the loop before.
        taken: whether threads take tasks as they finish; otherwise there are no more tasks than threads.
        tasks: seconds of each.
    """

    before: float
    taken: bool
    tasks: tuple[float, ...]

    def span(self, threads: int) -> float:
        """Seconds until the last of so many threads is done."""
        if not self.taken:
            return max(self.tasks, default=0.0)
        ends = [0.0] * threads
        for seconds in self.tasks:
            heapq.heapreplace(ends, ends[0] + seconds)
        return max(ends)


@dataclass(frozen=True)
class Cut:
    """A call as it is cut for `threads`."""

    threads: int
    loops: tuple[Loop, ...]
    after: float  # seconds alone behind the last loop

    @property
    def alone(self) -> float:
        """Seconds outside of loops, where torch may have some of its own."""
        return sum(loop.before for loop in self.loops) + self.after

    @property
    def work(self) -> float:
        """Seconds of all tasks."""
        return sum(sum(loop.tasks) for loop in self.loops)

    def span(self, barrier: float = 0.0) -> float:
        """Seconds of all loops on that many threads."""
        return sum(loop.span(self.threads) + barrier for loop in self.loops)


def cut(call: Callable[[], Any], threads: int) -> Cut:
    """Run `call` once, on this thread, as it would be cut for `threads`."""
    ops = torch.ops.wavlm_fast_cpu
    ops.begin_task_log(threads)
    try:
        call()
    finally:
        numbers = ops.end_task_log()
    loops, at = [], 0
    while at < len(numbers) - 1:
        before, taken, count = numbers[at : at + 3]
        at += 3 + int(count)
        loops.append(Loop(before, bool(taken), tuple(numbers[at - int(count) : at])))
    return Cut(threads, tuple(loops), numbers[-1])


def calls(
    model: str, batch: int, seconds: float, dtype: str = "fp32", wanted: Callable[[OpCase], bool] = lambda case: True
) -> Iterator[tuple[OpCase, BoundOp]]:
    """The ops of a model, those that are wanted, ready to run.

    Raises:
        UserError: the C++ kernels cannot be used here.
    """
    if extension.problem() is not None:
        raise UserError(extension.problem())
    provider = op_providers("cpu")[0][f"wavlm_fast cpu {dtype}"]
    for case in filter(wanted, op_cases(model, batch, seconds)):
        yield case, BoundOp(case, provider, case.build(provider.dtype, "cpu"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["base", "large"], help="default: base large")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="utterances (default: 1 8)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of each (default: 10)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 8, 16, 64], help="default: 2 8 16 64")
    parser.add_argument("--barrier", type=float, default=5.0, metavar="US", help="its microseconds (default: 5)")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases with this in their name")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(
        "ms on one thread; then of each number of threads: loops, tasks of the loop that has most of them, the share of"
    )
    print("so many times one thread's speed that loops reach, and ms outside of them")
    for model in args.model:
        for batch in args.batch:
            for case, call in calls(model, batch, args.seconds, args.dtype, lambda case: args.filter in case.name):
                _report(case.name, call, args.threads, args.barrier * 1e-6)
    return 0


def _report(name: str, call: BoundOp, threads: Sequence[int], barrier: float) -> None:
    call()  # packs weights
    one = min((cut(call, 1) for _ in range(_RUNS)), key=lambda c: c.work + c.alone)
    whole = one.work + one.alone
    columns = []
    for n in threads:
        runs = [cut(call, n) for _ in range(_RUNS)]
        loops, span, alone = runs[0].loops, min(c.span(barrier) for c in runs), min(c.alone for c in runs)
        most = max((len(loop.tasks) for loop in loops), default=1)
        # What is in no loop is the same for any number: it is left out on both sides.
        reached = (whole - alone) / (n * span) if loops else 1 / n
        columns.append(f"{n:3}: {len(loops):3} x {most:5} {reached:5.0%}  {1e3 * alone:6.2f}")
    print(f"{name:48} {1e3 * whole:8.2f}  " + " | ".join(columns))
