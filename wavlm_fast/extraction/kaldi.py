"""Kaldi's wav.scp, and the segments of its recordings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from reprlib import repr as shortened

from ..errors import UserError
from .utterance import Placed, lines, text, utterance


def is_segments(path: str) -> bool:
    """Whether a file is a list of segments, by its name."""
    return os.path.basename(path) == "segments" or path.endswith(".segments")


def recordings(scp: str) -> Iterator[Placed]:
    """`ID PATH` a line.

    Raises:
        UserError: the file cannot be read; a line names no file, or a program that would write it.
    """
    folder = os.path.dirname(scp)
    for place, (name, path) in _fields(scp, 2, "an id and a path"):
        if path.endswith("|"):
            raise UserError(f"{place}: a file is wanted, got a command, which is not run: {shortened(path)}")
        if path == "-" or re.search(r":\d+(\[.*\])?$", path):
            raise UserError(f"{place}: an audio file is wanted, got what Kaldi reads otherwise: {shortened(path)}")
        yield utterance(place, folder, path, id=name)


def segments(path: str, scp: str) -> Iterator[Placed]:
    """`ID RECORDING START END` a line, and maybe the channel; an end of -1 is the recording's.

    Raises:
        UserError: as `recordings`, of either file; a recording is missing.
    """
    named: dict[str, tuple[str, str]] = {}
    for place, one in recordings(scp):
        if one.id in named:
            raise UserError(f"ids must differ, but {one.id} is that of {named[one.id][0]} and of {place}")
        named[one.id] = place, one.path
    wanted = "an id, a recording, its start and its end"
    for place, (name, recording, times) in _fields(path, 3, wanted):
        if len(times.split()) not in (2, 3):
            raise UserError(f"{place}: {wanted} are wanted, got times {times!r}")
        start, until, channel = (*times.split(), None)[:3]
        if recording not in named:
            raise UserError(f"{place}: a recording that {scp} lists is wanted, got {shortened(recording)}")
        end = None if re.fullmatch(r"-1(\.0*)?", str(until)) else until
        # Where the path leads is settled already: no folder.
        yield utterance(place, "", named[recording][1], id=name, start=start, end=end, channel=channel)


def _fields(path: str, count: int, wanted: str) -> Iterator[tuple[str, list[str]]]:
    """Each line in fields, of which the last goes to the end of the line and may hold spaces."""
    for place, line in lines(path):
        fields = [text(field) for field in line.strip().split(None, count - 1)]
        if len(fields) < count:
            raise UserError(f"{place}: {wanted} are wanted, got {shortened(text(line))}")
        yield place, fields
