"""Each op as transformers would run it: the sequence of torch calls in its modules, in the dtype of the model.

What a user would have without this package, and so the yardstick for a fast path's error. The arguments are those of
the registered schemas less `save`; packed frames are each utterance alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .alone import each
from .composed import encoder_layer_of, feature_encoder_of
from .definitions import kept_weights, toeplitz


def _activation(name: str, x: Tensor) -> Tensor:
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    return F.relu(x) if name == "relu" else x


def _low(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """A plain model has one dtype; where an op takes wider operands, the plain path narrows them."""
    return [None if t is None else t.to(dtype) for t in tensors]


def waveform_conv(
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    norm_weight, norm_bias = _low(waveform.dtype, norm_weight, norm_bias)
    y = F.conv1d(waveform[:, None], weight, bias, stride)
    if norm == "group":
        y = F.group_norm(y, y.shape[1], norm_weight, norm_bias, eps)
    if norm == "layer":
        y = F.layer_norm(y.transpose(-2, -1), (y.shape[1],), norm_weight, norm_bias, eps).transpose(-2, -1)
    return _activation(act, y).transpose(1, 2)


def strided_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    norm_weight, norm_bias = _low(x.dtype, norm_weight, norm_bias)
    y = F.conv1d(x.transpose(1, 2), weight, bias, stride)
    if norm_weight is not None:
        y = F.layer_norm(y.transpose(-2, -1), (y.shape[1],), norm_weight, norm_bias, eps).transpose(-2, -1)
    return _activation(act, y).transpose(1, 2)


def positional_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, act: str, residual: bool
) -> Tensor:
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[2] // 2, groups=groups)
    if weight.shape[2] % 2 == 0:
        y = y[:, :, :-1]
    y = _activation(act, y).transpose(1, 2)
    return x + y if residual else y


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return _activation(act, F.linear(x, weight, bias))


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    return total if keep_sum else x.new_empty(0), F.layer_norm(total, (total.shape[-1],), weight, bias, eps)


def position_gate(x: Tensor, weight: Tensor, bias: Tensor, const: Tensor) -> Tensor:
    weight, bias, const = _low(x.dtype, weight, bias, const)
    heads = x.view(*x.shape[:-1], const.numel(), -1).permute(0, 2, 1, 3)
    projected = F.linear(heads, weight, bias).view(*heads.shape[:-1], 2, 4).sum(-1)
    gate_a, gate_b = torch.sigmoid(projected).chunk(2, dim=-1)
    return (gate_a * (gate_b * const.view(1, -1, 1, 1) - 1.0) + 2.0).squeeze(-1)


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    *,
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    batch, frames, heads, _ = q.shape
    gate, rel_bias = _low(q.dtype, gate, rel_bias)
    kept = None
    if dropout_p:
        kept = kept_weights(seed.item(), batch, heads, frames, dropout_p, rows).view(-1, frames, frames)
        kept = kept.to(q.device, q.dtype) / (1 - dropout_p)
    empty = torch.zeros(batch, dtype=torch.bool, device=q.device)
    if key_lengths is not None:
        empty = key_lengths == 0
        key_lengths = torch.where(empty, frames, key_lengths)
    out, scores, _ = attend(q, k, v, gate, toeplitz(rel_bias), key_lengths, scale, kept)
    lse = scores.logsumexp(-1).view(batch, heads, frames).masked_fill(empty[:, None, None], -math.inf)
    return out.masked_fill(empty[:, None, None, None], 0), lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    bias: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What transformers and torch's `multi_head_attention_forward` compute between the projections.

    Args:
        q, k, v: `[B, T, H, D]`.
        gate: `[B, H, T]`.
        bias: dense, `[H, T, T]` or `[B, H, T, T]`.
        key_lengths: `[B]` integers from 1, or None.
        scale: of the scores.
        kept: factors of the weights, `[B·H, T, T]`, or None.

    Returns:
        `[B, T, H, D]`, not contiguous; the scores and the weights, `[B·H, T, T]`.
    """
    batch, frames, heads, width = q.shape
    mask = (gate[..., None] * bias).view(batch * heads, frames, frames)
    if key_lengths is not None:
        past = torch.arange(frames, device=q.device) >= key_lengths[:, None]
        past = past[:, None, None].expand(-1, heads, -1, -1).reshape(batch * heads, 1, frames)
        mask = mask + torch.zeros_like(past, dtype=q.dtype).masked_fill_(past, -math.inf)
    q, k, v = (x.transpose(1, 2).reshape(batch * heads, frames, width) for x in (q, k, v))
    scores = torch.baddbmm(mask, q * scale, k.transpose(-2, -1))
    weights = F.softmax(scores, dim=-1)
    if kept is not None:
        weights = weights * kept
    return torch.bmm(weights, v).view(batch, heads, frames, width).transpose(1, 2), scores, weights


def tdnn(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, dilation: int, act: str) -> Tensor:
    weight = weight.view(weight.shape[0], kernel_size, -1).transpose(1, 2)
    return _activation(act, F.conv1d(x.transpose(1, 2), weight, bias, dilation=dilation).transpose(1, 2))


def stats_pool(x: Tensor, lengths: Tensor | None) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one frame has no deviation: NaN, as wanted
        if lengths is None:
            return torch.cat((x.mean(dim=1), x.std(dim=1)), dim=-1)
        means = [x[i, :length].mean(dim=0) for i, length in enumerate(lengths.tolist())]
        stds = [x[i, :length].std(dim=0) for i, length in enumerate(lengths.tolist())]
    return torch.cat((torch.stack(means), torch.stack(stds)), dim=-1)


TABLE: dict[str, Callable] = {
    f.__name__: f
    for f in (
        waveform_conv,
        strided_conv,
        positional_conv,
        linear_act,
        add_layer_norm,
        position_gate,
        gated_attention,
        tdnn,
        stats_pool,
    )
}
TABLE |= {"feature_encoder": feature_encoder_of(TABLE), "encoder_layer": encoder_layer_of(TABLE)}
TABLE = {op: each(op, dense) for op, dense in TABLE.items()}
