"""Steps that several fast modules share: each uses the fused op when its submodules are plain, else calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import backends, ops
from ..freed import MayBeFreed
from ._originals import StandIn, why_patched
from ._plain import has_hooks, same_dtype, why_changed, why_not_plain

EXAMPLE_FRAMES = 499  # ten seconds


@dataclass(frozen=True)
class Plan:
    """What a module would do in a forward: an op on arguments like `example`'s, or, with a `refusal`, its submodules.

    `example` gives the arguments of the op's schema; `report` calls it where tensors are made without memory.
    """

    op: str
    refusal: str | None
    example: Callable[[], tuple] | None = None


def frames_like(weight: Tensor, *sizes: int) -> Tensor:
    """Uninitialized frames `[1, EXAMPLE_FRAMES, *sizes]` of the device and dtype of `weight`."""
    return torch.empty((1, EXAMPLE_FRAMES, *sizes), device=weight.device, dtype=weight.dtype)


def plan_linear(name: str, module: nn.Module, activation: str = "none") -> Plan:
    """The plan of `linear` on a submodule."""

    def example() -> tuple:
        return frames_like(module.weight, module.in_features), module.weight, module.bias, activation, False

    return Plan("linear_act", named(name, why_not_plain(module, nn.Linear)), example)


def plan_add_norm(name: str, module: nn.Module) -> Plan:
    """The plan of `add_norm` with a submodule."""

    def example() -> tuple:
        x = frames_like(module.weight, *module.normalized_shape)
        return x, x, module.weight, module.bias, module.eps, True

    return Plan("add_layer_norm", named(name, why_not_norm(module)), example)


def has_kernel(op: str, example: tuple) -> bool:
    """Whether a backend has `op` as a kernel of its own for such arguments; where none has, it runs as its parts."""
    try:
        return backends.choose(op, example).backend != "reference"
    except backends.BackendUnavailable:
        return False


class FastModule(StandIn, MayBeFreed):
    """Mixed into every fast module: lets `report` ask what will run."""

    def _get_name(self) -> str:
        return f"Fast{type(self).__name__}" if self._is_twin() else type(self).__name__

    def why_called(self, but_captures: bool = False) -> str | None:
        """Why who contains this module must call it instead of doing its work: it has hooks, or a method of somebody
        else's; None when it need not. Hooks by which transformers captures outputs may not count.
        """
        return "it has hooks" if has_hooks(self, but_captures) else why_patched(self, but_forward=False)

    def plan(self) -> Iterator[Plan]:
        """The ops of one forward."""
        raise NotImplementedError

    def planned(self) -> Iterator[nn.Module]:
        """Submodules that do not run on their own: the plan speaks for them."""
        return iter(())


def named(name: str, refusal: str | None) -> str | None:
    """A refusal with the submodule's name in front."""
    return None if refusal is None else f"{name} is called: {refusal}"


def linear(module: nn.Module, x: Tensor, activation: str = "none") -> Tensor:
    """`activation(module(x))` as one op where `module` is a plain linear layer; without an activation any module."""
    if why_not_plain(module, nn.Linear) is None and same_dtype(x, module.weight, module.bias):
        return ops.linear_act(x, module.weight, module.bias, activation)
    return module(x)


def can_fuse_linear(module: nn.Module, x: Tensor) -> bool:
    """Whether `linear` will run the op, and may be given an activation."""
    return why_not_plain(module, nn.Linear) is None and same_dtype(x, module.weight, module.bias)


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


def add_norm(x: Tensor, residual: Tensor, norm: nn.Module, keep_sum: bool = True) -> tuple[Tensor, Tensor]:
    """`x + residual`, of no use without `keep_sum`, and `norm` of it."""
    if why_not_norm(norm) is None and x.shape == residual.shape and same_dtype(x, residual, norm.weight, norm.bias):
        return ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, keep_sum)
    total = residual + x
    return total, norm(total)
