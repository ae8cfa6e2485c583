"""`python -m benchmarks.gpu_bytes`: what the Triton kernels read and write, over what they could not do without.

Compulsory is every input of an op once and every output once. Three figures are set against it: what the programs of
the kernels ask for, every tile as often as it is read; what of it comes from memory, past an L2 cache of 40 MB; and
what transformers' sequence of torch ops moves if each of them reads its inputs once and writes its outputs once. Torch
ops around our kernels count as theirs do, and so do copies of weights in another order: none is kept.

Attention, norms and pooling are held to what is asked for. Products are held to what comes from memory: programs that
multiply M·K by K·N numbers ask for at least 2·M·N·K over the root of how many a processor holds, whatever their tiles,
which for the convolutions of the front end and 256 KB is nearly three times the compulsory bytes.

No GPU is needed. Kernels are counted by formulas (launch_formulas.py), attention by running it in Triton's
interpreter (counted_bytes.py). Exit status 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import wavlm_fast
from wavlm_fast.backends.triton import TABLE
from wavlm_fast.kernels._target import pretend

from .cases import BATCH, DTYPES, FRAMES, MODELS, Case, cases
from .compile import Launch, recording
from .launch_bytes import Bytes, of_launch
from .torch_bytes import TorchBytes, matching, sizes, transformers_bytes

TARGET = "hopper"
# The most that is allowed over the compulsory bytes, of what is asked for and of what comes from memory.
ASKED = {
    "waveform_conv": 1.1, "add_layer_norm": 1.1, "position_gate": 1.1, "stats_pool": 1.1,
    "gated_attention": 3.0, "gated_attention_backward": 6.0,
    # What was reached, rounded up. Only ever tighten.
    "waveform_conv_backward": 4.8, "add_layer_norm_backward": 1.15, "position_gate_backward": 1.1,
    "stats_pool_backward": 1.6,
}  # fmt: skip
# Tiles of fp32 are half as large, and these read some again.
HALF_ONLY = {"gated_attention", "gated_attention_backward", "waveform_conv_backward"}
MEMORY = {"strided_conv": 1.5, "tdnn": 1.5, "positional_conv": 1.5}


@dataclass(frozen=True)
class Row:
    """One op at the sizes of one model: bytes, and what they come to over the compulsory ones."""

    model: str
    op: str
    what: str
    half: bool  # the precision
    compulsory: int
    asked: int
    memory: int
    transformers: int

    @property
    def faults(self) -> list[str]:
        """Bars that are missed, as sentences."""
        found = []
        if self.op in HALF_ONLY and not self.half:
            return found
        for bars, name, figure in ((ASKED, "asks for", self.asked), (MEMORY, "moves", self.memory)):
            bar, ratio = bars.get(self.op), figure / self.compulsory
            if bar is not None and ratio > bar:
                case = " ".join(filter(None, (self.model, self.op, self.what)))
                found.append(f"{case}: {name} {ratio:.2f} times its bytes, the bar is {bar}")
        return found

    def __str__(self) -> str:
        asked, memory, theirs = (n / self.compulsory for n in (self.asked, self.memory, self.transformers))
        bar = {self.op in ASKED: f"asked {ASKED.get(self.op)}", self.op in MEMORY: f"memory {MEMORY.get(self.op)}"}
        if self.op in HALF_ONLY and not self.half:
            bar = {}
        return (
            f"{self.model:5} {self.op:24} {self.what:11} {self.compulsory / 1e6:10.1f} {asked:7.2f} {memory:7.2f} "
            f"{theirs:13.2f}  {bar.get(True, '')}"
        ).rstrip()


def compulsory(case: Case, outputs: Any) -> int:
    """Bytes of all inputs and outputs of an op."""
    return sizes(case.args, outputs)


def ours(case: Case) -> tuple[Any, list[Launch], Bytes]:
    """What the Triton backend returns for a case, its launches, and the bytes of torch ops around them."""
    with recording() as launches, torch.no_grad(), TorchBytes() as around:
        outputs = TABLE[case.op].fn(*case.args)
    return outputs, launches, Bytes(around.total, around.total)


def attention(dtype: torch.dtype, head_dim: int, batch: int = BATCH, frames: int = FRAMES) -> dict[str, Bytes]:
    """Bytes of attention and its backward for one head, by op and by kernel, from the interpreter."""
    # bfloat16 is not computed there; it takes the same tiles as float16.
    name = "float32" if dtype is torch.float32 else "float16"
    module = f"{__package__}.counted_bytes"
    command = [sys.executable, "-m", module, str(batch), str(frames), str(head_dim), name, TARGET]
    root = str(Path(wavlm_fast.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    found = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"counting attention in the interpreter failed:\n{found.stderr}")
    return {op: Bytes(*counts) for op, counts in json.loads(found.stdout.splitlines()[-1]).items()}


def rows(dtype: torch.dtype, chosen: str = "") -> Iterator[Row]:
    """Every op of both models whose name contains `chosen`, forward and backward."""
    heads: dict[int, dict[str, Bytes]] = {}
    for model, shape in MODELS.items():
        theirs = {(op, what): both for op, what, *both in transformers_bytes(model, dtype)}
        for case in cases(model, dtype):
            if chosen not in case.op:
                continue
            with pretend(TARGET):
                outputs, launches, around = ours(case)
            if case.op.startswith("gated_attention"):
                D = shape.channels // shape.heads
                heads[D] = heads.get(D) or attention(dtype, D)
                one = heads[D][case.op]
                found = Bytes(one.asked * shape.heads, one.memory * shape.heads)
            else:
                found = sum(map(of_launch, launches), around)
            least = compulsory(case, outputs)
            half = dtype is not torch.float32
            yield Row(model, case.op, case.what, half, least, found.asked, found.memory, matching(case, theirs))


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bytes", description=__doc__)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="write a row per op")
    args = parser.parse_args(arguments)
    print("                                              compulsory    over compulsory\n"
          "model op                       what                MB     asked  memory  transformers  bar")  # fmt: skip
    found = []
    for row in rows(DTYPES[args.dtype], args.op):
        print(row, flush=True)
        found.append(row)
    faults = [fault for row in found for fault in row.faults]
    print("\n".join(faults) if faults else "Every bar is met.")
    if args.json:
        content = {"dtype": args.dtype, "target": TARGET, "rows": [{**asdict(r), "faults": r.faults} for r in found]}
        Path(args.json).write_text(json.dumps(content, indent=1))
    return 1 if faults else 0
