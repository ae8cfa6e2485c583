"""Which of its configurations (tiles, warps, stages) a kernel is launched with.

Each kernel file has a function, marked `@tunable`, that returns a short tuple of configurations for a shape, a dtype
and a target of _target.py, the default first. A launch takes the choice that was found for its device and sizes, from
this process or from the files of _tuned.py, and else the default. WAVLM_FAST_AUTOTUNE=1 makes the first launch of each
kind time all configurations and keep the fastest, whatever ships with the package.

Sums may be added up in another order under another configuration. Where torch asks for deterministic algorithms, only
defaults run: nothing then depends on what was measured or on what the files hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, TypeVar

import torch

from .._locks import ForkSafeLock
from . import _tuned
from ._target import target

Config = dict[str, int]
Result = TypeVar("Result")

AUTOTUNE = "WAVLM_FAST_AUTOTUNE"
# No list is longer: every one of them is compiled for every architecture by the tests.
MOST = 4
# An alternative has to be faster by this much: smaller differences are noise.
MARGIN = 0.97
_WARM_UPS, _ROUNDS = 3, 15

_search = ForkSafeLock()
_forced: int | None = None


class Tunable:
    """The configurations of one kernel, and the choices made among them in this process."""

    def __init__(self, function: Callable[..., tuple[Config, ...]]) -> None:
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self.__doc__ = function.__doc__
        self._function = function
        self._chosen: dict[Hashable, Config] = {}

    def __call__(self, *arguments: Hashable) -> tuple[Config, ...]:
        """All configurations, the default first; the last argument is a target of _target.py.

        Those that a small shape makes equal are there once.
        """
        found = self._function(*arguments)
        assert 0 < len(found) <= MOST, f"{self.name} has {len(found)} configurations"
        return tuple(config for index, config in enumerate(found) if config not in found[:index])

    def launch(
        self,
        run: Callable[[Config], Result],
        device: torch.device,
        arguments: tuple[Hashable, ...],
        sizes: tuple[int, ...],
        also: tuple[Hashable, ...] = (),
    ) -> Result:
        """`run(config)` with the configuration chosen.

        Args:
            run: makes the launch. It may be called many times, so it must write all of what it writes, read none of
                that, and allocate what it accumulates into.
            device: where it runs.
            arguments: what the list of configurations depends on, without the target.
            sizes: batch, frames and the like; choices are shared between sizes up to the next power of two.
            also: what else makes launches differ in time.
        """
        arguments = (*arguments, target(device))
        if _forced is not None:
            configs = self(*arguments)
            return run(configs[_forced if _forced < len(configs) else 0])
        buckets = tuple((size - 1).bit_length() for size in sizes)
        key = (device, torch.are_deterministic_algorithms_enabled(), arguments, buckets, also)
        config = self._chosen.get(key)
        if config is None:
            config = self._choose(run, key)
        return run(config)

    def _choose(self, run: Callable[[Config], Any], key: tuple) -> Config:
        device, deterministic, arguments, *_ = key
        configs = self(*arguments)
        searches = os.environ.get(AUTOTUNE) == "1"
        if len(configs) == 1 or deterministic or not _can_tune(device) or not (searches or _tuned.exist()):
            self._chosen[key] = configs[0]
            return configs[0]
        place = _tuned.place(torch.cuda.get_device_name(device), self.name, configs, key[2:])
        config = _tuned.read(place, configs, shipped=not searches)
        if config is None and searches:
            # A graph's capture must not hold the search, and must not settle the choice either.
            if torch.cuda.is_current_stream_capturing():
                return configs[0]
            with _search:
                config = self._chosen.get(key) or fastest(run, configs)
            _tuned.write(place, config)
        self._chosen[key] = config or configs[0]
        return self._chosen[key]

    def forget(self) -> None:
        """Choose anew at the next launch."""
        self._chosen.clear()


TUNABLES: list[Tunable] = []


def tunable(function: Callable[..., tuple[Config, ...]]) -> Tunable:
    """Make a function that lists configurations, the default first, the place where one of them is chosen."""
    TUNABLES.append(Tunable(function))
    return TUNABLES[-1]


@contextmanager
def forced(index: int) -> Iterator[None]:
    """Launch every kernel with the configuration `index` of its list, or the default where the list is shorter.

    In all threads: backward passes run in threads of their own.
    """
    global _forced
    before, _forced = _forced, index
    try:
        yield
    finally:
        _forced = before


def fastest(run: Callable[[Config], Any], configs: tuple[Config, ...]) -> Config:
    """The fastest configuration; the default unless another is faster by MARGIN."""
    times = measure([lambda config=config: run(config) for config in configs])
    best = min(range(len(configs)), key=times.__getitem__)
    return configs[best] if times[best] < MARGIN * times[0] else configs[0]


def measure(launches: list[Callable[[], Any]]) -> list[float]:
    """Median time of each launch on the current device in ms, round by round; infinite for what cannot be launched."""
    times: list[list[float]] = [[] for _ in launches]
    usable = [index for index, launch in enumerate(launches) if _runs(launch)]
    for _ in range(_ROUNDS):
        for index in usable:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launches[index]()
            end.record()
            end.synchronize()
            times[index].append(start.elapsed_time(end))
    return [median(found) if found else float("inf") for found in times]


def _runs(launch: Callable[[], Any]) -> bool:
    """Compile and warm up. A configuration that this device has no room for is none, whatever the compiler raises."""
    try:
        for _ in range(_WARM_UPS):
            launch()
    except Exception:
        return False
    return True


def _can_tune(device: torch.device) -> bool:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and torch.cuda.is_available() and not interpreted
