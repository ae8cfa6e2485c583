"""How an op is registered: schema, contract, fake kernel, autograd formula, autocast rule, reference.

Every op of this package is defined once, in the file that bears its name, with `define`. Its kernel in the dispatcher
asks the chooser (`wavlm_fast.backends`) at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._private import TAGS, unaliased
from ..derived import derived
from ..freed import refuse
from ._decompose import decomposes
from ._direct import look_if_handed_on, look_of

NAMESPACE = "wavlm_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# Op name -> the op in differentiable plain torch, same arguments less `save`: the oracle of the parity harness.
references: dict[str, Callable[..., Any]] = {}
# Op name -> the reference backend's implementation.
kernels: dict[str, Callable[..., Any]] = {}
# Op name -> schema text without the name, for backends that implement the same schema in their own namespace.
schemas: dict[str, str] = {}
_checks: dict[str, _Checked] = {}


def define(
    name: str,
    signature: str,
    *,
    fake: Callable[..., Any],
    kernel: Callable[..., Any],
    check: Callable[..., None],
    in_parts: bool = False,
) -> Callable[..., Any]:
    """Register an op of the namespace `wavlm_fast`.

    Args:
        name: op name.
        signature: schema without the name; the last arguments may have a default of None.
        fake: outputs of the right shape, dtype and strides, without values.
        kernel: the reference backend's implementation.
        check: raises ValueError or TypeError when the arguments break the contract. Runs before any kernel; reads no
            values. A backward op refuses what its forward does, and what does not fit the forward's outputs.
    """
    schemas[name], kernels[name] = signature, kernel
    checked = _checks[name] = _Checked(check)
    count, lists = _count_and_lists(name)

    def is_by_ops(choice: backends.Choice) -> bool:
        """Whether who computes it is ops that are chosen for in their turn."""
        return in_parts and choice.backend == "reference"

    def compute(args: tuple) -> Any:
        choice = backends.choose(name, args)
        if not is_by_ops(choice):
            backends.note(name, choice)
            if choice.backend == "reference":
                refuse(name, args)
                backends.warn_once(choice)
        outputs = choice.fn(*args)
        # Autograd forbids writing into an output that is a view, even when nobody else has its base; SpecAugment does.
        return tuple(map(unaliased, outputs)) if isinstance(outputs, tuple) else unaliased(outputs)

    def dispatched(*args: Any) -> Any:
        args = _completed(name, args)
        checked(*args)
        return compute(args)

    def call(*args: Any) -> Any:
        """The op, past the dispatcher where that has taken such a call before and would only hand it on."""
        if torch.compiler.is_compiling():
            return op(*args)
        completed = args if len(args) == count and not lists else _completed(name, args)
        try:
            has_passed = look_if_handed_on(completed) in checked.met
        except _INCOMPARABLE:
            has_passed = False
        return compute(completed) if has_passed else op(*args)

    def checked_fake(*args: Any) -> Any:
        args = _completed(name, args)
        check(*args)
        if backends.is_noting():
            choice = backends.choose(name, args)
            if is_by_ops(choice):
                return choice.fn(*args)
            backends.note(name, choice)
        return fake(*args)

    LIBRARY.define(name + signature, tags=TAGS)
    LIBRARY.impl(name, dispatched, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    decomposes(op, list(arguments_of(signature)), kernel)
    return call


_MOST_MET = 1024  # calls of an op: utterances have many lengths
_INCOMPARABLE = (TypeError, RuntimeError)  # of sizes of a traced graph, or of a tensor without strides


class _Checked:
    """A check that lets pass what looks like a call which passed it earlier: it takes as long as a small op."""

    def __init__(self, check: Callable[..., None]) -> None:
        self.wants = check
        self.met: set[tuple | None] = set()  # looks

    def __call__(self, *args: Any) -> None:
        try:
            look = look_of(args)
            if look in self.met:
                return
        except _INCOMPARABLE:
            return self.wants(*args)
        self.wants(*args)
        if len(self.met) >= _MOST_MET:
            self.met.clear()
        self.met.add(look)


def arguments_of(signature: str) -> dict[str, str]:
    """The types of an op's arguments by name, in order."""
    inside, _, _ = signature.removeprefix("(").partition(") ->")
    pairs = (argument.removesuffix("=None").rpartition(" ") for argument in inside.split(", "))
    return {name: kind for kind, _, name in pairs}


@cache
def _count_and_lists(name: str) -> tuple[int, tuple[int, ...]]:
    """How many arguments an op has, and the positions of those that are lists."""
    kinds = arguments_of(schemas[name]).values()
    return len(kinds), tuple(i for i, kind in enumerate(kinds) if kind.endswith("[]"))


def _completed(name: str, args: tuple) -> tuple:
    """All arguments of an op as its schema has them: the dispatcher leaves out defaults, and packages of AOTInductor
    hand on None for an empty list.
    """
    count, lists = _count_and_lists(name)
    if len(args) < count:
        args = (*args, *[None] * (count - len(args)))
    if not lists or not any(args[i] is None for i in lists):
        return args
    return tuple([] if a is None and i in lists else a for i, a in enumerate(args))


def differentiate(
    name: str,
    reference: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor | None]],
    save: Callable[[tuple], Sequence[Tensor]] = lambda outputs: (),
    flowing: int = 1,
    maybe: tuple[int, ...] = (),
    unread: str | None = None,
) -> None:
    """Give an op its gradient.

    Args:
        name: op name.
        reference: the op in differentiable plain torch, for the parity harness and for gradients of gradients. Takes
            the op's inputs less `unread`.
        backward: from (gradients of the outputs, inputs of the op, saved outputs, which inputs want a gradient) to one
            gradient per input of `reference`; those of inputs that want none are not looked at.
        save: which of the outputs the backward pass needs.
        flowing: number of outputs, the first ones, from which a gradient may flow; the others are there to be saved.
        maybe: outputs whose gradient `backward` takes as None where none flows; the others' is zeros then.
        unread: name of the input, if any, that says whether these are wanted.
    """
    references[name] = reference
    names = list(arguments_of(schemas[name]))

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        refuse(f"the gradient of {name}", inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        # Zeros for what was only saved would take as long as the activation's gradient.
        ctx.set_materialize_grads(False)
        ctx.likes = [(o.shape, {"dtype": o.dtype, "device": o.device}) for o in outputs[:flowing]]
        kept = save(outputs)
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)), *kept)
        ctx.template = tuple(Tensor if isinstance(a, Tensor) else a for a in inputs)
        ctx.backend = backends.current()

    def run_backward(ctx: Any, *grads: Tensor | None) -> tuple:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if a is Tensor else a for a in ctx.template]
        pairs = enumerate(zip(grads, ctx.likes, strict=False))
        grads = tuple(
            torch.zeros(shape, **options) if g is None and n not in maybe else g for n, (g, (shape, options)) in pairs
        )
        if torch.is_grad_enabled():
            found = _reference_gradients(reference, dict(zip(names, inputs, strict=True)), unread, grads)
        else:
            with backends.resumed(ctx.backend):
                found = backward(grads, inputs, tuple(saved), ctx.needs_input_grad)
        return (*found, *[None] * (len(inputs) - len(found)))

    torch.library.register_autograd(f"{NAMESPACE}::{name}", run_backward, setup_context=setup_context, lib=LIBRARY)


def _reference_gradients(
    reference: Callable[..., Any], inputs: dict[str, Any], unread: str | None, grads: tuple
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, through plain torch, which takes all inputs but one."""
    wanted = [name for name, a in inputs.items() if isinstance(a, Tensor) and a.requires_grad]
    # Aliases keep one input's gradient from flowing on into another input that it was computed from.
    inputs |= {name: inputs[name].view_as(inputs[name]) for name in wanted}
    outputs = reference(*(a for name, a in inputs.items() if name != unread))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=False) if g is not None]
    found = torch.autograd.grad(
        [o for o, _ in pairs], [inputs[n] for n in wanted], [g for _, g in pairs], create_graph=True, allow_unused=True
    )
    gradients = dict(zip(wanted, found, strict=True))
    return [gradients.get(name) for name in inputs]


def autocast(name: str, op: Callable[..., Any], lower: tuple[int, ...] = (), weights: tuple[int, ...] = ()) -> None:
    """Give an op the usual autocast rule: inputs at the positions `lower` and `weights` are cast to the autocast dtype,
    the others stay. As with torch's own rules, float64 and integer tensors are left alone. Weights are cast once, as
    long as no gradient is wanted of them and they stay what they are.
    """

    def rule(device_type: str, *args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        return op(*(_cast(a, dtype, i in weights) if i in (*lower, *weights) else a for i, a in enumerate(args)))

    autocast_by(name, rule)


def autocast_by(name: str, rule: Callable[..., Any]) -> None:
    """Give an op an autocast rule of its own: a function of the device type and the op's inputs, run with autocast off,
    that calls the op.
    """

    def on(device_type: str) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            with torch.autocast(device_type, enabled=False):
                return rule(device_type, *_completed(name, args))

        return kernel

    for key, device_type in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        LIBRARY.impl(name, on(device_type), key)


def _cast(value: Any, dtype: torch.dtype, once: bool = False) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(v, dtype, once) for v in value]
    castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in (torch.float64, dtype)
    if not castable:
        return value
    refuse("autocast", (value,))
    return derived(f"cast to {dtype}", (value,), lambda: value.to(dtype)) if once else value.to(dtype)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def trained_by_torch(name: str, weight: Tensor, *args: Any) -> bool:
    """Whether a public function shall run its reference, which torch differentiates: a gradient of the weight is
    wanted, and a backend knows that to be faster. What is compiled keeps the op.

    Args:
        name: op name.
        weight: the one that may learn.
        args: all arguments of the op's schema, frames first.
    """
    if not left_to_torch(name, weight, args[0]):
        return False
    check_for_torch(name, *args)
    return True


def left_to_torch(name: str, weight: Tensor, x: Tensor) -> bool:
    """The same, nothing checked yet: of an op that takes as long as its check."""
    if not (torch.is_grad_enabled() and weight.requires_grad) or torch.compiler.is_compiling():
        return False
    choice = backends.trained_by_torch(name, x, weight)
    if choice is None:
        return False
    backends.note(name, choice)
    return True


def check_for_torch(name: str, *args: Any) -> None:
    """Refuse what an op refuses, before torch runs it."""
    refuse(f"the gradient of {name}", args)
    if not torch.is_autocast_enabled(args[0].device.type):  # under which operands may differ in dtype
        _checks[name](*args)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of gates, biases, statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def only(wanted: Sequence[bool], *grads: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
    """The gradients that are wanted, and empty tensors for the others."""
    return tuple(or_empty(g if w else None, like) for w, g in zip(wanted, grads, strict=True))


def or_none(wanted: Sequence[bool], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """What `only` gave, as autograd takes it."""
    return tuple(g if w else None for w, g in zip(wanted, grads, strict=True))


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Ops take and return tensors only: an absent gradient or saved value is an empty one."""
    return like.new_empty(0) if tensor is None else tensor


def is_absent(tensor: Tensor) -> bool:
    """Whether it is what `or_empty` gives for nothing."""
    return tensor.dim() == 1 and tensor.numel() == 0
