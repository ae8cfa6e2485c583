"""The x-vector head: time-delay layers and statistics pooling."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import ops
from ..leaving import leaving
from ._packing import Packing, resized
from ._plain import fused_activation, why_mixed, why_not_plain
from ._steps import Signal, Step, named


class TimeDelayLayer:
    """Dilated convolution with its weight stored as a linear layer's, ReLU.

    Made of `kernel`, `activation`; `in_conv_dim`, `kernel_size`, `dilation`.
    """

    def steps(self, signal: Signal) -> Iterator[Step]:
        step = self._convolve(signal.frames(self, self.in_conv_dim))
        yield step
        if step.refusal is None and not self._is_relu():
            yield Step("tdnn epilogue", f"activation is called: {type(self.activation).__name__} is not fused")

    def _is_relu(self) -> bool:
        return fused_activation(self.activation) == "relu"

    def _convolve(self, hidden_states: Tensor, packing: Packing | None = None, after: Packing | None = None) -> Step:
        """The convolution, and the activation where it is ReLU."""
        kernel = self.kernel
        refusal = why_not_plain(kernel, nn.Linear) or why_mixed(hidden_states, kernel.weight, kernel.bias)

        def fused() -> Tensor:
            options = {"kernel_size": self.kernel_size, "dilation": self.dilation}
            options |= {} if packing is None else resized(packing, after)
            activation = "relu" if self._is_relu() else "none"
            return ops.tdnn(hidden_states, kernel.weight, kernel.bias, activation=activation, **options)

        def called() -> Tensor:
            windows = self._windows(hidden_states) if packing is None else packing.each(self._windows, hidden_states)
            return kernel(windows)

        return Step("tdnn", named("kernel", refusal), fused, called)

    def convolve(
        self, hidden_states: Tensor, packing: Packing | None = None, after: Packing | None = None
    ) -> Tensor:
        """`[B, T, C]` to `[B, T', C']` with T' = T - (K - 1)·dilation; packed frames with their packing before and
        after.

        A kernel that is not plain (LoRA, quantized, hooked) is called as the linear layer it is, over windows of
        frames; transformers ignores LoRA here and warns.
        """
        step = self._convolve(hidden_states, packing, after)
        out = step.run()
        return out if step.refusal is None and self._is_relu() else self.activation(out)

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
