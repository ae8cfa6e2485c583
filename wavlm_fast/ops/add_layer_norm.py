"""Residual add and layer norm in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._define import (
    accumulation_dtype,
    autocast_by,
    check_for_torch,
    define,
    differentiate,
    is_absent,
    left_to_torch,
    needs_grad,
    only,
    or_empty,
    or_none,
)
from ._registry import Arguments, Operand, Place, Sizes, describe, vector

NAME = "add_layer_norm"
BACKWARD = f"{NAME}_backward"


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, keep_sum: bool = True
) -> tuple[Tensor, Tensor]:
    """The sum of `x` and `residual`, and its layer norm over channels.

    Equivalent to `s = x + residual; return s, F.layer_norm(s, (C,), weight, bias, eps)`. Post-norm layers go on with
    the second output, pre-norm layers with both.

    Args:
        x: `[..., C]`, floating point.
        residual: the shape and dtype of `x`.
        weight: `[C]`, the dtype of `x`, or float32 for narrower `x`.
        bias: `[C]`, the dtype of `weight`.
        eps: added to the variance.
        keep_sum: whether the first output is wanted; False saves writing it.

    Returns:
        Two tensors of the shape and dtype of `x`: the sum, or an empty tensor, and the sum normed.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
    """
    if left_to_torch(NAME, weight, x):
        total, normed = _by_torch(x, residual, weight, bias, eps, keep_sum)
        return total if keep_sum else x.new_empty(0), normed
    save = keep_sum or needs_grad(x, residual, weight, bias)  # the gradient is computed from the sum
    total, normed = _op(x.contiguous(), residual.contiguous(), weight, bias, eps, save)
    return total if keep_sum or not save else x.new_empty(0), normed


def reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    # What F.layer_norm calls when it has looked at what it was given.
    if total.dtype == weight.dtype:
        return total, torch.layer_norm(total, total.shape[-1:], weight, bias, eps)
    # Norm parameters may be wider than the frames under autocast.
    return total, torch.layer_norm(total.to(weight.dtype), total.shape[-1:], weight, bias, eps).to(total.dtype)


def _by_torch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    """The reference, which torch differentiates; nothing is checked yet, which takes as long as a fifth of it."""
    same = x.shape == residual.shape and x.dtype == residual.dtype == weight.dtype == bias.dtype
    if not same:
        check_for_torch(NAME, x, residual, weight, bias, eps, keep_sum)
    try:
        return reference(x, residual, weight, bias, eps)
    except RuntimeError:  # of frames that are the same torch refuses all that the check does
        check_for_torch(NAME, x, residual, weight, bias, eps, keep_sum)
        raise


def _kernel(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    total, normed = reference(x, residual, weight, bias, eps)
    return or_empty(total if keep_sum else None, x), normed


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_sum: bool) -> None:
    check_norm(NAME, "x", x, weight)
    check.alike(NAME, tuple(x.shape), "x", x, residual=residual)
    check.alike(NAME, tuple(weight.shape), "weight", weight, bias=bias)


def check_norm(op: str, name: str, x: Tensor, weight: Tensor) -> None:
    """Check that `weight` can be that of a layer norm of `x`, which is called `name`."""
    check.floating(op, name, x)
    if x.dim() < 1:
        raise ValueError(f"{op} wants {name} of shape [..., C], got {list(x.shape)}")
    check.shape(op, "weight", weight, (x.shape[-1],))
    if weight.dtype != accumulation_dtype(x.dtype):
        check.same(op, name, x, weight=weight)
    check.same_device(op, name, x, weight=weight)


def _check_backward(
    grad_sum: Tensor, grad_normed: Tensor, total: Tensor, weight: Tensor, eps: float, wanted: list[bool]
) -> None:
    check_norm(BACKWARD, "sum", total, weight)
    check.alike(BACKWARD, tuple(total.shape), "sum", total, grad_normed=grad_normed)
    if not is_absent(grad_sum):
        check.alike(BACKWARD, tuple(total.shape), "sum", total, grad_sum=grad_sum)
    check.wanted(BACKWARD, wanted, sum=total, weight=weight, bias=weight)


def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    return or_empty(torch.empty_like(x) if keep_sum else None, x), torch.empty_like(x)


def _backward_kernel(
    grad_sum: Tensor, grad_normed: Tensor, total: Tensor, weight: Tensor, eps: float, wanted: list[bool]
) -> tuple[Tensor, ...]:
    shape = list(weight.shape)
    wide = total.to(weight.dtype)
    _, mean, rstd = torch.ops.aten.native_layer_norm(wide, shape, None, None, eps)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(weight.dtype), wide, shape, mean, rstd, weight, weight, wanted
    )
    dx = dx.to(total.dtype) if wanted[0] else None
    if dx is not None and not is_absent(grad_sum):
        dx.add_(grad_sum)
    return only(wanted, dx, dweight, dbias, like=total)


def _backward_fake(
    grad_sum: Tensor, grad_normed: Tensor, total: Tensor, weight: Tensor, eps: float, wanted: list[bool]
) -> tuple[Tensor, ...]:
    return only(wanted, *(torch.empty_like(t) for t in (total, weight, weight)), like=total)


_op = define(
    NAME,
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, bool keep_sum) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    kernel=_kernel,
)
_backward_op = define(
    BACKWARD,
    "(Tensor grad_sum, Tensor grad_normed, Tensor sum, Tensor weight, float eps, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_backward_fake,
    kernel=_backward_kernel,
)


def _backward(grads: tuple, inputs: list, saved: tuple, wanted: tuple) -> tuple:
    _, _, weight, _, eps, _ = inputs
    wanted = (wanted[0] or wanted[1], *wanted[2:4])
    grad_sum, grad_normed = or_empty(grads[0], grads[1]).contiguous(), grads[1].contiguous()
    dx, *dvectors = or_none(wanted, _backward_op(grad_sum, grad_normed, *saved, weight, eps, wanted))
    return dx, dx, *dvectors, None


differentiate(NAME, reference, _backward, save=lambda outputs: outputs[:1], flowing=2, maybe=(0,), unread="keep_sum")


def _autocast(
    device_type: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    # The sum is of the wider operand's dtype, as torch promotes; layer norm runs in float32 on a GPU and in the dtype
    # of its input on a CPU, as torch's own rules have it.
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if device_type == "cpu":
        wide = torch.promote_types(dtype, weight.dtype)
        return _op(x.to(dtype), residual.to(dtype), weight.to(wide), bias.to(wide), eps, keep_sum)
    wide = torch.promote_types(dtype, torch.float32)
    total, normed = _op(*(t.to(wide) for t in (x, residual, weight, bias)), eps, keep_sum)
    return total.to(dtype), normed


autocast_by(NAME, _autocast)


def _example(*shape: int, keep_sum: bool = True) -> Arguments:
    return {
        "x": Operand(shape),
        "residual": Operand(shape),
        "weight": vector(shape[-1]),
        "bias": vector(shape[-1]),
        "eps": 1e-5,
        "keep_sum": keep_sum,
    }


def _in_model(s: Sizes) -> list[Place]:
    options = {"keep_sum": s.norm_first}
    return [Place("norms", (s.batch, s.frames, s.channels), options, times=2 * s.layers)]


_OUTPUTS = ("sum", "normed")
describe(NAME, add_layer_norm, example=_example, flops=lambda **rest: 0, places=_in_model, outputs=_OUTPUTS)
