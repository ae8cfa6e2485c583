"""`python -m benchmarks.gpu_static`: every Triton kernel compiled for every architecture that people own, and judged.

No GPU is needed. Fails on spilled registers, on more shared memory than an architecture has, on matrix products in half
precision that do not use the tensor cores, and on more instructions per score in attention's inner loop than BOUNDS.
Of a kernel's configurations other than the default, only the default's spills fail: the others are there to be tried.
Of the defaults a few spill outside their loops, and are named at the end: no more than in SPILLS.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from wavlm_fast.kernels._target import pretend
from wavlm_fast.kernels._tuning import MOST, forced

from .architectures import ARCHITECTURES, Architecture
from .bound import bound
from .cases import BATCH, DTYPES, MODELS, Case, cases, packed, packed_stages, wide_heads
from .code import KINDS
from .compile import Built, Launch, build

# Machine instructions outside the matrix unit per score, in attention's loop over tiles that load their bias: what was
# reached by a kernel's default and by its other configurations, rounded up. Only ever tighten.
BOUNDS = {
    ("gated_attention_fwd_kernel", "sm_80"): (8.4, 9.9),
    ("gated_attention_fwd_kernel", "sm_86"): (8.4, 9.9),
    ("gated_attention_fwd_kernel", "sm_90"): (7.9, 10.0),
    ("gated_attention_fwd_kernel", "sm_100"): (11.1, 11.8),
    ("gated_attention_bwd_dq_kernel", "sm_80"): (14.8, 15.0),
    ("gated_attention_bwd_dq_kernel", "sm_90"): (13.7, 16.2),
    ("gated_attention_bwd_dkv_kernel", "sm_80"): (14.0, 14.6),
    ("gated_attention_bwd_dkv_kernel", "sm_90"): (13.1, 16.2),
}
# Bytes that a default may spill outside its loops where its arguments are these; True is a tensor, False none. That
# leaves registers for one more program, or a thread cannot have more: a configuration that spills none holds fewer
# programs, or keeps the busiest unit busy longer. Only ever tighten.
SPILLS: dict[tuple[str, str, str], tuple[int, dict[str, Any]]] = {
    ("gated_attention_fwd_kernel", "sm_80", "tf32"): (16, {"D": 64, "offsets_ptr": True}),
    ("gated_attention_bwd_dq_kernel", "sm_90", "fp32"): (8, {"D": 64, "offsets_ptr": False}),
    ("gated_attention_bwd_dkv_kernel", "sm_90", "fp32"): (16, {"D": 128, "offsets_ptr": True}),
    ("gated_attention_bwd_dbias_kernel", "sm_100", "fp32"): (16, {"BLOCK_D": 128, "offsets_ptr": True}),
    ("gated_attention_bwd_dbias_kernel", "sm_100", "bf16"): (16, {"D": 80, "offsets_ptr": True}),
    ("gated_attention_bwd_dbias_kernel", "sm_100", "fp16"): (16, {"D": 80, "offsets_ptr": True}),
    ("gated_attention_bwd_dkv_kernel", "sm_120", "tf32"): (8, {"D": 64, "offsets_ptr": False}),
    ("frames_product_kernel", "sm_120", "bf16"): (8, {"OUT_STRIDE": 2, "BLOCK_K": 64}),
    ("frames_product_kernel", "sm_120", "fp16"): (8, {"OUT_STRIDE": 2, "BLOCK_K": 64}),
    ("frames_product_kernel", "sm_100", "fp32"): (8, {"C": 64, "ACTIVATION": "none", "offsets_ptr": True}),
    ("waveform_conv_bwd_kernel", "sm_100", "fp32"): (8, {"NORM": "layer", "offsets_ptr": True, "dy_ptr": True}),
}
_PER_SCORE = (
    "gated_attention_fwd_kernel", "gated_attention_bwd_dq_kernel", "gated_attention_bwd_dkv_kernel",
    "gated_attention_bwd_dbias_kernel",
)  # fmt: skip
QUICK = ("sm_80", "sm_90", "gfx942")
TF32 = "tf32"
TYPES = {**DTYPES, TF32: torch.float32}  # by the names of the table
_LEAST_SHOWN = 0.1  # per score
_TILES = ("BLOCK_M", "BLOCK_T", "BLOCK_R", "BLOCK_N", "BLOCK_C", "BLOCK_K", "BLOCK_D")


@dataclass(frozen=True)
class Task:
    """One kernel to compile: a launch of `op` in `dtype`, for an architecture."""

    op: str
    launch: Launch
    dtype: str
    architecture: Architecture
    default: bool = True  # whether its configuration is what runs without tuning


@dataclass(frozen=True)
class Row:
    """What came of one kernel."""

    architecture: str
    dtype: str
    op: str
    kernel: str
    constants: dict[str, Any]
    default: bool
    warps: int
    registers: int
    spilled: int  # bytes per thread
    known: int  # bytes that SPILLS lets it spill
    shared: int  # bytes
    shared_limit: int
    resident: int  # programs per multiprocessor
    occupancy: float  # share of a multiprocessor's warps
    instructions: dict[str, int]  # of the inner loop, else of the whole kernel, by kind
    loop: bool
    per_score: float | None  # instructions outside the matrix unit
    names: dict[str, float]  # those by kind and name, per score
    bound: str
    share: float | None  # of the peak of the unit that multiplies
    faults: tuple[str, ...]


def pretended(architecture: Architecture) -> str:
    """The name in kernels/_target.py that an architecture goes by."""
    names = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna3", "gfx90a": "cdna"}
    return names.get(architecture.name, "cuda")


@contextmanager
def _multiplying(dtype: str) -> Iterator[None]:
    """Set torch, and with it the kernels, to multiply fp32 in TF32 or exactly."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = dtype == TF32
    try:
        yield
    finally:
        for setting, allowed in zip(settings, before, strict=True):
            setting.allow_tf32 = allowed


def launches(
    architecture: Architecture, dtype: str, indices: Iterable[int] = range(MOST)
) -> Iterator[tuple[str, Launch, int]]:
    """Every distinct launch of both models, of attention with wide heads and of packed frames: its op, itself, and the
    index of its configuration in the kernel's list.

    Defaults have index 0 and come first; kernels without a list have only that.
    """
    seen = set()
    for index, case in product(indices, [*_cases(TYPES[dtype])]):
        with pretend(pretended(architecture)), forced(index), _multiplying(dtype):
            made = case.launches()
        for launch in made:
            other = dtype == TF32 and launch.arguments.get("PRECISION") != TF32  # the same as in fp32
            if launch.key not in seen and not other:
                seen.add(launch.key)
                yield case.op, launch, index


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    """Batches are large and of one utterance: some defaults depend on that."""
    for batch in (BATCH, 1):
        for model in MODELS:
            yield from cases(model, dtype, batch=batch)
        yield from wide_heads(dtype, batch)
        yield from packed(dtype, batch)
    for model in MODELS:
        yield from packed_stages(model, dtype)


def tasks(
    architectures: Iterable[str], dtypes: Iterable[str], op: str = "", indices: Iterable[int] = range(MOST)
) -> list[Task]:
    """What there is to compile, for ops whose name contains `op` and configurations at `indices` of their lists."""
    return [
        Task(found, launch, dtype, ARCHITECTURES[name], index == 0)
        for name in architectures
        for dtype in dtypes
        for found, launch, index in launches(ARCHITECTURES[name], dtype, indices)
        if op in found
    ]


def per_score(launch: Launch, built: Built, architecture: Architecture) -> float | None:
    """Instructions of the inner loop outside the matrix unit per score, for attention's kernels."""
    loop = built.loop
    if launch.name not in _PER_SCORE or loop is None:
        return None
    return (loop.total - loop.counts["matrix"]) / _scores(launch, built, architecture)


def _scores(launch: Launch, built: Built, architecture: Architecture) -> float:
    """Of a tile of attention: how many a thread holds."""
    threads = built.warps * architecture.target.warp_size
    return launch.arguments["BLOCK_M"] * launch.arguments["BLOCK_N"] / threads


def by_name(launch: Launch, built: Built, architecture: Architecture) -> dict[str, float]:
    """What `per_score` adds up, the most first."""
    if per_score(launch, built, architecture) is None:
        return {}
    scores = _scores(launch, built, architecture)
    return {
        f"{kind} {name}": count / scores for (kind, name), count in built.loop.names.most_common() if kind != "matrix"
    }


def known_spill(task: Task, built: Built) -> int:
    """The bytes that SPILLS lets a compiled kernel spill; 0 if a loop has a part in it."""
    size, arguments = SPILLS.get((task.launch.name, task.architecture.name, task.dtype), (0, {}))
    found = {name: task.launch.arguments[name] for name in arguments}
    told = {name: a is not None if a is None or isinstance(a, torch.Tensor) else a for name, a in found.items()}
    return size if told == arguments and not any(loop.counts["local"] for loop in built.loops) else 0


def faults(task: Task, built: Built) -> tuple[str, ...]:
    """What is wrong with a compiled kernel, as sentences."""
    found, launch, architecture = [], task.launch, task.architecture
    if task.default and built.spilled > known_spill(task, built):
        found.append(f"spills {built.spilled} bytes per thread")
    if built.shared > architecture.shared_limit:
        found.append(f"needs {built.shared} bytes of shared memory, {architecture.shared_limit} exist")
    elif not built.resident:
        found.append("does not fit a multiprocessor")
    if any(p.type == "half" for p in built.products) and not built.whole.counts["matrix"]:
        found.append("multiplies half precision without the tensor cores")
    count, limits = per_score(launch, built, architecture), BOUNDS.get((launch.name, architecture.name))
    if limits is not None and any(p.type == "half" for p in built.products) and launch.arguments["D"] == 64:
        limit = limits[0 if task.default else 1]
        if count is None:
            found.append("has no inner loop")
        elif count > limit:
            found.append(f"{count:.2f} instructions per score, the bound is {limit}")
    return tuple(found)


def judge(task: Task) -> Row:
    """Compile a kernel and look at it."""
    built, launch, architecture = build(task.launch, task.architecture), task.launch, task.architecture
    constants = {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
    mix = built.loop or built.whole
    reached = bound(mix, built, architecture)
    return Row(
        architecture=architecture.name, dtype=task.dtype, op=task.op, kernel=launch.name,
        constants={**constants, **{k: v for k, v in launch.options.items() if k == "num_stages"}},
        default=task.default, warps=built.warps, registers=built.registers, spilled=built.spilled,
        known=known_spill(task, built), shared=built.shared, shared_limit=architecture.shared_limit,
        resident=built.resident,
        occupancy=built.resident * built.warps * architecture.target.warp_size / architecture.threads,
        instructions={kind: mix.counts[kind] for kind in KINDS}, loop=built.loop is not None,
        per_score=per_score(launch, built, architecture), names=by_name(launch, built, architecture),
        bound=str(reached),
        share=None if math.isnan(reached.share) else reached.share, faults=faults(task, built),
    )  # fmt: skip


_tasks: list[Task] = []


def _find_tasks(*wanted: Any) -> None:
    _silence()
    _tasks[:] = tasks(*wanted)


def _judge_at(index: int) -> Row:
    return judge(_tasks[index])


def _silence() -> None:
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


def judge_all(wanted: tuple, jobs: int) -> Iterator[Row]:
    """A row for each of `tasks(*wanted)`, in their order, from `jobs` processes."""
    found = tasks(*wanted)
    if jobs == 1 or len(found) < 2:
        yield from map(judge, found)
        return
    # A launch holds a compiler's function and cannot be sent: every process finds the tasks itself. A forked one would
    # have them, and hang where torch's threads, which it does not have, hold a lock.
    with multiprocessing.get_context("spawn").Pool(jobs, _find_tasks, wanted) as pool:
        yield from pool.imap(_judge_at, range(len(found)))


_HEAD = (
    "arch    dtype op                      kernel                           tile           warps regs spill shared "
    "of limit  resident  per score  bound of the inner loop           " + " ".join(f"{kind[:7]:>7}" for kind in KINDS)
)


def line(row: Row) -> str:
    """A row of the table."""
    tile = "x".join(str(row.constants[name]) for name in _TILES if name in row.constants)
    score = "" if row.per_score is None else f"{row.per_score:.2f}"
    counts = " ".join(f"{row.instructions[kind] or '':>7}" for kind in KINDS)
    name = row.kernel.removesuffix("_kernel") + ("" if row.default else " *")
    return (
        f"{row.architecture:7} {row.dtype:5} {row.op:23} {name:32} {tile:14} {row.warps:5} {row.registers:4} "
        f"{row.spilled:5} {row.shared:6} {100 * row.shared / row.shared_limit:6.0f} % {row.resident:3} "
        f"{100 * row.occupancy:4.0f} % {score:>10}  {row.bound + ('' if row.loop else ' (no loop)'):33} {counts}"
    )


def instructions(row: Row) -> str:
    """What a score of attention's inner loop takes, under the row: by name, as long as it shows in the sum."""
    shown = [f"{count:5.2f} {name}" for name, count in row.names.items() if count >= _LEAST_SHOWN]
    rest = sum(count for count in row.names.values() if count < _LEAST_SHOWN)
    return "\n".join(f"        {text}" for text in [*shown, f"{rest:5.2f} others"]) if row.names else ""


def report(rows: Iterable[Row]) -> dict[str, Any]:
    """All rows and what compiled them, for JSON."""
    return {"triton": triton.__version__, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    parser.add_argument("--defaults", action="store_true", help="only what runs without tuning")
    parser.add_argument("--quick", action="store_true", help=f"defaults in bfloat16 on {', '.join(QUICK)}")
    parser.add_argument("--instructions", action="store_true", help="what a score of attention takes, by name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; as many as cores by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args(arguments)
    _silence()
    architectures, dtypes = (QUICK, ("bf16",)) if args.quick else (args.arch, args.dtype)
    print(_HEAD)
    rows = []
    indices = [0] if args.defaults or args.quick else range(MOST)
    for row in judge_all((architectures, dtypes, args.op, indices), args.jobs):
        print(line(row), flush=True)
        if args.instructions and row.names:
            print(instructions(row))
        rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(report(rows), indent=1))
    wrong = [f"{row.kernel} {row.architecture} {row.dtype}: {fault}" for row in rows for fault in row.faults]
    known = [
        f"{row.kernel} {row.architecture} {row.dtype}: spills {row.spilled} bytes per thread, {row.known} are known"
        for row in rows
        if row.default and 0 < row.spilled <= row.known
    ]
    print("\n".join([*known, *(wrong or [f"No fault found in {len(rows)} kernels."])]))
    return 1 if wrong else 0
