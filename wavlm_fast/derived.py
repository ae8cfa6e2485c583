"""Tensors computed from parameters and kept until the parameters change: packed, folded or concatenated weights.

Derived state is never in a `state_dict`, is not copied or pickled with the model, and lives as long as all of the
parameters that it was computed from: when one of them dies, it goes.

It is kept only where a change of a parameter cannot pass unnoticed, which is on the CPU: there the values themselves
are looked at, some of them or, where torch counts no versions, all. On a GPU looking would wait for the device, so
everything is computed again in each forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ._locks import ForkSafeLock
from ._private import version
from .freed import FreedWeight, free, refuse
from .leaving import leaving

_SAMPLES = 64

_ORDINARY = (torch.Tensor, torch.nn.Parameter)

# Guards building. The store itself needs no guard: it changes in single steps, also when a source dies, in any thread.
_lock = ForkSafeLock()
_releases: ContextVar[bool] = ContextVar("wavlm_fast_releases", default=False)
_remembers: ContextVar[bool] = ContextVar("wavlm_fast_remembers", default=True)
_store: dict[tuple, _Entry] = {}  # (kind, ids of the sources)


@dataclass
class _Entry:
    state: list
    value: Any  # None: met, and not built yet
    deaths: list[weakref.ref]  # of the sources: no id may be used again while it stands for one
    replaces: bool


def derived(
    kind: str,
    sources: tuple[torch.Tensor, ...],
    build: Callable[[], Any],
    replaces: bool = False,
    if_met_before: bool = False,
    keep: bool = True,
) -> Any:
    """`build()`, remembered under `kind` until the storage, version, dtype, device or shape of a source changes.

    Nothing is remembered, and nothing that is remembered is used, while a gradient may be needed through a source,
    while a graph is traced or a transform is active, or of tensors whose values are not at hand (`_can_watch`). Safe to
    call from several threads.

    Args:
        kind: what is built, a name.
        sources: the parameters that `build` reads.
        build: makes the value; any object holding tensors.
        replaces: whether who has the value does without the sources, parameters: `releasing` may then free them.
        if_met_before: whether to give None, and build nothing, unless the sources are what they were at an earlier
            call: for what does not pay if it is used once. What frees its sources is built at once.
        keep: whether to remember what is built now; what is remembered already is used either way. What frees its
            sources is always kept.

    Raises:
        RuntimeError: the sources were freed, and this was not derived before.
    """
    learning = torch.is_grad_enabled() and any(s.requires_grad for s in sources)
    sources = tuple(map(_without_link, sources))
    if type(sources[0]) is FreedWeight:
        return _what_is_left(kind, sources)
    if _only_once():
        return build()
    if learning or not all(map(_can_watch, sources)):
        return None if if_met_before else build()
    return _remembered(kind, sources, build, replaces, if_met_before, keep or _releases.get())


def _remembered(
    kind: str,
    sources: tuple[torch.Tensor, ...],
    build: Callable[[], Any],
    replaces: bool = False,
    if_met_before: bool = False,
    keep: bool = True,
) -> Any:
    key = (kind, *map(id, sources))
    state = [_state(s) for s in sources]
    if not keep and ((entry := _store.get(key)) is None or entry.value is None or entry.state != state):
        return build()
    with _lock:
        entry = _store.get(key)
        known = entry is not None and entry.state == state
        if_met_before = if_met_before and not (replaces and _releases.get())
        if entry is None or not known or entry.value is None:
            # A value built in inference mode could not take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                value = build() if known or not if_met_before else None
            entry = _store[key] = _Entry(state, value, _deaths(key, sources), replaces)
        if entry.replaces and _releases.get():
            for s in sources:
                free(s)
        return entry.value


def _deaths(key: tuple, sources: tuple[torch.Tensor, ...]) -> list[weakref.ref]:
    def forgotten(_: weakref.ref, store: dict[tuple, _Entry] = _store) -> None:  # at exit globals may be gone
        store.pop(key, None)

    return [weakref.ref(s, forgotten) for s in sources]


def concatenated(kind: str, sources: Sequence[torch.Tensor], steady: bool = False) -> torch.Tensor:
    """`torch.cat(sources)`, remembered under `kind`; with `steady` as by `linked`."""
    sources = tuple(sources)
    if steady:
        return linked(kind, sources, lambda *parts: torch.cat(parts))
    return derived(kind, sources, lambda: torch.cat(sources))


def linked(
    kind: str, sources: tuple[torch.Tensor, ...], function: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """`function(*sources)`, remembered under `kind` even where a gradient is wanted of the sources.

    For weights that are not expected to change from call to call. The gradient costs one more call of `function`. What
    is derived from the result is derived from the remembered value, and remembered too.
    """
    learning = torch.is_grad_enabled() and any(s.requires_grad for s in sources)
    if not learning or _only_once() or not all(map(_can_watch, sources)):
        return derived(kind, sources, lambda: function(*sources))
    value = _remembered(kind, sources, lambda: function(*sources))
    result = _Link.apply([value], function, *sources)
    result._linked_value = value
    return result


def _without_link(source: torch.Tensor) -> torch.Tensor:
    return getattr(source, "_linked_value", source) if type(source) is torch.Tensor else source


class _Link(torch.autograd.Function):
    """Stands for `function(*sources)` whose value is known."""

    @staticmethod
    def forward(
        ctx: Any, value: list[torch.Tensor], function: Callable[..., torch.Tensor], *sources: torch.Tensor
    ) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*sources)
        return value[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases keep the gradient of one source from flowing on into another that it was computed from.
            sources = [s.view_as(s) if twice else s.detach().requires_grad_(s.requires_grad) for s in ctx.saved_tensors]
            out = ctx.function(*sources)
            found = iter(torch.autograd.grad(out, [s for s in sources if s.requires_grad], grad, create_graph=twice))
        return None, None, *(next(found) if s.requires_grad else None for s in sources)


def _only_once() -> bool:
    """Whether nothing that is remembered is used now, and nothing remembered: of a graph it would be a constant."""
    return torch.compiler.is_compiling() or leaving() is not None or not _remembers.get()


@contextmanager
def remembering_nothing() -> Iterator[None]:
    """Build, in this thread, everything anew inside, of tensors without values too, and keep nothing."""
    token = _remembers.set(False)
    try:
        yield
    finally:
        _remembers.reset(token)


def _what_is_left(kind: str, sources: tuple[torch.Tensor, ...]) -> Any:
    entry = _store.get((kind, *map(id, sources)))
    if entry is None:
        refuse(kind, sources)
    assert entry is not None
    return entry.value


@contextmanager
def releasing() -> Iterator[None]:
    """Free, in this thread, every parameter that something replaces (`wavlm_fast.freed`) as soon as that is there."""
    token = _releases.set(True)
    try:
        yield
    finally:
        _releases.reset(token)


def values(parameters: Iterable[torch.Tensor]) -> list[Any]:
    """Everything derived from `parameters`, and from what was derived from them."""
    held = list(parameters)
    entries = [entry for key in _keys_of(held) if (entry := _store.get(key)) is not None]
    found = [entry.value for entry in entries if entry.value is not None]
    return found + values(v for v in found if isinstance(v, torch.Tensor)) if found else []


def nbytes(parameters: Iterable[torch.Tensor]) -> int:
    """Memory in bytes of `values(parameters)`."""
    return sum(map(_tensor_bytes, values(parameters)))


def forget(parameters: Iterable[torch.Tensor]) -> None:
    """Drop everything derived from `parameters`."""
    for key in _keys_of(list(parameters)):
        _store.pop(key, None)


def _keys_of(sources: list[torch.Tensor]) -> list[tuple]:
    ids = set(map(id, sources))
    return [key for key in list(_store) if not ids.isdisjoint(key[1:])]


def _can_watch(source: torch.Tensor) -> bool:
    """Whether a change of the values cannot pass unnoticed.

    Inference tensors count no versions: only the C++ fingerprint looks at all of their values, fast enough.
    """
    if type(source) not in _ORDINARY or not source.is_cpu or source.layout is not torch.strided:
        return False
    return not source.is_inference() or _fingerprint is not None


_fingerprint: Callable[[torch.Tensor, int], int] | None = None


def use_fingerprint(function: Callable[[torch.Tensor, int], int]) -> None:
    """Let `function(tensor, samples)` look at tensors on the CPU: the C++ one takes a microsecond, not five.

    Its number must change whenever what `_state` puts together would.
    """
    global _fingerprint
    _fingerprint = function


def _state(source: torch.Tensor) -> tuple | int:
    if _fingerprint is not None:
        return _fingerprint(source, _SAMPLES)
    return (source.data_ptr(), version(source), source.dtype, source.shape, source.stride(), _sample(source))


def _sample(source: torch.Tensor) -> tuple:
    # Writes through `.data` (weight averaging, some optimizers) leave the version alone. A few values tell.
    step = source.numel() // _SAMPLES | 1  # odd, so as not to stay in one column
    return tuple(torch.take(source.detach(), torch.arange(0, source.numel(), step)).tolist())


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        # oneDNN tensors have no storage to ask.
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(map(_tensor_bytes, value))
    return 0
