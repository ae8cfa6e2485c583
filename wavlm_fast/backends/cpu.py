"""C++ kernels (csrc/) and oneDNN through torch, for tensors on the CPU."""

from __future__ import annotations

import torch

from . import Implementation

NAME = "cpu"


def why_not(device: torch.device | None = None) -> str | None:
    """Why no kernel of this backend can run on `device`; None when one can."""
    if device is not None and device.type != "cpu":
        return f"the cpu backend needs tensors on the CPU, these are on {device.type}"
    return None


TABLE: dict[str, Implementation] = {}
