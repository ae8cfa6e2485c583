"""Self-attention with the gated relative position bias."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._private import hooks_of
from ..derived import concatenated
from ..ops._define import accumulation_dtype
from ..ops.gated_attention import bias_rows
from ._masks import Keys, keys_of
from ._packing import Packing
from ._plain import is_capture, why_mixed, why_not_plain
from ._steps import Signal, Step, linear_step, named, why_not_linear


def understands_rel_bias(module: nn.Module) -> bool:
    """Whether the attention in `module` takes the compact bias."""
    return isinstance(module, Attention) or any(isinstance(m, Attention) for m in module.modules())


def dense_bias(rel_bias: Tensor, batch: int) -> Tensor:
    """The compact bias `[H, 2T - 1]` as transformers' modules hand it on, `[B·H, T, T]`."""
    frames = (rel_bias.shape[1] + 1) // 2
    return bias_rows(rel_bias, 0, frames).repeat(batch, 1, 1)


def bias_for(module: nn.Module, position_bias: Tensor | None, batch: int) -> Tensor | None:
    """The bias in the form that `module` takes: a module that is not ours gets the dense one."""
    if position_bias is None or position_bias.dim() != 2 or understands_rel_bias(module):
        return position_bias
    return dense_bias(position_bias, batch)


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def why_dense(position_bias: Tensor | None, keys: Keys | None) -> str | None:
    """Why the bias or the mask of an attention wants all weights in memory; None when neither does."""
    if position_bias is not None and position_bias.dim() != 2:
        return "the position bias that it gets is dense"
    return None if keys is not None else "the mask is not ones followed by zeros"


class Attention:
    """Multi-head attention whose bias stays one vector per head.

    The bias goes from layer to layer as `rel_bias` `[H, 2T - 1]`, entry `j - i + T - 1`, where the families hand on a
    dense `[B·H, T, T]`; a dense one is taken as well.

    Made of `q_proj`, `k_proj`, `v_proj`, `out_proj`, `gru_rel_pos_linear`, `gru_rel_pos_const` and, in the first layer,
    `rel_attn_embed` and `compute_bias(queries, keys)`; `num_heads`, `head_dim`, `scaling`, `attention_dropout`, which
    is a rate, and `gate_heads`, how many gate and bias have.
    """

    original_makes_dense_bias = True
    # Whether forward returns attention weights that nobody asked for, to whoever hooks the module.
    returns_weights_unasked = False

    @property
    def attention_dropout(self) -> float:
        return self.dropout

    @property
    def gate_heads(self) -> int:
        return self.num_heads

    def _why_not_qkv(self) -> str | None:
        for name in _PROJECTIONS:
            reason = why_not_linear(name, getattr(self, name))
            if reason is not None:
                return reason
        return None

    def _why_not_gate(self) -> str | None:
        return why_not_linear("gru_rel_pos_linear", self.gru_rel_pos_linear)

    def parameters_of_op(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of the projections, as `ops.encoder_layer` takes them."""
        linears = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        return [linear.weight for linear in linears], [linear.bias for linear in linears]

    def _why_not_out(self) -> str | None:
        return why_not_linear("out_proj", self.out_proj)

    def _why_not_fused(self) -> str | None:
        if self.returns_weights_unasked and any(not is_capture(hook) for hook in hooks_of(self)[0].values()):
            return "a forward hook may read the attention weights"
        return self.why_not_rel_bias()

    def why_not_packed(self) -> str | None:
        """Why packed frames cannot be attended; None when they can."""
        return self._why_not_fused()

    def why_not_fused(self) -> str | None:
        """Why the attention cannot be a part of its layer's op; None when it can."""
        if self.training and self.attention_dropout > 0:
            return "its dropout is on"
        reason = self.why_called(but_captures=True) or self._why_not_qkv() or self._why_not_gate()
        return reason or self._why_not_fused() or self._why_not_out()

    def steps(self, signal: Signal) -> Iterator[Step]:
        signal.dense_bias = signal.dense_bias or self.why_not_rel_bias() is not None
        x = signal.frames(self, self.embed_dim)
        yield from self._projections(x)
        yield self._gate(x)
        q = signal.frames(self, self.num_heads, self.head_dim)
        gate = q[..., 0].mT.to(accumulation_dtype(q.dtype))
        position_bias = signal.position_bias(self.gate_heads, gate)
        yield self._attend(q, q, q, gate, position_bias, None, signal.output_attentions)
        yield self._leave(q.flatten(2))

    def attend(
        self,
        hidden_states: Tensor,
        mask: Tensor | Packing | None,
        position_bias: Tensor | None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Attention over the frames.

        Args:
            hidden_states: `[B, T, C]`.
            mask: `[B, T]`, 1 or True where a frame counts as a key, or None; of packed frames their packing.
            position_bias: what an earlier layer returned, or None to build it from `rel_attn_embed`.
            output_attentions: whether to return weights.

        Returns:
            The output `[B, T, C]`; the weights `[B, H, T, T]` averaged over heads (transformers does so), or None; the
            position bias for the next layer.
        """
        if position_bias is None:
            position_bias = self.position_bias(hidden_states, mask)
        q, k, v = self._project(hidden_states)
        gate = self._gate(hidden_states).run().to(accumulation_dtype(q.dtype))
        out, weights = self._attend(q, k, v, gate, position_bias, mask, output_attentions).run()
        weights = weights if output_attentions or self.returns_weights_unasked else None
        return self._leave(out.flatten(2)).run(), weights, position_bias

    def why_not_rel_bias(self) -> str | None:
        embedding = getattr(self, "rel_attn_embed", None)  # the first layer alone has one
        return None if embedding is None else named("rel_attn_embed", why_not_plain(embedding, nn.Embedding))

    def position_bias(self, hidden_states: Tensor, mask: Tensor | Packing | None) -> Tensor:
        """The compact bias; the dense one where the embedding may answer for every pair of frames on its own."""
        batch, frames = hidden_states.shape[:2]
        if self.why_not_rel_bias() is None:
            return self.compute_rel_bias(mask.longest if isinstance(mask, Packing) else frames)
        return self.dense_position_bias(batch, frames)

    def dense_position_bias(self, batch: int, frames: int) -> Tensor:
        """The bias `[B·H, T, T]`, as transformers' forward makes it."""
        return self.compute_bias(frames, frames).repeat(batch, 1, 1)

    def compute_rel_bias(self, frames: int) -> Tensor:
        """The bias `[H, 2T - 1]` for T frames, entry `j - i + T - 1`: the first column and row of the dense one."""
        column, row = self.compute_bias(frames, 1)[..., 0], self.compute_bias(1, frames)[:, 0]
        bias = torch.cat([column.flip(1)[:, :-1], row], 1)
        return bias.to(accumulation_dtype(bias.dtype))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `[B, T, H, D]` each: views into one product where the projections are plain."""
        heads = (self.num_heads, self.head_dim)
        projected = [step.run() for step in self._projections(x)]
        if len(projected) == 1:
            return projected[0].unflatten(-1, (3, *heads)).unbind(2)
        q, k, v = (p.unflatten(-1, heads) for p in projected)
        return q, k, v

    def _projections(self, x: Tensor) -> list[Step]:
        """One product where the three projections are plain, else each of them."""
        if self._why_not_qkv() is None:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            weights, biases = tuple(p.weight for p in projections), tuple(p.bias for p in projections)
            if why_mixed(x, *weights, *biases) is None:
                return [Step("linear_act", None, lambda: self._merged(x, weights, biases))]
        return [linear_step(name, getattr(self, name), x) for name in _PROJECTIONS]

    def _merged(self, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> Tensor:
        weight = concatenated("qkv weight", weights, steady=not self.training)
        bias = concatenated("qkv bias", biases, steady=not self.training)
        return ops.linear_act(x, weight, bias)

    def _gate(self, x: Tensor) -> Step:
        """The gate `[B, H, T]`, from the attention module's input."""
        const = self.gru_rel_pos_const.view(-1)
        projection = self.gru_rel_pos_linear

        def called() -> Tensor:
            heads = x.unflatten(-1, (self.gate_heads, self.head_dim)).transpose(1, 2)  # [B, H, T, D]
            projected = projection(heads).unflatten(-1, (2, 4)).sum(-1)
            a, b = projected.sigmoid().unbind(-1)
            return a * (b * const[:, None] - 1.0) + 2.0

        def fused() -> Tensor:
            return ops.position_gate(x, projection.weight, projection.bias, const)

        return Step("position_gate", self._why_not_gate(), fused, called)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        position_bias: Tensor,
        mask: Tensor | Packing | None,
        output_attentions: bool,
    ) -> Step:
        """What the heads attend to `[B, T, H, D]`, and weights `[B, H, T, T]` where they come into being."""
        keys = keys_of(mask)
        refusal = "attention weights are asked for" if output_attentions else None
        refusal = refusal or self._why_not_fused() or why_dense(position_bias, keys)

        def fused() -> tuple[Tensor, None]:
            options = (self.attention_dropout if self.training else 0.0, self.scaling, keys.offsets)
            rel_bias = position_bias.to(gate.dtype)
            return ops.gated_attention(q, k, v, gate, rel_bias, keys.lengths, *options), None

        def called() -> tuple[Tensor, Tensor]:
            return self._attend_dense(q, k, v, gate, position_bias, mask)

        return Step("gated_attention", refusal, fused, called)

    def _leave(self, x: Tensor) -> Step:
        return linear_step("out_proj", self.out_proj, x)

    def _attend_dense(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, position_bias: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention that has all weights in memory: `[B, T, H, D]`, and their mean over heads `[B, H, T, T]`."""
        batch, frames = q.shape[:2]
        if position_bias.dim() == 2:
            bias = bias_rows(position_bias, 0, frames)
        else:
            bias = position_bias.view(batch, self.num_heads, frames, frames)
        queries, keys, values = (x.transpose(1, 2).to(gate.dtype) for x in (q, k, v))
        scores = (queries * self.scaling) @ keys.mT + gate[..., None] * bias
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask.ne(1)[:, None, None], float("-inf"))
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        out = (weights @ values).transpose(1, 2).to(q.dtype)
        mean = weights.mean(1, keepdim=True).to(q.dtype)
        return out, mean.expand(-1, self.num_heads, -1, -1)
