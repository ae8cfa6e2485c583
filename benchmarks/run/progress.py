"""How far a run has come, for whoever watches it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Meter:
    """What a run tells of its progress; this one tells nobody."""

    def doing(self, what: str) -> None:
        """Name the step that begins."""

    def done(self, seconds: float) -> None:
        """Some seconds of audio have passed through a model."""


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
