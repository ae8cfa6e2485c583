"""Convolutional positional embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import ops
from .._private import FakeTensor, WeightNormHook, WeightNormParametrization, hooks_of, weight_norm
from ..derived import derived, linked
from ..ops._define import accumulation_dtype, needs_grad
from ._packing import Packing
from ._plain import (
    fused_activation,
    has_hooks,
    is_one,
    why_changed,
    why_mixed,
    why_not_plain,
    why_not_plain_parameters,
)
from ._steps import Signal, Step, named


def _weight_norm_hook(conv: nn.Module) -> WeightNormHook | None:
    """The hook by which `torch.nn.utils.weight_norm` sets the weight before each forward, if it is the only one."""
    hooks = list(hooks_of(conv)[1].values())
    return hooks[0] if len(hooks) == 1 and isinstance(hooks[0], WeightNormHook) else None


def _is_parametrized(conv: nn.Module) -> bool:
    """Whether the weight, and nothing else, is parametrized as `torch.nn.utils.parametrizations.weight_norm` does."""
    parametrizations = getattr(conv, "parametrizations", None)
    if parametrizations is None or list(parametrizations) != ["weight"] or type(conv).__mro__[1] is not nn.Conv1d:
        return False
    return [type(p) for p in parametrizations["weight"]] == [WeightNormParametrization]


def _why_not_conv(conv: nn.Module) -> str | None:
    if _is_parametrized(conv):
        reason = "it has hooks" if has_hooks(conv) else why_changed(conv, nn.Conv1d)
        reason = reason or why_not_plain_parameters(conv.parametrizations["weight"])
    elif is_one(conv, nn.Conv1d) and _weight_norm_hook(conv) is not None:
        reason = "it has hooks" if hooks_of(conv)[0] else why_changed(conv, type(conv))
        reason = reason or why_not_plain_parameters(conv)
    else:
        reason = why_not_plain(conv, nn.Conv1d)
    if reason is None and (conv.stride, conv.dilation, conv.padding) != ((1,), (1,), (conv.kernel_size[0] // 2,)):
        return "it has a stride, dilation or other padding"
    return reason


def _weight(conv: nn.Module) -> Tensor:
    """The convolution's weight `[C, C / groups, K]`, weight norm applied; remembered while no gradient is needed.

    Where nothing is remembered, off the CPU, it is written in the order in which kernels read it.
    """
    if _is_parametrized(conv):
        parametrization = conv.parametrizations["weight"]
        if any(has_hooks(m) for m in (parametrization, *parametrization)):
            return conv.weight
        sources = (parametrization.original0, parametrization.original1)
        if _is_written_by_taps(*sources):
            return _normed_by_taps(*sources, parametrization[0].dim)
        if conv.training:
            return derived("weight norm", sources, lambda: conv.weight)
        return linked("weight norm", sources, parametrization[0].forward)
    hook = _weight_norm_hook(conv)
    if hook is not None:
        sources = (getattr(conv, f"{hook.name}_g"), getattr(conv, f"{hook.name}_v"))
        if _is_written_by_taps(*sources):
            return _normed_by_taps(*sources, hook.dim)
        if conv.training:
            return derived("weight norm", sources, lambda: hook.compute_weight(conv))
        return linked("weight norm", sources, lambda g, v: weight_norm(v, g, hook.dim))
    return conv.weight


def _leave_weight(conv: nn.Module, weight: Tensor) -> None:
    """Set the weight on a module as the hook would, were the module called: whoever copies or reads it finds it there.

    A copy, since ours is kept; where gradients are wanted, whatever was there stays, and is as little to be copied.
    """
    hook = _weight_norm_hook(conv)
    if hook is None or torch.compiler.is_compiling() or isinstance(weight, FakeTensor) or weight.requires_grad:
        return

    def leave() -> bool:
        setattr(conv, hook.name, weight.clone())
        return True

    derived("weight left on the module", (getattr(conv, f"{hook.name}_g"), getattr(conv, f"{hook.name}_v")), leave)


def _is_written_by_taps(g: Tensor, v: Tensor) -> bool:
    return v.is_cuda and not needs_grad(g, v) and not torch.compiler.is_compiling()


def _normed_by_taps(g: Tensor, v: Tensor, dim: int) -> Tensor:
    """`weight_norm(v, g, dim)` as a view of `[K, C / groups, C]`."""
    axes = [axis for axis in range(v.dim()) if axis != dim]
    scale = g / torch.linalg.vector_norm(v, dim=axes, keepdim=True, dtype=accumulation_dtype(v.dtype))
    weight = v.new_empty(v.shape[::-1]).permute(2, 1, 0)
    return torch.mul(v, scale, out=weight)


class PositionalConv:
    """Grouped convolution with weight norm in either spelling, activation. Made of `conv` and `activation`."""

    def why_not_same(self) -> str | None:
        """Why there may not come out as many frames as go in: one more is to be cut off; None when it surely is."""
        raise NotImplementedError

    def own_forward(self, hidden_states: Tensor) -> Tensor:
        """What the family's own module does, on `[B, T, C]`."""
        raise NotImplementedError

    def _why_not_fused(self) -> str | None:
        return named("conv", _why_not_conv(self.conv)) or self.why_not_same()

    def steps(self, signal: Signal) -> Iterator[Step]:
        x = signal.frames(self, getattr(self.conv, "in_channels", 0))
        step = self._convolve(x, None, residual=self._why_not_added() is None)
        yield step
        if step.refusal is None and fused_activation(self.activation) is None:
            name = type(self.activation).__name__
            yield Step("positional_conv epilogue", f"activation is called: {name} is not fused")

    def _why_not_added(self) -> str | None:
        """Why the sum with its input is not a part of the op; None when it is."""
        return self.why_called() or (None if fused_activation(self.activation) else "its activation is called")

    def _convolve(self, hidden_states: Tensor, packing: Packing | None, residual: bool) -> Step:
        """The convolution, the activation where it can be fused, and with `residual` the sum with its input."""
        conv, refusal, weight = self.conv, self._why_not_fused(), None
        if refusal is None:
            weight = _weight(conv)
            refusal = named("conv", why_mixed(hidden_states, weight, conv.bias))

        def fused() -> Tensor:
            options = {"groups": conv.groups, "activation": fused_activation(self.activation) or "none"}
            options["offsets"] = None if packing is None else packing.offsets
            _leave_weight(conv, weight)
            return ops.positional_conv(hidden_states, weight, conv.bias, residual=residual, **options)

        return Step("positional_conv", refusal, fused)

    def embed(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """`[B, T, C]` frames, or packed ones `[1, N, C]`, to their positional embedding, the same shape."""
        step = self._convolve(hidden_states, packing, residual=False)
        if step.refusal is not None:
            return self.own_forward(hidden_states) if packing is None else packing.each(self.own_forward, hidden_states)
        out = step.fused()
        return out if fused_activation(self.activation) else self.activation(out.transpose(1, 2)).transpose(1, 2)

    def added_to(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """`hidden_states + self(hidden_states)`."""
        if self._why_not_added() is None:
            step = self._convolve(hidden_states, packing, residual=True)
            if step.refusal is None:
                return step.fused()
        return hidden_states + (self(hidden_states) if packing is None else self(hidden_states, packing))
