"""How a call looks to the check of an op, and when the dispatcher would do nothing with it but hand it to the kernel.

On its way it enters Python twice, for autograd and for the kernel: 20 us, as long as a small op takes. So what is here,
in each call of an op, is one loop over its arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._private import PLAIN_KEYS, dispatch_keys, is_autocast_enabled, is_plain, is_watched
from ..leaving import leaving_eager

_SCALARS = frozenset({bool, int, float, str, type(None)})


def look_of(args: Iterable[Any]) -> tuple:
    """All of a call that a check can see: of tensors anything but values."""
    return tuple(map(_look, args))


def _look(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _look_of_tensor(value)
    if isinstance(value, (list, tuple)):
        return look_of(value)
    return type(value), value


def _look_of_tensor(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.stride()


def look_if_handed_on(args: tuple) -> tuple | None:
    """The look of a call in which nobody else has a part, in eager torch: no gradient is recorded, nothing cast or
    traced, no mode listens, and tensors are no more than that. None of any other call.

    Raises:
        RuntimeError: a parameter has no strides.
    """
    if is_watched() or leaving_eager() is not None or is_autocast_enabled():
        return None
    return _look_of_plain(args, torch.is_grad_enabled())


def _look_of_plain(args: Iterable[Any], recording: bool) -> tuple | None:
    look: list[Any] = []
    for value in args:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            if recording and value.requires_grad:
                return None
            if kind is Tensor and dispatch_keys(value).raw_repr() not in PLAIN_KEYS and not is_plain(value):
                return None
            look.append(_look_of_tensor(value))
        elif kind in _SCALARS:
            look.append((kind, value))
        elif isinstance(value, Tensor):
            return None
        elif isinstance(value, (list, tuple)):
            inner = _look_of_plain(value, recording)
            if inner is None:
                return None
            look.append(inner)
        else:
            look.append((kind, value))
    return tuple(look)
