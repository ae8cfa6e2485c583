"""The x-vector head: time-delay layers and statistics pooling."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.models.wavlm import modeling_wavlm as hf

from .. import ops
from ..leaving import leaving
from ._originals import or_original, stands_in_for
from ._packing import Packing, resized
from ._plain import fused_activation, same_dtype, why_not_plain
from ._steps import FastModule, Plan, frames_like, named


@stands_in_for(hf.TDNNLayer)
class FastTDNNLayer(FastModule, hf.TDNNLayer):
    """Dilated convolution with its weight stored as a linear layer's, ReLU."""

    def plan(self) -> Iterator[Plan]:
        yield Plan("tdnn", named("kernel", why_not_plain(self.kernel, nn.Linear)), self._example)

    def _example(self) -> tuple:
        weight, bias = self.kernel.weight, self.kernel.bias
        return frames_like(weight, self.in_conv_dim), weight, bias, self.kernel_size, self.dilation, "relu"

    @or_original
    def forward(
        self, hidden_states: Tensor, packing: Packing | None = None, after: Packing | None = None
    ) -> Tensor:
        """`[B, T, C]` to `[B, T', C']` with T' = T - (K - 1)·dilation; packed frames with their packing before and
        after.

        A kernel that is not plain (LoRA, quantized, hooked) is called as the linear layer it is, over windows of
        frames; transformers ignores LoRA here and warns.
        """
        kernel = self.kernel
        if why_not_plain(kernel, nn.Linear) is not None or not same_dtype(hidden_states, kernel.weight, kernel.bias):
            windows = self._windows(hidden_states) if packing is None else packing.each(self._windows, hidden_states)
            return self.activation(kernel(windows))
        activation = "relu" if fused_activation(self.activation) == "relu" else "none"
        options = {"kernel_size": self.kernel_size, "dilation": self.dilation, "activation": activation}
        options |= {} if packing is None else resized(packing, after)
        out = ops.tdnn(hidden_states, kernel.weight, kernel.bias, **options)
        return self.activation(out) if activation == "none" else out

    @property
    def span(self) -> int:
        """Frames that one frame of the output is made of."""
        return (self.kernel_size - 1) * self.dilation + 1

    def _windows(self, hidden_states: Tensor) -> Tensor:
        """`[B, T', K·C]`."""
        windows = hidden_states.unfold(1, self.span, 1)[..., :: self.dilation]  # [B, T', C, K]
        return windows.transpose(2, 3).flatten(2)


def pool_statistics(hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean and unbiased deviation over each utterance's frames, `[B, T, C]` to `[B, 2C]`.

    Args:
        hidden_states: `[B, T, C]`.
        lengths: `[B]` as transformers computes them, or None for all frames. They ignore dilation and may lie outside
            0..T; a slice `x[:length]` tells what is meant then, as there.
    """
    if lengths is not None:
        frames = hidden_states.shape[1]
        lengths = torch.where(lengths < 0, lengths + frames, lengths).clamp(0, frames)
    pool = ops.stats_pool if leaving() is None else ops.references["stats_pool"]
    return pool(hidden_states, lengths)
