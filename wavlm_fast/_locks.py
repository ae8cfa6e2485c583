"""Locks that a forked child finds open."""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakSet

_made: WeakSet[ForkSafeLock] = WeakSet()


class ForkSafeLock:
    """A `threading.RLock`, free in a forked child whatever other threads held it in the parent: they are not there.

    What it guards must be whole at every moment in which a thread can be interrupted, or the child finds half of it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _made.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: Any) -> None:
        self._lock.release()

    def _open(self) -> None:
        if self._lock.acquire(blocking=False):  # free, or held by the thread that forks, which goes on in the child
            self._lock.release()
        else:
            self._lock = threading.RLock()


def _open_all() -> None:
    for lock in _made:
        lock._open()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_open_all)
