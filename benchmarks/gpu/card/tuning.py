"""With what time is left: a search for configurations of the kernels that are furthest from what the device can do.

What is found goes into `tuned.json` of the run's folder, in the format of kernels/_tuned.py: with WAVLM_FAST_CACHE_DIR
set to that folder, or as tuned.json in the cache folder of any user of such a device, it is what runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wavlm_fast.backends.triton.launch import interpreted
from wavlm_fast.kernels import _tuned, _tuning

from .steps import TUNING, Row, Scale, Step


def steps(scale: Scale, folder: Path, measured: Iterable[Step], rows: list[Row]) -> Iterator[Step]:
    """A search for each measurement of ours, the least share of a peak first."""
    shares = {row["step"]: row["share"] for row in rows if row.get("ours") and row.get("share")}
    for step in sorted((s for s in measured if s.tuned and s.name in shares), key=lambda s: shares[s.name]):
        yield Step(TUNING, f"tuning of {step.name}", 40, lambda step=step: _searched(scale, folder, step))


def _searched(scale: Scale, folder: Path, step: Step) -> list[Row]:
    if interpreted():
        return [{"of": step.name, "problem": "there is nothing to search for in Triton's interpreter"}]
    return [search(scale, folder, step.name, step.tuned)]


def search(scale: Scale, folder: Path, name: str, make: Callable[[], Callable]) -> Row:
    """Time a call as it is, search, and time it again."""
    call = make()
    before = scale.time(call).median
    known = _choices(folder)
    with _searching(folder):
        make()()
        call = make()
        after = scale.time(call).median
    found = {key: config for key, config in _choices(folder).items() if known.get(key) != config}
    return {"of": name, "before": before, "after": after, "choices": found, "problem": None}


def _choices(folder: Path) -> dict[str, dict[str, int]]:
    path = folder / "tuned.json"
    return json.loads(path.read_text()) if path.exists() else {}


@contextmanager
def _searching(folder: Path) -> Iterator[None]:
    """Launches choose anew, and write what they chose into the folder."""
    before = {name: os.environ.get(name) for name in (_tuning.AUTOTUNE, _tuned.FOLDER)}
    os.environ |= {_tuning.AUTOTUNE: "1", _tuned.FOLDER: str(folder)}
    for tunable in _tuning.TUNABLES:
        tunable.forget()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
        for tunable in _tuning.TUNABLES:
            tunable.forget()
