"""Weights in the layout that kernels read."""

from collections.abc import Callable

import torch

from ..derived import derived


def packed(kind: str, weight: torch.Tensor, view: Callable[[], torch.Tensor], learns: bool = False) -> torch.Tensor:
    """`view()` of a weight, made contiguous, and remembered under `kind` as long as the weight stays what it is.

    One that learns is another at the next step and is not remembered.
    """
    if learns:
        return view().contiguous()
    return derived(kind, (weight,), lambda: view().contiguous())
