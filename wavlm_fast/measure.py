"""Errors against float64, and times that a drifting machine does not decide."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .parity import rule

_L2_BYTES = 2**28  # more than any GPU's L2 cache holds
_OUTLIER = 8.0  # a channel whose rms is this many times that of the median channel is an outlier


@dataclass(frozen=True)
class Errors:
    """Maximal errors against the truth over some channels."""

    theirs: float  # max |transformers - truth|
    ours: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether ours is as close to the truth as the plain path, within a factor of two; NaN is not."""
        return self.ours <= self.allowed


@dataclass(frozen=True)
class LayerError:
    """One layer of both models against the truth.

    The parity rule is asked twice: of all channels, and of those that are no outliers, whose errors would otherwise
    hide behind the roundings of values of 50.
    """

    layer: str
    largest: float  # max |truth|
    all: Errors
    ordinary: Errors

    @property
    def ok(self) -> bool:
        """The verdict of the parity rule."""
        return self.all.ok and self.ordinary.ok

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "ok": self.ok}


def errors(theirs: torch.Tensor, ours: torch.Tensor, truth: torch.Tensor) -> Errors:
    """The errors of [B, T, C] in any dtype against [B, T, C] in float64, and what is allowed: twice that of the plain
    path in the same dtype, plus the parity rule's few roundings of an ordinary large value, three times the rms."""
    theirs, ours = theirs.detach().cpu(), ours.detach().cpu()
    error = max_error(theirs, truth)
    ordinary = min(rule.magnitude(truth), 3.0 * rule.rms(truth))
    return Errors(error, max_error(ours, truth), 2.0 * error + rule.tiny(ordinary, theirs.dtype))


def max_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """max |value - truth| in float64; NaN when any value is NaN or the shape is another."""
    return float((value.detach().double() - truth).abs().max()) if value.shape == truth.shape else math.nan


def layers(model: nn.Module, waveform: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a base model on [B, S] and return its output at every layer, by name in the order the signal meets them."""
    parameter = next(model.parameters())
    with torch.inference_mode():
        out = model(waveform.to(parameter.device, parameter.dtype), output_hidden_states=True)
    found = {"conv features": out.extract_features}
    for index, hidden in enumerate(out.hidden_states):
        found[f"layer {index}" if index else "embedding"] = hidden
    return {**found, "output": out.last_hidden_state}


def compare(
    theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]
) -> list[LayerError]:
    """The errors of both at every layer of `truth` (float64, on the CPU)."""
    rows = []
    for name, true in truth.items():
        scale = true.square().flatten(0, -2).mean(0).sqrt()  # [C]
        quiet = scale <= _OUTLIER * scale.median()
        all_channels = errors(theirs[name], ours[name], true)
        if quiet.all() or not quiet.any():  # none is when the truth itself is NaN
            rows.append(LayerError(name, rule.magnitude(true), all_channels, all_channels))
            continue
        found = [hidden[..., quiet.to(hidden.device)] for hidden in (theirs[name], ours[name], true)]
        rows.append(LayerError(name, rule.magnitude(true), all_channels, errors(*found)))
    return rows


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    p10: float
    p90: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        return cls(statistics.median(seconds), percentile(seconds, 10), percentile(seconds, 90), len(seconds))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the nearest ranks."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device | str = "cpu",
    budget: float = math.inf,
    warm_up: bool = True,
    between: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time callables in turn, in alternating order, so that drift of the machine meets all of them alike.

    Args:
        calls: name -> the call.
        rounds: timed runs of each.
        device: that the calls run on; a GPU's own events tell their time.
        budget: seconds after which no further round starts, once there are three.
        warm_up: whether each runs once untimed first.
        between: called after every run, off the clock.

    Returns:
        name -> seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values() if warm_up else ():
        call()
        between()
    begin = time.perf_counter()
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - begin > budget:
            break
        for name in order(calls, index):
            seconds[name].append(_clock(calls[name], device))
            between()
    return seconds


def order(names: Iterable[str], index: int) -> list[str]:
    """Who comes after whom in round `index`: every other one runs backwards."""
    return list(names) if index % 2 == 0 else list(names)[::-1]


def _clock(call: Callable[[], Any], device: torch.device | str) -> float:
    """On a GPU by its own events, with its L2 cache full of something else."""
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    _something_else(str(device)).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _something_else(device: str) -> torch.Tensor:
    return torch.empty(_L2_BYTES, dtype=torch.uint8, device=device)


def ratio(slow: list[float], fast: list[float]) -> Timing:
    """How many times faster, round by round: the two runs of a round met the same machine."""
    return Timing.of([s / f for s, f in zip(slow, fast, strict=True)])


def forward(model: nn.Module, waveform: torch.Tensor) -> Callable[[], Any]:
    """The call that is timed: inference on [B, S], already on the model's device and of its dtype."""
    parameter = next(model.parameters())
    prepared = waveform.to(parameter.device, parameter.dtype)

    def call() -> Any:
        with torch.inference_mode():
            return model(prepared)

    return call
