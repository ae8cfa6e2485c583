"""What a list of audio names, and the refusal of what it cannot mean."""

from __future__ import annotations

import gzip
import math
import os
import posixpath
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

from ..errors import UserError

# Of what libsndfile reads, those that are meant by their ending. Anything else can be named by itself or in a list.
_COMMON = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2")
_RARE = (".aif", ".aiff", ".aifc", ".au", ".snd", ".bwf", ".caf", ".nist", ".rf64", ".sph", ".voc", ".w64")
ENDINGS = frozenset([*_COMMON, *_RARE])
_LONGEST = 1e9  # seconds: thirty years are no recording
_COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "audio_filepath", "audio", "wav"),
    "id": ("id",),
    "start": ("start", "offset"),
    "duration": ("duration",),
    "end": ("end",),
    "channel": ("channel",),
}


@dataclass(frozen=True)
class Utterance:
    """One stretch of one recording."""

    id: str  # unique within a run; a relative POSIX path without an ending for files of a tree
    path: str  # of the audio file
    start: float = 0.0  # seconds
    duration: float | None = None  # seconds; None: to the end
    channel: int | None = None  # of the file, counted from 0; None: the mean of all


Placed = tuple[str, Utterance]  # the place, such as FILE:LINE, that names it


def columns(names: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Which of the given names hold path, id, start, duration, end and channel: of several, the first in `_COLUMNS`."""
    found = {ours: next((name for name in theirs if name in names), None) for ours, theirs in _COLUMNS.items()}
    return {ours: name for ours, name in found.items() if name is not None}


def path_columns() -> str:
    """The names that a column of paths may have, for a refusal."""
    return ", ".join(_COLUMNS["path"])


def utterance(
    place: str,
    folder: str,
    path: Any,
    *,
    id: Any = None,
    start: Any = None,
    duration: Any = None,
    end: Any = None,
    channel: Any = None,
) -> Placed:
    """An utterance as a line of a list gives it: values are JSON's or text, None and "" are not given.

    Args:
        place: FILE:LINE.
        folder: of the list. A relative path is looked for there, then in the working directory.
        path: of the audio.
        id: by default `id_of` the path, followed by -START-END in milliseconds where the line says where it starts.
        start: seconds.
        duration: seconds.
        end: seconds; only where there is no duration.
        channel: counted from 0.

    Raises:
        UserError: one of them cannot be meant.
    """
    if not _is_name(path):
        raise UserError(f"{place}: the path of an audio file is wanted, got {shortened(path)}")
    begin = _number(place, "start", start)
    length = _number(place, "duration", duration, above=0.0)
    if length is None and (stop := _number(place, "end", end, above=begin or 0.0)) is not None:
        length = stop - (begin or 0.0)
    name = id if _given(id) else id_of(path, folder)
    if begin is not None and not _given(id):
        name += f"-{_milliseconds(begin)}-{'end' if length is None else _milliseconds(begin + length)}"
    return place, Utterance(_id(place, name), located(path, folder), begin or 0.0, length, _channel(place, channel))


def located(path: str, folder: str) -> str:
    """The path, of a list in a folder, from the working directory."""
    beside = os.path.join(folder, path)
    return path if beside != path and not os.path.exists(beside) and os.path.exists(path) else beside


def id_of(path: str, folder: str = "") -> str:
    """A path as an id: below the folder where it is, else as it is written, without root, `..` and ending."""
    path = os.path.normpath(path)
    if os.path.isabs(path):
        above = os.path.join(os.path.abspath(folder), "")
        path = path[len(above) :] if path.startswith(above) else os.path.splitdrive(path)[1]
    return re.sub(r"^(?:/|\.\.(?:/|$))+", "", without_ending(path.replace(os.sep, "/")))


def without_ending(path: str) -> str:
    """The path without the ending of an audio file."""
    stem, ending = os.path.splitext(path)
    return stem if ending.lower() in ENDINGS else path


def lines(path: str) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not blank, each with its place; of a compressed one, where it ends in .gz.

    Raises:
        UserError: it cannot be read.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line.rstrip(b"\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(f"{path}{f' beyond line {number}' if number else ''}", error) from error


def unreadable(path: str, error: Exception) -> UserError:
    """The refusal of a list that cannot be read."""
    return UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def text(line: bytes) -> str:
    """A line as text, in which bytes that are none stay what they are in a path."""
    return line.decode("utf-8", "surrogateescape")


def _given(value: Any) -> bool:
    return value is not None and value != ""


def _is_name(value: Any) -> bool:
    """Whether a file may be called so."""
    try:
        return isinstance(value, str) and value != "" and "\0" not in value and bool(os.fsencode(value))
    except UnicodeError:  # half a character
        return False


def _number(place: str, name: str, value: Any, above: float | None = None) -> float | None:
    """Seconds from 0 on, or above a number."""
    if not _given(value):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (number <= _LONGEST and (number >= 0 if above is None else number > above)):
        wanted = "from 0 on" if above is None else f"above {above:g}"
        raise UserError(f"{place}: as {name} a number of seconds {wanted} is wanted, got {shortened(value)}")
    return number


def _milliseconds(seconds: float) -> str:
    return f"{round(1000 * seconds):07d}"


def _channel(place: str, value: Any) -> int | None:
    if not _given(value):
        return None
    written = str(value)
    if isinstance(value, bool) or not (written.isascii() and written.isdigit() and len(written) < 10):
        raise UserError(f"{place}: as channel a whole number from 0 on is wanted, got {shortened(value)}")
    return int(written)


def _id(place: str, value: Any) -> str:
    """Ids become names of files: below a folder, and no two of one file."""
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not _is_name(name) or posixpath.normpath(name) != name or name in (".", "..") or name.startswith(("/", "../")):
        raise UserError(f"{place}: as id a name or a relative path such as a/b is wanted, got {shortened(value)}")
    return name
