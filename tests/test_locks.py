"""Locks that a forked child finds open."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from doubles import Double
from torch import nn

from wavlm_fast._locks import ForkSafeLock
from wavlm_fast.derived import derived, values


def in_a_fork(work):
    """Whether `work()` is true in a forked child, within half a minute."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@forks
def test_a_fork_while_another_thread_builds():
    weight = nn.Parameter(torch.arange(6.0).view(2, 3), requires_grad=False)
    double = Double(weight)
    building, ends = threading.Event(), threading.Event()
    kept = double()

    def build():
        building.set()
        assert ends.wait(90)
        return torch.ones(1)

    def work():
        weight.mul_(2)
        return (
            torch.equal(double(), kept * 2)
            and derived("slow", (weight,), lambda: torch.zeros(1)).item() == 0
            and len(values([weight])) == 2
        )

    slow = threading.Thread(target=derived, args=("slow", (weight,), build))
    slow.start()
    try:
        assert building.wait(60)
        assert in_a_fork(work)
    finally:
        ends.set()
        slow.join()
    assert double() is kept
    assert derived("slow", (weight,), lambda: None).item() == 1


@forks
def test_a_fork_by_the_thread_that_holds_the_lock():
    lock = ForkSafeLock()

    def others_wait():
        got = []
        other = threading.Thread(target=lambda: got.append(lock._lock.acquire(blocking=False)))
        other.start()
        other.join()
        return got == [False]

    with lock:
        assert in_a_fork(others_wait)
        assert others_wait()
    assert not others_wait()


def test_every_lock_is_open_in_a_fork():
    root = Path(__file__).parents[1]
    files = [f for name in ("wavlm_fast", "kernels") for f in root.joinpath(name).rglob("*.py")]
    files = [f for f in files if f.name != "_locks.py"]
    assert {"graphed.py", "_tuning.py"} <= {f.name for f in files}
    names = r"\b(R?Lock|Condition|Semaphore|BoundedSemaphore)\b"
    assert not [f for f in files if re.search(names, re.sub(r'""".*?"""|#.*', "", f.read_text(), flags=re.DOTALL))]
