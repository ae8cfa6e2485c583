"""Which gradients a backward pass hands back."""

from collections.abc import Sequence

import torch


def only(wanted: Sequence[bool], *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Those that are wanted, and None for the others."""
    return tuple(gradient if is_wanted else None for is_wanted, gradient in zip(wanted, gradients, strict=True))
