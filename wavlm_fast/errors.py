"""What the command line tells its user in one sentence."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one sentence: what was wanted and what came."""
