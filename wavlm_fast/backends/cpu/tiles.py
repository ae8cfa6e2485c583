"""What runs on AMX tiles (csrc/tiles.h): bfloat16 products of the engine packed_conv.py, attention, both or neither.

They were never run on a CPU that has the unit, only emulated, so they wait to be asked for, by WAVLM_FAST_AMX_TILES=1.
Even then nobody is taken at their word: before tiles compute anything for a user, a trial finds out whether they give
the right numbers here, and sooner than what runs without them: oneDNN's products, attention by dot products. It is made
once per process for each of the two, at the first call that could use it, in well under a second. What it finds wrong,
too slow or failing leaves everything as it is without tiles.
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

PRODUCTS, ATTENTION = "products", "attention"  # what is decided apart
use = extension.kernel("use_tiles(str work, str kind) -> ()")  # none or unit; for tests emulated and trapped
_problem = extension.kernel("tiles_problem() -> str")
_kernels = torch.ops.wavlm_fast_cpu  # of packed_conv.py, which asks this file, and gated_attention.py
_lock = ForkSafeLock()

ENVIRONMENT_VARIABLE = "WAVLM_FAST_AMX_TILES"
_MARGIN = 1.1  # by which tiles must be faster: what is measured once is not measured well
_ROUNDS = 7


class Case(NamedTuple):
    """A convolution of one utterance; a linear layer has one tap."""

    rivals = "oneDNN"
    frames: int
    C: int
    channels: int
    taps: int = 1
    stride: int = 1
    filtered: bool = False

    def __str__(self) -> str:
        return f"{self.frames} frames, {self.taps} × {self.C} -> {self.channels}"

    def operands(self) -> tuple[Tensor, ...]:
        """`[1, T, C]` and `[C', K, C]`, small whole numbers, which all sums keep exactly."""
        frames = (self.frames - 1) * self.stride + self.taps
        return _mixed(1, frames, self.C), _mixed(self.channels, self.taps, self.C)

    def rounded_operands(self) -> tuple[Tensor, ...]:
        """The same of numbers that sums round."""
        x, weight = (t.float() for t in self.operands())
        return x.sin().bfloat16(), weight.cos().bfloat16()

    def truth(self, x: Tensor, weight: Tensor) -> Tensor:
        """What a linear layer gives, in float64."""
        return x.double() @ weight[:, 0].double().T

    def runner(self, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        """What convolves in C++."""
        packed = _kernels.pack_conv([weight], self.filtered)
        sizes = (self.channels, self.taps, self.stride, 1, self.filtered, "none")
        return lambda: _kernels.packed_conv(x, packed, None, *sizes)

    def rival(self, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        """What convolves in oneDNN."""
        if self.taps == 1:
            rows, theirs = x[0], onednn.pack_linear(weight[:, 0])
            return lambda: onednn.linear(rows, theirs, None, "none")
        theirs = onednn.pack_conv(weight, self.stride, 1)
        return lambda: onednn.convolve(x, theirs, None, self.stride, 1, "none")


class Attention(NamedTuple):
    """Attention over one utterance, without a position bias, which is added to what tiles give."""

    rivals = "dot products"
    frames: int
    heads: int
    D: int

    def __str__(self) -> str:
        return f"{self.frames} frames, {self.heads} heads of {self.D}"

    def operands(self) -> tuple[Tensor, ...]:
        """q, k and v `[1, T, H, D]` and the scale, of which all weights are powers of two and all sums are exact."""
        q, k, v = self._mixed()
        frame, number = torch.arange(self.frames, device="cpu"), torch.arange(self.D, device="cpu")
        few = (frame[:, None, None] + number) % math.ceil(self.D / 5) == 0  # five of a query: 2^-10 is the least weight
        return q.clamp(-1, 1) * few, k.clamp(-1, 1), v, torch.tensor(math.log(2), device="cpu")

    def rounded_operands(self) -> tuple[Tensor, ...]:
        """The same of numbers that sums round."""
        q, k, v = (t.float() for t in self._mixed())
        scale = torch.tensor(self.D**-0.5, device="cpu")
        return q.sin().bfloat16() * 4, k.cos().bfloat16() * 4, v.tan().bfloat16(), scale

    def _mixed(self) -> tuple[Tensor, ...]:
        return _mixed(3, self.frames, self.heads, self.D).split(1)

    def truth(self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        """What it gives in float64."""
        q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
        return ((q * scale.double()) @ k.mT).softmax(-1).matmul(v).transpose(1, 2)

    def runner(self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Callable[[], Tensor]:
        """What attends in C++."""
        gate = torch.zeros(1, self.heads, self.frames, device="cpu")
        rel_bias = torch.zeros(self.heads, 2 * self.frames - 1, device="cpu")
        rest = (gate, rel_bias, None, 0.0, None, scale.item())
        return lambda: _kernels.gated_attention(q, k, v, *rest)[0]

    def rival(self, *operands: Tensor) -> Callable[[], Tensor]:
        """The same by dot products."""
        run = self.runner(*operands)

        def plain() -> Tensor:
            use(ATTENTION, "none")
            try:
                return run()
            finally:
                use(ATTENTION, "unit")

        return plain


class _Trial(NamedTuple):
    right: tuple[Case | Attention, ...]  # to the bit
    exact: Case | Attention
    fast: tuple[Case | Attention, ...]


_TRIALS = {
    PRODUCTS: _Trial(
        # Tiles of all sizes, runs of all lengths, one to three vectors of columns; more frames than a task has.
        (
            Case(1, 2, 16),
            Case(19, 102, 72),
            Case(150, 590, 104),
            Case(33, 3072, 96),
            Case(20, 96, 56, 5),
            Case(100, 80, 96, 3, 2, True),
        ),
        Case(64, 3072, 96),
        # Products of WavLM-base on one second and on ten, and a convolution of its front end.
        (Case(49, 768, 3072), Case(499, 3072, 768), Case(1000, 512, 512, 3, 2, True)),
    ),
    ATTENTION: _Trial(
        # One to three vectors of queries, one tile of keys and several, heads of whole tiles and not.
        (
            Attention(1, 1, 64),
            Attention(47, 2, 48),
            Attention(131, 1, 80),
            Attention(300, 2, 33),
            Attention(70, 1, 128),
        ),
        Attention(300, 2, 64),
        # WavLM-base on one second and on ten.
        (Attention(49, 12, 64), Attention(499, 12, 64)),
    ),
}


def _mixed(*shape: int) -> Tensor:
    """Numbers from -3 to 3 in no order, and of no generator, which may be refused where models are called."""
    n = torch.arange(1, math.prod(shape) + 1, device="cpu") + shape[0]
    n = n * n * 2654435761
    return (((n ^ n >> 29) >> 11) % 7 - 3).bfloat16().view(shape)


def why_not(work: str) -> str | None:
    """Why products or attention do not run on tiles, a sentence; None when they do. The extension must be usable."""
    with _lock:  # a second trial at the same time would spoil both
        return _why_not(work)


def decide_attention(x: Tensor) -> None:
    """Make the trial of attention before `x` is attended to, if it matters: the kernels know what came of it."""
    if x.dtype == torch.bfloat16:
        why_not(ATTENTION)


@cache
def _why_not(work: str) -> str | None:
    if os.environ.get(ENVIRONMENT_VARIABLE) != "1":
        return f"AMX tiles, so far only emulated, are tried with {ENVIRONMENT_VARIABLE}=1"
    return _problem() or _private.on_real_tensors(lambda: _trial(work))


def _trial(work: str) -> str | None:
    """Try tiles, and leave them in use if that is best."""
    found: str | None = f"a trial of {work} on AMX tiles was broken off"
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = _verdict(work)
    except Exception as error:
        found = f"a trial of {work} on AMX tiles failed: {type(error).__name__}: {error}".partition("\n")[0]
    finally:
        use(work, "none" if found else "unit")
    return found


def _verdict(work: str) -> str | None:
    trial = _TRIALS[work]
    if not all(_is_right(work, case) for case in trial.right) or not _is_exact(work, trial.exact):
        return f"{work} on AMX tiles came out wrong in a trial"
    use(work, "unit")
    for case in trial.fast:
        operands = case.operands()
        ours, theirs = _seconds(case.runner(*operands), case.rival(*operands))
        if ours * _MARGIN > theirs:
            taken = f"took {ours * 1e6:.0f} µs in a trial, {case.rivals} {theirs * 1e6:.0f}"
            return f"{work} on AMX tiles {taken} ({case})"
    return None


def _is_right(work: str, case: Case | Attention) -> bool:
    """Whether tiles give the numbers that registers give."""
    plain, found = _both(work, case.runner(*case.operands()))
    return torch.equal(plain, found)


def _is_exact(work: str, case: Case | Attention) -> bool:
    """Whether the error of numbers that are rounded is as small as it is in registers, by the rule of our tests."""
    operands = case.rounded_operands()
    true = case.truth(*operands)
    plain, found = ((out.double() - true).abs().max() for out in _both(work, case.runner(*operands)))
    return bool(found <= 2 * plain)


def _both(work: str, run: Callable[[], Tensor]) -> list[Tensor]:
    found = []
    for kind in ("none", "unit"):
        use(work, kind)
        found.append(run())
    return found


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
