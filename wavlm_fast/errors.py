"""What the command line tells its user in one sentence."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one sentence: what was wanted and what came."""


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
