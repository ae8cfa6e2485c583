"""Matrix products and convolutions on weights that oneDNN has packed: part of the cpu backend.

torch calls oneDNN itself for some products only, and packs the weight again at each call. The calls under
`torch.ops.mkldnn` that take a packed weight are private to torch: they are tried once before they are relied on.

A kernel runs below autograd and cannot see whether a gradient is recorded. While a weight learns it is packed anew at
each optimizer step, which costs less than the faster product saves; gradients take the weight itself.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..derived import derived
from ..ops._activation import activate
from ..ops._define import or_empty

_DTYPES = (torch.float32, torch.bfloat16)
_POST_OPERATIONS = {  # activation -> name and algorithm, as oneDNN calls them
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
# oneDNN adds up a float32 product in longer runs than MKL, which F.linear calls. Above this many terms its rounding
# error is more than twice as large, so such a product is computed in pieces.
_MOST_TERMS = 1024
_PIECE = 768


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """The op of that name."""
    packed = derived("onednn linear", (weight,), lambda: _pack_linear(weight))
    rows = x.reshape(-1, x.shape[-1])
    kept = save and activation != "none"
    out = _linear(rows, packed, bias, "none" if kept else activation).view(*x.shape[:-1], -1)
    return (activate(activation, out), out) if kept else (out, or_empty(None, x))


def strided_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The op of that name."""
    packed = derived(f"onednn conv, stride {stride}", (weight,), lambda: _pack_conv(weight, stride, 1))
    if norm_weight is None and not save:
        return _convolve(x, packed, bias, stride, 1, activation), or_empty(None, x)
    out = pre = _convolve(x, packed, bias, stride, 1, "none")
    if norm_weight is not None:
        # Norm parameters may be wider than the product under autocast.
        out = F.layer_norm(pre.to(norm_weight.dtype), pre.shape[-1:], norm_weight, norm_bias, eps)
    out = activate(activation, out).to(pre.dtype)
    return out, or_empty(pre if save and out is not pre else None, x)


def tdnn(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, dilation: int, activation: str
) -> Tensor:
    """The op of that name."""
    packed = derived(
        f"onednn conv, kernel {kernel_size}, dilation {dilation}",
        (weight,),
        lambda: _pack_conv(weight.unflatten(1, (kernel_size, -1)).transpose(1, 2), 1, dilation),
    )
    return _convolve(x, packed, bias, 1, dilation, activation)


def _pack_linear(weight: Tensor) -> tuple[Tensor, ...]:
    terms = weight.shape[1]
    whole = weight.dtype != torch.float32 or terms <= _MOST_TERMS
    pieces = weight.split(terms if whole else _PIECE, 1)
    return tuple(torch.ops.mkldnn._reorder_linear_weight(piece.contiguous()) for piece in pieces)


def _linear(rows: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, activation: str) -> Tensor:
    if len(packed) == 1:
        name, algorithm = _POST_OPERATIONS[activation]
        return torch.ops.mkldnn._linear_pointwise(rows, packed[0], bias, name, [], algorithm)
    first, *others = rows.split(_PIECE, 1)
    out = torch.ops.mkldnn._linear_pointwise(first, packed[0], bias, "none", [], "")
    for piece, weight in zip(others, packed[1:], strict=True):
        out = torch.ops.mkldnn._linear_pointwise.binary(piece, out, weight, None, "add")
    return activate(activation, out)


def _pack_conv(weight: Tensor, stride: int, dilation: int) -> Tensor:
    """Pack `[C', C, K]`."""
    image = weight.unsqueeze(2).contiguous()
    return torch.ops.mkldnn._reorder_convolution_weight(image, [0, 0], [1, stride], [1, dilation], 1)


def _convolve(
    x: Tensor, packed: Tensor, bias: Tensor | None, stride: int, dilation: int, activation: str
) -> Tensor:
    """`[B, T, C]` -> `[B, T', C']`: as an image of height one, time-major frames are channels-last."""
    image = x.transpose(1, 2).unsqueeze(2)
    name, algorithm = _POST_OPERATIONS[activation]
    y = torch.ops.mkldnn._convolution_pointwise(
        image, packed, bias, [0, 0], [1, stride], [1, dilation], 1, name, [], algorithm
    )
    return y.squeeze(2).transpose(1, 2).contiguous()


def why_not(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    """Why these ops cannot run on packed weights; None when they can."""
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return f"packed weights are float32 or bfloat16, x is {x.dtype} and the weight {weight.dtype}"
    if x.numel() == 0:
        return "there is nothing to compute"
    return _unusable(x.dtype)


@cache
def _unusable(dtype: torch.dtype) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this torch comes without oneDNN"
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN has no bfloat16 products on this CPU"
        with unset_fake_temporarily(), torch.no_grad():
            return _try(dtype)
    except Exception as error:
        return f"torch {torch.__version__} lacks the private oneDNN calls for packed weights ({type(error).__name__})"


def _try(dtype: torch.dtype) -> str | None:
    """Run every private call on small whole numbers, which are exact in any dtype."""
    terms = 2 * _PIECE
    x = (torch.arange(3 * terms) % 3 - 1).to(dtype).view(3, terms)
    weight = (torch.arange(16 * terms) % 5 - 2).to(dtype).view(16, terms)
    bias = (torch.arange(16) - 8).to(dtype)
    pairs = [(_linear(x, _pack_linear(weight), bias, "none"), F.linear(x, weight, bias))]
    rows, short = x[:, :32].contiguous(), weight[:, :32].contiguous()
    filters = short.view(16, 16, 2)
    frames = rows.view(1, 6, 16)
    for activation in _POST_OPERATIONS:
        expected = activate(activation, F.linear(rows, short, bias))
        pairs.append((_linear(rows, _pack_linear(short), bias, activation), expected))
        for stride, dilation in ((2, 1), (1, 2)):
            got = _convolve(frames, _pack_conv(filters, stride, dilation), bias, stride, dilation, activation)
            plain = F.conv1d(frames.transpose(1, 2), filters, bias, stride, dilation=dilation)
            pairs.append((got, activate(activation, plain.transpose(1, 2))))
    tolerance = 4 * torch.finfo(dtype).eps
    if all(torch.allclose(got, expected, rtol=tolerance, atol=tolerance) for got, expected in pairs):
        return None
    return f"torch {torch.__version__} computes something else in its private oneDNN calls for packed weights"
