"""Plain torch: any device, any dtype. The oracle; run in float64 it is the truth."""

from __future__ import annotations

import torch

from ..ops import kernels
from . import Implementation

NAME = "reference"
DEVICES = None
RANK = 0
# Each op is defined together with its reference.
TABLE = {op: Implementation(kernel) for op, kernel in kernels.items()}


def why_not(device: torch.device | None = None) -> str | None:
    """The reference always runs."""
    return None
