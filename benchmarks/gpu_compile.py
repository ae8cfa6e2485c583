"""Compiling the Triton kernels for GPUs that are not there, and reading the machine code.

`record` runs a host function of kernels/ on tensors of the device "meta" and keeps every launch instead of making it:
shapes of any size cost nothing. `build` compiles one launch for one target as Triton itself would at that launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Architecture:
    """What a program may use and a multiprocessor (compute unit) has. Shared memory in bytes."""

    name: str
    target: GPUTarget
    shared_limit: int
    shared_total: int
    threads: int
    registers: int = 65536


def _cuda(capability: int, limit: int, total: int, threads: int) -> Architecture:
    return Architecture(f"sm_{capability}", GPUTarget("cuda", capability, 32), limit * 1024, total * 1024, threads)


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 2 and CDNA 3 ISA documents.
ARCHITECTURES = {
    a.name: a
    for a in (
        _cuda(80, 163, 164, 2048),
        _cuda(86, 99, 100, 1536),
        _cuda(89, 99, 100, 1536),
        _cuda(90, 227, 228, 2048),
        _cuda(100, 227, 228, 2048),
        _cuda(120, 99, 100, 1536),
        Architecture("gfx942", GPUTarget("hip", "gfx942", 64), 65536, 65536, 2048, 131072),
        Architecture("gfx90a", GPUTarget("hip", "gfx90a", 64), 65536, 65536, 2048, 131072),
    )
}


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


@dataclass
class Built:
    """A launch compiled: what it needs, and its machine code."""

    registers: int
    spilled: int  # bytes per thread
    shared: int
    warps: int
    resident: int  # programs per multiprocessor
    loops: list[Counter] = field(default_factory=list)  # instructions by kind, per innermost loop
    whole: Counter = field(default_factory=Counter)


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
        aligned = False
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def build(launch: Launch, architecture: Architecture) -> Built:
    """Compile a launch for an architecture and read what came of it."""
    compiled = triton.compile(_source(launch), target=architecture.target, options=launch.options)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    threads = warps * architecture.target.warp_size
    if architecture.target.backend == "hip":
        registers, spilled, code = _read_amd(compiled.asm["amdgcn"])
    else:
        registers, spilled, code = _read_nvidia(compiled.asm["cubin"])
    by_registers = architecture.registers // max(registers * threads, 1)
    by_shared = architecture.shared_total // (shared + 1024)  # the system keeps 1 KB per program
    resident = min(by_registers, by_shared, architecture.threads // threads, 32)
    loops = [Counter(map(kind, body)) for body in _innermost_loops(code)]
    return Built(registers, spilled, shared, warps, resident, loops, Counter(kind(op) for _, op, _ in code))


def _read_nvidia(cubin: bytes) -> tuple[int, int, list[tuple[int, str, int | None]]]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
    assert found, usage.stdout
    registers, stack, local = map(int, found.groups())
    code = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass.stdout):
        text = re.sub(r"^@!?U?P\w+\s+", "", text.strip())
        jump = re.search(r"0x([0-9a-f]+)", text) if text.startswith("BRA") else None
        code.append((int(address, 16), text.split()[0], int(jump.group(1), 16) if jump else None))
    return registers, stack + local, code


def _read_amd(assembly: str) -> tuple[int, int, list[tuple[int, str, int | None]]]:
    def number(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", assembly)), default=0)

    lines, labels, code = assembly.splitlines(), {}, []
    for place, line in enumerate(lines):
        label = re.match(r"(\.LBB\w+):", line)
        if label:
            labels[label.group(1)] = place
        text = line.split(";")[0].strip()
        if not text or text.startswith(".") or text.endswith(":"):
            continue
        jump = re.search(r"(\.LBB\w+)", text) if text.startswith(("s_cbranch", "s_branch")) else None
        code.append((place, text.split()[0], jump.group(1) if jump else None))
    code = [(place, op, labels.get(jump) if isinstance(jump, str) else None) for place, op, jump in code]
    registers = number("vgpr_count") + number("agpr_count")
    spilled = 4 * number("vgpr_spill_count") + 4 * number("sgpr_spill_count")
    return registers, spilled, code


def _innermost_loops(code: list[tuple[int, str, int | None]]) -> list[list[str]]:
    spans = [(jump, place) for place, _, jump in code if jump is not None and jump < place]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[op for place, op, _ in code if first <= place <= last] for first, last in sorted(inner)]


# Machine instruction -> kind, by prefix; the first that fits.
_KINDS = (
    ("matrix", ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "QMMA", "v_mfma", "UTCMMA")),
    ("exp", ("MUFU", "v_exp_f32", "v_log_f32", "v_rcp_f32", "v_rsq", "v_sqrt")),
    ("global load", ("LDG", "LDGSTS", "UTMALDG", "global_load", "buffer_load")),
    ("global store", ("STG", "RED", "ATOMG", "UTMASTG", "global_store", "buffer_store", "global_atomic",
                      "buffer_atomic")),
    ("shared", ("LDS", "STS", "ds_", "LDTM", "STTM")),
    ("local", ("LDL", "STL", "scratch_")),
    ("fp32", ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "F2F", "FCHK", "HADD2", "HFMA2", "HMUL2", "UF2F",
              "v_add_f32", "v_mul_f32", "v_fma", "v_max_f32", "v_pk_", "v_sub_f32", "v_cvt", "v_max3_f32", "v_mac")),
)  # fmt: skip


def kind(op: str) -> str:
    """The unit that a machine instruction occupies: one of _KINDS or "integer" for all the rest."""
    for name, prefixes in _KINDS:
        if op.startswith(prefixes):
            return name
    return "integer"
