"""`python -m benchmarks.gpu_fp32`: fp32 products of bf16 or TF32 pieces, which kernels/_precision.py chooses among.

First the errors of sums as long as the model's, emulated (matrix_unit.py), over that of fp32 on fp32 units, where a
thread adds one product after the other. A way holds the house's rule where its error is at most twice that. Torch on a
CPU stands beside it: it adds up many partial sums, and errs less over long ones than either. Then kernels compiled for
GPUs: registers, spills, shared memory, and the time of the busiest unit as gpu_roofline estimates it, which is no time
on a GPU.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from wavlm_fast.kernels import _frames_product, gated_attention
from wavlm_fast.kernels._target import pretend

from . import roofline
from .cases import Case, cases
from .compile import Launch
from .devices import DEVICES, Device
from .matrix_unit import PRODUCTS, chain, product
from .static import pretended

RULE = 2.0  # of fp32's own error
TARGETS = ("A100", "H100", "RTX 4090", "L4")
_IEEE = "ieee"
_ROWS = 64
_CPU = "torch, CPU"
# What the sums run over: a head's channels, two and three taps of the front end, 128 taps of a group of large.
_LENGTHS = {"queries · keys": 64, "front end, k2": 1024, "front end, k3": 1536, "positional conv": 128 * 64}
_NUMBERS = {
    "normal": torch.randn,
    "all positive": torch.rand,
    "of many sizes": lambda *shape, generator: (
        torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).mul(3).exp()
    ),
}


@dataclass(frozen=True)
class Error:
    """The largest error of one product, by how it was made, over that of the fp32 units."""

    what: str
    numbers: str
    length: int
    fp32: float
    ratios: dict[str, float]


def errors(precisions: Sequence[str], depth: int = 16) -> Iterator[Error]:
    """Every length of sum with every kind of numbers; `depth` is BLOCK_K of the kernels in fp32."""
    for what, length in _LENGTHS.items():
        for name, draw in _NUMBERS.items():
            generator = torch.Generator().manual_seed(length)
            a, b = (draw(*shape, generator=generator) for shape in ((_ROWS, length), (length, _ROWS)))
            truth = a.double() @ b.double()
            fp32 = _error(chain(a, b), truth)
            found = {precision: _error(product(a, b, precision, depth), truth) / fp32 for precision in precisions}
            yield Error(what, name, length, fp32, {_CPU: _error(a @ b, truth) / fp32, **found})


def _error(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth).abs().max().item()


@contextmanager
def multiplied(precision: str) -> Iterator[None]:
    """Let convolutions and attention multiply fp32 in this way, whatever _precision.py says."""
    with ExitStack() as stack:
        for module, name in ((_frames_product, "conv_precision"), (gated_attention, "dot_precision")):
            stack.enter_context(patch.object(module, name, lambda *asked: precision))
        yield


def launches(precision: str, device: Device, ops: Sequence[str]) -> Iterator[tuple[Case, Launch]]:
    """The first launch of each kernel that multiplies, of base."""
    seen = set()
    with pretend(pretended(device.architecture)), multiplied(precision):
        for case in (c for c in cases("base", torch.float32) if c.op in ops):
            for launch in case.launches():
                norm = launch.arguments.get("NORM", False)
                if "PRECISION" in launch.arguments and (launch.name, norm) not in seen:
                    seen.add((launch.name, norm))
                    yield case, launch


def compiled(precisions: Sequence[str], devices: Sequence[str], ops: Sequence[str]) -> Iterator[str]:
    """A line for each kernel and way."""
    for name in devices:
        device = DEVICES[name]
        for precision in precisions:
            for case, launch in launches(precision, device, ops):
                built = roofline.compiled(launch, device)
                units = roofline.of_launch(launch, built, device)
                unit = max(units, key=units.__getitem__)
                # In pieces of rows, the innermost loop is a part of the one that of_launch takes it for.
                known = not launch.arguments.get("IN_PIECES", False)
                time = f"{1e3 * units[unit]:8.3f} by {unit}" if known else f"{'':8} unknown"
                yield (
                    f"{name:9} {launch.name.removesuffix('_kernel'):29} {case.what:9} {precision:7} "
                    f"{built.registers:4} {built.spilled:5} {built.shared:6} {built.resident:8} {time}"
                )


def error_table(precisions: Sequence[str]) -> Iterator[str]:
    """The emulated errors, and which ways hold the rule everywhere."""
    ways = " ".join(f"{way:>10}" for way in (_CPU, *precisions))
    yield f"{'sum':15} {'of':5} {'numbers':13} {'fp32 units':>10} {ways}"
    held = dict.fromkeys(precisions, 0.0)
    for row in errors(precisions):
        ratios = " ".join(f"{_digits(ratio):>10}" for ratio in row.ratios.values())
        yield f"{row.what:15} {row.length:5} {row.numbers:13} {row.fp32:10.2e} {ratios}"
        held = {precision: max(worst, row.ratios[precision]) for precision, worst in held.items()}
    for precision, worst in held.items():
        verdict = f"which {'holds' if worst <= RULE else 'breaks'} the rule of {RULE:g}"
        yield f"{precision}: at most {_digits(worst)} times the error of the fp32 units, {verdict}"


def _digits(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.{max(0, 2 - int(math.log10(ratio)))}f}"


def main(arguments: list[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_fp32", description=__doc__)
    parser.add_argument("--precision", nargs="+", choices=list(PRODUCTS), default=list(PRODUCTS))
    parser.add_argument("--device", nargs="*", choices=TARGETS, default=list(TARGETS), help="none: errors alone")
    parser.add_argument("--op", nargs="+", default=["strided_conv", "strided_conv_backward", "gated_attention",
                                                    "gated_attention_backward"])  # fmt: skip
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    print("Errors over that of the fp32 units, emulated")
    for line in error_table(args.precision):
        print(line, flush=True)
    if args.device:
        print(f"\n{roofline.ESTIMATE}\n{'device':9} {'kernel':29} {'what':9} {'by':7} regs spill shared resident "
              "      ms")  # fmt: skip
    for line in compiled([_IEEE, *args.precision], args.device, args.op):
        print(line, flush=True)
    return 0
