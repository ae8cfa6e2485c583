"""`python -m benchmarks.gpu_roofline`: how fast WavLM could be on GPUs, estimated. Nothing is measured.

A kernel of ours takes at least as long as its busiest unit: the matrix unit, the issue of instructions and the like by
the machine code that was compiled for the device, or memory by the bytes that its programs miss in the last cache
(launch_bytes.py; attention has no formula there, and counts the bytes that it cannot do without). Torch's own ops take
the longer of arithmetic at the device's peak and their bytes. Real times are longer: nothing is known here of latency,
of caches beyond that, or of clocks that sink under load. The host's time for launches stands beside the sum.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

from wavlm_fast.kernels._target import pretend

from ..run import cases, flops
from .bound import clocks
from .cases import DTYPES
from .compile import Built, Launch, build
from .devices import DEVICES, Device
from .launch_bytes import of_launch as bytes_of_launch
from .launch_formulas import FORMULAS
from .pieces import Call, calls, trips
from .static import pretended

ESTIMATE = "Estimate from data sheets and compiled kernels, not measured on a GPU"
BATCHES = (8, 1)
SECONDS = 10
RATE = 16_000
LAUNCH = 5e-6  # seconds of the host for one launch, a common figure; a captured graph needs next to none


@dataclass(frozen=True)
class Stage:
    """One stage of the model: the least seconds that it takes, by what bounds them."""

    name: str
    seconds: float
    bounds: Mapping[str, float]  # unit -> seconds
    operations: float
    bytes: float
    launches: int

    @property
    def bound(self) -> str:
        """The unit that most of the time goes to."""
        return max(self.bounds, key=self.bounds.__getitem__, default="")


@dataclass(frozen=True)
class Estimate:
    """A forward or a training step on a device."""

    model: str
    device: str
    dtype: str
    batch: int
    train: bool
    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def launches(self) -> int:
        return sum(stage.launches for stage in self.stages)

    @property
    def longest(self) -> Stage:
        """The stage that takes most of the time."""
        return max(self.stages, key=lambda stage: stage.seconds)


def of_launch(launch: Launch, built: Built, device: Device) -> dict[str, float]:
    """Seconds that each unit of the device is busy with a launch."""
    architecture, rates = device.architecture, device.rates
    found = Counter(clocks(built.whole, built, architecture, rates))
    if built.loop is not None:
        loop, times = Counter(clocks(built.loop, built, architecture, rates)), trips(launch)
        for unit, count in loop.items():
            found[unit] += count * max(times - 1, 0)
    waves = math.ceil(math.prod(launch.grid) / device.processors)
    return {unit: count * waves / device.clock for unit, count in found.items()}


def of_call(call: Call, device: Device, traffic: int) -> dict[str, float]:
    """Seconds of one call, by what bounds them; `traffic` is what its launches move."""
    found: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for launch in call.launches:
        units = of_launch(launch, compiled(launch, device), device)
        unit = max(units, key=units.__getitem__)
        kernels[unit] += units[unit]
    memory = traffic / device.bandwidth
    if call.launches:
        found.update({"memory": memory} if memory > kernels.total() else kernels)
    for op in call.around:
        arithmetic, memory = op.operations / device.peak(op.type), op.bytes / device.bandwidth
        unit = "memory" if memory > arithmetic else "fp32" if op.type == "fp32" else "matrix"
        found[unit] += max(arithmetic, memory)
    return dict(found)


def moved(call: Call, device: Device) -> int:
    """Bytes that the launches of a call move to and from memory, two programs on each processor at a time."""
    if not call.launches:
        return 0
    known = (launch for launch in call.launches if launch.name in FORMULAS)
    found = sum(bytes_of_launch(launch, 2 * device.processors, device.cache).memory for launch in known)
    return max(found, call.bytes)


_built: dict[tuple, Built] = {}


def compiled(launch: Launch, device: Device) -> Built:
    """The launch compiled for the device, once for all launches of its kind."""
    key = (launch.key, device.architecture.name)
    if key not in _built:
        _built[key] = build(launch, device.architecture)
    return _built[key]


def estimate(model: str, device: Device, dtype: str, batch: int, train: bool, seconds: float = SECONDS) -> Estimate:
    """The least time of a forward, or of a training step without its optimizer, on `batch` utterances of `seconds`."""
    samples = int(seconds * RATE)
    operations = _operations(model, batch, samples)
    bounds: dict[str, Counter[str]] = {stage: Counter() for stage in operations}
    traffic, launched = Counter(), Counter()
    with pretend(pretended(device.architecture)):
        for call in calls(model, DTYPES[dtype], batch, samples, train):
            ours = moved(call, device)
            for unit, time in of_call(call, device, ours).items():
                bounds[call.stage][unit] += call.times * time
            traffic[call.stage] += call.times * (ours + sum(op.bytes for op in call.around))
            launched[call.stage] += call.times * (len(call.launches) + len(call.around))
    stages = tuple(
        Stage(name, found.total(), dict(found), (3 if train else 1) * operations[name], traffic[name], launched[name])
        for name, found in bounds.items()
    )
    return Estimate(model, device.name, dtype, batch, train, stages)


@cache
def _operations(model: str, batch: int, samples: int) -> dict[str, float]:
    found = flops.forward(cases.MODELS[model].config, batch, samples)
    return {stage: count for stage, count in found.items() if stage != "head"}


def table(found: Estimate) -> str:
    """A stage a line."""
    audio = found.batch * SECONDS
    lines = [
        f"{title(found)} on {found.device}. {ESTIMATE}.",
        f"{'stage':18} {'GFLOP':>8} {'MB':>8} {'launches':>8} {'ms':>8} {'share':>7}  bound",
    ]
    for s in found.stages:
        split = ", ".join(f"{unit} {1e3 * t:.3f}" for unit, t in sorted(s.bounds.items(), key=lambda i: -i[1]))
        lines.append(
            f"{s.name:18} {s.operations / 1e9:8.1f} {s.bytes / 1e6:8.1f} {s.launches:8} {1e3 * s.seconds:8.3f} "
            f"{100 * s.seconds / found.seconds:5.1f} %  {split}"
        )
    lines.append(
        f"{'in all':18} {sum(s.operations for s in found.stages) / 1e9:8.1f} "
        f"{sum(s.bytes for s in found.stages) / 1e6:8.1f} {found.launches:8} {1e3 * found.seconds:8.3f}          "
        f"{audio / found.seconds:.0f} x real time at most; launches take the host {1e3 * LAUNCH * found.launches:.1f} "
        f"ms at {1e6 * LAUNCH:.0f} us each, next to none in a graph"
    )
    return "\n".join(lines)


def title(found: Estimate) -> str:
    what = "training step" if found.train else "forward"
    return f"{found.model}, {found.batch} x {SECONDS} s, {found.dtype}, {what}"


def summary(found: Iterable[Estimate]) -> str:
    """One line each."""
    columns = f"{'device':9} {'ms':>8} {'x real time':>11} {'launches, ms of host':>21}  longest stage"
    lines = [f"{ESTIMATE}.", f"{'':38} {columns}"]
    for e in found:
        longest = e.longest
        lines.append(
            f"{title(e):38} {e.device:9} {1e3 * e.seconds:8.2f} {e.batch * SECONDS / e.seconds:11.0f} "
            f"{e.launches:12} {1e3 * LAUNCH * e.launches:8.1f}  {longest.name}, "
            f"{100 * longest.seconds / e.seconds:.0f} %, by {longest.bound}"
        )
    return "\n".join(lines)


def sheet() -> str:
    """The devices as their data sheets have them."""
    lines = [f"{'device':9} {'fp16/bf16':>9} {'TF32':>6} {'fp32':>6} TFLOP/s {'TB/s':>6}  source"]
    for d in DEVICES.values():
        lines.append(
            f"{d.name:9} {d.half / 1e12:9.1f} {d.tf32 / 1e12:6.1f} {d.fp32 / 1e12:6.1f} {d.bandwidth / 1e12:14.2f}  "
            f"{d.source}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print a summary, or tables of stages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_roofline", description=__doc__)
    parser.add_argument("--model", nargs="+", choices=("base", "large"), default=["base", "large"])
    parser.add_argument("--device", nargs="+", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--mode", nargs="+", choices=("forward", "step"), default=["forward", "step"])
    parser.add_argument("--stages", action="store_true", help="a table of stages for each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    print(sheet() + "\n")
    found = []
    for model, mode, dtype, batch, name in product(args.model, args.mode, args.dtype, args.batch, args.device):
        found.append(estimate(model, DEVICES[name], dtype, batch, mode == "step"))
        if args.stages:
            print(table(found[-1]) + "\n", flush=True)
    print(summary(found))
    if args.json:
        args.json.write_text(json.dumps({"what": ESTIMATE, "estimates": [asdict(e) for e in found]}, indent=1))
    return 0
