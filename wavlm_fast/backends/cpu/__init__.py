"""C++ kernels (csrc/) and oneDNN through torch, for tensors on the CPU.

A file here is named after its op and holds how the op, forward and backward, is computed and why not. What several ops
share are the engines: `extension.py` loads the kernels, `packed_conv.py` multiplies by weights that are kept packed,
in C++ or in oneDNN (`onednn.py`), `matmul.py` multiplies what gradients are made of, `norm_act.py` does what surrounds
the products, and `grid.py` lays packed frames out for products that know no boundaries. `choices.py` holds what torch
trains faster.
"""

from __future__ import annotations

from functools import cache

import torch

from .. import gather
from . import choices, extension
from .choices import why_torch_trains
from .extension import build_record, isa, isa_levels, threads
from .packed_conv import arithmetic

__all__ = [
    "DEVICES", "NAME", "RANK", "TABLE", "arithmetic", "build_record", "choices", "isa", "isa_levels", "mending",
    "threads", "why_not", "why_torch_trains",
]  # fmt: skip

NAME = "cpu"
DEVICES = ("cpu",)
RANK = 1
TABLE = gather(__name__, __path__)


@cache  # asked in each call of an op
def why_not(device: torch.device | None = None) -> str | None:
    """Why no kernel of this backend can run on `device`; None when one can."""
    if device is not None and device.type != "cpu":
        return f"the cpu backend needs tensors on the CPU, these are on {device.type}"
    return None


def mending(reason: str) -> str | None:
    """What the user can do about a refusal; None when there is nothing, or when it was the user's wish."""
    return extension.mending() if reason == extension.problem() else None
