"""The machine's arithmetic peaks, measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from wavlm_fast import measure
from wavlm_fast.backends import cpu

_SIZE, _GPU_SIZE, _RUNS = 2048, 8192, 6  # of the product that shows what matrix units do


@dataclass(frozen=True)
class Peaks:
    """Operations per second on all of torch's threads; None where nothing tells, with the reason in `how`."""

    fp32: float | None
    bf16: float | None
    how: str

    def of(self, dtype: torch.dtype) -> float | None:
        return self.fp32 if dtype == torch.float32 else self.bf16

    def best(self, other: Peaks) -> Peaks:
        """The higher of each: nothing but another process's work makes a machine look slower than it is."""
        pairs = ((self.fp32, other.fp32), (self.bf16, other.bf16))
        fp32, bf16 = (max((p for p in pair if p is not None), default=None) for pair in pairs)
        return Peaks(fp32, bf16, self.how)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        shown = (f"{name} {'n/a' if peak is None else f'{peak / 1e9:.0f}'}" for name, peak in self._named())
        return f"{' and '.join(shown)} GFLOP/s ({self.how})"

    def _named(self) -> tuple[tuple[str, float | None], ...]:
        return ("fp32", self.fp32), ("bf16", self.bf16)


def peaks(device: str = "cpu") -> Peaks:
    """Measure; takes about a second."""
    if device != "cpu":
        fp32, bf16 = (product(dtype, _GPU_SIZE, device) for dtype in (torch.float32, torch.bfloat16))
        return Peaks(fp32, bf16, "a large product by the vendor's library")
    if cpu.extension.problem() is not None:
        return Peaks(None, None, f"not measured: {cpu.extension.problem()}")
    fp32, bf16 = (torch.ops.wavlm_fast_cpu.peak(dtype) for dtype in ("float32", "bfloat16"))
    if _has_matrix_unit():
        return Peaks(fp32, product(), f"multiply-adds on registers, {cpu.isa()}; bf16: a large oneDNN product, on AMX")
    how = f"multiply-adds on registers, {cpu.isa()}"
    if math.isnan(bf16):
        return Peaks(fp32, fp32, f"{how}, which multiplies bfloat16 as float32")
    return Peaks(fp32, bf16, how)


def _has_matrix_unit() -> bool:
    # A private question of torch's, which has no public one.
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def product(dtype: torch.dtype = torch.bfloat16, size: int = _SIZE, device: str = "cpu") -> float:
    """Operations per second of a product of square matrices by the vendor's library."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2.0 * size**3 / min(measure.interleave({"product": lambda: torch.mm(a, b)}, _RUNS, device)["product"])
