"""Which attention weights are dropped: a function of a seed and the weight's position, the same on every backend.

With `mix` a 32-bit hash (two multiplications and three shifted exclusive-ors), all arithmetic modulo 2**32:

    row  = (b * H + h) * T + i, of packed frames h * N + n
    key  = mix(seed + mix(row))
    u    = mix(key + j * 0x9e3779b9)
    kept = (u >> 8) >= floor(p * 2**24)

j counts the keys of an utterance, packed or not, n all N packed frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9 - 2**32
_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B - 2**32


def keep_mask(
    seed: Tensor,
    sizes: torch.Size,
    start: int,
    stop: int,
    dropout_p: float,
    packed: tuple[int, int] | None = None,
) -> Tensor:
    """Which weights of the queries `start` to `stop` are kept.

    Args:
        seed: `[1]` int64, its low 32 bits count.
        sizes: B, H, T.
        start, stop: query frames.
        dropout_p: probability of dropping, 0 <= p < 1.
        packed: first frame of the one utterance and N, when it is one of packed frames.

    Returns:
        `[B, H, stop - start, T]` bool.
    """
    batch, heads, frames = sizes
    first, step = (0, frames) if packed is None else packed
    keys = torch.arange(frames, device=seed.device, dtype=torch.int32)
    heads_first = torch.arange(batch * heads, device=seed.device, dtype=torch.int64)[:, None] * step + first
    rows = heads_first + torch.arange(start, stop, device=seed.device)
    key = _mix(_int32(seed) + _mix(_int32(rows)))
    u = _mix(key[..., None] + keys * _GOLDEN)
    kept = ((u >> 8) & 0xFFFFFF) >= int(dropout_p * 2**24)
    return kept.view(batch, heads, stop - start, frames)


def _int32(x: Tensor) -> Tensor:
    # The low 32 bits as a two's complement number, without relying on how a cast treats what does not fit.
    return (((x + 2**31) & 0xFFFFFFFF) - 2**31).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)
