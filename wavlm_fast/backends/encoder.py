"""The transformer layers of the cpu backend."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..derived import concatenated, derived
from . import products


def encoder_layer(
    x: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    gate: list[Tensor],
    norms: list[Tensor],
    eps: list[float],
    scale: float,
    activation: str,
    norm_first: bool,
    offsets: Tensor | None = None,
) -> Tensor:
    """The op of that name."""
    native = torch.ops.wavlm_fast_cpu
    pack = lambda: native.pack_conv([weight[:, None] for weight in weights[:3]], False)  # noqa: E731
    qkv = derived("packed qkv", tuple(weights[:3]), pack, replaces=True)
    qkv_bias = concatenated("qkv bias", biases[:3])
    others = [products.pack(weight, lambda weight=weight: weight[:, None], 1, False) for weight in weights[3:]]
    return native.encoder_layer(
        x, rel_bias, key_lengths, [qkv, *others], [qkv_bias, *biases[3:]], gate, norms, eps, scale, activation,
        norm_first, offsets,
    )  # fmt: skip


def why_not(
    extension_problem: str | None, x: Tensor, rel_bias: Tensor, key_lengths: Tensor | None, weights: list[Tensor],
    *rest: object,
) -> str | None:  # fmt: skip
    """Why a layer cannot run as a whole; None when it can."""
    reason = products.why_not(extension_problem, x, weights[0])
    if any(weight.numel() == 0 for weight in weights):
        return "there is nothing to compute"
    if reason is not None or x.dtype == torch.float32:
        return reason
    if products.in_onednn(x):
        return "bfloat16 products run in oneDNN here, one by one"
    if not _multiplies_bfloat16() or any(weight.shape[1] % 2 for weight in weights):
        return "the C++ encoder_layer takes bfloat16 of even width where the CPU multiplies pairs of it (AVX-512 BF16)"
    return None


@cache
def _multiplies_bfloat16() -> bool:
    return torch.ops.wavlm_fast_cpu.isa() == "avx512_bf16"
