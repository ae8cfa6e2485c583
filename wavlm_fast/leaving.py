"""When a model is leaving torch's eager house: exported, traced or transformed, and so wanted as plain aten ops."""

from __future__ import annotations


def leaving() -> str | None:
    """A sentence saying who is taking the model's ops now; None where they just run, or are compiled."""
    return None
