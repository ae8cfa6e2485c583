"""Compiling the Triton kernels for GPUs that are not there, and reading what came of it.

`record` runs a host function of kernels/ on tensors of the device "meta" and keeps every launch instead of making it:
shapes of any size cost nothing. `build` compiles one launch for one target as Triton itself would at that launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import code as machine_code
from .architectures import Architecture
from .code import Mix


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel: its arguments by name, grid and compile options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip("_")

    @property
    def key(self) -> tuple:
        """What tells kernels apart here. Not which sizes are multiples of 16, though Triton compiles anew for that."""
        constants = {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}
        kinds = [type(a) if not isinstance(a, torch.Tensor) else a.dtype for a in self.arguments.values()]
        return self.name, str(constants), str(kinds), str(self.options)


@dataclass(frozen=True)
class Product:
    """A product of tiles, `[m, k]` by `[k, n]`, and how its operands are multiplied: "half", "tf32" or "fp32"."""

    m: int
    n: int
    k: int
    type: str
    times: int = 1  # of pieces: how many products it is made of

    @property
    def operations(self) -> int:
        """Two per multiply-add."""
        return 2 * self.m * self.n * self.k * self.times


@dataclass
class Built:
    """A launch compiled: what it needs, and what its machine code does."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes
    warps: int
    resident: int  # programs per multiprocessor
    loops: list[Mix] = field(default_factory=list)  # of the innermost loops
    whole: Mix = field(default_factory=Mix)
    products: list[Product] = field(default_factory=list)  # written in the kernel, copies of a loop's body included

    @property
    def loop(self) -> Mix | None:
        """The loop that multiplies matrices, if any; of several, the one that does most besides."""
        return max(self.loops, key=lambda m: (m.counts["matrix"] > 0, m.total), default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Keep the launches made inside instead of making them."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [p.name for p in self.params]
        arguments = dict(zip(names, args, strict=False))
        arguments.update({n: kwargs.pop(n) for n in list(kwargs) if n in names})
        launches.append(Launch(self, arguments, tuple(grid), kwargs))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def record(function: Callable[..., Any], *args: Any) -> list[Launch]:
    """The launches that `function` makes on these arguments, given as tensors of the device "meta"."""
    with recording() as launches:
        function(*args)
    return launches


_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def _source(launch: Launch) -> ASTSource:
    """The specialisation that Triton makes of a launch: ones are constants, sixteens are known to be aligned."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        aligned = False
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = special and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def build(launch: Launch, architecture: Architecture) -> Built:
    """Compile a launch for an architecture and read what came of it."""
    compiled = triton.compile(_source(launch), target=architecture.target, options=launch.options)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if architecture.target.backend == "hip":
        registers, spilled, code = _read_amd(compiled.asm["amdgcn"])
    else:
        registers, spilled, code = _read_nvidia(compiled.asm["cubin"])
    lanes = architecture.target.warp_size
    loops = [machine_code.mix(body, lanes) for body in machine_code.innermost(machine_code.loops(code))]
    resident = architecture.resident(warps, registers, shared)
    products = _products(compiled.asm["ttir"])
    return Built(registers, spilled, shared, warps, resident, loops, machine_code.mix(code, lanes), products)


def _products(ttir: str) -> list[Product]:
    found = []
    for line in re.findall(r"tt\.dot .*", ttir):
        (m, k), (_, n) = (map(int, shape) for shape in re.findall(r"tensor<(\d+)x(\d+)x", line)[:2])
        pieces = re.search(r"(bf16|tf32)x(\d)", line)
        half = re.search(r"tensor<\d+x\d+xb?f16>", line) or "bf16x" in line
        type_ = "half" if half else "tf32" if "tf32" in line else "fp32"
        found.append(Product(m, n, k, type_, int(pieces[2]) if pieces else 1))
    return found


def _read_nvidia(cubin: bytes) -> tuple[int, int, list[machine_code.Instruction]]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", found)
    assert usage, found
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local, machine_code.parse_nvidia(found)


def _read_amd(assembly: str) -> tuple[int, int, list[machine_code.Instruction]]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    # Accumulation registers are part of the count.
    spilled = max(4 * (number("vgpr_spill_count") + number("sgpr_spill_count")), number("private_segment_fixed_size"))
    return number("vgpr_count"), spilled, machine_code.parse_amd(assembly)
