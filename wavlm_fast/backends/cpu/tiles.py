"""Whether the engine packed_conv.py multiplies bfloat16 on AMX tiles (csrc/tiles.h), or leaves that to oneDNN.

They were never run on a CPU that has the unit, only emulated, so they wait to be asked for, by WAVLM_FAST_AMX_TILES=1.
Even then nobody is taken at their word: before tiles compute anything for a user, a trial finds out whether they give
the right numbers here, and sooner than oneDNN. It is made once per process, at the first call that could use them, in
well under a second. What it finds wrong, too slow or failing leaves everything as it is without tiles.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _private
from ..._locks import ForkSafeLock
from . import extension, onednn

use = extension.kernel("use_tiles(str kind) -> ()")  # none or unit; for tests emulated and trapped
_problem = extension.kernel("tiles_problem() -> str")
_kernels = torch.ops.wavlm_fast_cpu  # of packed_conv.py, which asks this file
_lock = ForkSafeLock()

ENVIRONMENT_VARIABLE = "WAVLM_FAST_AMX_TILES"
_MARGIN = 1.1  # by which tiles must be faster than oneDNN: what is measured once is not measured well
_ROUNDS = 7


class Case(NamedTuple):
    """A convolution of one utterance; a linear layer has one tap."""

    frames: int
    C: int
    channels: int
    taps: int = 1
    stride: int = 1
    filtered: bool = False

    def operands(self) -> tuple[Tensor, Tensor]:
        """`[1, T, C]` and `[C', K, C]`, small whole numbers, which all sums keep exactly."""
        frames = (self.frames - 1) * self.stride + self.taps
        return _mixed(1, frames, self.C), _mixed(self.channels, self.taps, self.C)

    def runner(self, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        """What convolves in C++."""
        packed = _kernels.pack_conv([weight], self.filtered)
        sizes = (self.channels, self.taps, self.stride, 1, self.filtered, "none")
        return lambda: _kernels.packed_conv(x, packed, None, *sizes)


def _mixed(*shape: int) -> Tensor:
    """Numbers from -3 to 3 in no order, and of no generator, which may be refused where models are called."""
    n = torch.arange(1, math.prod(shape) + 1, device="cpu") + shape[0]
    n = n * n * 2654435761
    return (((n ^ n >> 29) >> 11) % 7 - 3).bfloat16().view(shape)


# Tiles of all sizes, runs of all lengths, one to three vectors of columns; more frames than a task has.
_TO_BE_RIGHT = (
    Case(1, 2, 16),
    Case(19, 102, 72),
    Case(150, 590, 104),
    Case(33, 3072, 96),
    Case(20, 96, 56, 5),
    Case(100, 80, 96, 3, 2, True),
)
# Products of WavLM-base on one second and on ten, and a convolution of its front end.
_TO_BE_FAST = (Case(49, 768, 3072), Case(499, 3072, 768), Case(1000, 512, 512, 3, 2, True))


def why_not() -> str | None:
    """Why products do not run on tiles, a sentence; None when they do. The extension must be usable."""
    with _lock:  # a second trial at the same time would spoil both
        return _why_not()


@cache
def _why_not() -> str | None:
    if os.environ.get(ENVIRONMENT_VARIABLE) != "1":
        return f"products on AMX tiles, so far only emulated, are tried with {ENVIRONMENT_VARIABLE}=1"
    return _problem() or _private.on_real_tensors(_trial)


def _trial() -> str | None:
    """Try tiles, and leave them in use if that is best."""
    found: str | None = "a trial of products on AMX tiles was broken off"
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = _verdict()
    except Exception as error:
        found = f"a trial of products on AMX tiles failed: {type(error).__name__}: {error}".partition("\n")[0]
    finally:
        use("none" if found else "unit")
    return found


def _verdict() -> str | None:
    if not all(map(_is_right, _TO_BE_RIGHT)) or not _is_exact():
        return "products on AMX tiles came out wrong in a trial"
    use("unit")
    for case in _TO_BE_FAST:
        ours, theirs = _seconds(*_runners(case))
        if ours * _MARGIN > theirs:
            name = f"{case.frames} frames, {case.taps} × {case.C} -> {case.channels}"
            return f"a product on AMX tiles took {ours * 1e6:.0f} µs in a trial, oneDNN {theirs * 1e6:.0f} ({name})"
    return None


def _is_right(case: Case) -> bool:
    """Whether tiles give the numbers that registers give."""
    plain, found = _both(case.runner(*case.operands()))
    return torch.equal(plain, found)


def _is_exact() -> bool:
    """Whether the error of numbers that are rounded is as small as it is in registers, by the rule of our tests."""
    case = Case(64, 3072, 96)
    x, weight = (t.float() for t in case.operands())
    x, weight = x.sin().bfloat16(), weight.cos().bfloat16()
    true = x.double() @ weight[:, 0].double().T
    plain, found = ((out.double() - true).abs().max() for out in _both(case.runner(x, weight)))
    return bool(found <= 2 * plain)


def _both(run: Callable[[], Tensor]) -> list[Tensor]:
    found = []
    for kind in ("none", "unit"):
        use(kind)
        found.append(run())
    return found


def _runners(case: Case) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A case on tiles and in oneDNN."""
    x, weight = case.operands()
    if case.taps == 1:
        rows, theirs = x[0], onednn.pack_linear(weight[:, 0])
        return case.runner(x, weight), lambda: onednn.linear(rows, theirs, None, "none")
    theirs = onednn.pack_conv(weight, case.stride, 1)
    return case.runner(x, weight), lambda: onednn.convolve(x, theirs, None, case.stride, 1, "none")


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
