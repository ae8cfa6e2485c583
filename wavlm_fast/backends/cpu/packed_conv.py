"""Engine: convolutions and linear layers on packed weights, bias and activation fused.

linear_act, strided_conv and tdnn are all convolutions over time-major frames; a linear layer has one tap. They run in
C++ (csrc/packed_conv.cpp), float32 as fast as in oneDNN, whose rounding error is more than twice that of torch's own
linear and conv1d. On CPUs with matrix units (AMX) bfloat16 runs on tiles where tiles.py finds that best, else in
oneDNN, as for want of the extension: packed frames in one call on a grid, for it would make itself ready anew for each
length.

A kernel runs below autograd and cannot see whether a gradient is recorded. While a weight learns it is another at each
optimizer step, and a copy that is used once does not pay: kernels then take the weight as it is, as gradients do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..._private import is_amx_supported
from ...derived import derived
from ...ops._packed import DENSE, Resized
from . import extension, onednn, tiles
from .grid import Grid, resized_bounds

_pack_conv = extension.kernel("pack_conv(Tensor[] weights, bool filtered) -> Tensor")
_packed_conv = extension.kernel(
    "packed_conv(Tensor x, Tensor packed, Tensor? bias, int channels, int taps, int stride, int dilation, "
    f"bool filtered, str activation, {extension.RESIZED}) -> Tensor"
)

extension.kernel("copies_pay(bool? pay=None) -> bool")  # for tests


def convolve(
    x: Tensor,
    weight: Tensor,
    filters: Callable[[], Tensor],
    taps: int,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    activation: str,
    filtered: bool = False,
    packed: Resized = DENSE,
    learns: bool = False,
) -> Tensor:
    """`[B, T, C]` -> `[B, T', C']`; `filters` gives the weight as `[C', K, C]`, which may be another at the next call
    where it `learns`."""
    if in_onednn(x):
        kind = f"onednn conv, {taps} taps, stride {stride}, dilation {dilation}"
        ready = derived(kind, (weight,), lambda: onednn.pack_conv(filters(), stride, dilation), replaces=True)
        convolve = lambda x: onednn.convolve(x, ready, bias, stride, dilation, activation)  # noqa: E731
        if packed.offsets is None:
            return convolve(x)
        stride = min(stride, x.shape[1])  # beyond the frames a stride leaves one, whatever it is
        span = (taps - 1) * dilation + 1
        grid = Grid(*resized_bounds("the convolution", packed, x.shape[1], span, stride), stride)
        return grid.pick_out(convolve(grid.place(x)))
    ready = pack(weight, filters, taps, filtered, learns and multiplies(x))
    if ready is None:
        ready = filters().contiguous()
    return _packed_conv(x, ready, bias, weight.shape[0], taps, stride, dilation, filtered, activation, *packed)


def pack(
    weight: Tensor,
    filters: Callable[[], Tensor],
    taps: int,
    filtered: bool = False,
    if_met_before: bool = False,
    keep: bool = True,
) -> Tensor | None:
    """`filters()` `[C', K, C]` of a weight in the order of packed_conv.cpp, remembered as by `derived`."""
    kind = f"packed conv, {taps} taps{', filtered' if filtered else ''}"
    return derived(kind, (weight,), lambda: _pack_conv([filters()], filtered), True, if_met_before, keep)


def pack_together(kind: str, weights: list[Tensor], keep: bool = True) -> Tensor:
    """Linear layers' weights `[C', C]` as one, remembered under `kind`; `keep` as in `derived`."""
    build = lambda: _pack_conv([w[:, None] for w in weights], False)  # noqa: E731
    return derived(kind, tuple(weights), build, replaces=True, keep=keep)


def wide_and_packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first convolution's weight `[C, 1, K]` in float32, as it is and packed, remembered."""

    def build() -> tuple[Tensor, Tensor]:
        wide = weight.detach().float()  # never the weight itself: what is derived of one must not keep it
        return wide, _pack_conv([wide], False)

    return derived("packed waveform conv", (weight,), build)


def can_filter(taps: int, stride: int) -> bool:
    """Whether minimal filtering (packed_conv_kernel.cpp) does a convolution in 7/9 of the products.

    It rounds sums of frames and of taps: in bfloat16 no more than what the fused forward saves, in float32 a tenth of
    the error more. Gradients, which add up more roundings, are taken of the direct form.
    """
    return taps == 3 and stride == 2


def multiplies(x: Tensor) -> bool:
    """Whether the kernels multiply frames `[..., C]` in their own dtype: bfloat16 in pairs, where the CPU does that."""
    return x.dtype == torch.float32 or (multiplies_pairs() and x.shape[-1] % 2 == 0)


def multiplies_pairs() -> bool:
    """Whether the kernels multiply pairs of bfloat16, which need an even width; else they widen it to float32."""
    return extension.isa() in extension.PAIRS


def in_onednn(x: Tensor) -> bool:
    """Whether products of `x` run in oneDNN."""
    return x.dtype == torch.bfloat16 and _prefers_onednn()


def _prefers_onednn() -> bool:
    return onednn.why_not() is None and why_onednn() is not None


def why_onednn() -> str | None:
    """Why oneDNN would do bfloat16 better than C++, a sentence; None where it would not."""
    return extension.problem() or (tiles.why_not(tiles.PRODUCTS) if _has_amx() else None)


_has_amx = cache(is_amx_supported)


def arithmetic() -> str | None:
    """How bfloat16 is multiplied, a sentence, where that is not by dot products; None where it is."""
    if not _has_amx() or extension.problem() is not None:
        return extension.isa_reason()
    products, attention = tiles.why_not(tiles.PRODUCTS), tiles.why_not(tiles.ATTENTION)
    if products is None:
        said = "bfloat16 products run on AMX tiles"
        return f"{said}, attention too" if attention is None else f"{said}; attention by dot products: {attention}"
    said = f"bfloat16 products run in oneDNN: {products}" if _prefers_onednn() else None
    if attention == products:  # nobody asked for tiles, or there are none
        return said
    said = said or f"bfloat16 products run by dot products: {products}"
    return f"{said}; attention on AMX tiles" if attention is None else f"{said}; attention by dot products: {attention}"


def why_not(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    """Why these ops cannot run on packed weights; None when they can."""
    if x.dtype not in extension.DTYPES or weight.dtype != x.dtype:
        return f"packed weights are float32 or bfloat16, x is {x.dtype} and the weight {weight.dtype}"
    if x.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    return None if in_onednn(x) else extension.problem()
