"""bfloat16 products and convolutions on weights that oneDNN has packed: part of the cpu backend.

torch packs a weight again at each call of its public functions. Its calls that take a packed weight are private: they
are tried once before they are relied on.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _private
from ...ops._activation import activate

_POST_OPERATIONS = {  # activation -> name and algorithm, as oneDNN calls them
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


def pack_linear(weight: Tensor) -> Tensor:
    """Pack `[C', C]`."""
    return _private.reorder_linear_weight(weight.contiguous())


def linear(rows: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`[R, C]` -> `[R, C']` with a weight from `pack_linear`."""
    name, algorithm = _POST_OPERATIONS[activation]
    return _private.linear_pointwise(rows, packed, _read(bias), name, [], algorithm)


def pack_conv(filters: Tensor, stride: int, dilation: int) -> Tensor:
    """Pack `[C', K, C]`."""
    image = filters.transpose(1, 2).unsqueeze(2).contiguous()
    return _private.reorder_convolution_weight(image, [0, 0], [1, stride], [1, dilation], 1)


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, stride: int, dilation: int, activation: str) -> Tensor:
    """`[B, T, C]` -> `[B, T', C']` with a weight from `pack_conv`."""
    image = x.transpose(1, 2).unsqueeze(2)  # of height one: time-major frames are then channels-last
    name, algorithm = _POST_OPERATIONS[activation]
    y = _private.convolution_pointwise(
        image, packed, _read(bias), [0, 0], [1, stride], [1, dilation], 1, name, [], algorithm
    )
    return y.squeeze(2).transpose(1, 2).contiguous()


def _read(bias: Tensor | None) -> Tensor | None:
    # These calls read a vector as if its numbers lay one behind the other, and know of no negated views.
    return None if bias is None else bias.contiguous().resolve_neg()


@cache
def why_not() -> str | None:
    """Why these functions cannot run here; None when they can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch comes without oneDNN"
    try:
        if not _private.is_mkldnn_bf16_supported():
            return "oneDNN has no bfloat16 products on this CPU"
        right = _private.on_real_tensors(_trials_succeed)
    except Exception as error:
        return f"torch {torch.__version__} lacks the private oneDNN calls for packed weights ({type(error).__name__})"
    if not right:
        return f"torch {torch.__version__} computes something else in its private oneDNN calls for packed weights"
    return None


def _trials_succeed() -> bool:
    with torch.no_grad():
        return all(torch.allclose(got, wanted, rtol=2**-6, atol=2**-6) for got, wanted in _trials())


def _trials() -> list[tuple[Tensor, Tensor]]:
    """Every call with every activation on small whole numbers, beside what it should give."""
    frames = (torch.arange(6 * 32) % 3 - 1).bfloat16().view(1, 6, 32)
    weight = (torch.arange(16 * 32 * 2) % 5 - 2).bfloat16().view(16, 2, 32)
    bias = (torch.arange(16) - 8).bfloat16()
    pairs = []
    for name in _POST_OPERATIONS:
        rows, tap = frames[0], weight[:, 0].contiguous()
        pairs.append((linear(rows, pack_linear(tap), bias, name), activate(name, F.linear(rows, tap, bias))))
        for stride, dilation in ((2, 1), (1, 2)):
            got = convolve(frames, pack_conv(weight, stride, dilation), bias, stride, dilation, name)
            plain = F.conv1d(frames.transpose(1, 2), weight.transpose(1, 2), bias, stride, dilation=dilation)
            pairs.append((got, activate(name, plain.transpose(1, 2))))
    return pairs
