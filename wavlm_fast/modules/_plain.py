"""When a fast module may read a submodule's parameters instead of calling it.

A submodule is plain when calling it would do nothing but its class's arithmetic on its own parameters. A hook, a LoRA
adapter, a quantized or sharded weight makes it not plain: it is then called, and keeps working.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.wavlm import modeling_wavlm as hf

from .._private import ACTIVATIONS, CAPTURING, GLOBAL_HOOKS, FakeTensor, hooks_of, parameters_of
from ..freed import FreedWeight

_ORDINARY = (nn.Parameter, Tensor, FreedWeight)
_FUSED_ACTIVATIONS = {nn.ReLU: "relu", **ACTIVATIONS}


# Their arithmetic, as it was at import: somebody may put his own on a class.
_ARITHMETIC = {
    cls: tuple((name, getattr(cls, name)) for name in ("forward", "_conv_forward") if hasattr(cls, name))
    for cls in (
        *(nn.Linear, nn.Conv1d, nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.Dropout, nn.GELU, hf.WavLMSamePadLayer),
        *_FUSED_ACTIVATIONS,
    )
}


# Other classes of the same arithmetic: the class above that each stands for.
_ALIKE: dict[type[nn.Module], type[nn.Module]] = {}


def take_for(cls: type[nn.Module], known: type[nn.Module] | None) -> None:
    """Let modules of a class be plain ones of a known class from now on; with None no more."""
    if known is None:
        _ALIKE.pop(cls, None)
    elif cls is not known:
        _ARITHMETIC[cls] = tuple((name, getattr(cls, name)) for name, _ in _ARITHMETIC[known])
        _ALIKE[cls] = known


def arithmetic_of(cls: type[nn.Module]) -> tuple[tuple[str, Callable], ...]:
    """The methods by name that a class's arithmetic is made of, as they were; none of a class that is not known."""
    return _ARITHMETIC.get(cls, ())


def why_changed(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """A sentence naming a method that somebody replaced on the class, one of those above, or on the module; or None."""
    for name, method in _ARITHMETIC[cls]:
        if getattr(cls, name) is not method or name in module.__dict__:
            return f"its {name} was replaced"
    return None


def has_hooks(module: nn.Module, but_captures: bool = False) -> bool:
    """Whether calling the module runs anything beside its class's forward; captures by transformers may not count."""
    forward, before_forward, backward, before_backward = hooks_of(module)
    if but_captures and forward:
        forward = [hook for hook in forward.values() if not is_capture(hook)]
    if forward or before_forward or backward or before_backward:
        return True
    return "forward" in module.__dict__ or any(GLOBAL_HOOKS)  # accelerate's hooks replace the bound method


def is_capture(hook: object) -> bool:
    """Whether a forward hook is one by which transformers 5 collects outputs; it looks away unless asked for them."""
    return getattr(hook, "__module__", "") == CAPTURING


def why_not_plain(module: nn.Module, expected: type[nn.Module]) -> str | None:
    """A sentence saying why the module must be called, or None when its parameters may be read."""
    if not is_one(module, expected):
        return f"it is a {_full_name(type(module))}, not a plain {_full_name(expected)}"
    if has_hooks(module):
        return "it has hooks"
    return why_changed(module, type(module)) or why_not_plain_parameters(module)


def is_one(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Whether the module's class is the expected one, or taken for it."""
    return is_like(type(module), expected)


def is_like(cls: type[nn.Module], known: type[nn.Module]) -> bool:
    """Whether a class is a known one, or taken for it."""
    return cls is known or _ALIKE.get(cls) is known


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def why_not_plain_parameters(module: nn.Module) -> str | None:
    """A sentence naming the module's first parameter that is no ordinary tensor, or None."""
    reasons = (why_not_ordinary(name, p) for name, p in parameters_of(module).items() if p is not None)
    return next((reason for reason in reasons if reason is not None), None)


def why_not_ordinary(name: str, parameter: Tensor) -> str | None:
    """A sentence saying why the values of a parameter cannot be read, or None when they can."""
    if type(parameter) not in _ORDINARY and not _is_fake(parameter):
        return f"its {name} is a {type(parameter).__name__}"
    if hasattr(parameter, "ds_id"):
        return f"its {name} is sharded by DeepSpeed"
    return None if parameter.is_floating_point() else f"its {name} is quantized to {parameter.dtype}"


def _is_fake(tensor: Tensor) -> bool:
    # Tracing (torch.compile, torch.export) puts fake tensors in the parameters' place.
    return isinstance(tensor, FakeTensor) or torch.compiler.is_compiling()


# Functions that are activations which ops know.
_functions: dict[Callable[[Tensor], Tensor], str] = {}


def learn_activation(function: Callable[[Tensor], Tensor]) -> None:
    """Find out by trying whether a function is an activation that ops know: copies of a house have their own."""
    if function in _functions:
        return
    x = torch.linspace(-6, 6, 193, dtype=torch.float64)
    known = {"relu": x.relu(), "gelu": F.gelu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}
    with torch.no_grad(), contextlib.suppress(Exception):  # what cannot be tried is called
        found = function(x.clone())
        for name, values in known.items():
            if torch.allclose(found, values, rtol=0, atol=1e-6):  # some compute in float32
                _functions[function] = name


def fused_activation(activation: object) -> str | None:
    """The name under which ops know an activation, a module or a function; None when it must be called."""
    if not isinstance(activation, nn.Module):
        return _functions.get(activation) if isinstance(activation, Hashable) else None
    if has_hooks(activation):
        return None
    if type(activation) in _ARITHMETIC and why_changed(activation, type(activation)) is not None:
        return None
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return _FUSED_ACTIVATIONS.get(type(activation))


def why_mixed(x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why an op cannot take these together; None when it can: autocast brings them to one dtype, else they have it."""
    dtype = x.dtype
    for p in parameters:
        if p is not None and p.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            return "its dtype is not that of its input"
    return None
