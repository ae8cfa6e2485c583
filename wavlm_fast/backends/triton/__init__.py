"""Triton kernels (kernels/) for CUDA and ROCm devices; on CPU tensors under TRITON_INTERPRET=1.

A file here is named after its op and says how the op, forward and backward, is computed and why not; `launch.py` is
what they share. Nothing is imported of Triton before a kernel runs: it may not be there.
"""

from __future__ import annotations

import torch

from .. import gather
from .launch import interpreted

NAME = "triton"
DEVICES = ("cuda",)
RANK = 2
TABLE = gather(__name__, __path__)


def why_not(device: torch.device | None = None) -> str | None:
    """Why no Triton kernel can run, on `device` or anywhere here; None when one can."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation raises more than ImportError
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    if interpreted():
        return None
    if device is not None and device.type != "cuda":
        return f"Triton kernels need a CUDA or ROCm device, the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is available"
    if torch.version.hip and not _is_cdna(name := torch.cuda.get_device_properties(device).gcnArchName):
        return f"of AMD's GPUs the Triton kernels were made for CDNA (gfx90a, gfx942 and their kin), this is {name}"
    return None


def _is_cdna(name: str) -> bool:
    """Whether a GPU has matrix instructions of 64 lanes, from its architecture's name: RDNA has others."""
    return name.startswith(("gfx908", "gfx90a", "gfx94", "gfx95"))
