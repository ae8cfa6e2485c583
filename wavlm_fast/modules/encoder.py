"""The transformer: positional embedding and layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.wavlm import modeling_wavlm as hf

from .._private import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from ._masks import zero_padding
from ._originals import or_original, stands_in_for
from ._packing import Packing
from ._steps import FastModule, Signal, Step, steps_of
from ._versions import DRAWS_FOR_EVERY_LAYER, ENCODER_COLLECTS
from .attention import bias_for, understands_rel_bias
from .encoder_layer import why_layer_not_packed
from .positional_conv import FastWavLMPositionalConvEmbedding


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
        if not isinstance(self.pos_conv_embed, FastWavLMPositionalConvEmbedding):
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
        states, weights, position_bias = [], [], None
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
        if isinstance(embedding, FastWavLMPositionalConvEmbedding):
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
