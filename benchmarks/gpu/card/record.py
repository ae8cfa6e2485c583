"""The record of a run: JSON lines, the first about the device, then one for each step as it was measured.

A process that is killed leaves at most half of the last line, which the next one takes away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wavlm_fast.console import finite
from wavlm_fast.errors import UserError

FILE = "card.jsonl"
Line = dict[str, Any]


@dataclass
class Found:
    """What a record holds: `head` about the device, `lines` of steps, and of every run when it began and what it
    left out."""

    head: Line
    lines: list[Line] = field(default_factory=list)
    runs: list[Line] = field(default_factory=list)

    @property
    def done(self) -> set[str]:
        """The steps that need not be measured again."""
        return {line["step"] for line in self.lines}

    def rows(self, *phases: str) -> list[Line]:
        """The measurements of these phases, each with the name of its step."""
        return [
            {"step": line["step"], "phase": line["phase"], **row}
            for line in self.lines
            if line["phase"] in phases
            for row in line["rows"]
        ]

    @property
    def left_out(self) -> list[str]:
        """What the last run did not come to."""
        return self.runs[-1]["left out"] if self.runs else []


def read(path: Path) -> Found:
    """The record in a file.

    Raises:
        UserError: there is none, or it is something else.
    """
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise UserError(f"the record {path} cannot be read: {error.strerror or error}") from error
    return parsed(text, path)


def parsed(text: str, path: Path) -> Found:
    """The record in a text; a last line without its end does not count.

    Raises:
        UserError: it is none; the sentence names `path`.
    """
    try:
        first, *others = [json.loads(line) for line in text.split("\n")[:-1]]
        found = Found(first["head"])
        for line in others:
            if "run" in line:
                found.runs.append(line["run"])
            else:
                step, phase, rows = str(line["step"]), str(line["phase"]), [dict(row) for row in line["rows"]]
                found.lines.append({**line, "step": step, "phase": phase, "rows": rows})
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the record {path} is not what `wavlm-fast gpu` writes") from error
    return found


class Record:
    """A record that is being written.

    Args:
        folder: where `FILE` is, or will be.
        head: about the device and versions; what a record that is there has to agree with.

    Raises:
        UserError: the folder cannot be written, or holds the record of another device or version.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        self.path = folder / FILE
        self._file = None
        try:
            if not self.path.exists():
                self.found = Found(dict(head))
                self._open("xb")
                self._write({"head": head})
                return
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            self.found = parsed(whole.decode("utf-8", "replace"), self.path) if whole else Found(dict(head))
            if whole:
                _agree(self.path, self.found.head, head)
            self._open("r+b")
            self._file.truncate(len(whole))
            self._file.seek(0, os.SEEK_END)
            if not whole:
                self._write({"head": head})
        except OSError as error:
            raise UserError(f"the record {self.path} cannot be written: {error.strerror or error}") from error

    def _open(self, mode: str) -> None:
        self._file = self.path.open(mode)  # until `close`

    def add(self, line: Line) -> None:
        """A step, measured."""
        self.found.lines.append(line)
        self._write(line)

    def end(self, run: Line) -> None:
        """What the run left out."""
        self.found.runs.append(run)
        self._write({"run": run})

    def close(self) -> None:
        """Nothing follows."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(finite(line), allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _agree(path: Path, before: Line, now: Mapping[str, Any]) -> None:
    """Figures of two devices or versions do not go into one record."""
    for name, value in json.loads(json.dumps(finite(dict(now)))).items():
        if before.get(name) != value:
            raise UserError(
                f"the record {path} is of another {name}, {_said(before.get(name))}, and this is {_said(value)}: "
                "name another folder with --out"
            )


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
