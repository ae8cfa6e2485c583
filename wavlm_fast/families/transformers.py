"""transformers' WavLM. The stages are named after its modules: they need not be told what is what."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.wavlm import modeling_wavlm as hf

from .._private import is_deepspeed_zero3_enabled, is_frozen, is_fsdp_managed_module, relative_positions_bucket
from ..modules import (
    Attention,
    ConvLayer,
    EncoderLayer,
    FastModule,
    FeatureEncoder,
    FeatureProjection,
    FeedForward,
    PositionalConv,
    Signal,
    Step,
    TimeDelayLayer,
    steps_of,
)
from ..modules._masks import zero_padding
from ..modules._originals import or_original, stands_in_for
from ..modules._packing import Packing
from ..modules._plain import why_not_plain
from ..modules._steps import named
from ..modules._versions import (
    DRAWS_FOR_EVERY_LAYER,
    ENCODER_COLLECTS,
    LAYERS_RETURN_ATTENTIONS,
    RETURNS_WEIGHTS_UNASKED,
)
from ..modules.attention import bias_for, dense_bias, understands_rel_bias
from ..modules.encoder_layer import why_layer_not_packed
from ..ops._define import accumulation_dtype


class _FastConvLayer(ConvLayer, FastModule):
    @property
    def in_channels(self) -> int:
        return self.in_conv_dim

    def own_forward(self, hidden_states: Tensor) -> Tensor:
        return self.run_original(hidden_states)

    @or_original
    def forward(
        self, hidden_states: Tensor, packing: Packing | None = None, after: Packing | None = None
    ) -> Tensor:
        """`[B, C, T]` to `[B, C', T']`; packed frames `[1, C, N]` with their packing before and after."""
        return self.convolve(hidden_states, packing, after)


@stands_in_for(hf.WavLMNoLayerNormConvLayer)
class FastWavLMNoLayerNormConvLayer(_FastConvLayer, hf.WavLMNoLayerNormConvLayer):
    """Convolution and activation."""


@stands_in_for(hf.WavLMLayerNormConvLayer)
class FastWavLMLayerNormConvLayer(_FastConvLayer, hf.WavLMLayerNormConvLayer):
    """Convolution, layer norm over channels, activation."""

    norm = "layer"


@stands_in_for(hf.WavLMGroupNormConvLayer)
class FastWavLMGroupNormConvLayer(_FastConvLayer, hf.WavLMGroupNormConvLayer):
    """Convolution, norm of every channel over time, activation."""

    norm = "group"

    def forward(self, hidden_states: Tensor, *packed: Packing) -> Tensor:
        """As the other layers', and over valid samples only where that is wanted, whoever's forward would run."""
        return self.convolve_valid(hidden_states) if self.counts_valid() else super().forward(hidden_states, *packed)


@stands_in_for(hf.WavLMFeatureEncoder)
class FastWavLMFeatureEncoder(FeatureEncoder, FastModule, hf.WavLMFeatureEncoder):
    """The front end."""

    @or_original
    def forward(self, input_values: Tensor) -> Tensor:
        """Waveform `[B, S]` to channel-major frames `[B, C, T]`."""
        return self.encode(input_values)

    def entering(self, waveform: Tensor) -> Tensor:
        hidden_states = super().entering(waveform)
        checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)
        if is_frozen(self) or not (self.training and checkpointed and torch.is_grad_enabled()):
            return hidden_states
        # Reentrant checkpointing records nothing unless an input needs a gradient.
        return hidden_states if waveform.requires_grad else hidden_states.detach().requires_grad_()


@stands_in_for(hf.WavLMFeatureProjection)
class FastWavLMFeatureProjection(FeatureProjection, FastModule, hf.WavLMFeatureProjection):
    """Frames of the front end to the encoder's width."""

    @or_original
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, C]` to the projected frames `[B, T, C']` and the normed ones `[B, T, C]`."""
        return self.project(hidden_states)


@stands_in_for(hf.WavLMPositionalConvEmbedding)
class FastWavLMPositionalConvEmbedding(PositionalConv, FastModule, hf.WavLMPositionalConvEmbedding):
    """Convolutional positional embedding."""

    def why_not_same(self) -> str | None:
        return named("padding", why_not_plain(self.padding, hf.WavLMSamePadLayer))

    def own_forward(self, hidden_states: Tensor) -> Tensor:
        return self.run_original(hidden_states)

    @or_original
    def forward(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """`[B, T, C]` frames, or packed ones `[1, N, C]`, to their positional embedding, the same shape."""
        return self.embed(hidden_states, packing)


@stands_in_for(hf.WavLMAttention)
class FastWavLMAttention(Attention, FastModule, hf.WavLMAttention):
    """Self-attention with the gated relative position bias."""

    returns_weights_unasked = RETURNS_WEIGHTS_UNASKED

    def compute_rel_bias(self, frames: int) -> Tensor:
        """As its base class's, without waiting for a device: theirs makes positions on the CPU."""
        positions = torch.arange(1 - frames, frames, device=self.rel_attn_embed.weight.device)
        values = self.rel_attn_embed(relative_positions_bucket(self, positions))  # [2T - 1, H]
        return values.t().to(accumulation_dtype(values.dtype)).contiguous()

    @or_original
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        index: int = 0,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `attend`. The layer's number, `index`, is unused, as in transformers."""
        return self.attend(hidden_states, attention_mask, position_bias, output_attentions)

    def run_original(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """transformers' forward, which takes and hands on the dense bias."""
        if position_bias is not None and position_bias.dim() == 2:
            position_bias = dense_bias(position_bias, hidden_states.shape[0])
        return super().run_original(hidden_states, attention_mask, position_bias, *args, **kwargs)


@stands_in_for(hf.WavLMFeedForward)
class FastWavLMFeedForward(FeedForward, FastModule, hf.WavLMFeedForward):
    """Linear layer, activation, linear layer."""

    @or_original
    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        return self.feed(hidden_states)


class _FastLayer(EncoderLayer, FastModule):
    def run_original(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> tuple:
        """transformers' forward, or what somebody put there. Its bias is the dense one, layer by layer."""
        attention, (batch, frames) = self.attention, hidden_states.shape[:2]
        if position_bias is not None and position_bias.dim() == 2:
            position_bias = dense_bias(position_bias, batch)
        elif position_bias is None and isinstance(attention, Attention):
            position_bias = attention.dense_position_bias(batch, frames)
        return super().run_original(hidden_states, attention_mask, position_bias, *args, **kwargs)

    def call_attention(
        self, hidden_states: Tensor, mask: Tensor | Packing | None, position_bias: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        return self.attention(hidden_states, attention_mask=mask, position_bias=position_bias, **kwargs)


def _outputs(hidden_states: Tensor, position_bias: Tensor, weights: Tensor | None, wanted: bool) -> tuple:
    outputs = (hidden_states, position_bias)
    return (*outputs, weights) if wanted and LAYERS_RETURN_ATTENTIONS else outputs


@stands_in_for(hf.WavLMEncoderLayer)
class FastWavLMEncoderLayer(_FastLayer, hf.WavLMEncoderLayer):
    """Post-norm layer."""

    norm_first = False

    @or_original
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        index: int = 0,
        **kwargs: object,
    ) -> tuple:
        """`[B, T, C]` frames, and the position bias for the next layer. Arguments as of the attention module."""
        outputs = self.run(hidden_states, attention_mask, position_bias, output_attentions, index=index)
        return _outputs(*outputs, output_attentions)


@stands_in_for(hf.WavLMEncoderLayerStableLayerNorm)
class FastWavLMEncoderLayerStableLayerNorm(_FastLayer, hf.WavLMEncoderLayerStableLayerNorm):
    """Pre-norm layer."""

    norm_first = True

    @or_original
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: object,
    ) -> tuple:
        """`[B, T, C]` frames, and the position bias for the next layer. Arguments as of the attention module."""
        outputs = self.run(hidden_states, attention_mask, position_bias, output_attentions)
        return _outputs(*outputs, output_attentions)


class _FastEncoder(FastModule):
    """What both encoders share; they differ in where the final layer norm stands."""

    def _enter(self, hidden_states: Tensor) -> Tensor:
        raise NotImplementedError

    def _leave(self, hidden_states: Tensor) -> Tensor:
        raise NotImplementedError

    def steps(self, signal: Signal) -> Iterator[Step]:
        signal.output_attentions = bool(getattr(self.config, "output_attentions", False))
        yield from steps_of(self.pos_conv_embed, signal)
        if isinstance(self, hf.WavLMEncoder):
            signal.passes(self.layer_norm)
        for layer in self.layers:
            signal.dense_bias = signal.dense_bias or not understands_rel_bias(layer)  # as `bias_for`
            yield from steps_of(layer, signal)

    def why_not_packed(self) -> str | None:
        """Why packed frames cannot come in; None when they can."""
        if not isinstance(self.pos_conv_embed, PositionalConv):
            return f"pos_conv_embed is called: it is a {type(self.pos_conv_embed).__name__}"
        for index, layer in enumerate(self.layers):
            reason = why_layer_not_packed(layer)
            if reason is not None:
                return f"layer {index}: {reason}"
        return None

    @or_original
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **kwargs: object,
    ) -> BaseModelOutput | tuple:
        """Encode frames.

        Args:
            hidden_states: `[B, T, C]`.
            attention_mask: `[B, T]` bool, True where a frame is valid, or None; of packed frames their packing.
            output_attentions: whether the layers return attention weights; None for what the config says.
            output_hidden_states: whether to collect every layer's input (transformers 4; 5 collects by hooks).
            return_dict: whether to return a `BaseModelOutput`.

        Returns:
            The last hidden states `[B, T, C]`, and what was collected.
        """
        if output_attentions is None:
            output_attentions = bool(getattr(self.config, "output_attentions", False))
        hidden_states = self._enter(self._embed_positions(hidden_states, attention_mask))
        collects_states = ENCODER_COLLECTS and output_hidden_states
        collects_weights = ENCODER_COLLECTS and output_attentions
        states: list[Tensor] = []
        weights: list[Tensor | None] = []
        position_bias = None
        for index, layer in enumerate(self.layers):
            if collects_states:
                states.append(hidden_states)
            if self._drops(index):
                weights.append(None)
                continue
            outputs = self._run(layer, index, hidden_states, attention_mask, position_bias, output_attentions)
            hidden_states, position_bias = outputs[:2]
            weights.append(outputs[2] if len(outputs) > 2 else None)
        hidden_states = self._leave(hidden_states)
        collected = (
            (*states, hidden_states) if collects_states else None,
            tuple(weights) if collects_weights else None,
        )
        if not return_dict:
            return tuple(x for x in (hidden_states, *collected) if x is not None)
        return BaseModelOutput(hidden_states, *collected)

    def _run(
        self,
        layer: nn.Module,
        index: int,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None,
        position_bias: Tensor | None,
        output_attentions: bool,
    ) -> tuple:
        position_bias = bias_for(layer, position_bias, hidden_states.shape[0])
        options = {"output_attentions": output_attentions}
        if isinstance(self, hf.WavLMEncoder):
            options["index"] = index
        if self.training and getattr(layer, "gradient_checkpointing", False):
            # Reentrant checkpointing sees positional arguments only; it would run every earlier layer again for a
            # bias whose history it did not cut off.
            return layer(hidden_states, attention_mask, position_bias, **options)
        return layer(hidden_states, attention_mask=attention_mask, position_bias=position_bias, **options)

    def _embed_positions(self, hidden_states: Tensor, mask: Tensor | Packing | None) -> Tensor:
        embedding, packing = self.pos_conv_embed, mask if isinstance(mask, Packing) else None
        if packing is None:
            hidden_states = zero_padding(hidden_states, mask)
        if isinstance(embedding, PositionalConv):
            return embedding.added_to(hidden_states, packing)
        return hidden_states + embedding(hidden_states)

    def _drops(self, index: int) -> bool:
        """Whether layer drop skips this layer; never the first, which owns the position bias."""
        if DRAWS_FOR_EVERY_LAYER:
            draw = torch.rand([])
        if not (self.training and index > 0 and self.config.layerdrop > 0):
            return False
        if not DRAWS_FOR_EVERY_LAYER:
            draw = torch.rand([])
        # Under ZeRO-3 and FSDP all processes must run every layer.
        return bool(draw < self.config.layerdrop) and not (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self))


@stands_in_for(hf.WavLMEncoder)
class FastWavLMEncoder(_FastEncoder, hf.WavLMEncoder):
    """Post-norm encoder: the layer norm stands before the layers."""

    def _enter(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.layer_norm(hidden_states))

    def _leave(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


@stands_in_for(hf.WavLMEncoderStableLayerNorm)
class FastWavLMEncoderStableLayerNorm(_FastEncoder, hf.WavLMEncoderStableLayerNorm):
    """Pre-norm encoder: the layer norm stands after the layers."""

    def _enter(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(hidden_states)

    def _leave(self, hidden_states: Tensor) -> Tensor:
        return self.layer_norm(hidden_states)


@stands_in_for(hf.TDNNLayer)
class FastTDNNLayer(TimeDelayLayer, FastModule, hf.TDNNLayer):
    """Time-delay layer of the x-vector head."""

    @or_original
    def forward(
        self, hidden_states: Tensor, packing: Packing | None = None, after: Packing | None = None
    ) -> Tensor:
        """`[B, T, C]` to `[B, T', C']`; packed frames with their packing before and after."""
        return self.convolve(hidden_states, packing, after)


# Each stands in for a class of transformers'.
MODULES = (
    FastWavLMFeatureEncoder,
    FastWavLMGroupNormConvLayer,
    FastWavLMLayerNormConvLayer,
    FastWavLMNoLayerNormConvLayer,
    FastWavLMFeatureProjection,
    FastWavLMPositionalConvEmbedding,
    FastWavLMEncoder,
    FastWavLMEncoderStableLayerNorm,
    FastWavLMEncoderLayer,
    FastWavLMEncoderLayerStableLayerNorm,
    FastWavLMAttention,
    FastWavLMFeedForward,
    FastTDNNLayer,
)
