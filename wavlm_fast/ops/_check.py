"""The sentences with which ops refuse arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FUSED_ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")


def shape(op: str, name: str, tensor: Tensor, wanted: tuple[int | str, ...]) -> None:
    """Check rank and the sizes given as numbers; sizes given as letters are free."""
    strided(op, name, tensor)
    fits = tensor.dim() == len(wanted) and all(
        isinstance(w, str) or s == w for s, w in zip(tensor.shape, wanted, strict=True)
    )
    if not fits:
        text = ", ".join(map(str, wanted))
        raise ValueError(f"{op} wants {name} of shape [{text}], got {list(tensor.shape)}")


def strided(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise ValueError(f"{op} wants {name} strided, got {tensor.layout}")


def floating(op: str, name: str, tensor: Tensor) -> None:
    strided(op, name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{op} wants {name} of a floating-point dtype, got {tensor.dtype}")


def same(op: str, reference: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Check that the others are on the device of `tensor` and have its dtype."""
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != tensor.dtype:
            raise TypeError(f"{op} wants {name} of the dtype of {reference}, {tensor.dtype}, got {other.dtype}")
        same_device(op, reference, tensor, **{name: other})


def same_device(op: str, reference: str, tensor: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(f"{op} wants {name} on the device of {reference}, {tensor.device}, got {other.device}")


def activation(op: str, name: str) -> None:
    if name not in FUSED_ACTIVATIONS:
        raise ValueError(f"{op} wants an activation of {FUSED_ACTIVATIONS}, got {name!r}")


def frames(op: str, available: int, needed: int, what: str = "frames") -> None:
    if available < needed:
        raise ValueError(f"{op} needs at least {needed} {what}, got {available}")


def positive(op: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{op} wants {name} of 1 or more, got {number}")


def integers(op: str, name: str, tensor: Tensor, wanted: tuple[int | str, ...]) -> None:
    """Check shape and dtype of lengths."""
    shape(op, name, tensor, wanted)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op} wants {name} of an integer dtype, got {tensor.dtype}")


def alike(op: str, wanted: tuple[int | str, ...], reference: str, like: Tensor, **others: Tensor) -> None:
    """Check that the others have this shape, and device and dtype of `like`: gradients of outputs, and saved ones."""
    for name, other in others.items():
        if other is None:  # which torch takes for a tensor
            raise TypeError(f"{op} wants {name}, got None")
        shape(op, name, other, wanted)
    same(op, reference, like, **others)


def norm(op: str, size: int, like: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Check the parameters of a norm, which may be wider than what it norms."""
    for name, vector in (("norm_weight", weight), ("norm_bias", bias)):
        if vector is not None:
            shape(op, name, vector, (size,))
            floating(op, name, vector)
            same_device(op, "the input", like, **{name: vector})
    if bias is not None and bias.dtype != (like if weight is None else weight).dtype:
        wider = "the input" if weight is None else "norm_weight"
        raise TypeError(f"{op} wants norm_bias of the dtype of {wider}, got {bias.dtype}")


def wanted(op: str, which: Sequence[bool], **inputs: Tensor | None) -> None:
    """Check which gradients a backward op is asked for, one truth value for each of its inputs."""
    if len(which) != len(inputs):
        raise ValueError(f"{op} wants {len(inputs)} truth values for {', '.join(inputs)}, got {len(which)}")
    for is_wanted, (name, given) in zip(which, inputs.items(), strict=True):
        if is_wanted and given is None:
            raise ValueError(f"{op} is asked for the gradient of {name}, which is None")
