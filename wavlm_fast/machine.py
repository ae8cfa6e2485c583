"""What this machine is and what is installed on it. Nothing here fails for want of a package."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

# What /proc/cpuinfo calls it -> what people call it.
_FEATURES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "ARM BF16",
}
PACKAGES = ("wavlm-fast", "torch", "transformers", "triton", "numpy", "soundfile", "soxr")
# Environment variables that change what runs or how.
VARIABLES = (
    "WAVLM_FAST_BACKEND",
    "WAVLM_FAST_CPU_ISA",
    "WAVLM_FAST_AMX_TILES",
    "WAVLM_FAST_EXTENSION",
    "WAVLM_FAST_NO_EXTENSION",
    "WAVLM_FAST_AUTOTUNE",
    "WAVLM_FAST_CACHE_DIR",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "LD_PRELOAD",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
)
QUOTA = "allowed by a quota of time"


def versions(more: tuple[str, ...] = ()) -> dict[str, str | None]:
    """Version of Python and of each package, with `more` of them; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        found[package] = _version(package)
    return found


def _version(package: str) -> str | None:
    module = sys.modules.get(package.replace("-", "_"))
    try:
        return str(getattr(module, "__version__", None) or importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def one_line_versions() -> str:
    """The versions that decide speed and results."""
    found = versions()
    return ", ".join(f"{name} {found[name] or 'not installed'}" for name in ("python", "torch", "transformers"))


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def cpu_features() -> list[str]:
    """The instruction sets that matter here."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            return [name for flag, name in _FEATURES.items() if flag in flags]
    capability = torch.backends.cpu.get_cpu_capability()
    return [] if capability == "DEFAULT" else [capability.replace("AVX512", "AVX-512")]


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def threads() -> dict[str, float]:
    """CPUs and threads, and how many CPUs' time is allowed where there is a limit, of which torch does not know."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return {
        "CPUs": os.cpu_count() or 1,
        "usable by this process": usable,
        **({} if quota is None else {QUOTA: quota}),
        "torch threads": torch.get_num_threads(),
        "torch inter-op threads": torch.get_num_interop_threads(),
    }


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """The CPUs' time that the control groups of this process allow it, as a container's `--cpus`; None without a limit.

    Args:
        root: where control groups are mounted: version 2, or those of version 1, a folder for each controller.
        groups: which ones the process is in.
    """
    found = []
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        inner = top / path.lstrip("/")
        # A container may not see the names of the groups above it, but has its own limit at the top.
        folders = (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))
        found += [_quota_of(folder, bool(controllers)) for folder in folders]
    return min((quota for quota in found if quota is not None), default=None)


def _quota_of(folder: Path, first_version: bool) -> float | None:
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if first_version else ("cpu.max",)
    try:
        quota, period = " ".join(folder.joinpath(name).read_text() for name in names).split()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):  # no such group here, or another layout
        return None


def devices() -> list[str]:
    """The GPUs that torch can use, by name; empty without one."""
    if not torch.cuda.is_available():
        return []
    return [f"cuda:{index} {device_name(f'cuda:{index}')}" for index in range(torch.cuda.device_count())]


def device_name(device: str) -> str:
    """A GPU's name, architecture and memory."""
    properties = torch.cuda.get_device_properties(device)
    kind = "ROCm " + properties.gcnArchName if torch.version.hip else f"CUDA sm_{properties.major}{properties.minor}"
    return f"{properties.name} ({kind}, {properties.total_memory / 2**30:.0f} GiB)"


def why_no_device() -> str:
    """Why `devices` is empty."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU only"
    kind = "ROCm" if torch.version.hip else "CUDA"
    return f"this torch is built for {kind}, but it finds no device or no driver"


def triton_problem() -> str | None:
    """Why Triton cannot be imported; None when it can."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "the triton package is not installed"
        return f"import triton fails: {error}"
    except Exception as error:  # a broken install raises whatever it likes; doctor must still speak
        return f"import triton fails: {error}"
    return None


def environment() -> dict[str, str]:
    """The variables that steer us or torch and are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
