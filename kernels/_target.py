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
    return {9: "hopper", 10: "blackwell"}.get(torch.cuda.get_device_capability(index)[0], "cuda")


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
    return {"blackwell": "hopper", "cdna3": "cdna"}.get(kind, kind)


def has_tensor_memory(device: torch.device) -> bool:
    """Whether products leave their sums in tensor memory (sm_100), not in registers."""
    return _kind(device) == "blackwell"


def has_tf32(device: torch.device) -> bool:
    """Whether products of TF32 numbers exist: of AMD's GPUs Triton makes them on gfx942 alone."""
    return _kind(device) != "cdna"


@contextmanager
def pretend(name: str) -> Iterator[None]:
    """Launch as for another GPU: "hopper" (sm_90), "blackwell" (sm_100), "cuda", "cdna3" (gfx942) or "cdna"."""
    token = _pretended.set(name)
    try:
        yield
    finally:
        _pretended.reset(token)
