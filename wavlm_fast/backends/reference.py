"""Plain torch: any device, any dtype. The oracle; run in float64 it is the truth."""

from __future__ import annotations

import torch

from . import Implementation

NAME = "reference"


def why_not(device: torch.device | None = None) -> str | None:
    """The reference always runs."""
    return None


# Filled by wavlm_fast.ops, where each op is defined together with its reference.
TABLE: dict[str, Implementation] = {}
