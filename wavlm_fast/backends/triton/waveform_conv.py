"""The first convolution: kernels/waveform_conv.py and kernels/waveform_conv_backward.py."""

from __future__ import annotations

from torch import Tensor

from .. import Implementation
from . import launch

_MOST_TAPS = 15  # with a column of ones, the side of the Gram matrix


def why_not(
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm: str,
    norm_weight: Tensor | None,
    *rest: object,
) -> str | None:
    """Why the kernel cannot take this call."""
    channels, _, taps = weight.shape
    if taps > _MOST_TAPS or channels > launch.MOST_NORMED_CHANNELS:
        return (
            f"the Triton waveform_conv takes up to {_MOST_TAPS} taps and {launch.MOST_NORMED_CHANNELS} channels, "
            f"weight has {taps} and {channels}"
        )
    return launch.why_not("waveform_conv", waveform, norm_weight)


def why_not_backward(grad: Tensor, *rest: object) -> str | None:
    """The same of the gradient."""
    return why_not(*rest)


TABLE = {
    "waveform_conv": Implementation(launch.kernel("waveform_conv", "waveform_conv"), why_not),
    "waveform_conv_backward": Implementation(
        launch.kernel("waveform_conv_backward", "waveform_conv_backward"), why_not_backward
    ),
}
