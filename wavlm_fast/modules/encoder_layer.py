"""One transformer layer, with the layer norms after (`WavLMEncoderLayer`) or before (stable) its two halves."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers.models.wavlm import modeling_wavlm as hf

from ._plain import fused_activation
from ._steps import FastModule, Plan, add_norm, can_fuse_linear, linear, plan_add_norm, plan_linear
from ._versions import LAYERS_RETURN_ATTENTIONS
from .attention import bias_for


class FastWavLMFeedForward(FastModule, hf.WavLMFeedForward):
    """Linear layer, activation, linear layer."""

    def plan(self) -> Iterator[Plan]:
        activation = fused_activation(self.intermediate_act_fn)
        first = plan_linear("intermediate_dense", self.intermediate_dense, activation or "none")
        yield first
        if first.refusal is None and activation is None:
            name = getattr(self.intermediate_act_fn, "__name__", type(self.intermediate_act_fn).__name__)
            yield Plan("linear_act epilogue", f"intermediate_act_fn is called: {name} is not fused")
        yield plan_linear("output_dense", self.output_dense)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        activation = fused_activation(self.intermediate_act_fn)
        if activation is not None and can_fuse_linear(self.intermediate_dense, hidden_states):
            hidden_states = linear(self.intermediate_dense, hidden_states, activation)
        else:
            hidden_states = self.intermediate_act_fn(linear(self.intermediate_dense, hidden_states))
        hidden_states = self.intermediate_dropout(hidden_states)
        return self.output_dropout(linear(self.output_dense, hidden_states))


class _FastLayer(FastModule):
    def _attend(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_bias: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The attention module's output, weights or None, and position bias."""
        position_bias = bias_for(self.attention, position_bias, hidden_states.shape[0])
        out, weights, position_bias = self.attention(
            hidden_states, attention_mask=attention_mask, position_bias=position_bias, **kwargs
        )
        return self.dropout(out), weights, position_bias


def _outputs(hidden_states: Tensor, position_bias: Tensor, weights: Tensor | None, wanted: bool) -> tuple:
    outputs = (hidden_states, position_bias)
    return (*outputs, weights) if wanted and LAYERS_RETURN_ATTENTIONS else outputs


class FastWavLMEncoderLayer(_FastLayer, hf.WavLMEncoderLayer):
    """Post-norm layer: each half's sum is normed."""

    def plan(self) -> Iterator[Plan]:
        yield plan_add_norm("layer_norm", self.layer_norm)
        yield plan_add_norm("final_layer_norm", self.final_layer_norm)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        index: int = 0,
        **kwargs: object,
    ) -> tuple:
        """`[B, T, C]` frames, and the position bias for the next layer. Arguments as of the attention module."""
        attended, weights, position_bias = self._attend(
            hidden_states, attention_mask, position_bias, output_attentions=output_attentions, index=index
        )
        _, hidden_states = add_norm(attended, hidden_states, self.layer_norm, keep_sum=False)
        fed = self.feed_forward(hidden_states)
        _, hidden_states = add_norm(fed, hidden_states, self.final_layer_norm, keep_sum=False)
        return _outputs(hidden_states, position_bias, weights, output_attentions)


class FastWavLMEncoderLayerStableLayerNorm(_FastLayer, hf.WavLMEncoderLayerStableLayerNorm):
    """Pre-norm layer: each half's input is normed, its sum goes on as it is."""

    def plan(self) -> Iterator[Plan]:
        yield plan_add_norm("final_layer_norm", self.final_layer_norm)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: object,
    ) -> tuple:
        """`[B, T, C]` frames, and the position bias for the next layer. Arguments as of the attention module."""
        attended, weights, position_bias = self._attend(
            self.layer_norm(hidden_states), attention_mask, position_bias, output_attentions=output_attentions
        )
        hidden_states, normed = add_norm(attended, hidden_states, self.final_layer_norm)
        hidden_states = hidden_states + self.feed_forward(normed)
        return _outputs(hidden_states, position_bias, weights, output_attentions)
