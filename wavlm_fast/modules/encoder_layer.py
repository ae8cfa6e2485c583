"""One transformer layer, with the layer norms after its two halves, or before them (stable)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..ops._define import accumulation_dtype, needs_grad
from ._kept import kept
from ._masks import keys_of
from ._packing import Packing
from ._plain import fused_activation, why_mixed
from ._steps import (
    Signal,
    Step,
    add_norm_step,
    linear_step,
    named,
    parts_of,
    steps_of,
    why_not_dropout,
    why_not_linear,
    why_not_norm,
)
from .attention import Attention, bias_for, understands_rel_bias, why_dense

_Parameters = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class FeedForward:
    """Linear layer, activation, linear layer.

    Made of `intermediate_dense`, `intermediate_act_fn`, `intermediate_dropout`, `output_dense`, `output_dropout`.
    """

    def steps(self, signal: Signal) -> Iterator[Step]:
        first = self._expand(signal.frames(self.intermediate_dense, getattr(self.intermediate_dense, "in_features", 0)))
        yield first
        if first.refusal is None and fused_activation(self.intermediate_act_fn) is None:
            name = getattr(self.intermediate_act_fn, "__name__", type(self.intermediate_act_fn).__name__)
            yield Step("linear_act epilogue", f"intermediate_act_fn is called: {name} is not fused")
        signal.passes(self.intermediate_dense)
        yield self._contract(signal.frames(self.output_dense, getattr(self.output_dense, "in_features", 0)))

    def _expand(self, x: Tensor) -> Step:
        """The first linear layer, with the activation where that can be fused."""
        activation = fused_activation(self.intermediate_act_fn) or "none"
        return linear_step("intermediate_dense", self.intermediate_dense, x, activation)

    def _contract(self, x: Tensor) -> Step:
        return linear_step("output_dense", self.output_dense, x)

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

    def feed(self, hidden_states: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        first = self._expand(hidden_states)
        hidden_states = first.run()
        if first.refusal is not None or fused_activation(self.intermediate_act_fn) is None:
            hidden_states = self.intermediate_act_fn(hidden_states)
        hidden_states = self.intermediate_dropout(hidden_states)
        return self.output_dropout(self._contract(hidden_states).run())


class EncoderLayer:
    """As one op while no gradient is wanted and no dropout is on, else step by step.

    Made of `attention`, `attention_half_dropout`, `layer_norm`, `feed_forward`, `final_layer_norm`. With `norm_first`
    each half's input is normed and its sum goes on as it is; else each half's sum is normed.
    """

    norm_first: bool
    original_makes_dense_bias = True

    @property
    def attention_half_dropout(self) -> nn.Module:
        return self.dropout

    def why_not_packed(self) -> str | None:
        """Why packed frames cannot come in; None when they can."""
        for name, cls in (("attention", Attention), ("feed_forward", FeedForward)):
            if not isinstance(getattr(self, name), cls):
                return f"{name} is called: it is a {type(getattr(self, name)).__name__}"
        return named("attention", self.attention.why_not_packed())

    def _why_not_whole(self) -> str | None:
        for name, cls in (("attention", Attention), ("feed_forward", FeedForward)):
            part = getattr(self, name)
            reason = part.why_not_fused() if isinstance(part, cls) else f"it is a {type(part).__name__}"
            if reason is not None:
                return f"{name} is called: {reason}"
        reason = named("layer_norm", why_not_norm(self.layer_norm))
        reason = reason or named("final_layer_norm", why_not_norm(self.final_layer_norm))
        return reason or named("dropout", why_not_dropout(self.attention_half_dropout))

    def _as_one(self) -> tuple[str | None, _Parameters | None]:
        """Why the layer is no single op, whatever comes to it, or None and the parameters that the op takes."""
        refusal = self._why_not_whole()
        return refusal, self._parameters_of_op() if refusal is None else None

    def _parameters_of_op(self) -> _Parameters:
        """Weights, biases, gate and norms as `ops.encoder_layer` takes them, but for the shape of the gate's const."""
        attention, feed_forward = self.attention, self.feed_forward
        weights, biases = attention.parameters_of_op()
        linears = (feed_forward.intermediate_dense, feed_forward.output_dense)
        gate = attention.gru_rel_pos_linear
        norms = (self.layer_norm, self.final_layer_norm)
        return (
            weights + [linear.weight for linear in linears],
            biases + [linear.bias for linear in linears],
            [gate.weight, gate.bias, attention.gru_rel_pos_const],
            [parameter for norm in norms for parameter in (norm.weight, norm.bias)],
        )

    def _options(self) -> dict[str, Any]:
        return {
            "eps": [self.layer_norm.eps, self.final_layer_norm.eps],
            "scale": self.attention.scaling,
            "activation": fused_activation(self.feed_forward.intermediate_act_fn),
            "norm_first": self.norm_first,
        }

    def steps(self, signal: Signal) -> Iterator[Step]:
        norms = [norm for norm in (self.layer_norm, self.final_layer_norm) if isinstance(norm, nn.LayerNorm)]
        attention, x = self.attention, signal.frames(self, *(norms[0].normalized_shape if norms else ()))
        owns_bias = getattr(attention, "rel_attn_embed", None) is not None
        position_bias = None if owns_bias else signal.position_bias(getattr(attention, "num_heads", 1), x)
        whole = self._whole(x, None, position_bias, signal.output_attentions)
        if whole.refusal is None:
            yield whole
        else:
            yield from parts_of(whole, self._why_not_whole(), self._steps_of_parts(x, signal))

    def _steps_of_parts(self, x: Tensor, signal: Signal) -> Iterator[Step]:
        signal.dense_bias = signal.dense_bias or not understands_rel_bias(self.attention)  # as `bias_for`
        yield from steps_of(self.attention, signal)
        yield self._first_sum(x, x)
        yield from steps_of(self.feed_forward, signal)
        if not self.norm_first:
            yield self._second_sum(x, x)

    def _whole(
        self,
        hidden_states: Tensor,
        mask: Tensor | Packing | None,
        position_bias: Tensor | None,
        output_attentions: bool,
    ) -> Step:
        """The layer as one op: its output and the position bias."""
        refusal, parameters = self._why_not_these(hidden_states, position_bias, output_attentions), None
        if refusal is None:
            refusal, parameters = kept(self, self._as_one)
        if refusal is not None:
            return Step("encoder_layer", refusal)
        keys, attention = keys_of(mask), self.attention
        weights, biases, gate, norms = parameters
        embedding = () if position_bias is not None else (attention.rel_attn_embed.weight,)
        if needs_grad(*weights, *biases, *gate, *norms, *embedding):
            return Step("encoder_layer", "a gradient is wanted")

        def fused() -> tuple[Tensor, Tensor]:
            bias = attention.position_bias(hidden_states, mask) if position_bias is None else position_bias
            rel_bias = bias.to(accumulation_dtype(weights[0].dtype))
            options = {**self._options(), "offsets": keys.offsets}
            parts = (weights, biases, [*gate[:2], gate[2].view(-1)], norms)
            return ops.encoder_layer(hidden_states, rel_bias, keys.lengths, *parts, **options), bias

        refusal = why_dense(position_bias, keys) or why_mixed(hidden_states, *weights, *biases)
        return Step("encoder_layer", refusal, fused)

    @staticmethod
    def _why_not_these(x: Tensor, position_bias: Tensor | None, output_attentions: bool) -> str | None:
        """Why the op cannot run on what comes to the layer, as far as that is seen at once."""
        if output_attentions:
            return "attention weights are asked for"
        if x.device.type != "cpu":
            return "off the CPU it is made of its parts"
        return "a gradient is wanted" if needs_grad(x, position_bias) else None

    def _first_sum(self, attended: Tensor, hidden_states: Tensor) -> Step:
        """What the attention's half gives, normed for, or in a stable layer before, what comes next."""
        if self.norm_first:
            return add_norm_step("final_layer_norm", attended, hidden_states, self.final_layer_norm)
        return add_norm_step("layer_norm", attended, hidden_states, self.layer_norm, keep_sum=False)

    def _second_sum(self, fed: Tensor, hidden_states: Tensor) -> Step:
        """What the feed-forward's half gives; in a stable layer a plain sum."""
        return add_norm_step("final_layer_norm", fed, hidden_states, self.final_layer_norm, keep_sum=False)

    def run(
        self,
        hidden_states: Tensor,
        mask: Tensor | Packing | None,
        position_bias: Tensor | None,
        output_attentions: bool = False,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The layer's output `[B, T, C]`, the position bias, attention weights or None; arguments as of `attend`."""
        whole = self._whole(hidden_states, mask, position_bias, output_attentions)
        if whole.refusal is None:
            return *whole.fused(), None
        position_bias = bias_for(self.attention, position_bias, hidden_states.shape[0])
        return self.run_parts(hidden_states, mask, position_bias, output_attentions=output_attentions, **kwargs)

    def run_parts(
        self, hidden_states: Tensor, mask: Tensor | Packing | None, position_bias: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `run`, step by step, on frames in whatever order `call_attention` takes them."""
        normed = self.layer_norm(hidden_states) if self.norm_first else hidden_states
        attended, weights, position_bias = self.call_attention(normed, mask, position_bias, **kwargs)
        attended = self.attention_half_dropout(attended)
        hidden_states, normed = self._first_sum(attended, hidden_states).run()
        if self.norm_first:
            return hidden_states + self.feed_forward(normed), position_bias, weights
        _, hidden_states = self._second_sum(self.feed_forward(normed), normed).run()
        return hidden_states, position_bias, weights

    def call_attention(
        self, hidden_states: Tensor, mask: Tensor | Packing | None, position_bias: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The attention module's output, weights or None, and position bias."""
        raise NotImplementedError


def why_layer_not_packed(layer: nn.Module) -> str | None:
    """Why a layer, perhaps inside of what shards or wraps it, cannot take packed frames; None when it can."""
    inside = next((module for module in layer.modules() if isinstance(module, EncoderLayer)), None)
    return f"it is a {type(layer).__name__}" if inside is None else inside.why_not_packed()
