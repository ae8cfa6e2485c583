"""Steps: the ops of a module's forward, decided once. Forward runs a step, `report` asks the same step.

A step is made of the tensors that a forward has in its hands: the op runs where its submodules are plain and the
tensors fit, else what it stands for is called. `report` makes the steps of tensors without memory (`Signal`), and calls
no module of anybody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..freed import MayBeFreed
from ..inputs import SAMPLE_RATE
from ._originals import StandIn, why_original, why_patched
from ._plain import has_hooks, why_changed, why_mixed, why_not_plain

EXAMPLE_SECONDS = 10
EXAMPLE_FRAMES = 499


@dataclass
class Step:
    """An op of a forward.

    `refusal` says why the op does not run, None when it does. `fused` runs it, `called` does the same without it; None
    where the forward itself knows what to do instead.
    """

    op: str
    refusal: str | None
    fused: Callable[[], Any] | None = None
    called: Callable[[], Any] | None = None

    def run(self) -> Any:
        return self.fused() if self.refusal is None else self.called()


@dataclass
class Signal:
    """What comes to a module in the forward that `report` tells of, handed on from module to module as there."""

    samples: int = EXAMPLE_SECONDS * SAMPLE_RATE  # of the waveform, and then what each convolution makes of them
    learns: bool = False  # whether a gradient is wanted of it
    dense_bias: bool = False  # whether the position bias comes as transformers' modules hand it on
    output_attentions: bool = False

    def frames(self, module: nn.Module, *channels: int, count: int = EXAMPLE_FRAMES) -> Tensor:
        """Uninitialized frames `[1, T, *channels]` of the device and dtype in which a module computes."""
        like = _matrix_of(module)
        frames = torch.empty((1, count, *channels), device=like.device, dtype=like.dtype)
        return frames.requires_grad_(self.learns)

    def position_bias(self, heads: int, like: Tensor) -> Tensor:
        shape = (heads, EXAMPLE_FRAMES, EXAMPLE_FRAMES) if self.dense_bias else (heads, 2 * EXAMPLE_FRAMES - 1)
        return like.new_empty(shape).requires_grad_(self.learns)

    def passes(self, module: nn.Module | Inline) -> None:
        """The module has made of it what comes next."""
        self.learns = self.learns or (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))


def _matrix_of(module: nn.Module | Inline) -> Tensor:
    """The first weight of a module that frames are multiplied by; norms and vectors may have other dtypes."""
    found = [p for p in module.parameters() if p.is_floating_point()]
    return next((p for p in found if p.dim() > 1), found[0] if found else torch.empty(0))


def steps_of(module: nn.Module | Inline, signal: Signal) -> Iterator[Step]:
    """The steps of a forward of any module or stage, and of what is in it."""
    reason = why_original(module) if isinstance(module, StandIn) else None
    if reason is not None:
        yield Step(module.original.__name__, f"the original's forward runs: {reason}")
        signal.dense_bias = signal.dense_bias or module.original_makes_dense_bias
    if isinstance(module, Inline) or (isinstance(module, StandIn) and reason is None):
        yield from module.steps(signal)
    else:
        yield from steps_of_children(module, signal)
    signal.passes(module)


def steps_of_children(module: nn.Module, signal: Signal) -> Iterator[Step]:
    """The steps of a module's submodules, each once, in the order in which the module has them."""
    for child in module.children():
        yield from steps_of(child, signal)


def parts_of(whole: Step, why_not_whole: str | None, parts: Iterator[Step]) -> Iterator[Step]:
    """The steps in the place of a whole that does not run, and before them why not, if no part tells that.

    Args:
        whole: its step.
        why_not_whole: what of the submodules keeps it from running, if anything; what comes to them may too.
        parts: the steps of its submodules.
    """
    made = list(parts)
    if whole.refusal == why_not_whole and not any(step.refusal for step in made):
        yield whole
    yield from made


class Inline:
    """Mixed into a stage that is no module of its own: what a family's module does with some of its submodules."""

    def __init__(self, *parts: nn.Module) -> None:
        self.parts = parts

    def parameters(self) -> Iterator[Tensor]:
        return (parameter for part in self.parts for parameter in part.parameters())

    def why_called(self, but_captures: bool = False) -> None:
        """Nobody can call it, nor hook it."""


class FastModule(StandIn, MayBeFreed):
    """Mixed into every fast module, behind its stage."""

    def _get_name(self) -> str:
        return f"Fast{type(self).__name__}" if self.is_twin() else type(self).__name__

    def why_called(self, but_captures: bool = False) -> str | None:
        """Why who contains this module must call it instead of doing its work: it has hooks, a method of somebody
        else's, or has to run as its original; None when it need not. Hooks by which transformers captures outputs may
        not count.
        """
        if has_hooks(self, but_captures):
            return "it has hooks"
        return why_patched(self, but_forward=False) or self.why_own_code()


def named(name: str, refusal: str | None) -> str | None:
    """A refusal with the submodule's name in front."""
    return None if refusal is None else f"{name} is called: {refusal}"


def linear_step(name: str, module: nn.Module, x: Tensor, activation: str = "none") -> Step:
    """`activation(module(x))` where the submodule `name` is a plain linear layer; without activation any module."""
    refusal = why_not_plain(module, nn.Linear) or why_mixed(x, module.weight, module.bias)
    return Step(
        "linear_act",
        named(name, refusal),
        lambda: ops.linear_act(x, module.weight, module.bias, activation),
        lambda: module(x),
    )


def why_not_linear(name: str, module: nn.Module) -> str | None:
    """Why the submodule `name` cannot be fused as a linear layer with a bias; None when it can."""
    reason = named(name, why_not_plain(module, nn.Linear))
    if reason is None and module.bias is None:
        return f"{name} is called: it has no bias"
    return reason


def why_not_dropout(module: nn.Module) -> str | None:
    """Why a dropout module does something; None when it hands on what it gets."""
    if type(module) is not nn.Dropout or has_hooks(module) or why_changed(module, nn.Dropout) is not None:
        return "it is not plain"
    return "it is on" if module.training and module.p > 0 else None


def why_not_norm(module: nn.Module) -> str | None:
    """Why a layer norm cannot be fused; None when it can."""
    reason = why_not_plain(module, nn.LayerNorm)
    if reason is None and (module.weight is None or module.bias is None):
        return "it has no weight or no bias"
    return reason


def add_norm_step(name: str, x: Tensor, residual: Tensor, norm: nn.Module, keep_sum: bool = True) -> Step:
    """`x + residual`, of no use without `keep_sum`, and the submodule `name`, a norm, of it."""
    refusal = why_not_norm(norm)
    if refusal is None and x.shape != residual.shape:
        refusal = "what it norms is a sum of different shapes"
    refusal = refusal or why_mixed(x, residual, norm.weight, norm.bias)

    def called() -> tuple[Tensor, Tensor]:
        total = residual + x
        return total, norm(total)

    return Step(
        "add_layer_norm",
        named(name, refusal),
        lambda: ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, keep_sum),
        called,
    )
