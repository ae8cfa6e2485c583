"""Calls as the ops describe them, with values: what arguments there are and of what shapes is said in `ops.OPS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import OPS, Operand
from .values import Leaves, gain, hidden_states, matrix, normal

# From the generator, an operand's name (of a list's first "weights 0"), the operand, and what has been drawn before.
Draw = Callable[[torch.Generator, str, Operand, Leaves], Tensor]


def usual(g: torch.Generator, name: str, operand: Operand, before: Leaves) -> Tensor:
    """Frames, matrices, gains of norms and biases, by what they are called."""
    kind, shape = name.partition(" ")[0], operand.shape
    if kind == "x":
        return hidden_states(g, *shape)
    if kind in ("weight", "weights") and len(shape) > 1:
        return matrix(g, *shape)
    return gain(g, *shape) if "weight" in kind else normal(g, *shape, std=0.5)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Builds the values of a call.

    Attributes:
        op: whose call it is.
        example: its arguments, with operands in the place of tensors.
        draw: the values of an operand.
    """

    op: str
    example: dict[str, Any]
    draw: Draw = usual

    @property
    def wide(self) -> frozenset[str]:
        """What is kept in float32 when the dtype under test is narrower."""
        return frozenset(name for name, v in self.example.items() if isinstance(v, Operand) and v.wide)

    def __call__(self, g: torch.Generator) -> Leaves:
        leaves: Leaves = {}
        for name, value in self.example.items():
            if isinstance(value, Operand):
                leaves[name] = self.draw(g, name, value, leaves)
            elif isinstance(value, list) and all(isinstance(v, Operand) for v in value):
                for i, own in enumerate(value):
                    leaves[f"{name} {i}"] = self.draw(g, f"{name} {i}", own, leaves)
            else:
                leaves[name] = value
        return leaves

    def arrange(self, leaves: Leaves) -> tuple:
        """The positional arguments of the call."""
        return tuple(named(self.op, leaves).values())


def named(op: str, leaves: Leaves) -> dict[str, Any]:
    """The leaves by the names of the op's arguments and in their order, those of a list together again."""
    found: dict[str, Any] = {}
    for name, kind in OPS[op].arguments.items():
        if kind == "Tensor[]":
            found[name] = [leaf for own, leaf in leaves.items() if own.rpartition(" ")[0] == name]
        elif name in leaves:
            found[name] = leaves[name]
    return found
