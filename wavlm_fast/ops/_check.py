"""The sentences with which ops refuse arguments."""

from __future__ import annotations

from torch import Tensor

FUSED_ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")


def shape(op: str, name: str, tensor: Tensor, wanted: tuple[int | str, ...]) -> None:
    """Check rank and the sizes given as numbers; sizes given as letters are free."""
    fits = tensor.dim() == len(wanted) and all(
        isinstance(w, str) or s == w for s, w in zip(tensor.shape, wanted, strict=True)
    )
    if not fits:
        text = ", ".join(map(str, wanted))
        raise ValueError(f"{op} wants {name} of shape [{text}], got {list(tensor.shape)}")


def floating(op: str, name: str, tensor: Tensor) -> None:
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
