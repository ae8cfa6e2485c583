"""Dilated convolution and activation. Engines: packed_conv.py, and matmul.py for the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops._define import only
from ...ops._packed import Resized
from .. import Implementation
from . import matmul, packed_conv
from .grid import Grid, resized_bounds


def tdnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int,
    activation: str,
    *packed: Tensor | int | None,
) -> Tensor:
    """The op of that name; `packed` is offsets, out_offsets and out_frames."""
    filters = lambda: weight.unflatten(1, (kernel_size, -1))  # noqa: E731
    return packed_conv.convolve(
        x, weight, filters, kernel_size, bias, 1, dilation, activation,
        packed=Resized(*packed), learns=weight.requires_grad,
    )  # fmt: skip


def tdnn_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    kernel_size: int,
    dilation: int,
    activation: str,
    wanted: list[bool],
    *packed: Tensor | int | None,
) -> tuple[Tensor, ...]:
    """The op of that name."""
    x, dpre = x.contiguous(), (torch.where(out > 0, grad, 0) if activation == "relu" else grad).contiguous()
    taps = weight.unflatten(1, (kernel_size, -1)).transpose(0, 1)
    dbias = dpre.sum((0, 1)) if wanted[2] else None
    places = out_places = None
    packed = Resized(*packed)
    if packed.offsets is not None:
        span = (kernel_size - 1) * dilation + 1
        places, out_places = resized_bounds("tdnn_backward", packed, x.shape[1], span, 1)
        if bool((x.sum() + weight.sum()).isfinite()):
            # All utterances at once, with zeros for the windows across a boundary, where zeros do no harm. At a stride
            # of one x lies as it has to.
            dpre, places, out_places = Grid(places, out_places, 1).place_out(dpre, span), None, None
    runs = matmul.runs(dpre, out_places)
    dx = matmul.of_input(runs, taps, x, places, 1, dilation) if wanted[0] else None
    dweight = None
    if wanted[1]:
        dweight = matmul.of_filters(runs, matmul.runs(x, places), kernel_size, 1, dilation).flatten(1)
    return only(wanted, dx, dweight, dbias, like=x)


TABLE = {
    "tdnn": Implementation(tdnn, packed_conv.why_not),
    "tdnn_backward": Implementation(tdnn_backward, matmul.why_not),
}
