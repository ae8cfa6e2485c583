"""Which GPU a kernel will run on, as far as its default tiles depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

_pretended: ContextVar[str | None] = ContextVar("wavlm_fast_target", default=None)


@cache
def _of_device(index: int) -> str:
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index).gcnArchName
        return "cdna3" if name.startswith("gfx942") else "cdna"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) == (8, 0):
        return "ampere"
    return {9: "hopper", 10: "blackwell"}.get(major, "cuda")


def _kind(device: torch.device) -> str:
    """What `pretend` takes. Asks the driver once per device, and waits for nothing."""
    pretended = _pretended.get()
    if pretended is not None:
        return pretended
    if device.type != "cuda":  # the interpreter
        return "cuda"
    return _of_device(torch.cuda.current_device() if device.index is None else device.index)


def target(device: torch.device) -> str:
    """Products read their operands from shared memory on "hopper" (sm_90, sm_100), from registers on "cuda" (other
    NVIDIA GPUs) and "cdna" (AMD).
    """
    kind = _kind(device)
    return {"ampere": "cuda", "blackwell": "hopper", "cdna3": "cdna"}.get(kind, kind)


def has_tensor_memory(device: torch.device) -> bool:
    """Whether products leave their sums in tensor memory (sm_100), not in registers."""
    return _kind(device) == "blackwell"


def has_tf32(device: torch.device) -> bool:
    """Whether products of TF32 numbers exist: of AMD's GPUs Triton makes them on gfx942 alone."""
    return _kind(device) != "cdna"


def pieces_pay(device: torch.device) -> bool:
    """Whether six products of bf16 numbers take less time than one of fp32 numbers: on sm_80 and sm_90, whose matrix
    units do 32 operations for each fp32 lane. Those of GeForce and the like do four; on sm_100 the pieces themselves
    take too long. Triton's interpreter, on the CPU, knows no pieces.
    """
    return _kind(device) in ("ampere", "hopper") and device.type != "cpu"


@contextmanager
def pretend(name: str) -> Iterator[None]:
    """Launch as for another GPU: "ampere" (sm_80), "hopper" (sm_90), "blackwell" (sm_100), "cuda" (of NVIDIA's all
    others), "cdna3" (gfx942) or "cdna".
    """
    token = _pretended.set(name)
    try:
        yield
    finally:
        _pretended.reset(token)
