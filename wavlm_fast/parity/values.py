"""Values that hide nothing: what the inputs of cases are made of, in float64 from a seeded generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OUTLIER = 50.0
Leaves = dict[str, Any]
Build = Callable[[torch.Generator], Leaves]


def normal(g: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64) * std


def hidden_states(g: torch.Generator, *shape: int) -> Tensor:
    """Hidden states, two of their channels at the magnitude that trained checkpoints show."""
    x = normal(g, *shape)
    if shape[-1] >= 8:
        x[..., 3] += OUTLIER
        x[..., shape[-1] // 2 + 1] -= OUTLIER
    return x


def matrix(g: torch.Generator, *shape: int) -> Tensor:
    return normal(g, *shape, std=math.prod(shape[1:]) ** -0.5)


def gain(g: torch.Generator, size: int) -> Tensor:
    return 1 + normal(g, size, std=0.3)


def uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)
