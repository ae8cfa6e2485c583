"""Where plain torch trains an op faster than the kernels here: a row per processor, measured.

A weight that learns is another at each step, and what is made of it for a product is used once: in bfloat16 that costs
more than the product saves. An op of two short passes takes less time than the call of an op of ours. "auto" leaves
such calls to torch, gradient and all; the backend asked for by name computes them. Only calls of which a gradient of
the weight is wanted: without one weights stay packed, and a frame's numbers must not depend on how many there are,
which torch does not promise.

`pytest benchmarks/test_never_slower.py` holds the rows, and their absence, against the machine that it runs on.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from ..._private import is_amx_supported
from ...machine import cpu_name
from . import extension

_BOTH, _HALF = extension.DTYPES, (torch.bfloat16,)
_AMX, _AMD = "Intel with AMX", "AMD with AVX-512"


@dataclass(frozen=True)
class Row:
    """Training of an op on a processor that torch does faster.

    Attributes:
        processor, op: as `processor` says, and which op.
        measured: how many times as fast ours was, the least and the most.
        frames: of the whole batch, up to which it is so.
        dtypes: of the product.
    """

    processor: str
    op: str
    measured: str
    frames: int
    dtypes: tuple[torch.dtype, ...] = _BOTH

    @cached_property
    def reason(self) -> str:
        """The sentence for reports."""
        return f"torch's own {self.op} trains faster on {self.processor} up to {self.frames} frames ({self.measured} x)"


ROWS = (
    # Zen 4, two threads, torch 2.13, of 1 s to 8 x 10 s of audio. In float32 every product trains faster here.
    Row(_AMD, "add_layer_norm", "0.43-0.83", 512),
    Row(_AMD, "linear_act", "0.79-0.97", 512, _HALF),
    Row(_AMD, "tdnn", "0.82-0.92", 4096, _HALF),
    # Sapphire Rapids, two threads, torch 2.13, of 2 s, where oneDNN gets bfloat16 weights packed at each step. What was
    # measured of float32 was of weights packed at each step too, which they no longer are.
    Row(_AMX, "add_layer_norm", "0.46-0.59", 128),
    Row(_AMX, "linear_act", "0.62-0.68", 128, _HALF),
    Row(_AMX, "tdnn", "0.56-0.73", 128, _HALF),
)


@cache
def processor() -> str:
    """What kind this processor is, at the level that the extension uses."""
    level = extension.isa()
    if platform.machine() in ("aarch64", "arm64"):
        return "aarch64"
    if not (level or "").startswith("avx512"):
        return "a processor with AVX2" if level == "avx2" else "another processor"
    if is_amx_supported():
        return _AMX
    return _AMD if cpu_name().startswith("AMD") else "Intel with AVX-512"


def here() -> list[Row]:
    """The rows of this processor; none without kernels."""
    return [] if extension.problem() else [row for row in ROWS if row.processor == processor()]


def why_torch_trains(op: str, x: Tensor, weight: Tensor) -> str | None:
    """Why plain torch should compute a call of which a gradient of `weight` is wanted; None when it should not."""
    for row in ROWS:
        if row.op == op and row.processor == processor() and _dtype(op, x) in row.dtypes:
            is_short = x.dim() > 0 and x.numel() <= row.frames * x.size(-1)
            return row.reason if is_short and extension.problem() is None else None
    return None


def _dtype(op: str, x: Tensor) -> torch.dtype:
    """That of the arithmetic: autocast lowers products only."""
    lowered = op != "add_layer_norm" and x.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if lowered else x.dtype
