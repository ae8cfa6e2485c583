"""What a module decides by what it and its submodules hold, kept while they hold the same.

To ask each submodule of a layer why it cannot be fused takes several times as long as to see that nothing in them has
changed since all were asked. What is compared is everything that is set on them, whatever it is: no question can be
about something that is left out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._private import GLOBAL_HOOKS, buffers_of, parameters_of
from ._plain import arithmetic_of


class _Held:
    """What a module and all in it hold, in their `__dict__`s and on their classes; nothing of it is the module."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self.cls, self.own = type(module), _copied(module)
        self.inside = [(m, type(m), _copied(m)) for m in modules[1:]]
        tensors_of = [of for of in (parameters_of, buffers_of) if of(module) is of(module)]
        self.tensors = [
            (own, name, t, type(t), None if t is None else t.dtype)
            for of in tensors_of
            for own in map(of, modules)
            for name, t in own.items()
        ]
        self.methods = [found for cls in set(map(type, modules)) for found in _methods_of(cls)]
        attributes = (value for m in modules for value in vars(m).values())
        self.can_be_compared = len(tensors_of) == 2 and not any(isinstance(value, Tensor) for value in attributes)

    def is_still_held_by(self, module: nn.Module) -> bool:
        """Whether all is as it was."""
        if any(GLOBAL_HOOKS):
            return False
        # Tensors first: where they are the same, no values of theirs are compared below.
        for own, name, t, cls, dtype in self.tensors:
            if own.get(name) is not t or type(t) is not cls:
                return False
            if t is not None and (t.dtype is not dtype or hasattr(t, "ds_id")):
                return False
        for cls, name, method in self.methods:
            if getattr(cls, name, None) is not method:
                return False
        try:
            if type(module) is not self.cls or module.__dict__ != self.own:
                return False
            for m, cls, held in self.inside:
                if type(m) is not cls or m.__dict__ != held:
                    return False
        except Exception:  # what cannot be compared, such as a tensor in the place of something else
            return False
        return True

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all of these are among its parameters: what is computed of them must be computed again."""
        ids = {id(t) for _, _, t, *_ in self.tensors}
        return all(id(t) in ids for t in tensors)


def _methods_of(cls: type[nn.Module]) -> Iterator[tuple[type, str, Any]]:
    """What somebody may put his own in the place of, on a class or on the one that it stands in for."""
    taken_over = [name for name, *_ in getattr(cls, "taken_over", ())]
    for name in {"forward", *taken_over, *(name for name, _ in arithmetic_of(cls))}:
        yield cls, name, getattr(cls, name, None)
    for name in taken_over:
        yield cls.original, name, getattr(cls.original, name, None)


def _copied(module: nn.Module) -> dict[str, Any]:
    """What is set on a module; hooks, parameters and submodules are in dictionaries, which change in place."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}


_kept: weakref.WeakKeyDictionary[nn.Module, tuple[_Held, Any]] = weakref.WeakKeyDictionary()


def kept(module: nn.Module, decide: Callable[[], tuple[str | None, Any]]) -> tuple[str | None, Any]:
    """`decide()`, a refusal or None and lists of parameters; where it is no refusal, as it was when it was asked first,
    as long as neither the module nor anything in it has changed.

    Args:
        module: what `decide` asks, with its submodules, and nothing else.
        decide: reads what they hold, their classes' methods, and the classes and dtypes of parameters; no values.
    """
    if torch.compiler.is_compiling():
        return decide()
    known = _kept.get(module)
    if known is not None and known[0].is_still_held_by(module):
        return known[1]
    held = _Held(module)  # as it is before anybody is asked
    refusal, parameters = decision = decide()
    if refusal is None and held.can_be_compared and held.holds(p for group in parameters for p in group):
        _kept[module] = held, decision
    else:
        _kept.pop(module, None)
    return decision
