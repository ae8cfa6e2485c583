"""One transformer layer, with the layer norms after (`WavLMEncoderLayer`) or before (stable) its two halves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.wavlm import modeling_wavlm as hf

from .. import ops
from ..ops._define import accumulation_dtype, needs_grad
from ._masks import keys_of
from ._originals import or_original, stands_in_for
from ._packing import Packing
from ._plain import fused_activation, same_dtype
from ._steps import (
    FastModule,
    Plan,
    add_norm,
    can_fuse_linear,
    frames_like,
    has_kernel,
    linear,
    named,
    plan_add_norm,
    plan_linear,
    why_not_dropout,
    why_not_linear,
    why_not_norm,
)
from ._versions import LAYERS_RETURN_ATTENTIONS
from .attention import FastWavLMAttention, bias_for, dense_bias


@stands_in_for(hf.WavLMFeedForward)
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

    def why_not_fused(self) -> str | None:
        """Why the feed-forward cannot be a part of its layer's op; None when it can."""
        reason = self.why_called()
        for name in ("intermediate_dense", "output_dense"):
            reason = reason or why_not_linear(name, getattr(self, name))
        if reason is not None:
            return reason
        for name in ("intermediate_dropout", "output_dropout"):
            reason = named(name, why_not_dropout(getattr(self, name)))
            if reason is not None:
                return reason
        return None if fused_activation(self.intermediate_act_fn) else "its activation is not fused"

    @or_original
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
    """What both kinds of layer share: as one op while no gradient is wanted and no dropout is on, else step by step."""

    norm_first: bool

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
        elif position_bias is None and isinstance(attention, FastWavLMAttention):
            position_bias = attention.dense_position_bias(batch, frames)
        return super().run_original(hidden_states, attention_mask, position_bias, *args, **kwargs)

    def why_not_packed(self) -> str | None:
        """Why packed frames cannot come in; None when they can."""
        for name, cls in (("attention", FastWavLMAttention), ("feed_forward", FastWavLMFeedForward)):
            if not isinstance(getattr(self, name), cls):
                return f"{name} is called: it is a {type(getattr(self, name)).__name__}"
        return named("attention", self.attention.why_not_packed())

    def _why_not_whole(self) -> str | None:
        for name, cls in (("attention", FastWavLMAttention), ("feed_forward", FastWavLMFeedForward)):
            part = getattr(self, name)
            reason = part.why_not_fused() if isinstance(part, cls) else f"it is a {type(part).__name__}"
            if reason is not None:
                return f"{name} is called: {reason}"
        reason = named("layer_norm", why_not_norm(self.layer_norm))
        reason = reason or named("final_layer_norm", why_not_norm(self.final_layer_norm))
        return reason or named("dropout", why_not_dropout(self.dropout))

    def _parameters_of_op(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Weights, biases, gate and norms as `ops.encoder_layer` takes them."""
        attention, feed_forward = self.attention, self.feed_forward
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
        linears += (feed_forward.intermediate_dense, feed_forward.output_dense)
        gate = attention.gru_rel_pos_linear
        norms = (self.layer_norm, self.final_layer_norm)
        return (
            [linear.weight for linear in linears],
            [linear.bias for linear in linears],
            [gate.weight, gate.bias, attention.gru_rel_pos_const.view(-1)],
            [parameter for norm in norms for parameter in (norm.weight, norm.bias)],
        )

    def _options(self) -> dict[str, Any]:
        return {
            "eps": [self.layer_norm.eps, self.final_layer_norm.eps],
            "scale": self.attention.scaling,
            "activation": fused_activation(self.feed_forward.intermediate_act_fn),
            "norm_first": self.norm_first,
        }

    def plan(self) -> Iterator[Plan]:
        if self._runs_whole():
            yield Plan("encoder_layer", None, self._example)
        else:
            yield from self._steps()

    def planned(self) -> Iterator[nn.Module]:
        return iter((self.attention, self.feed_forward) if self._runs_whole() else ())

    def _steps(self) -> Iterator[Plan]:
        raise NotImplementedError

    def _runs_whole(self) -> bool:
        wants_gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if wants_gradient or self._why_not_whole() is not None:
            return False
        return has_kernel("encoder_layer", self._example())

    def _example(self) -> tuple:
        parameters = self._parameters_of_op()
        x = frames_like(parameters[0][0], self.attention.embed_dim)
        dtype = accumulation_dtype(x.dtype)
        rel_bias = x.new_empty((self.attention.num_heads, 2 * x.shape[1] - 1), dtype=dtype)
        return x, rel_bias, None, *parameters, *self._options().values()

    def _run_whole(
        self, hidden_states: Tensor, attention_mask: Tensor | Packing | None, position_bias: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The layer's output and the position bias; None where it has to run step by step."""
        if hidden_states.device.type != "cpu" or self._why_not_whole() is not None:
            return None
        parameters = self._parameters_of_op()
        if needs_grad(hidden_states, position_bias, *(p for group in parameters for p in group)):
            return None
        if position_bias is None:
            position_bias = self.attention.position_bias(hidden_states, attention_mask)
        keys = keys_of(attention_mask)
        fits = position_bias.dim() == 2 and keys is not None
        if not fits or not same_dtype(hidden_states, *parameters[0], *parameters[1]):
            return None
        rel_bias = position_bias.to(accumulation_dtype(parameters[0][0].dtype))
        options = {**self._options(), "offsets": keys.offsets}
        return ops.encoder_layer(hidden_states, rel_bias, keys.lengths, *parameters, **options), position_bias

    def _attend(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None,
        position_bias: Tensor | None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The attention module's output, weights or None, and position bias."""
        position_bias = bias_for(self.attention, position_bias, hidden_states.shape[0])
        out, weights, position_bias = self.attention(
            hidden_states, attention_mask=attention_mask, position_bias=position_bias, **kwargs
        )
        return self.dropout(out), weights, position_bias


def why_layer_not_packed(layer: nn.Module) -> str | None:
    """Why a layer, perhaps inside of what shards or wraps it, cannot take packed frames; None when it can."""
    inside = next((module for module in layer.modules() if isinstance(module, _FastLayer)), None)
    return f"it is a {type(layer).__name__}" if inside is None else inside.why_not_packed()


def _outputs(hidden_states: Tensor, position_bias: Tensor, weights: Tensor | None, wanted: bool) -> tuple:
    outputs = (hidden_states, position_bias)
    return (*outputs, weights) if wanted and LAYERS_RETURN_ATTENTIONS else outputs


@stands_in_for(hf.WavLMEncoderLayer)
class FastWavLMEncoderLayer(_FastLayer, hf.WavLMEncoderLayer):
    """Post-norm layer: each half's sum is normed."""

    norm_first = False

    def _steps(self) -> Iterator[Plan]:
        yield plan_add_norm("layer_norm", self.layer_norm)
        yield plan_add_norm("final_layer_norm", self.final_layer_norm)

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
        whole = None if output_attentions else self._run_whole(hidden_states, attention_mask, position_bias)
        if whole is not None:
            return whole
        attended, weights, position_bias = self._attend(
            hidden_states, attention_mask, position_bias, output_attentions=output_attentions, index=index
        )
        _, hidden_states = add_norm(attended, hidden_states, self.layer_norm, keep_sum=False)
        fed = self.feed_forward(hidden_states)
        _, hidden_states = add_norm(fed, hidden_states, self.final_layer_norm, keep_sum=False)
        return _outputs(hidden_states, position_bias, weights, output_attentions)


@stands_in_for(hf.WavLMEncoderLayerStableLayerNorm)
class FastWavLMEncoderLayerStableLayerNorm(_FastLayer, hf.WavLMEncoderLayerStableLayerNorm):
    """Pre-norm layer: each half's input is normed, its sum goes on as it is."""

    norm_first = True

    def _steps(self) -> Iterator[Plan]:
        yield plan_add_norm("final_layer_norm", self.final_layer_norm)

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
        whole = None if output_attentions else self._run_whole(hidden_states, attention_mask, position_bias)
        if whole is not None:
            return whole
        attended, weights, position_bias = self._attend(
            self.layer_norm(hidden_states), attention_mask, position_bias, output_attentions=output_attentions
        )
        hidden_states, normed = add_norm(attended, hidden_states, self.final_layer_norm)
        hidden_states = hidden_states + self.feed_forward(normed)
        return _outputs(hidden_states, position_bias, weights, output_attentions)
