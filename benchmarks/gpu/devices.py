"""GPUs by their data sheets; caches by the whitepapers of their architectures."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .architectures import ARCHITECTURES, Architecture, Rates


@dataclass(frozen=True)
class Device:
    """Peaks as the vendor publishes them: operations per second without sparsity, with fp32 sums; bytes per second."""

    name: str
    architecture: Architecture
    processors: int  # multiprocessors or compute units
    clock: float  # Hz, at which the peaks are those of the units
    half: float
    tf32: float
    fp32: float  # without TF32, by whichever unit is faster
    bandwidth: float
    cache: int  # bytes, the last one before memory
    source: str

    @property
    def rates(self) -> Rates:
        """Those of the architecture, with this device's matrix unit."""
        matrix = {type_: n for type_, n in self.architecture.rates.matrix.items() if type_ == "fp32"}
        per_clock = self.processors * self.clock
        matrix |= {"half": self.half / per_clock, "tf32": self.tf32 / per_clock}
        return replace(self.architecture.rates, matrix=matrix)

    def peak(self, type_: str) -> float:
        """Operations per second of products of "half", "tf32" or "fp32"."""
        return {"half": self.half, "tf32": self.tf32, "fp32": self.fp32}[type_]


DEVICES = {
    d.name: d
    for d in (
        Device("H100", ARCHITECTURES["sm_90"], 132, 1.83e9, 989.4e12, 494.7e12, 66.9e12, 3.35e12, 50 * 2**20,
               "NVIDIA H100 Tensor Core GPU data sheet, SXM5 80 GB"),
        Device("A100", ARCHITECTURES["sm_80"], 108, 1.41e9, 312e12, 156e12, 19.5e12, 2.039e12, 40 * 2**20,
               "NVIDIA A100 Tensor Core GPU data sheet, SXM4 80 GB"),
        Device("RTX 4090", ARCHITECTURES["sm_89"], 128, 2.52e9, 165.2e12, 82.6e12, 82.6e12, 1.008e12, 72 * 2**20,
               "NVIDIA Ada GPU architecture whitepaper, appendix A"),
        Device("L4", ARCHITECTURES["sm_89"], 58, 2.04e9, 121e12, 60e12, 30.3e12, 0.3e12, 48 * 2**20,
               "NVIDIA L4 Tensor Core GPU data sheet"),
        Device("MI300X", ARCHITECTURES["gfx942"], 304, 2.1e9, 1307.4e12, 653.7e12, 163.4e12, 5.3e12, 256 * 2**20,
               "AMD Instinct MI300X data sheet"),
    )
}  # fmt: skip
