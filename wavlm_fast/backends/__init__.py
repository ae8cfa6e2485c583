"""Who computes an op: the chooser, its reasons, and the user's wish for a backend.

A backend is one file in this folder with a `NAME`, a backend-level `why_not(device)`, and a `TABLE` from op name to
`Implementation`. `choose` walks the backends in order and takes the first that does not refuse.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("wavlm_fast")

ENVIRONMENT_VARIABLE = "WAVLM_FAST_BACKEND"
_NAMES = ("reference", "cpu", "triton")
# Fastest first, by the kind of device that the tensors are on. ROCm devices are "cuda" to torch.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}

_wanted: ContextVar[str | None] = ContextVar("wavlm_fast_backend", default=None)
_noted: ContextVar[list[tuple[str, Choice]] | None] = ContextVar("wavlm_fast_noted", default=None)


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run this call. The message says why."""


@dataclass(frozen=True)
class Implementation:
    """One backend's way to compute one op.

    `fn` takes the arguments of the op's schema. `why_not` takes the same and returns a sentence when `fn` cannot
    compute this call, None when it can. It must read shapes, dtypes and devices only, never values.
    """

    fn: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *args: None


@dataclass(frozen=True)
class Choice:
    """The backend that computes a call, and for each faster one the sentence why it does not."""

    backend: str
    fn: Callable[..., Any]
    refused: tuple[tuple[str, str], ...] = ()


def names() -> tuple[str, ...]:
    """The backends by name, without "auto"."""
    return _NAMES


@cache
def load(name: str) -> ModuleType:
    """The module of one backend."""
    return importlib.import_module(f"{__name__}.{name}")


def _checked(name: str, source: str) -> str:
    if name not in (*_NAMES, "auto"):
        raise ValueError(f"{source} must be one of 'auto', {', '.join(map(repr, _NAMES))}, got {name!r}")
    return name


def current() -> str:
    """The backend wished for in this thread: `use_backend`, else WAVLM_FAST_BACKEND, else "auto"."""
    wanted = _wanted.get()
    if wanted is not None:
        return wanted
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", f"the environment variable {ENVIRONMENT_VARIABLE}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of this thread on one backend: "auto" (default), "reference", "cpu" or "triton".

    The backward pass of what ran inside follows, whenever and in whichever thread it runs. An op for which the named
    backend has no kernel runs on the reference; a kernel that cannot take the call raises `BackendUnavailable`.

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


def choose(op: str, args: tuple) -> Choice:
    """Decide which backend computes `op` on `args` (the arguments of its schema, positionally).

    Raises:
        BackendUnavailable: a backend was asked for by name and refuses this call.
    """
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    wanted = current()
    if wanted != "auto":
        return _named(wanted, op, args, device)
    refused = []
    for name in _PREFERENCE.get(device.type, ("reference",)):
        implementation, reason = _ask(name, op, args, device)
        if reason is None:
            return Choice(name, implementation.fn, tuple(refused))
        refused.append((name, reason))
        _log_once(op, name, reason)
    raise AssertionError("the reference never refuses")


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


def _named(name: str, op: str, args: tuple, device: torch.device) -> Choice:
    if op not in load(name).TABLE:
        reason = f"the {name} backend has no kernel for {op}"
        return Choice("reference", load("reference").TABLE[op].fn, ((name, reason),))
    implementation, reason = _ask(name, op, args, device)
    if reason is not None:
        raise BackendUnavailable(f"{op} cannot run on the {name} backend: {reason}")
    return Choice(name, implementation.fn)


def _ask(name: str, op: str, args: tuple, device: torch.device) -> tuple[Implementation | None, str | None]:
    backend = load(name)
    implementation = backend.TABLE.get(op)
    if implementation is None:
        return None, f"no {name} kernel for {op}"
    reason = backend.why_not(device)
    return implementation, implementation.why_not(*args) if reason is None else reason


@cache
def _log_once(op: str, name: str, reason: str) -> None:
    logger.info("%s does not run on the %s backend: %s", op, name, reason)
