"""How cost grows with the length of the audio and with the batch: exponents fitted to what was measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

_FEWEST = 3  # points of a fit
# Groups whose cases differ in more than batch and length.
_UNEVEN = ("ragged", "corpus", "training", "regimes", "houses", "op")


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """The slope of the straight line through the points' logarithms, by least squares: y grows as x to this power."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    x_mean, y_mean = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((x - x_mean) * (y - y_mean) for x, y in logs) / sum((x - x_mean) ** 2 for x, _ in logs)


def scaling(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for --json: of each provider, time against length and batch, and memory of a forward against length.

    Args:
        found: a document with "rows" and "memory".
    """
    points: defaultdict[tuple, dict[float, float]] = defaultdict(dict)
    for row in found["rows"]:
        if row["seconds"] is None or row["group"] in _UNEVEN or row["cls"] != "WavLMModel":
            continue
        who = row["model"], row["provider"], row["dtype"]
        took = row["seconds"]["median"]
        if row["batch"] == 1:
            points[(*who, "length", "seconds", None)][row["length"]] = took
        points[(*who, "batch", "seconds", row["length"])][row["batch"]] = took
    for row in found["memory"]:
        if row["forward_bytes"] and row["batch"] == 1:
            who = row["model"], row["provider"], row["dtype"]
            points[(*who, "length", "memory", None)][row["audio"]] = row["forward_bytes"]
    names = ("model", "provider", "dtype", "along", "quantity", "at")
    return [
        dict(zip(names, key, strict=True)) | _fitted(sorted(found.items()))
        for key, found in points.items()
        if len(found) >= _FEWEST
    ]


def _fitted(points: list[tuple[float, float]]) -> dict[str, Any]:
    return {"points": points, "exponent": exponent(points), "local": exponent(points[-2:])}
