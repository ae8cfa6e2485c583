"""Which of transformers' classes a fast class stands in for, and when a module runs as that class after all.

A fast class answers to the name and module of the class that it stands in for: FSDP's wrap lists, `_no_split_modules`,
device maps and exporters find layers by class name and libraries by module. `repr` and `report` tell which is which.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from ..leaving import leaving

Class = TypeVar("Class", bound=type[nn.Module])

if TYPE_CHECKING:
    Mixin = nn.Module  # what it is mixed into
else:
    Mixin = object


class StandIn(Mixin):
    """Mixed into every fast class."""

    original: ClassVar[type[nn.Module]]
    # The class of the modules that `accelerate` makes fast, which answers to the original's name.
    twin: ClassVar[type[nn.Module]]
    # Name of each method of `original` that the fast class may do without calling it, the method that a module has
    # under that name, and transformers' own, as both were at import.
    taken_over: ClassVar[tuple[tuple[str, Callable[..., Any], Callable[..., Any] | None], ...]] = ()
    # Whether the original's forward takes and makes a dense position bias.
    original_makes_dense_bias: ClassVar[bool] = False

    def run_original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the class that this one stands in for."""
        return self.original.forward(self, *args, **kwargs)

    def why_own_code(self) -> str | None:
        """Why this module has to run as its original just now, for what it holds; None when it need not."""
        return None

    @classmethod
    def is_twin(cls) -> bool:
        """Whether this is the class that takes the original's place, and not a subclass of somebody else's."""
        return cls is cls.twin

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # By its name and module pickle would find the original.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (self.original.__name__,), *reduced[2:]) if self.is_twin() else reduced


def _new(name: str) -> nn.Module:
    """A module of the class that stands in for transformers' class `name`, not initialized: pickle fills it."""
    from ..swap import FAST_CLASSES  # a table of classes that this file is needed for

    fast = next(fast for original, fast in FAST_CLASSES.items() if original.__name__ == name)
    return fast.__new__(fast)


def stands_in_for(original: type[nn.Module], public: bool = False, tried: bool = False) -> Callable[[Class], Class]:
    """A class decorator: the class can take the place of `original`, and does where `swap.FAST_CLASSES` has it.

    A `public` class keeps its own module, by which it is imported and pickled; its twin is a subclass that answers to
    the original's name and module. Any other class is its own twin. The methods of an original that was `tried` are as
    they were then, whoever wrote them.
    """

    def stand_in(cls: Class) -> Class:
        fast: Any = cls
        fast.original = original
        methods = methods_when_tried(original) if tried else own_methods(original)
        fast.taken_over = tuple((name, getattr(fast, name), method) for name, method in methods)
        fast.twin = type(original.__name__, (fast,), {"__doc__": fast.__doc__}) if public else fast
        for name in ("__name__", "__qualname__", "__module__"):
            setattr(fast.twin, name, getattr(original, name))
        return cls

    return stand_in


def methods_of(module: nn.Module) -> tuple[Callable[..., Any] | None, ...]:
    """All that people may put their own in the place of, as it is now: two answers differ where somebody did."""
    own = tuple(
        method
        for name, *_ in getattr(module, "taken_over", ())
        for method in (getattr(type(module), name), getattr(module.original, name), module.__dict__.get(name))
    )
    return (type(module).forward, module.__dict__.get("forward"), *own)


def own_methods(cls: type) -> tuple[tuple[str, Callable[..., Any] | None], ...]:
    """The methods that a class defines, by name; None for one that somebody had put there before this import."""
    return tuple(
        (name, method if method.__module__ == cls.__module__ else None)
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.startswith("__")
    )


def methods_when_tried(cls: type[nn.Module]) -> tuple[tuple[str, Callable[..., Any]], ...]:
    """The methods of a class and of those below it, but for torch's own of every module."""
    above = cls.__mro__[: cls.__mro__.index(nn.Module)]
    names = {name for own in above for name, found in vars(own).items() if inspect.isfunction(found)}
    return tuple((name, getattr(cls, name)) for name in sorted(names) if not name.startswith("__"))


def or_original(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that hands over to the original's while `why_original` has a reason."""

    @functools.wraps(forward)
    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if why_original(self) is None:
            return forward(self, *args, **kwargs)
        return self.run_original(*args, **kwargs)

    # Exporters (optimum) take decorators off a forward and call what is below: that must not be ours.
    chosen.__signature__ = inspect.signature(forward)
    del chosen.__wrapped__
    return chosen


def why_original(module: StandIn) -> str | None:
    """Why a fast module runs its original's forward now; None when it runs ours."""
    return why_patched(module) or leaving() or module.why_own_code()


def why_patched(module: StandIn, but_forward: bool = True) -> str | None:
    """A sentence naming a method that somebody replaced on transformers' class, on ours or on this module, or None.

    With `but_forward` one of the module's or its class's own does not count: torch calls it instead of ours, and where
    ours runs, it was called from there, by a subclass or by accelerate's hooks.
    """
    for name, ours, theirs in module.taken_over:
        own = getattr(type(module), name) is not ours or name in module.__dict__
        if getattr(module.original, name) is not theirs or (own and not (but_forward and name == "forward")):
            return f"{module.original.__name__}.{name} was replaced"
    return None
