"""When the dispatcher would do nothing with a call but hand it to the op's kernel.

On its way it enters Python twice, for autograd and for the kernel: 20 us, as long as a small op takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._private import is_plain, is_watched
from ..leaving import leaving


def would_hand_on(args: tuple) -> bool:
    """Whether nobody else has a part in a call in eager torch: no gradient is recorded, nothing cast or traced, no mode
    listens, and tensors are no more than that.
    """
    if is_watched() or leaving() is not None or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return False
    return not _concern_others(args, torch.is_grad_enabled())


def _concern_others(values: Iterable[Any], recording: bool) -> bool:
    for value in values:
        kind = type(value)
        if kind is nn.Parameter or (kind is Tensor and is_plain(value)):
            if recording and value.requires_grad:
                return True
        elif isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and _concern_others(value, recording)):
            return True
    return False
