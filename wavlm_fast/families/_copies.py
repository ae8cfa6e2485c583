"""Classes of houses that people copy: recognised by what a module holds, and stood in for by a subclass of their own.

A copy may have been changed by whoever copied it. So before a class is stood in for, it is tried once: both forwards on
a few random frames, with random weights, in float64. A copy that computes something else keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._private import WeightNormHook, buffers_of, hooks_of, parameters_of
from ..modules import FastModule
from ..modules._originals import StandIn, stands_in_for
from ..modules._plain import take_for

_TOLERANCE = 1e-5  # of the largest value: copies cast to float32 inside
_fast_classes: dict[tuple[type, type], type] = {}
_tried: dict[tuple, str | None] = {}
# Of every house: finds its modules in any module, the inner ones first, each with the base of what stands in for it.
recognisers: list[Callable[[nn.Module], Iterator[tuple[nn.Module, type[Copy]]]]] = []

Call = Callable[[nn.Module], Any]


class Copy(FastModule):
    """Mixed into the fast modules of such a house; each is the base of as many classes as there are copies."""

    boundary: ClassVar[tuple[str, ...]] = ()  # methods beside forward that ours take the place of
    tried_first = True  # before it is stood in for
    cut: ClassVar[tuple[str, ...]] = ()  # names of lists of modules of which one is enough to try it

    @classmethod
    def variant(cls, module: nn.Module) -> tuple:
        """On what, beside its class, it depends what a module does."""
        return ()

    @classmethod
    def alike(cls, module: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
        """Classes of submodules, each with the class of torch's whose arithmetic it has."""
        return {}

    @staticmethod
    def trials(module: nn.Module) -> Iterator[Call]:
        """Calls by which a copy is tried, on the CPU in float64."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple:
        reduced = super().__reduce_ex__(protocol)
        return (_new, (base_of(type(self)), self.original), *reduced[2:]) if self.is_twin() else reduced


def base_of(fast: type) -> type:
    """The family's class that a fast class is made of."""
    return fast.__mro__[1]


def _new(base: type, original: type) -> nn.Module:
    """A module of the fast class, not initialized: pickle fills it."""
    fast = fast_class(base, original)
    return fast.__new__(fast)


def fast_class(base: type, original: type) -> type:
    """The subclass of a copy's class that stands in for it."""
    key = (base, original)
    if key not in _fast_classes:
        fast = type(original.__name__, (base, original), {"__doc__": base.__doc__})
        _fast_classes[key] = stands_in_for(original)(fast)
    return _fast_classes[key]


def stand_ins(model: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module] | None, str | None]]:
    """Every module of a copied house's WavLM that is not fast: the class to stand in for it, or why none does."""
    for recognised in recognisers:
        for module, base in recognised(model):
            if not isinstance(module, StandIn):
                reason = why_not_trusted(base, module) if base.tried_first else None
                yield module, fast_class(base, type(module)) if reason is None else None, reason


def make_fast(model: nn.Module) -> None:
    """Put fast modules in the place of those of copied houses."""
    for module, fast, _ in stand_ins(model):
        if fast is not None:
            module.__class__ = fast


def why_not_trusted(base: type[Copy], module: nn.Module) -> str | None:
    """Why a copy's class cannot be stood in for, a sentence; None when its forward does what ours does.

    Args:
        base: of the fast class.
        module: recognised as what the base stands in for.
    """
    original = module.original if isinstance(module, StandIn) else type(module)
    key = (base, original, original.forward, *base.variant(module))
    if key not in _tried:
        alike = base.alike(module)
        for cls, known in alike.items():
            take_for(cls, known)
        ours = original.__module__.partition(".")[0] == __package__.partition(".")[0]
        _tried[key] = _why_in_the_way(base, original) or (None if ours else _why_not_alike(base, module, original))
        if _tried[key] is not None:
            for cls in alike:
                take_for(cls, None)
    return _tried[key]


def calls(module: nn.Module, name: str, call: Call) -> bool:
    """Whether such a call of a module calls its submodule `name`, instead of reading weights."""
    found = []
    plain = _shadow(module, torch.Generator().manual_seed(0))
    getattr(plain, name).register_forward_hook(lambda *args: found.append(args))
    with torch.no_grad():
        call(plain)
    return bool(found)


def _why_in_the_way(base: type[Copy], original: type) -> str | None:
    """A sentence naming something of the class's own that has the name of something of ours; None when nothing has."""
    own = {name for cls in original.__mro__[: original.__mro__.index(nn.Module)] for name in vars(cls)}
    taken = {n for n in own if hasattr(base, n) and not hasattr(nn.Module, n) and n not in base.boundary}
    return f"{original.__qualname__}.{min(taken)} has the name of something of ours" if taken else None


def _why_not_alike(base: type[Copy], module: nn.Module, original: type) -> str | None:
    name = f"{original.__module__}.{original.__qualname__}"
    try:
        plain = _shadow(module, torch.Generator().manual_seed(0), base.cut)
        for inner in plain.modules():
            if isinstance(inner, StandIn):
                inner.__class__ = inner.original
        ours = _shadow(plain, None)
        for part in ours.children() if base.tried_first else (ours,):
            make_fast(part)
        ours.__class__ = fast_class(base, original)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for call in base.trials(plain):
                if not _alike(call(plain), call(ours)):
                    return f"the forward of {name} computes something else than the published one"
    except Exception as error:
        return f"the forward of {name} cannot be tried: {str(error).partition(chr(10))[0]}"
    return None


def _alike(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, (tuple, list)):
        same = isinstance(ours, type(theirs)) and len(ours) == len(theirs)
        return same and all(map(_alike, theirs, ours))
    if not isinstance(theirs, Tensor):
        return theirs == ours
    if not isinstance(ours, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    return bool((theirs - ours).abs().max() <= _TOLERANCE * theirs.abs().max())


def _shadow(module: nn.Module, generator: torch.Generator | None, cut: tuple[str, ...] = ()) -> nn.Module:
    """A module like this one on the CPU in eval mode, without its hooks; with random weights, or with none its own.

    Lists of these names are cut to their first modules.
    """
    found = module.__new__(type(module))
    nn.Module.__init__(found)
    own = {name: value for name, value in vars(module).items() if name not in vars(found) and name != "forward"}
    vars(found).update(own)
    for hook in hooks_of(module)[1].values():
        if isinstance(hook, WeightNormHook):  # sets the weight before each forward
            vars(found).pop(hook.name, None)
            found.register_forward_pre_hook(hook)
    for name, parameter in parameters_of(module).items():
        found.register_parameter(name, _random(parameter, generator))
    for name, buffer in buffers_of(module).items():
        found.register_buffer(name, _random(buffer, generator))
    for name, child in module.named_children():
        kept = child[:1] if name in cut and isinstance(child, nn.ModuleList) else child
        found.add_module(name, _shadow(kept, generator, cut))
    return found.eval()


def _random(tensor: Tensor | None, generator: torch.Generator | None) -> Tensor | None:
    """Values under which every part of a module matters to what it computes."""
    if tensor is None or generator is None:
        return tensor
    if not tensor.is_floating_point():
        return tensor.cpu()
    shape = tensor.shape
    if tensor.numel() == max(shape, default=1):  # of a norm, a bias, a gate, a weight norm
        return nn.Parameter(0.5 + torch.rand(shape, generator=generator, dtype=torch.float64))
    scale = (shape[0] / tensor.numel()) ** 0.5
    return nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))
