"""Triton kernels for CUDA and ROCm devices; on CPU tensors under TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import torch

from . import Implementation

NAME = "triton"


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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
    return None


TABLE: dict[str, Implementation] = {}
