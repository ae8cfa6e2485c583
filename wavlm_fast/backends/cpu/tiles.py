"""Whether the engine packed_conv.py multiplies bfloat16 on AMX tiles (csrc/tiles.h), or leaves that to oneDNN.

Nobody is taken at their word: a first call finds out whether tiles give the right numbers here, and sooner than oneDNN.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ... import _private
from . import extension, onednn

use = extension.kernel("use_tiles(str kind) -> ()")  # none, unit, or emulated: what a CPU without AMX can test
_problem = extension.kernel("tiles_problem() -> str")
_kernels = torch.ops.wavlm_fast_cpu  # of packed_conv.py, which asks this file

_ROWS, _CHANNELS = 512, 768  # of the product that is timed
_ROUNDS = 5


@cache
def why_not() -> str | None:
    """Why products do not run on tiles, a sentence; None when they do. The extension must be usable."""
    return _problem() or _private.on_real_tensors(_trial)


def _trial() -> str | None:
    """Try tiles, and leave them in use if that is best."""
    found: str | None = "the trial of products on AMX tiles failed"
    use("unit")
    try:
        with torch.no_grad():
            found = _verdict()
    finally:
        if found is not None:
            use("none")
    return found


def _verdict() -> str | None:
    if not _is_right():
        return "products on AMX tiles came out wrong in a trial"
    ours, theirs = _seconds(*_runners())
    if ours < theirs:
        return None
    return f"a product on AMX tiles took {ours * 1e6:.0f} µs in a trial, oneDNN {theirs * 1e6:.0f}"


def _is_right() -> bool:
    """Small whole numbers, whose sums are exact; tiles of all sizes."""
    rows = (torch.arange(19 * 102) % 3 - 1).bfloat16().view(19, 102)
    weight = (torch.arange(72 * 102) % 5 - 2).bfloat16().view(72, 102)
    return torch.equal(_product(rows, _packed(weight), 72), (rows.float() @ weight.float().T).bfloat16())


def _runners() -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One product of a base layer, on tiles and in oneDNN."""
    rows = torch.ones(_ROWS, _CHANNELS, dtype=torch.bfloat16)
    weight = torch.ones(_CHANNELS, _CHANNELS, dtype=torch.bfloat16)
    ours, theirs = _packed(weight), onednn.pack_linear(weight)
    return lambda: _product(rows, ours, _CHANNELS), lambda: onednn.linear(rows, theirs, None, "none")


def _seconds(*runners: Callable[[], object]) -> tuple[float, ...]:
    """The shortest time of each, taking turns after a first call."""
    best = [float("inf")] * len(runners)
    for turn in range(_ROUNDS + 1):
        for i, run in enumerate(runners):
            start = time.perf_counter()
            run()
            if turn:
                best[i] = min(best[i], time.perf_counter() - start)
    return tuple(best)


def _packed(weight: Tensor) -> Tensor:
    return _kernels.pack_conv([weight[:, None]], False)


def _product(rows: Tensor, packed: Tensor, channels: int) -> Tensor:
    return _kernels.packed_conv(rows[None], packed, None, channels, 1, 1, 1, False, "none")[0]
