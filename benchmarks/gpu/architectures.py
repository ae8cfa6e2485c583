"""What GPU architectures have: room for programs, and units with their rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Rates:
    """Of one multiprocessor (compute unit), per clock.

    The matrix unit's are operations, two per multiply-add, by the type of its operands; sums are fp32.
    """

    matrix: Mapping[str, float]
    fp32: int  # lanes of multiply-adds
    integer: int = 64  # lanes
    fp64: float = 32  # lanes
    exp: int = 16  # lanes
    issue: int = 4  # warps, for NVIDIA any instruction, for AMD one of the vector unit
    shared: int = 128  # bytes
    loaded: int = 64  # bytes from the L2 cache


@dataclass(frozen=True)
class Architecture:
    """What a program may use and a multiprocessor has. Memory in bytes."""

    name: str
    target: GPUTarget
    shared_limit: int  # of one program
    shared_total: int
    shared_reserve: int  # what the system keeps per program
    threads: int
    programs: int
    registers: int  # of one of the four parts of a multiprocessor
    register_unit: int  # registers per thread come in multiples of it
    rates: Rates = field(compare=False)

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """Programs that a multiprocessor holds at once; 0 if not even one fits."""
        lanes = self.target.warp_size
        if shared > self.shared_limit:
            return 0
        rounded = -(-max(registers, 1) // self.register_unit) * self.register_unit
        by_registers = 4 * (self.registers // (rounded * lanes)) // warps
        by_shared = self.shared_total // max(shared + self.shared_reserve, 1)
        return min(by_registers, by_shared, self.threads // (lanes * warps), self.programs)


def _cuda(capability: int, limit: int, total: int, threads: int, programs: int, rates: Rates) -> Architecture:
    target, kilo = GPUTarget("cuda", capability, 32), 1024
    return Architecture(
        f"sm_{capability}", target, limit * kilo, total * kilo, kilo, threads, programs, 16384, 8, rates
    )


def _amd(name: str, rates: Rates) -> Architecture:
    kilo = 1024
    return Architecture(name, GPUTarget("hip", name, 64), 64 * kilo, 64 * kilo, 0, 2048, 16, 32768, 8, rates)


def _halving(half: int, fp32: int, **others: float) -> Rates:
    """TF32 runs at half the speed of fp16 and bf16."""
    return Rates({"half": half, "tf32": half / 2}, fp32, **others)


# Room: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 2 and CDNA 3 instruction
# set architecture documents. Rates: that guide's "Throughput of Native Arithmetic Instructions"; matrix units from the
# architecture whitepapers of Ampere (GA100, GA102), Ada, Hopper and Blackwell, where sm_86, sm_89 and sm_120 are
# GeForce cards, which add fp32 sums at half speed; CDNA 2 and CDNA 3 whitepapers.
ARCHITECTURES = {
    a.name: a
    for a in (
        _cuda(80, 163, 164, 2048, 32, _halving(2048, 64)),
        _cuda(86, 99, 100, 1536, 16, _halving(512, 128, fp64=2)),
        _cuda(89, 99, 100, 1536, 24, _halving(512, 128, fp64=2)),
        _cuda(90, 227, 228, 2048, 32, _halving(4096, 128, fp64=64)),
        _cuda(100, 227, 228, 2048, 32, _halving(8192, 128, fp64=64)),
        _cuda(120, 99, 100, 1536, 24, _halving(512, 128, integer=128, fp64=2)),
        _amd("gfx942", Rates({"half": 2048, "tf32": 1024, "fp32": 256}, 64, fp64=64, issue=1)),
        _amd("gfx90a", Rates({"half": 1024, "fp32": 256}, 64, fp64=64, issue=1)),
    )
}
