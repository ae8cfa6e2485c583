"""Keeps the time and the record, and outlives the process that touches the device."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import wavlm_fast
from wavlm_fast.errors import UserError
from wavlm_fast.kernels import _tuned, _tuning

from .record import Found, Record
from .session import fault

LOG = "log.txt"
_PATIENCE, _AT_LEAST = 8.0, 60.0  # a step may take so many times as long as was thought, and seconds at least
_DYING = 10.0  # seconds from the last word of a process to its end; a core dump takes some
_EARLY = 1.0  # seconds before the end, for what is left to say
_END = object()


class _Late(Exception):
    """There was no message in time."""


@dataclass
class Worker:
    """A process and what it says."""

    process: subprocess.Popen
    log: Path
    said: queue.Queue = field(default_factory=queue.Queue)

    @classmethod
    def start(cls, folder: Path, device: str, sizes: str) -> Worker:
        """In a session of its own, so that its helpers, such as compilers, end with it."""
        root = str(Path(wavlm_fast.__file__).parents[1])
        environment = {name: value for name, value in os.environ.items() if name != _tuning.AUTOTUNE}
        environment |= {
            # What was tuned here before does not steer what is measured; what ships does, as for everybody.
            _tuned.FOLDER: str(folder / "untuned"),
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        }
        environment.pop("WAVLM_FAST_BACKEND", None)
        with open(folder / LOG, "ab") as log:
            process = subprocess.Popen(
                _command(folder, device, sizes), env=environment, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        made = cls(process, folder / LOG)
        threading.Thread(target=made._listen, daemon=True).start()
        return made

    def _listen(self) -> None:
        for line in self.process.stdout:
            if line.endswith(b"\n"):
                self.said.put(json.loads(line))
        self.said.put(_END)

    def next(self, until: float) -> Any:
        """The next message, or _END; `_Late` when there is none until then."""
        try:
            return self.said.get(timeout=max(0.0, until - time.time()))
        except queue.Empty:
            raise _Late from None

    def tell(self, message: dict[str, Any]) -> None:
        """To its standard input."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def ended(self) -> int:
        """The exit status of one that has said all that it will."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(_DYING)
        return self.end()

    def end(self) -> int:
        """Whatever it does; its exit status."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def last_words(self) -> str:
        """The last line of its standard error."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "nothing"


class Run:
    """One run: as many workers as it takes.

    Args:
        folder: of the record; there already.
        device, sizes: for the worker.
        minutes: from `begin` on. What runs then is ended, is no line of the record, and is named as left out.
        tell: is told every line of the record.
        begin: of time.time().
    """

    def __init__(
        self, folder: Path, device: str, sizes: str, minutes: float, tell: Callable[[dict], None], begin: float
    ) -> None:
        self._folder, self._device, self._sizes, self._tell = folder, device, sizes, tell
        self._begin, self._deadline, self._minutes = begin, begin + 60 * minutes - _EARLY, minutes
        self._record: Record | None = None
        self._planned: list[str] = []
        self._over = False
        self._why: str | None = None

    def __call__(self) -> Found:
        """Until there is nothing left, or no time.

        Raises:
            UserError: the folder's record is of something else, or no worker comes as far as its first message.
        """
        try:
            while not self._over and time.time() < self._deadline:
                worker = Worker.start(self._folder, self._device, self._sizes)
                try:
                    self._follow(worker)
                except _Late:
                    self._over = self._over or time.time() >= self._deadline
                finally:
                    worker.end()
            if self._record is None:
                raise UserError(f"{self._minutes:g} minutes were over before the device was there")
            self._record.end(self._about())
            return self._record.found
        finally:
            if self._record is not None:
                self._record.close()

    def _about(self) -> dict[str, Any]:
        """The run, now that it is over."""
        done = self._record.found.done
        return {
            "date": datetime.fromtimestamp(self._begin, timezone.utc).isoformat(timespec="seconds"),
            "minutes": self._minutes,
            "seconds": time.time() - self._begin,
            "left out": [name for name in dict.fromkeys(self._planned) if name not in done],
            "stopped": self._why,
        }

    def _follow(self, worker: Worker) -> None:
        """A worker from its first message to its last."""
        first = worker.next(self._deadline)
        if first is _END:
            return self._give_up(worker)
        if self._record is None:
            self._record = Record(self._folder, first["head"])
        worker.tell({"deadline": self._deadline})
        progressed = False
        running: dict[str, Any] | None = None
        while True:
            patience = max(_AT_LEAST, _PATIENCE * running["seconds"]) if running is not None else math.inf
            until = time.time() + patience
            try:
                message = worker.next(min(until, self._deadline))
            except _Late:
                if until < self._deadline:
                    self._failed(running, f"it did not end within {patience:.0f} s")
                raise
            if message is _END:
                if running is not None:
                    self._failed(running, _ended(worker.ended()))
                elif not progressed:
                    self._give_up(worker)
                return
            running = {**message, "began": time.time()} if "start" in message else None
            self._planned += message.get("plan", ())
            self._over = self._over or "end" in message
            if "step" in message:
                progressed = True
                self._add(message)
            if self._over:
                return

    def _give_up(self, worker: Worker) -> None:
        """A worker ended that had done nothing; what others have found is kept."""
        why = f"the device cannot be used: {worker.last_words()} (all of it is in {worker.log})"
        if self._record is None or not self._record.found.lines:
            raise UserError(why)
        self._over, self._why = True, why

    def _failed(self, running: dict[str, Any], why: str) -> None:
        rows = [fault(running["phase"], running["start"], why)]
        took = time.time() - running["began"]
        self._add({"step": running["start"], "phase": running["phase"], "took": took, "rows": rows})

    def _add(self, line: dict[str, Any]) -> None:
        self._record.add(line)
        self._tell(line)


def _command(folder: Path, device: str, sizes: str) -> list[str]:
    return [sys.executable, "-m", f"{__package__}.worker", str(folder), device, sizes]


def _ended(status: int) -> str:
    if status < 0:
        return f"the process ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


def folder_for(path: Path) -> Path:
    """The folder of a run, made where it is missing.

    Raises:
        UserError: it cannot be one.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--out {path} cannot be a folder to write into: {error.strerror or error}") from error
    return path.absolute()
