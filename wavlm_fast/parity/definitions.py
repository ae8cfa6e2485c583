"""What each op means, written out from sums and products: the truth, evaluated in float64.

Nothing here calls a fused or library form of what it defines, nor our own references, so that neither is compared with
itself. The arguments are those of the registered schemas less `save`; packed frames are each utterance alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .alone import each
from .composed import encoder_layer_of, feature_encoder_of


def activation(name: str, x: Tensor) -> Tensor:
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x.clamp_min(0) if name == "relu" else x


def _standardise(x: Tensor, dim: int, eps: float) -> Tensor:
    centred = x - x.mean(dim, keepdim=True)
    return centred / ((centred**2).mean(dim, keepdim=True) + eps).sqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


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
    windows = waveform.unfold(1, weight.shape[2], stride)  # [B, T, K]
    y = _affine(torch.einsum("btk,ck->btc", windows, weight[:, 0]), None, bias)
    if norm != "none":
        y = _affine(_standardise(y, 1 if norm == "group" else 2, eps), norm_weight, norm_bias)
    return activation(act, y)


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
    windows = x.unfold(1, weight.shape[2], stride)  # [B, T', C, K]
    y = _affine(torch.einsum("btck,ock->bto", windows, weight), None, bias)
    if norm_weight is not None:
        y = _affine(_standardise(y, 2, eps), norm_weight, norm_bias)
    return activation(act, y)


def positional_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, act: str, residual: bool
) -> Tensor:
    batch, frames, channels = x.shape
    kernel = weight.shape[2]
    edge = x.new_zeros(batch, kernel // 2, channels)
    windows = torch.cat((edge, x, edge), 1).unfold(1, kernel, 1)[:, :frames]  # [B, T, C, K]
    windows = windows.unflatten(2, (groups, -1))
    filters = weight.unflatten(0, (groups, -1))  # [groups, C / groups, C / groups, K]
    y = _affine(torch.einsum("btgck,gock->btgo", windows, filters).flatten(2), None, bias)
    return activation(act, y) + (x if residual else 0)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return activation(act, _affine(torch.einsum("...c,oc->...o", x, weight), None, bias))


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    return total if keep_sum else x.new_empty(0), _affine(_standardise(total, -1, eps), weight, bias)


def position_gate(x: Tensor, weight: Tensor, bias: Tensor, const: Tensor) -> Tensor:
    heads = x.unflatten(2, (const.numel(), -1)).transpose(1, 2)  # [B, H, T, D]
    eight = torch.einsum("bhtd,nd->bhtn", heads, weight) + bias
    a = 1 / (1 + (-eight[..., :4].sum(-1)).exp())
    b = 1 / (1 + (-eight[..., 4:].sum(-1)).exp())
    return a * (b * const[:, None] - 1) + 2


def toeplitz(rel_bias: Tensor) -> Tensor:
    """The dense bias `[H, T, T]`: entry i, j is `rel_bias[:, j - i + T - 1]`."""
    frames = (rel_bias.shape[1] + 1) // 2
    at = torch.arange(frames, device=rel_bias.device)
    return rel_bias[:, at[None, :] - at[:, None] + frames - 1]


def kept_weights(
    seed: int, batch: int, heads: int, frames: int, dropout_p: float, rows: tuple[int, int] | None = None
) -> Tensor:
    """Which attention weights dropout keeps, `[B, H, T, T]` bool, from the published counter-based definition.

    `rows` is the first frame and the number of all packed frames, when these are one utterance's of them.
    """

    def mix(x: Tensor) -> Tensor:  # int64 holding 32 bits; products split so that they never overflow
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = x ^ (x >> shift)
            x = (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & 0xFFFFFFFF
        return x ^ (x >> 16)

    first, of = rows or (0, frames)
    row = (torch.arange(batch * heads)[:, None] * of + first + torch.arange(frames)).view(batch, heads, frames, 1)
    key = mix(((seed & 0xFFFFFFFF) + mix(row)) & 0xFFFFFFFF)
    u = mix((key + (torch.arange(frames) * 0x9E3779B9 & 0xFFFFFFFF)) & 0xFFFFFFFF)
    return (u >> 8) >= math.floor(dropout_p * 2**24)


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
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale + gate[..., None] * toeplitz(rel_bias)
    lengths = [frames] * batch if key_lengths is None else key_lengths.tolist()
    outs, sums = [], []
    for row, length, values in zip(scores, lengths, v, strict=True):  # one utterance at a time, only its own keys
        if length == 0:
            outs.append(torch.zeros_like(values))
            sums.append(row.new_full((heads, frames), -math.inf))
            continue
        top = row[..., :length].amax(-1, keepdim=True).detach()
        powers = (row[..., :length] - top).exp()
        total = powers.sum(-1, keepdim=True)
        weights = powers / total
        if dropout_p:
            kept = kept_weights(seed.item(), batch, heads, frames, dropout_p, rows)[len(outs), :, :, :length]
            weights = weights * kept / (1 - dropout_p)
        outs.append(torch.einsum("hij,jhd->ihd", weights, values[:length]))
        sums.append((top + total.log()).squeeze(-1))
    return torch.stack(outs), torch.stack(sums)


def tdnn(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, dilation: int, act: str) -> Tensor:
    taps = weight.unflatten(1, (kernel_size, -1))  # [C', K, C]
    frames = x.shape[1] - (kernel_size - 1) * dilation
    y = sum(x[:, i * dilation : i * dilation + frames] @ taps[:, i].mT for i in range(kernel_size))
    return activation(act, _affine(y, None, bias))


def stats_pool(x: Tensor, lengths: Tensor | None) -> Tensor:
    rows = []
    for utterance, length in zip(x, [x.shape[1]] * len(x) if lengths is None else lengths.tolist(), strict=True):
        valid = utterance[:length]
        mean = valid.sum(0) / length if length else torch.full_like(utterance[0], math.nan)
        spread = ((valid - mean) ** 2).sum(0)
        std = (spread / (length - 1)).sqrt() if length > 1 else torch.full_like(mean, math.nan)
        rows.append(torch.cat((mean, std)))
    return torch.stack(rows)


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
