"""Who computes an op: the chooser, its reasons, and the user's wish for a backend.

A backend is a file or a folder beside this one; nothing else names it. `choose` walks those that serve the device,
fastest first, and takes the first that does not refuse. What a backend's module holds:

    NAME: its name, that of the file or folder.
    DEVICES: the device types whose tensors it is chosen for; None for all. ROCm devices are "cuda" to torch.
    RANK: its place among those that serve the same device; the highest is asked first.
    TABLE: op name -> `Implementation`.
    why_not(device=None): why none of them can run, on the device or anywhere here; None when one can.
    mending(reason): what the user can do about a refusal that slows a call down, if anything; may be left out.
    why_torch_trains(op, x, weight): why plain torch is faster at a call, gradient and all, if it is; may be left out.

Importing it must neither take long nor fail, whatever is not installed: all are imported to be put in order.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .._private import is_set

logger: logging.Logger = logging.getLogger("wavlm_fast")

ENVIRONMENT_VARIABLE = "WAVLM_FAST_BACKEND"

_wanted: ContextVar[str | None] = ContextVar("wavlm_fast_backend", default=None)
_noted: ContextVar[list[tuple[str, Choice]] | None] = ContextVar("wavlm_fast_noted", default=None)
_warned: set[str] = set()


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run this call. The message says why."""


@dataclass(frozen=True)
class Implementation:
    """One backend's way to compute one op.

    `fn` takes the arguments of the op's schema. `why_not` takes the same and returns a sentence when `fn` cannot
    compute this call, None when it can. It must read shapes, dtypes and devices only, never values. Whoever calls `fn`
    has asked it: what a kernel needs may be loaded then.
    """

    fn: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *args: None


class Choice(NamedTuple):  # one is made in each call of an op
    """The backend that computes a call, and for each faster one the sentence why it does not."""

    backend: str
    fn: Callable[..., Any]
    refused: tuple[tuple[str, str], ...] = ()


@cache
def names() -> tuple[str, ...]:
    """The backends by name, without "auto"; the reference first."""
    return tuple(backend.NAME for backend in _found())


@cache
def load(name: str) -> ModuleType:
    """The module of one backend."""
    return importlib.import_module(f"{__name__}.{name}")


@cache
def _found() -> tuple[ModuleType, ...]:
    """All backends, by rank."""
    return tuple(sorted((load(file.name) for file in pkgutil.iter_modules(__path__)), key=lambda b: b.RANK))


@cache
def _serving(device: torch.device) -> tuple[ModuleType, ...]:
    """The backends for tensors on a device, fastest first."""
    return tuple(b for b in reversed(_found()) if b.DEVICES is None or device.type in b.DEVICES)


def gather(package: str, folder: Iterable[str]) -> dict[str, Implementation]:
    """The table of a backend that is a folder: of the tables of its files, one for each op and its gradient."""
    table: dict[str, Implementation] = {}
    for file in pkgutil.iter_modules(folder):
        table |= getattr(importlib.import_module(f"{package}.{file.name}"), "TABLE", {})
    return table


def _checked(name: str, source: str) -> str:
    known = names()
    if name not in (*known, "auto"):
        raise ValueError(f"{source} must be one of 'auto', {', '.join(map(repr, known))}, got {name!r}")
    return name


def current() -> str:
    """The backend wished for in this thread: `use_backend`, else WAVLM_FAST_BACKEND, else "auto"."""
    wanted = _wanted.get()
    if wanted is not None:
        return wanted
    if not is_set(ENVIRONMENT_VARIABLE):
        return "auto"
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _checked(name, f"the environment variable {ENVIRONMENT_VARIABLE}") if name else "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of this thread on one backend, in a `with` block.

    The backward pass of what ran inside follows, whenever and in whichever thread it runs. An op for which the named
    backend has no kernel runs on the reference; a kernel that cannot take the call raises `BackendUnavailable`.

    Args:
        name: "auto", which is the default, "reference", "cpu" or "triton".

    Raises:
        ValueError: no backend has that name.
        BackendUnavailable: the backend cannot run on this machine at all.
    """
    _checked(name, "the backend")
    if name != "auto":
        reason = load(name).why_not()
        if reason is not None:
            raise BackendUnavailable(f"the {name} backend cannot be used here: {reason}")
    with resumed(name):
        yield


@contextmanager
def resumed(name: str) -> Iterator[None]:
    """Continue with a wish that `current` gave earlier: the backward pass may run in another thread."""
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def choose(op: str, args: tuple[Any, ...]) -> Choice:
    """Decide which backend computes `op` on `args` (the arguments of its schema, positionally; a tensor first).

    Raises:
        BackendUnavailable: a backend was asked for by name and refuses this call.
    """
    device = args[0].device
    wanted = current()
    if wanted != "auto":
        return _named(wanted, op, args, device)
    refused: tuple[tuple[str, str], ...] = ()
    for backend in _serving(device):
        implementation = backend.TABLE.get(op)
        reason = _why_not(backend, implementation, op, args, device)
        if implementation is not None and reason is None:
            return Choice(backend.NAME, implementation.fn, refused)
        refused = (*refused, (backend.NAME, str(reason)))
        _log_once(op, backend.NAME, reason)
    raise AssertionError("the reference never refuses")


def trained_by_torch(op: str, x: torch.Tensor, weight: torch.Tensor) -> Choice | None:
    """The choice of plain torch for a call of which a gradient of `weight` is wanted, where the fastest backend knows
    torch to be faster; None when `choose` shall decide. It is no refusal: asked for by name that backend computes.
    """
    if current() != "auto":
        return None
    fastest = _serving(x.device)[0]
    why = getattr(fastest, "why_torch_trains", None)
    reason = None if why is None else why(op, x, weight)
    return None if reason is None else _left_to_torch(op, fastest.NAME, reason)


@cache
def _left_to_torch(op: str, fastest: str, reason: str) -> Choice:
    return Choice("reference", load("reference").TABLE[op].fn, ((fastest, reason),))


@contextmanager
def noting() -> Iterator[list[tuple[str, Choice]]]:
    """Note what is chosen for the ops that this thread calls inside, also on tensors without memory."""
    noted: list[tuple[str, Choice]] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def is_noting() -> bool:
    return _noted.get() is not None


def note(op: str, choice: Choice) -> None:
    """Say, to who notes it, that a choice is what computes an op."""
    noted = _noted.get()
    if noted is not None:
        noted.append((op, choice))


def _named(name: str, op: str, args: tuple[Any, ...], device: torch.device) -> Choice:
    backend = load(name)
    if op not in backend.TABLE:
        lacks = f"the {name} backend has no kernel for {op}"
        return Choice("reference", load("reference").TABLE[op].fn, ((name, lacks),))
    implementation = backend.TABLE[op]
    reason = _why_not(backend, implementation, op, args, device)
    if reason is not None:
        raise BackendUnavailable(f"{op} cannot run on the {name} backend: {reason}")
    return Choice(name, implementation.fn)


def _why_not(
    backend: ModuleType, implementation: Implementation | None, op: str, args: tuple[Any, ...], device: torch.device
) -> str | None:
    if implementation is None:
        return f"no {backend.NAME} kernel for {op}"
    reason = backend.why_not(device)
    return implementation.why_not(*args) if reason is None else reason


@cache
def _log_once(op: str, name: str, reason: str) -> None:
    logger.info("%s does not run on the %s backend: %s", op, name, reason)


def warn_once(choice: Choice) -> None:
    """Say where everybody sees it that a call falls back, when the user could help that; once for each backend.

    By the logger, as transformers tells of slow paths, and at a level that is shown by default: a warning of Python
    would be lost where warnings are ignored, and end the forward where they are errors.
    """
    for name, reason in choice.refused:
        mending = getattr(load(name), "mending", None)
        line = None if name in _warned or mending is None else mending(reason)
        if line is not None:
            _warned.add(name)
            logger.warning("wavlm_fast runs in plain torch, slower than it could: %s. To mend it: %s", reason, line)
