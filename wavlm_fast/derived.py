"""Tensors computed from parameters and kept until the parameters change: packed, folded or concatenated weights.

Derived state is never in a `state_dict`, is not copied or pickled with the model, and dies with the parameter that it
was computed from.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ._private import WeakTensorKeyDictionary, version
from .freed import FreedWeight, free, refuse
from .leaving import leaving

_SAMPLES = 64

_ORDINARY = (torch.Tensor, torch.nn.Parameter)

_lock = threading.RLock()
_releases: ContextVar[bool] = ContextVar("wavlm_fast_releases", default=False)
_store: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # first source -> {(kind, ids of the rest): Entry}


@dataclass
class _Entry:
    state: list
    value: Any
    others: tuple[torch.Tensor, ...]  # sources after the first, held: no id may be used again while it stands for one
    replaces: bool


def derived(kind: str, sources: tuple[torch.Tensor, ...], build: Callable[[], Any], replaces: bool = False) -> Any:
    """`build()`, remembered under `kind` until the storage, version, dtype, device or shape of a source changes.

    Nothing is remembered, and nothing that is remembered is used, while a gradient may be needed through a source,
    while a graph is traced or a transform is active, or for tensors that track no version (inference tensors). Safe to
    call from several threads.

    Args:
        kind: what is built, a name.
        sources: the parameters that `build` reads.
        build: makes the value; any object holding tensors.
        replaces: whether who has the value does without the sources, parameters: `releasing` may then free them.

    Raises:
        RuntimeError: the sources were freed, and this was not derived before.
    """
    learning = torch.is_grad_enabled()
    if type(sources[0]) is FreedWeight:
        return _what_is_left(kind, sources)
    if torch.compiler.is_compiling() or leaving() is not None:
        return build()
    for s in sources:
        if not _trackable(s) or (learning and s.requires_grad):
            return build()
    key = (kind, *map(id, sources[1:]))
    state = [_state(s) for s in sources]
    with _lock:
        entry = _store.setdefault(sources[0], {}).get(key)
        if entry is None or entry.state != state:
            # A value built in inference mode could not take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                entry = _Entry(state, build(), sources[1:], replaces)
            _store[sources[0]][key] = entry
        if entry.replaces and _releases.get():
            for s in sources:
                free(s)
        return entry.value


def concatenated(kind: str, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat(sources)`, remembered under `kind`."""
    return derived(kind, tuple(sources), lambda: torch.cat(tuple(sources)))


def _what_is_left(kind: str, sources: tuple[torch.Tensor, ...]) -> Any:
    with _lock:
        entry = _store.get(sources[0], {}).get((kind, *map(id, sources[1:])))
    if entry is None:
        refuse(kind, sources)
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
    with _lock:
        found = [e.value for p in parameters for e in _store.get(p, {}).values()]
        return found + values(v for v in found if isinstance(v, torch.Tensor)) if found else []


def nbytes(parameters: Iterable[torch.Tensor]) -> int:
    """Memory in bytes of `values(parameters)`."""
    return sum(map(_tensor_bytes, values(parameters)))


def forget(parameters: Iterable[torch.Tensor]) -> None:
    """Drop everything derived from `parameters`."""
    with _lock:
        for p in parameters:
            _store.pop(p, None)


def _trackable(source: torch.Tensor) -> bool:
    return type(source) in _ORDINARY and not source.is_meta and not source.is_inference()


_fingerprint: Callable[[torch.Tensor, int], int] | None = None


def use_fingerprint(function: Callable[[torch.Tensor, int], int]) -> None:
    """Let `function(tensor, samples)` look at tensors on the CPU: the C++ one takes a microsecond, not five.

    Its number must change whenever what `_state` puts together would.
    """
    global _fingerprint
    _fingerprint = function


def _state(source: torch.Tensor) -> tuple | int:
    if _fingerprint is not None and source.is_cpu and not torch.jit.is_tracing():  # which takes no op for a number
        return _fingerprint(source, _SAMPLES)
    return (source.data_ptr(), version(source), source.dtype, source.device, source.shape, _sample(source))


def _sample(source: torch.Tensor) -> tuple | None:
    # Writes through `.data` (weight averaging, some optimizers) leave the version alone. A few values tell; on other
    # devices reading them would wait for the device.
    if source.device.type != "cpu" or source.numel() == 0 or not source.is_contiguous():
        return None
    flat = source.detach().view(-1)
    return tuple(flat[:: flat.numel() // _SAMPLES | 1].tolist())  # odd, so as not to stay in one column


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        # oneDNN tensors have no storage to ask.
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(map(_tensor_bytes, value))
    return 0
