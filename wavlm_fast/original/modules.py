"""What the model is built of: attention, weight norm, norms, activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._define import accumulation_dtype


class MultiheadAttention(nn.Module):
    """Self-attention with the gated relative position bias.

    The bias of a head on a pair of frames is looked up by their distance, in the first layer, which hands it on to the
    others. Each layer multiplies it by a gate of its own, one number per head and querying frame.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        has_relative_attention_bias: bool = False,
        num_buckets: int = 32,
        max_distance: int = 128,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"{embed_dim} channels do not divide into {num_heads} attention heads")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout_module = nn.Dropout(dropout)
        self.has_relative_attention_bias = has_relative_attention_bias
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.gru_rel_pos = True
        self.grep_linear = nn.Linear(self.head_dim, 8)
        self.grep_a = nn.Parameter(torch.ones(1, num_heads, 1, 1))

    def compute_bias(self, query_length: int, key_length: int) -> Tensor:
        """The bias before any gate, `[H, T, T]`."""
        distance = torch.arange(key_length)[None, :] - torch.arange(query_length)[:, None]
        bucket = relative_positions_bucket(distance, self.num_buckets, self.max_distance)
        table = self.relative_attention_bias
        return table(bucket.to(table.weight.device)).permute(2, 0, 1)

    def _gates(self, query: Tensor) -> Tensor:
        """`[B, H, T, 1]` from frames `[T, B, H, D]`."""
        gates = self.grep_linear(query.permute(1, 2, 0, 3)).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        a, b = gates.chunk(2, dim=-1)
        return a * (b * self.grep_a - 1.0) + 2.0

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: None = None,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attention of frames `[T, B, C]` to one another.

        Args:
            query, key, value: the frames, thrice.
            key_padding_mask: `[B, T]`, True at frames that no frame attends to.
            need_weights: whether to return the weights.
            attn_mask: None; WavLM has none.
            position_bias: the first layer's, `[B·H, T, T]`.

        Returns:
            `[T, B, C]`; the weights averaged over heads, `[B, T, T]`, or None; the position bias for the next layer.
        """
        if attn_mask is not None:
            raise ValueError("a WavLM's attention takes no attn_mask: its mask is the gated relative position bias")
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.compute_bias(query.size(0), key.size(0)).repeat(query.size(1), 1, 1)  # [B·H, T, T]
        heads = (self.num_heads, self.head_dim)
        if position_bias is None:  # in training, where layer drop took the layer that makes it
            bias = query.new_zeros(query.size(1), 1, 1, key.size(0))
        else:
            bias = self._gates(query.unflatten(-1, heads)) * position_bias.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            bias = bias.masked_fill(key_padding_mask[:, None, None], -math.inf)
        q, k, v = (
            projection(x).unflatten(-1, heads).permute(1, 2, 0, 3)  # [B, H, T, D]
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        dropout = self.dropout_module.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, bias, dropout)
        weights = (q @ k.mT * self.scaling + bias).softmax(-1).mean(1) if need_weights else None
        # Copied in any case: how the product lies in memory may change between a trace and its use.
        x = x.permute(2, 0, 1, 3).clone(memory_format=torch.contiguous_format).flatten(2)  # [T, B, C]
        return self.out_proj(x), weights, position_bias


def relative_positions_bucket(positions: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Rows of the table of biases for distances in frames.

    One half is for frames that come later. In each half, short distances have a row each; the others share rows, the
    more the longer they are, up to max_distance.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = positions.abs()
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    shared = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return (positions > 0).long() * half + torch.where(distance < exact, distance, shared)


class WeightNormConv1d(nn.Conv1d):
    """A convolution for `torch.nn.utils.weight_norm` that can be copied all the same, and loads the newer names too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_respell)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if "weight" in state:  # what the last forward computed, with its graph; a copy takes the values
            state["weight"] = state["weight"].detach()
        return state


def _respell(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        if (name := f"{prefix}parametrizations.weight.{new}") in state_dict:
            state_dict[prefix + old] = state_dict.pop(name)


class SamePad(nn.Module):
    """Cuts the frame that a convolution of even kernel adds."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.remove = 1 - kernel_size % 2

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.remove] if self.remove else x


class TransposeLast(nn.Module):
    """`[…, C, T]` to `[…, T, C]` and back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-2, -1)


class Fp32LayerNorm(nn.LayerNorm):
    """In float32 for half precisions."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = accumulation_dtype(input.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class Fp32GroupNorm(nn.GroupNorm):
    """In float32 for half precisions."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = accumulation_dtype(input.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.group_norm(input.to(dtype), self.num_groups, weight, bias, self.eps).to(input.dtype)


class GLU_Linear(nn.Module):  # noqa: N801, the original's name
    """A linear layer whose second half of channels, through a swish, gates the first."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.linear(x).chunk(2, dim=-1)
        return x * F.silu(gate)


def gelu(x: Tensor) -> Tensor:
    """In float32 for half precisions."""
    return F.gelu(x.to(accumulation_dtype(x.dtype))).to(x.dtype)


def _identity(x: Tensor) -> Tensor:
    return x


_gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "tanh": torch.tanh,
    "linear": _identity,
    "glu": _identity,  # in its linear layer
}
