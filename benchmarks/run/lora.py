"""LoRA in plain torch: a frozen model, and low-rank products beside some of its linear layers that learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ADAPTED = ("q_proj", "v_proj")
_ALPHA = 16.0


class Adapter(nn.Module):
    """A linear layer, and what learns beside it.

    transformers' attention never calls its projections, it reads `weight` and `bias`: these say the same. With those of
    the base the adapter would be left out without a word.
    """

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.scaling = _ALPHA / rank
        # As after some training: with zeros in `up` nothing would reach `down`.
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5 / 4, generator=generator)

    @property
    def weight(self) -> Tensor:
        return self.base.weight + self.up.weight @ self.down.weight * self.scaling

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * self.scaling


def adapted(model: nn.Module, rank: int) -> nn.Module:
    """transformers' model, frozen, with adapters on the queries and values of every layer; the same numbers always."""
    model.freeze_feature_encoder()  # else transformers would take its gradient down to the waveform
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(rank)
    with torch.random.fork_rng(devices=[]):
        for layer in model.get_submodule("encoder").layers:
            for name in _ADAPTED:
                setattr(layer.attention, name, Adapter(getattr(layer.attention, name), rank, generator))
    return model
