"""The position bias as layers of other houses hand it on: dense to whoever looks, one vector per head to us."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._private import make_wrapper_subclass, version
from ..ops.gated_attention import bias_rows

_PROPERTIES = (
    Tensor.shape, Tensor.dtype, Tensor.device, Tensor.layout, Tensor.ndim, Tensor.is_cpu, Tensor.is_cuda,
    Tensor.requires_grad, Tensor.grad_fn, Tensor.is_leaf,
)  # fmt: skip
# What can be said without values.
_HARMLESS = {*(p.__get__ for p in _PROPERTIES), Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}
_GRADIENT_WANTED = {Tensor.register_hook, Tensor.retain_grad, Tensor.requires_grad_}


class PositionBias(Tensor):
    """Has the shape and dtype of the dense bias and none of its memory: any op on it makes the dense one first.

    That is made once, so that what is written to it is seen by whoever comes later, us included.
    """

    rel_bias: Tensor
    made_by: Any  # its grad_fn, until a function of autograd hands it on as an output of its own
    dense: Tensor | None = None
    unwritten: object = None  # the dense one's version

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HARMLESS:
            return super().__torch_function__(func, types, args, kwargs or {})
        result = _on_dense(_whole, func, args, kwargs or {})
        if func in _GRADIENT_WANTED and type(args[0]) is PositionBias:
            args[0].unwritten = None
        return result

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _on_dense(_values, func, args, kwargs or {})  # below autograd, which has seen the bias itself

    def __deepcopy__(self, memo: dict) -> Tensor:
        return _whole(self).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _whole(self).contiguous().__reduce_ex__(protocol)


class _HandOn(torch.autograd.Function):
    """What a gradient takes whose function was given the bias and saw a tensor like others."""

    @staticmethod
    def forward(ctx: Any, rel_bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(rel_bias)
        return make_wrapper_subclass(PositionBias, shape, dtype=dtype, device=rel_bias.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rel_bias,), differentiable = ctx.saved_tensors, torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = rel_bias.detach().requires_grad_()
            bias = dense(leaf, grad.shape, grad.dtype)
        return torch.autograd.grad(bias, leaf, grad, create_graph=differentiable)[0], None, None


def _on_dense(whole: Callable[[PositionBias], Tensor], func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    def made(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(made, value))
        return whole(value) if type(value) is PositionBias else value

    return func(*map(made, args), **{name: made(value) for name, value in kwargs.items()})


def _values(bias: PositionBias) -> Tensor:
    return dense(bias.rel_bias, bias.shape, bias.dtype) if bias.dense is None else bias.dense


def _whole(bias: PositionBias) -> Tensor:
    """The dense bias."""
    if _is_anothers(bias):
        # Its gradient goes where that function says. Below autograd the op comes back to us.
        return Tensor.__torch_function__(Tensor.clone, (), (bias,), {})
    if bias.dense is None:
        with torch.set_grad_enabled(bias.rel_bias.requires_grad):  # as it is handed on, whoever looks first
            bias.dense = dense(bias.rel_bias, bias.shape, bias.dtype)
        bias.unwritten = None if bias.dense.is_inference() else version(bias.dense)
    return bias.dense


def _is_anothers(bias: PositionBias) -> bool:
    return torch.is_grad_enabled() and bias.grad_fn is not bias.made_by


def _is_written(bias: PositionBias) -> bool:
    """Whether the dense bias is, or may be, another than it was made."""
    made = bias.dense
    return made is not None and (bias.unwritten is None or bias.unwritten != version(made))


def dense(rel_bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The compact bias `[H, 2T - 1]` with all rows in memory, `[B·H, T, T]` or `[B, H, T, T]`, as the shape says."""
    frames = (rel_bias.shape[1] + 1) // 2
    bias = bias_rows(rel_bias, 0, frames).to(dtype)
    return bias.repeat(shape[0], 1, 1, 1) if len(shape) == 4 else bias.repeat(shape[0] // len(bias), 1, 1)


class _Handing(threading.local):
    def __init__(self) -> None:  # once in every thread
        self.as_it_is = False


_handing = _Handing()


@contextmanager
def handing_on_as_it_is() -> Iterator[None]:
    """Within, layers of this thread hand on the compact bias itself: for graphs, which know no lazy one, where nobody
    but layers of ours is handed it.
    """
    before, _handing.as_it_is = _handing.as_it_is, True
    try:
        yield
    finally:
        _handing.as_it_is = before


def handed_on(rel_bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The compact bias in the shape and dtype of the dense one."""
    if _handing.as_it_is:
        return rel_bias
    if make_wrapper_subclass is None or torch.compiler.is_compiling():
        return dense(rel_bias, shape, dtype)
    bias = _HandOn.apply(rel_bias, shape, dtype)
    bias.rel_bias, bias.made_by = rel_bias, bias.grad_fn
    return bias


def taken(position_bias: Tensor | None) -> Tensor | None:
    """The compact bias in what a layer is handed; any other bias as it is."""
    if type(position_bias) is not PositionBias:
        return position_bias
    if _is_written(position_bias) or _is_anothers(position_bias):
        return _whole(position_bias)
    return position_bias.rel_bias
