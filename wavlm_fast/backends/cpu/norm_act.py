"""Engine: what surrounds products, a layer norm with its activation and the gradient of an activation.

csrc/norm_act.cpp and csrc/activation_backward.cpp.
"""

from __future__ import annotations

from torch import Tensor

from ...ops._activation import activate_backward
from . import extension

# Layer norm over channels and activation, of `[..., C]`.
norm_act = extension.kernel("norm_act(Tensor x, Tensor? weight, Tensor? bias, float eps, str activation) -> Tensor")
_activation_backward = extension.kernel("activation_backward(Tensor grad, Tensor pre, str activation) -> Tensor")


def through_activation(activation: str, grad: Tensor, pre: Tensor) -> Tensor:
    """The gradient before the activation of `pre`; without the extension in torch."""
    if activation == "none":
        return grad
    if extension.problem() is not None:
        return activate_backward(activation, grad, pre)
    return _activation_backward(grad, pre, activation)
