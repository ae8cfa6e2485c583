"""What a careful user would do to transformers' WavLM without this package: a library's attention, and torch.compile.

The models here have transformers' own parameters and return no attention weights.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.models.wavlm import modeling_wavlm as hf

NO_FLEX_GRADIENT = "FlexAttention computes no gradients on CPUs"
_COMPILATIONS = 1000  # of one function, in a process that measures many shapes


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, gated: Tensor, valid: Tensor | None, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """torch's `scaled_dot_product_attention` with the dense gated bias as its mask.

    Args:
        q, k, v: `[B, T, H, D]`.
        gated: gate times bias, `[B, H, T, T]`, the dtype of `q`.
        valid: `[B, T]` bool, the frames that count as keys, or None for all.
        scale: of the scores.
        dropout_p: of the weights.

    Returns:
        `[B, T, H, D]`, contiguous.
    """
    if valid is not None:
        gated = gated.masked_fill(~valid[:, None, None], float("-inf"))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=gated, dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2).contiguous()


def flex(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rel_bias: Tensor, blocks: BlockMask | None, scale: float
) -> Tensor:
    """torch's FlexAttention, which adds gate times bias to every score.

    On CPUs it runs in float32, bfloat16 and float16, for inference only.

    Args:
        q, k, v: `[B, T, H, D]`.
        gate: `[B, H, T]`.
        rel_bias: `[H, 2T - 1]`, entry `j - i + T - 1`.
        blocks: of `block_mask`, or None where all frames count as keys.
        scale: of the scores.

    Returns:
        `[B, T, H, D]`, contiguous.
    """
    return _compiled_flex()(q, k, v, gate, rel_bias, blocks, scale)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rel_bias: Tensor, blocks: BlockMask | None, scale: float
) -> Tensor:
    frames = q.shape[1]

    def with_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + gate[b, h, i] * rel_bias[h, j - i + frames - 1]

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = flex_attention(q, k, v, score_mod=with_bias, block_mask=blocks, scale=scale)
    return out.transpose(1, 2).contiguous()


@cache
def _compiled_flex() -> Any:
    # Uncompiled it has all scores in memory, which is no use to anybody.
    never_uncompiled()
    return torch.compile(_flex, dynamic=False, fullgraph=True)


def block_mask(lengths: Tensor, frames: int) -> BlockMask:
    """The mask that hides keys past each utterance's length `[B]` from `flex`. Built once per forward."""

    def is_key(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < lengths[b]

    return create_block_mask(is_key, len(lengths), None, frames, frames, device=lengths.device)


def never_uncompiled() -> None:
    """From the ninth shape on torch would quietly run what it was to compile as it is: for this process that is an
    error, and many more shapes are allowed."""
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = _COMPILATIONS
    config.fail_on_recompile_limit_hit = True


class SdpaAttention(hf.WavLMAttention):
    """transformers' attention with `sdpa` between its projections; the bias stays as dense as transformers has it."""

    def torch_multi_head_self_attention(
        self, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor, *rest: object
    ) -> tuple[Tensor, None]:
        batch, frames, _ = hidden_states.shape
        q, k, v = _project(self, hidden_states)
        gated = gated_position_bias.view(batch, self.num_heads, frames, frames)
        valid = None if attention_mask is None else attention_mask.eq(1)
        out = sdpa(q, k, v, gated, valid, self.scaling, self.dropout if self.training else 0.0)
        return self.out_proj(out.flatten(2)), None


class FlexBias(NamedTuple):
    """What `FlexAttention` hands on from layer to layer in place of transformers' dense bias."""

    rel_bias: Tensor  # [H, 2T - 1]
    blocks: BlockMask | None


class FlexAttention(hf.WavLMAttention):
    """transformers' attention with `flex` between its projections, and one bias vector per head.

    Raises:
        ValueError: dropout is on, which FlexAttention does not have.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: FlexBias | None = None,
        output_attentions: bool = False,
        index: int = 0,
        **kwargs: object,
    ) -> tuple[Tensor, None, FlexBias]:
        if self.training and self.dropout > 0:
            raise ValueError(f"FlexAttention has no dropout, attention_dropout is {self.dropout}")
        frames = hidden_states.shape[1]
        if position_bias is None:
            positions = torch.arange(1 - frames, frames, device=hidden_states.device)
            rel_bias = self.rel_attn_embed(self._relative_positions_bucket(positions)).t().contiguous()
            # A mask over frames is a prefix in every WavLM.
            blocks = None if attention_mask is None else block_mask(attention_mask.sum(-1), frames)
            position_bias = FlexBias(rel_bias, blocks)
        q, k, v = _project(self, hidden_states)
        out = flex(q, k, v, self._gate(hidden_states), position_bias.rel_bias, position_bias.blocks, self.scaling)
        return self.out_proj(out.flatten(2)), None, position_bias

    def _gate(self, x: Tensor) -> Tensor:
        """`[B, H, T]`, as in transformers' forward."""
        heads = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        a, b = self.gru_rel_pos_linear(heads).unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)
        return a * (b * self.gru_rel_pos_const.squeeze(-1) - 1.0) + 2.0


def _project(module: hf.WavLMAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = (module.num_heads, module.head_dim)
    q, k, v = (p(x).unflatten(-1, heads) for p in (module.q_proj, module.k_proj, module.v_proj))
    return q, k, v


def with_sdpa(model: nn.Module) -> nn.Module:
    """A copy of a transformers WavLM, on the same parameters, whose attention is torch's SDPA with a dense gated bias.

    Raises:
        ValueError: there is no attention module of transformers' in it.
    """
    return _with(SdpaAttention, model)


def with_flex(model: nn.Module) -> nn.Module:
    """A copy of a transformers WavLM, on the same parameters, whose attention is torch's FlexAttention.

    The attention is compiled, the rest is not. On CPUs it computes no gradients and no float64, and `compiled` fails on
    the model around it: torch 2.13 finds no kernel for an attention in the middle of a graph there.

    Raises:
        ValueError: there is no attention module of transformers' in it.
    """
    return _with(FlexAttention, model)


def _with(attention: type[hf.WavLMAttention], model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    found = [m for m in made.modules() if type(m) is hf.WavLMAttention]
    if not found:
        raise ValueError(f"a transformers WavLM is wanted, {type(model).__name__} has no WavLMAttention")
    for module in found:
        module.__class__ = attention
    return made


def compiled(model: nn.Module, training: bool = False) -> nn.Module:
    """The model under torch.compile, with what makes the fastest code of it for inputs of one shape.

    Shapes are compiled one by one (`dynamic=False`): kernels that know their sizes are faster, and a benchmark has few
    of them. Whoever's utterances all differ in length pays a compilation for each, or takes slower kernels. For
    inference on CPUs weights are frozen, so that they can be laid out for oneDNN; the model may not be changed after
    its first call. CUDA graphs are left out: they hold one set of buffers per shape, and overwrite the outputs
    of the call before.

    Args:
        model: of any class, in the dtype and on the device that it runs on.
        training: whether gradients will be wanted.
    """
    never_uncompiled()
    on_cpu = next(model.parameters()).device.type == "cpu"
    return torch.compile(model, dynamic=False, options={"freezing": on_cpu and not training})
