"""`python -m benchmarks.gpu_static`: every Triton kernel compiled for every architecture that people own, and judged.

No GPU is needed. Fails on spilled registers, on more shared memory than an architecture has, on matrix products in half
precision that do not use the tensor cores, and on more instructions per score in attention's inner loop than BOUNDS.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

from wavlm_fast.kernels._target import pretend
from wavlm_fast.kernels._tuning import MOST, forced

from .gpu_cases import DTYPES, MODELS, cases
from .gpu_compile import ARCHITECTURES, Architecture, Built, Launch, build

# Machine instructions outside the matrix unit per score, in attention's loop over tiles that load their bias: what was
# reached, rounded up. Only ever tighten.
BOUNDS = {
    ("gated_attention_fwd_kernel", "sm_80"): 8.7,
    ("gated_attention_fwd_kernel", "sm_86"): 8.7,
    ("gated_attention_fwd_kernel", "sm_90"): 10.5,
    ("gated_attention_fwd_kernel", "sm_100"): 11.6,
    ("gated_attention_bwd_dq_kernel", "sm_80"): 14.8,
    ("gated_attention_bwd_dq_kernel", "sm_90"): 13.7,
    ("gated_attention_bwd_dkv_kernel", "sm_80"): 14.0,
    ("gated_attention_bwd_dkv_kernel", "sm_90"): 13.1,
}
# Per multiprocessor and clock: half-precision matrix operations with fp32 sums (2 per multiply-add), and fp32 lanes.
# NVIDIA's architecture whitepapers. Exponentials 16, shared and global memory 32 lanes, 4 instructions issued, on all.
_RATES = {"sm_80": (2048, 64), "sm_86": (512, 128), "sm_89": (512, 128), "sm_90": (4096, 128), "sm_100": (8192, 128),
          "sm_120": (512, 128)}  # fmt: skip
_PRODUCTS = {"gated_attention_fwd_kernel": 2, "gated_attention_bwd_dq_kernel": 3, "gated_attention_bwd_dkv_kernel": 4,
             "gated_attention_bwd_dbias_kernel": 2}  # fmt: skip
QUICK = ("sm_80", "sm_90", "gfx942")


def pretended(architecture: Architecture) -> str:
    """The name in kernels/_target.py that an architecture goes by."""
    if architecture.target.backend == "hip":
        return "cdna"
    return {"sm_90": "hopper", "sm_100": "blackwell"}.get(architecture.name, "cuda")


def launches(
    architecture: Architecture, dtype: str, indices: Iterable[int] = range(MOST)
) -> Iterator[tuple[str, Launch, int]]:
    """Every distinct launch of both models: its op, itself, and the index of its configuration in the kernel's list.

    Defaults have index 0 and come first; kernels without a list have only that.
    """
    seen = set()
    for index in indices:
        for model in MODELS:
            for case in cases(model, DTYPES[dtype]):
                with pretend(pretended(architecture)), forced(index):
                    made = case.launches()
                for launch in made:
                    if launch.key not in seen:
                        seen.add(launch.key)
                        yield case.op, launch, index


def main_loop(built: Built) -> Counter:
    """The loop that multiplies matrices; of several, the one that does most besides (it loads the bias)."""
    return max((c for c in built.loops if c["matrix"]), key=lambda c: c.total(), default=Counter())


def per_score(launch: Launch, built: Built, threads: int) -> float | None:
    """Instructions outside the matrix unit per score, for attention's kernels."""
    if launch.name not in _PRODUCTS or not main_loop(built):
        return None
    loop = main_loop(built)
    scores = launch.arguments["BLOCK_M"] * launch.arguments["BLOCK_N"] / threads
    return (loop.total() - loop["matrix"]) / scores


def bound(launch: Launch, built: Built, architecture: Architecture) -> str:
    """Which unit an iteration of the main loop keeps busy longest, and the share of matrix peak that it leaves."""
    loop = main_loop(built)
    if not loop or architecture.name not in _RATES:
        return ""
    matrix, lanes = _RATES[architecture.name]
    a = launch.arguments
    if launch.name in _PRODUCTS:
        operations = 2 * a["BLOCK_M"] * a["BLOCK_N"] * a["BLOCK_D"] * _PRODUCTS[launch.name]
    else:
        operations = 2 * a["BLOCK_T"] * a["BLOCK_N"] * a["BLOCK_C"]
    threads = 32 * built.warps
    clocks = {
        "matrix": operations / matrix,
        "issue": loop.total() * built.warps / 4,
        "exp": loop["exp"] * threads / 16,
        "fp32": loop["fp32"] * threads / lanes,
        "memory": (loop["shared"] + loop["global load"]) * threads / 32,
    }
    unit = max(clocks, key=clocks.__getitem__)
    return f"{unit}, {100 * clocks['matrix'] / clocks[unit]:.0f} % of matrix peak"


def faults(launch: Launch, built: Built, architecture: Architecture, dtype: str, index: int = 0) -> list[str]:
    """What is wrong with a compiled kernel, as sentences. Alternatives to a default may spill: they are tried first."""
    found = []
    if built.spilled and index == 0:
        found.append(f"spills {built.spilled} bytes per thread")
    if built.shared > architecture.shared_limit:
        found.append(f"needs {built.shared} bytes of shared memory, {architecture.shared_limit} exist")
    multiplies = launch.name in _PRODUCTS or launch.name.startswith("frames_product")
    if multiplies and dtype != "fp32" and not built.whole["matrix"]:
        found.append("multiplies half precision without the tensor cores")
    count = per_score(launch, built, built.warps * architecture.target.warp_size)
    limit = BOUNDS.get((launch.name, architecture.name))
    if dtype != "fp32" and limit is not None and count is not None and launch.arguments["D"] == 64 and count > limit:
        found.append(f"{count:.2f} instructions per score, the bound is {limit}")
    return found


def row(op: str, launch: Launch, built: Built, architecture: Architecture, dtype: str) -> str:
    count = per_score(launch, built, built.warps * architecture.target.warp_size)
    loop = main_loop(built)
    mix = " ".join(f"{k} {v}" for k, v in sorted(loop.items()))
    tile = "x".join(str(v) for k, v in launch.arguments.items() if k in ("BLOCK_M", "BLOCK_T", "BLOCK_N", "BLOCK_C"))
    return (
        f"{architecture.name:7} {dtype:5} {launch.name:36} {tile:14} w{built.warps:<3} {built.registers:4} "
        f"{built.spilled:6} {built.shared:7} {built.resident:4}  {'' if count is None else f'{count:5.2f}':5}  "
        f"{bound(launch, built, architecture):32} {mix}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--op", help="only ops whose name contains this")
    parser.add_argument(
        "--all", action="store_true", help="not only default configurations but every one that tuning tries"
    )
    parser.add_argument("--quick", action="store_true", help=f"bfloat16 on {', '.join(QUICK)}")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    architectures, dtypes = (QUICK, ("bf16",)) if args.quick else (args.arch, args.dtype)
    print("arch    dtype kernel                               tile           warps regs spilled shared resident "
          "instructions/score, what bounds the inner loop, its instructions")  # fmt: skip
    wrong = []
    for name in architectures:
        for dtype in dtypes:
            for op, launch, index in launches(ARCHITECTURES[name], dtype, range(MOST) if args.all else [0]):
                if args.op and args.op not in op:
                    continue
                built = build(launch, ARCHITECTURES[name])
                print(row(op, launch, built, ARCHITECTURES[name], dtype), flush=True)
                found = faults(launch, built, ARCHITECTURES[name], dtype, index)
                wrong += [f"{launch.name} {name} {dtype}: {fault}" for fault in found]
    print("\n".join(wrong) if wrong else "No fault found.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
