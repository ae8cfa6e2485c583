"""Engine: how the host functions of kernels/ are reached, and what no kernel takes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...ops._define import or_empty

MOST_NORMED_CHANNELS = 1024  # a row of them and its tile of the weight fit in one program of a convolution
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernel(file: str, function: str) -> Callable[..., Any]:
    """A host function of kernels/`file`.py, imported at the first call: Triton may not be there.

    What it has not computed, since nobody wants it, is None there and an empty tensor here.
    """

    def run(*args: Any) -> Any:
        device = args[0].device
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            found = getattr(importlib.import_module(f"wavlm_fast.kernels.{file}"), function)(*args)
        return tuple(or_empty(f, args[0]) for f in found) if isinstance(found, tuple) else found

    return run


def why_not(op: str, x: Tensor, *others: Tensor | None, name: str = "x") -> str | None:
    """Why no kernel takes frames like `x`, called `name`, beside others whose dtype may differ; None when one can."""
    if interpreted() and torch.bfloat16 in (x.dtype, *(other.dtype for other in others if other is not None)):
        return "Triton's interpreter computes bfloat16 wrongly: it truncates and multiplies the bits"
    return None if x.dtype in _DTYPES else f"the Triton {op} takes float32, float16 or bfloat16, {name} is {x.dtype}"
