"""The position bias as layers of other houses hand it on: dense to whoever looks, one vector per head to us."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._private import make_wrapper_subclass
from ..ops.gated_attention import bias_rows

_PROPERTIES = (Tensor.shape, Tensor.dtype, Tensor.device, Tensor.layout, Tensor.ndim, Tensor.is_cpu, Tensor.is_cuda)
# What can be said without values.
_HARMLESS = {*(p.__get__ for p in _PROPERTIES), Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}


class PositionBias(Tensor):
    """Has the shape and dtype of the dense bias and none of its memory: any op on it makes the dense one first."""

    rel_bias: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HARMLESS:
            return super().__torch_function__(func, types, args, kwargs or {})
        return _on_dense(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _on_dense(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict) -> Tensor:
        return _dense(self).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _dense(self).contiguous().__reduce_ex__(protocol)


def _on_dense(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    return func(*map(_dense, args), **{name: _dense(value) for name, value in kwargs.items()})


def _dense(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_dense, value))
    return dense(value.rel_bias, value.shape, value.dtype) if type(value) is PositionBias else value


def dense(rel_bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The compact bias `[H, 2T - 1]` with all rows in memory, `[B·H, T, T]` or `[B, H, T, T]`, as the shape says."""
    frames = (rel_bias.shape[1] + 1) // 2
    bias = bias_rows(rel_bias, 0, frames).to(dtype)
    return bias.expand(shape) if len(shape) == 4 else bias.repeat(shape[0] // len(bias), 1, 1)


def handed_on(rel_bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The compact bias in the shape and dtype of the dense one."""
    if make_wrapper_subclass is None or torch.compiler.is_compiling():
        return dense(rel_bias, shape, dtype)
    bias = make_wrapper_subclass(PositionBias, shape, dtype=dtype, device=rel_bias.device)
    bias.rel_bias = rel_bias
    return bias


def taken(position_bias: Tensor | None) -> Tensor | None:
    """The compact bias in what a layer is handed; any other bias as it is."""
    return position_bias.rel_bias if type(position_bias) is PositionBias else position_bias
