"""What bounds a kernel by its instructions: how long each unit of a multiprocessor is busy with them.

These are bounds, not times: they hold if a multiprocessor always has a warp ready for the unit, and they know nothing
of the memory beyond the L2 cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .architectures import Architecture, Rates
from .code import Mix
from .compile import Built

Clocks = dict[str, float]
# Names of "integer" instructions that the integer lanes do not see: uniform ones, and those of the multiply-add lanes.
_NOT_INTEGER_LANES = ("U", "IMAD", "HFMA2", "S2", "CS2R", "R2UR", "LDC")


@dataclass(frozen=True)
class Bound:
    """The unit that is busy longest, and the share of the time in which products keep theirs busy.

    `peak` names that unit: "matrix" or, for products that it cannot do, "fp32"; "" if nothing is multiplied.
    """

    unit: str
    share: float
    peak: str

    def __str__(self) -> str:
        return f"{self.unit}, {100 * self.share:.0f} % of {self.peak} peak" if self.peak else self.unit


def clocks(mix: Mix, built: Built, architecture: Architecture, rates: Rates | None = None) -> Clocks:
    """Clocks that each unit of one multiprocessor is busy when all warps of a program run `mix` once.

    `rates` are those of the architecture unless a device has others.
    """
    rates = rates or architecture.rates
    warps, lanes = built.warps, architecture.target.warp_size
    amd = architecture.target.backend == "hip"
    count = mix.counts
    integer = sum(n for name, n in mix.integer_names.items() if not name.startswith(_NOT_INTEGER_LANES))
    issued = count["fp32"] + count["fp64"] + count["integer"] + count["exp"] if amd else mix.total
    return {
        "matrix": sum(n / rates.matrix[type_] for type_, n in matrix_operations(mix, built).items()),
        "issue": issued * warps / rates.issue,
        "fp32": count["fp32"] * warps * lanes / rates.fp32,
        "fp64": count["fp64"] * warps * lanes / rates.fp64,
        "integer": integer * warps * lanes / (rates.fp32 if amd else rates.integer),
        "exp": count["exp"] * warps * lanes / rates.exp,
        "shared": mix.shared_bytes * warps / rates.shared,
        "load": mix.loaded_bytes * warps / rates.loaded,
    }


def matrix_operations(mix: Mix, built: Built) -> Mapping[str, float]:
    """Operations of a program's matrix instructions in `mix`, by type."""
    found = {type_: float(n * built.warps) for type_, n in mix.operations.items() if n}
    # UTCHMMA is issued by one thread for the whole program, takes 32 bytes of each row, and does not say how many rows
    # and columns: those of the kernel's products.
    count = sum(n for name, n in mix.matrix_names.items() if name.startswith("UTCHMMA"))
    if count:
        type_ = built.products[0].type
        steps = sum(p.times * p.m / min(p.m, 128) * p.k / (16 if type_ == "half" else 8) for p in built.products)
        found[type_] = found.get(type_, 0) + count * sum(p.operations for p in built.products) / steps
    return found


def bound(mix: Mix, built: Built, architecture: Architecture, rates: Rates | None = None) -> Bound:
    """Which unit `mix` keeps busy longest."""
    found = clocks(mix, built, architecture, rates)
    unit = max(found, key=found.__getitem__)
    peak = "" if not built.products else "matrix" if found["matrix"] else "fp32"
    share = found[peak] / found[unit] if peak else math.nan
    return Bound(unit, share, peak)
