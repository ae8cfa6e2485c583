"""`wavlm-fast gpu`: what a borrowed card can tell in a few minutes. The steps are in benchmarks/gpu/card/."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from . import machine
from .backends import load
from .benchmarks.gpu.card import record, supervise, tables
from .benchmarks.gpu.card.steps import FULL, TINY
from .console import positive
from .errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `wavlm-fast gpu`."""
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"a folder for {record.FILE}, to which every measurement is added as it is made; a run that finds one of "
        "the same device and versions goes on with it",
    )
    add("--minutes", type=positive("minutes"), default=10.0, help="when to be through with everything (default: 10)")
    add("--device", default="cuda", help="cuda (default) or cuda:N; cpu with --tiny under TRITON_INTERPRET=1")
    add("--tiny", action="store_true", help="toy sizes, to see the command work")


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when all of ours that was measured is right, 1 when something is not."""
    begin = time.time() - time.process_time()  # imports have taken some of it
    _check_device(args)
    folder = supervise.folder_for(args.out)
    sizes = TINY if args.tiny else FULL
    found = supervise.Run(folder, args.device, sizes, args.minutes, _tell, begin)()
    print()
    for name in found.left_out:
        print(f"left out: {name}")
    for table in tables.tables(found):
        print(table.plain())
    faults, (right, compared) = tables.faults(found), tables.counted(found)
    print(f"{right} of {compared} comparisons with float64 are right; {folder / record.FILE} has everything.")
    for row in faults:
        print(f"wrong: {row['step']}: {row.get('problem') or row.get('reason') or 'off by more than is allowed'}")
    stopped = found.runs[-1]["stopped"]
    if stopped:
        print(f"It stopped before its time: {stopped}")
    if found.left_out:
        print(f"{len(found.left_out)} measurements were left out; the same command goes on with them.")
    return int(bool(faults or stopped))


def _tell(line: dict) -> None:
    print(tables.one_line(line), flush=True)


def _check_device(args: argparse.Namespace) -> None:
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise UserError(f"--device: cuda or cuda:N is wanted, got {args.device!r}") from None
    if device.type == "cpu":
        if not args.tiny or os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError("on the CPU this runs with --tiny in Triton's interpreter alone: set TRITON_INTERPRET=1")
    elif device.type != "cuda" or not torch.cuda.is_available():
        raise UserError(f"there is no GPU to measure: {machine.why_no_device()}")
    elif (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"this machine has {torch.cuda.device_count()} GPUs, --device is {args.device!r}")
    reason = load("triton").why_not(device)
    if reason is not None:
        raise UserError(f"our kernels cannot run: {reason}")
