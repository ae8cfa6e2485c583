"""The rule by which a fast path passes, and how an error is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"

# How many units in the last place of a value of its natural magnitude an output may be off when the plain path happens
# to be exact or lucky. bfloat16 and float16 paths accumulate in float32, so that only the rounding of what is stored
# counts: the other neighbour is one unit away, and a gradient passes through two or three stored values. Where the
# accumulation itself is in the dtype, two orders of summation differ by a random walk over the terms: sqrt(n) / 2 units
# for the thousand or two of the cases here.
_UNITS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 16, torch.float64: 64}


@dataclass(frozen=True)
class Result:
    """One comparison: the worst tensor of one case.

    Attributes:
        level: "op" or "model".
        name: of the op, or of the model class.
        quantity: "forward" or "gradient".
        backend, dtype, case: what ran.
        tensor: the output or input whose error comes closest to what is allowed, or exceeds it most.
        error: max |x - truth|, or None when skipped.
        allowed: the most that passes.
        verdict: "pass", "FAIL" or "skipped".
        reason: why it was skipped, or what is noteworthy.
    """

    level: str
    name: str
    quantity: str
    backend: str
    dtype: str
    case: str
    tensor: str = ""
    error: float | None = None
    allowed: float | None = None
    verdict: str = SKIPPED
    reason: str = ""

    @property
    def excess(self) -> float:
        """Error over allowed error; above one fails."""
        return ratio(self.error, self.allowed) if self.error is not None else -1.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an output that is wrong in kind, not in degree, has error null."""
        finite = self.error is not None and math.isfinite(self.error)
        return {**asdict(self), "error": self.error if finite else None}


def ratio(error: float, allowed: float) -> float:
    if error <= allowed:
        return error / allowed if allowed else 0.0
    return error / allowed if allowed else math.inf


def error_of(x: Tensor, truth: Tensor) -> float:
    """max |x - truth|; infinite when the shape, or the place of a NaN or an infinity, is wrong."""
    if x.shape != truth.shape:
        return math.inf
    x, truth = x.detach().to("cpu", torch.float64), truth.detach()
    if truth.numel() == 0:
        return 0.0
    finite = truth.isfinite()
    if not torch.equal(x.nan_to_num(0.0, 1.0, -1.0)[~finite], truth.nan_to_num(0.0, 1.0, -1.0)[~finite]):
        return math.inf
    if not torch.equal(x.isnan(), truth.isnan()):
        return math.inf
    return (x - truth)[finite].abs().max().item() if finite.any() else 0.0


def magnitude(truth: Tensor) -> float:
    """The largest finite value."""
    finite = truth.detach()[truth.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def rms(x: Tensor) -> float:
    finite = x.detach()[x.isfinite()].double()
    return finite.square().mean().sqrt().item() if finite.numel() else 0.0


def tiny(scale: float, dtype: torch.dtype) -> float:
    """The slack for values of magnitude `scale` computed in `dtype`."""
    return _UNITS[dtype] * torch.finfo(dtype).eps * scale


def allowed_error(plain: Tensor, truth: Tensor, dtype: torch.dtype, scale: float | None = None) -> float:
    """2 · err(plain) + tiny. `scale` is the natural magnitude where it is more than that of the truth."""
    return 2 * error_of(plain, truth) + tiny(max(magnitude(truth), scale or 0.0), dtype)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(d): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every fresh tensor with NaN, torch.empty and at::empty alike: what an op leaves unwritten shows.

    This is torch's deterministic mode, so that deterministic variants of kernels, where they exist, run here.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        yield
    finally:
        deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
