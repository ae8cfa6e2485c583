"""Classes of houses that people copy: recognised by what a module holds, and stood in for by a subclass of their own.

A copy may have been changed by whoever copied it. So before a class is stood in for, it is tried once: both forwards on
a few random frames, with random weights, in float64, with their gradients. A copy that computes something else keeps
its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .._private import WeightNormHook, buffers_of, hooks_of, on_real_tensors, parameters_of
from ..modules import FastModule
from ..modules._originals import StandIn, stands_in_for
from ..modules._plain import is_like, take_for

_TOLERANCE = 1e-5  # of the largest value: copies cast to float32 inside
_fast_classes: dict[tuple[type, type], type] = {}
_tried: dict[tuple, str | None] = {}
_calling: dict[tuple, bool] = {}
_MATRIX = 2**15  # numbers: gradients of weights so large take time, and tell nothing that those of biases do not
_PLAIN_VALUES = (bool, int, float, str, type(None))
MODE = "_wavlm_fast_padding"  # in a model's own dict: what padding means to it
_OF_ANY_MODULE = {*vars(nn.Module()), MODE}
# Of every house: finds its modules in any module, the inner ones first, each with the base of what stands in for it.
recognisers: list[Callable[[nn.Module], Iterator[tuple[nn.Module, type[Copy]]]]] = []

Call = Callable[[nn.Module], Any]


class Copy(FastModule):
    """Mixed into the fast modules of such a house; each is the base of as many classes as there are copies."""

    boundary: ClassVar[tuple[str, ...]] = ()  # methods beside forward that ours take the place of
    tried_first = True  # before it is stood in for
    cut: ClassVar[tuple[str, ...]] = ()  # names of lists of modules of which one is enough to try it

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
        _fast_classes[key] = stands_in_for(original, tried=True)(fast)
    return _fast_classes[key]


def own_has(module: nn.Module | None, *names: str) -> bool:
    """Whether a module has all these itself: one that wraps another may answer for what is inside."""
    return module is not None and all(hasattr(type(module), name) for name in set(names) - own_names(module))


def own_names(module: nn.Module) -> set[str]:
    """Of what is set on a module, not of what its class has."""
    return {*vars(module), *parameters_of(module), *buffers_of(module), *(name for name, _ in module.named_children())}


def stand_ins(model: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module] | None, str | None]]:
    """Every module of a copied house's WavLM that is not fast: the class to stand in for it, or why none does."""
    for recognised in recognisers:
        for module, base in recognised(model):
            if not isinstance(module, StandIn):
                reason = _why_in_the_way(base, module) or (why_not_trusted(base, module) if base.tried_first else None)
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
    key = (base, original, original.forward, _attributes(module), _classes(module))
    if key not in _tried:
        alike = {cls: known for cls, known in base.alike(module).items() if not is_like(cls, known)}
        for cls, known in alike.items():
            take_for(cls, known)
        ours = original.__module__.partition(".")[0] == __package__.partition(".")[0]
        _tried[key] = None if ours else on_real_tensors(lambda: _why_not_alike(base, module, original))
        if _tried[key] is not None:
            for cls in alike:
                take_for(cls, None)
    return _tried[key]


def _attributes(module: nn.Module) -> tuple:
    """What a module holds that may decide which way its forward goes."""
    held = ((name, value) for name, value in vars(module).items() if type(value) in _PLAIN_VALUES)
    return tuple(pair for pair in held if pair[0] not in _OF_ANY_MODULE and not _is_dropout(module, *pair))


def _classes(module: nn.Module) -> tuple[type, ...]:
    return tuple(getattr(type(inner), "original", type(inner)) for inner in module.modules())


def calls(module: nn.Module, name: str, call: Callable[[], Call]) -> bool:
    """Whether a call of a module calls its submodule `name`, instead of reading weights; asked once."""
    key = (type(module), type(module).forward, name, type(getattr(module, name)))
    if key not in _calling:
        _calling[key] = on_real_tensors(lambda: _calls(module, name, call))
    return _calling[key]


def _calls(module: nn.Module, name: str, call: Callable[[], Call]) -> bool:
    found = []
    try:
        with _aside():
            plain = _shadow(module, torch.Generator().manual_seed(0))
            getattr(plain, name).register_forward_hook(lambda *args: found.append(args))
            call()(plain)
    except Exception:  # then it is not trusted either
        return False
    return bool(found)


@contextmanager
def _aside() -> Iterator[None]:
    """Within, modules can be tried: nobody's generators move, and no mode that happens to be on matters."""
    states = random.getstate(), np.random.get_state()
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
            torch.random.fork_rng(devices=[]),
        ):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _why_in_the_way(base: type[Copy], module: nn.Module) -> str | None:
    """A sentence naming something of a module's own that has the name of something of ours; None when nothing has."""
    original = type(module)
    own = {name for cls in original.__mro__[: original.__mro__.index(nn.Module)] for name in vars(cls)}
    own = {name for name in own | own_names(module) if not hasattr(nn.Module, name) and name not in base.boundary}
    taken = {name for name in own if hasattr(base, name)}
    return f"{original.__qualname__}.{min(taken)} has the name of something of ours" if taken else None


def _why_not_alike(base: type[Copy], module: nn.Module, original: type) -> str | None:
    name = f"{original.__module__}.{original.__qualname__}"
    try:
        with _aside():
            plain = _shadow(module, torch.Generator().manual_seed(0), base.cut)
            for inner in plain.modules():
                if isinstance(inner, StandIn):
                    inner.__class__ = inner.original
            ours = _shadow(plain, None)
            for part in ours.children() if base.tried_first else (ours,):
                make_fast(part)
            ours.__class__ = fast_class(base, original)
            for call in base.trials(plain):
                if not _alike(call(plain), call(ours)):
                    return f"the forward of {name} computes something else than the published one"
            first = next(base.trials(plain))
            if base.tried_first and not _learn_alike(plain.train(), ours.train(), first):
                return f"the forward of {name} trains otherwise than the published one"
    except Exception as error:
        return f"the forward of {name} cannot be tried: {str(error).partition(chr(10))[0]}"
    return None


def _alike(theirs: Any, ours: Any, scale: Tensor | None = None) -> bool:
    """Whether outputs are the same but for rounding, tensors in relation to `scale`, or to the largest of their own."""
    if isinstance(theirs, (tuple, list)):
        same = isinstance(ours, type(theirs)) and len(ours) == len(theirs)
        return same and all(_alike(a, b, scale) for a, b in zip(theirs, ours, strict=True))
    if not isinstance(theirs, Tensor):
        return theirs == ours if not isinstance(ours, Tensor) else False
    if not isinstance(ours, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    return bool((theirs - ours).abs().max() <= _TOLERANCE * (theirs.abs().max() if scale is None else scale))


def _learn_alike(plain: nn.Module, ours: nn.Module, call: Call) -> bool:
    """Whether both give the same outputs and gradients while they train."""
    (theirs, wanted), (mine, found) = (_gradients(module, call) for module in (plain, ours))
    largest = max((g.abs().max() for g in wanted if g is not None), default=None)  # some are rounding noise around 0
    return _alike(theirs, mine) and _alike(wanted, found, largest)


def _gradients(module: nn.Module, call: Call) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs of a call, and gradients: of what comes in, as one number, and of the parameters but for matrices."""
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        frames = {id(x): x * factor for x in given}
        return tuple(frames.get(id(x), x) for x in args), {n: frames.get(id(x), x) for n, x in kwargs.items()}

    handle = module.register_forward_pre_hook(enter, with_kwargs=True)
    with torch.enable_grad():
        outputs = call(module)
        outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(x, Tensor)]
        loss = sum((x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs)
        handle.remove()
        sources = [factor, *(p for p in module.parameters() if p.requires_grad)]
        if not loss.requires_grad:
            return outputs, [None] * len(sources)
        return [x.detach() for x in outputs], list(torch.autograd.grad(loss, sources, allow_unused=True))


def _shadow(module: nn.Module, generator: torch.Generator | None, cut: tuple[str, ...] = ()) -> nn.Module:
    """A module like this one on the CPU in eval mode, without its hooks and its dropout; with random weights, or with
    none its own.

    Lists of these names are cut to their first modules.
    """
    found = module.__new__(type(module))
    nn.Module.__init__(found)
    own = {name: value for name, value in vars(module).items() if name not in vars(found) and name != "forward"}
    vars(found).update(own | {name: 0.0 for name, value in own.items() if _is_dropout(module, name, value)})
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


def _is_dropout(module: nn.Module, name: str, value: Any) -> bool:
    name = f"{type(module).__name__}.p" if name == "p" else name
    return "drop" in name.lower() and isinstance(value, float)


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
    # Numbers that repeat, at a period that is no matrix's: drawing each would take longer than all the rest.
    few = torch.randn(min(tensor.numel(), 10007), generator=generator, dtype=torch.float64)
    values = few.repeat(math.ceil(tensor.numel() / len(few)))[: tensor.numel()].view(shape)
    return nn.Parameter(scale * values, requires_grad=tensor.numel() < _MATRIX)
