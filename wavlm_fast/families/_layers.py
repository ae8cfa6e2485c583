"""What attention and layers of copied houses share: the position bias goes from layer to layer in their shape."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..modules import Attention, EncoderLayer, Signal, Step
from ..modules._position_bias import handed_on
from ._copies import Copy


class CopiedAttention(Attention, Copy):
    """Attention that hands on what it gets, and makes the bias where it has a table of it."""

    @property
    def original_makes_dense_bias(self) -> bool:
        return self.rel_attn_embed is not None

    @staticmethod
    def shape_of_bias(batch: int, heads: int, frames: int) -> tuple[int, ...]:
        """Of the dense position bias as it is handed on."""
        return (batch * heads, frames, frames)

    def handed_on(self, bias: Tensor, given: Tensor | None, frames: Tensor) -> Tensor:
        """The position bias as the next layer's argument.

        Args:
            bias: as the stage has it.
            given: as it came in, if it did.
            frames: `[B, T, C]`.
        """
        if given is not None or bias.dim() != 2:
            return bias if given is None else given
        heads, length = bias.shape[0], (bias.shape[1] + 1) // 2
        shape = self.shape_of_bias(frames.shape[0], heads, length)
        return handed_on(bias, shape, self.rel_attn_embed.weight.dtype)


class CopiedLayer(EncoderLayer, Copy):
    """A layer around such attention."""

    @property
    def owns_bias(self) -> bool:
        """Whether its attention has a table of the position bias."""
        raise NotImplementedError

    @property
    def original_makes_dense_bias(self) -> bool:
        return self.owns_bias

    @property
    def norm_first(self) -> bool:
        return self.layer_norm_first

    def handed_on(self, bias: Tensor, given: Tensor | None, frames: Tensor) -> Tensor:
        """As `CopiedAttention.handed_on`; what attention of somebody else's made goes on as it is."""
        return self.attention.handed_on(bias, given, frames) if isinstance(self.attention, CopiedAttention) else bias

    def steps(self, signal: Signal) -> Iterator[Step]:
        dense = signal.dense_bias
        yield from super().steps(signal)
        signal.dense_bias = dense or (self.original_makes_dense_bias and signal.dense_bias)
