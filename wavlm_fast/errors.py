"""What the command line tells its user in one sentence."""

from __future__ import annotations

import io
import sys


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one sentence: what was wanted and what came."""


def show_everything() -> None:
    """From now on print as an escape what the encoding lacks: the name of a user's file may be no text in any."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
