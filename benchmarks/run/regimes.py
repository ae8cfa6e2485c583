"""Ways in which people run a model other than by itself under `torch.no_grad()`, each as the call that is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from .cases import Inputs, Output, placed

Run = Callable[[Output, Inputs], Callable[[], Tensor]]


def _no_grad(module: Output, inputs: Inputs) -> Callable[[], Tensor]:
    """By the book."""
    inputs = placed(module, inputs)

    def call() -> Tensor:
        with torch.no_grad():
            return module(**inputs)

    return call


def _grad(module: Output, inputs: Inputs) -> Callable[[], Tensor]:
    """A forgotten `no_grad`: every parameter wants a gradient, and none is ever asked for."""
    inputs = placed(module, inputs)
    return lambda: module(**inputs)


def _built_in_inference_mode(module: Output, inputs: Inputs) -> Callable[[], Tensor]:
    """The model was made or loaded in inference mode, so that its weights count no versions."""
    inputs = placed(module, inputs)
    with torch.inference_mode():
        built = copy.deepcopy(module)

    def call() -> Tensor:
        with torch.inference_mode():
            return built(**inputs)

    return call


def _autocast(module: Output, inputs: Inputs) -> Callable[[], Tensor]:
    """A float32 model whose products are bfloat16."""
    inputs = placed(module, inputs)
    device = inputs["input_values"].device.type

    def call() -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return module(**inputs)

    return call


def _to_waveform(module: Output, inputs: Inputs) -> Callable[[], Tensor]:
    """Frozen, as the loss of somebody else's model: the gradient with respect to the waveform `[B, S, 1]`."""
    inputs, frozen = placed(module, inputs), copy.deepcopy(module).requires_grad_(False)
    weights: list[Tensor] = []

    def call() -> Tensor:
        waveform = inputs["input_values"].clone().requires_grad_()
        out = frozen(**{**inputs, "input_values": waveform})
        if not weights:
            weights.append(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
        (out * weights[0]).mean().backward()
        return waveform.grad[..., None]

    return call


REGIMES: dict[str, Run] = {
    "no_grad": _no_grad,
    "grad": _grad,
    "inference-built": _built_in_inference_mode,
    "autocast": _autocast,
    "to-waveform": _to_waveform,
}
