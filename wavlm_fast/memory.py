"""Peak memory of one forward pass, measured in a fresh process: `python -m wavlm_fast.memory` is that process."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import UserError


@dataclass(frozen=True)
class Peak:
    """Bytes. On a GPU both count its memory, on the CPU the resident memory of the process."""

    total: int  # the most that was held at any time of the forward pass: Python, torch, weights and all
    forward: int  # of that, what was not yet held when the forward pass began


def measure(
    provider: str,
    *,
    audio: str | None,
    samples: int,
    batch: int = 1,
    model: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    backend: str | None = None,
    keep_originals: bool = True,
    allow_truncated: bool = False,
) -> Peak:
    """Run one forward pass in a new process and return its peak.

    Args:
        provider: "transformers" or "wavlm_fast".
        audio: file, or None for the clip of the package.
        samples: at 16 kHz; the audio is repeated or cut to this length.
        batch: copies of it.
        model, dtype, device, threads: as for the subcommands.
        backend: of wavlm_fast; None leaves it to the environment.
        keep_originals: as `accelerate` takes it.
        allow_truncated: as `audio.load` takes it.

    Raises:
        UserError: the process failed, normally for want of memory.
    """
    command = [provider, str(samples), str(batch), dtype, device]
    for option, value in (("--audio", audio), ("--model", model), ("--threads", threads), ("--backend", backend)):
        if value is not None:
            command += [f"{option}={value}"]
    command += [] if keep_originals else ["--free-originals"]
    command += ["--allow-truncated"] if allow_truncated else []
    try:
        return Peak(**json.loads(in_new_process(__name__, *command)))
    except UserError as error:
        raise UserError(f"the process measuring the memory of {provider} {error}") from error


def in_new_process(module: str, *arguments: str) -> str:
    """Run `python -m module` with what this process can import, and return the last line that it prints.

    Raises:
        UserError: it failed; the message says how it ended.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"ended with status {done.returncode}: {last}")
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Measure in this process and print a `Peak` as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("provider", choices=("transformers", "wavlm_fast"))
    parser.add_argument("samples", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("dtype")
    parser.add_argument("device")
    parser.add_argument("--audio")
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--backend")
    parser.add_argument("--free-originals", action="store_true")
    parser.add_argument("--allow-truncated", action="store_true")
    print(json.dumps(asdict(_measure_here(parser.parse_args()))))


def _measure_here(args: argparse.Namespace) -> Peak:
    from . import accelerate, audio, checkpoint, console, measure, use_backend

    console.apply_threads(args.threads)
    model, source = checkpoint.load(args.model, console.DTYPES[args.dtype])
    options = {"at_least": checkpoint.receptive_field(model), "allow_truncated": args.allow_truncated}
    waveform, _ = audio.load(args.audio or audio.clip(), **options)
    waveform = checkpoint.prepare(audio.fit(waveform, args.samples), source.normalise).repeat(args.batch, 1)
    model = model.to(args.device)
    if args.provider == "wavlm_fast":
        model = accelerate(model.eval(), keep_originals=not args.free_originals)
    call = measure.forward(model, waveform)
    with use_backend(args.backend) if args.backend else contextlib.nullcontext():
        return peak_of(call, args.device)


def peak_of(call: Callable[[], Any], device: str) -> Peak:
    """The peak of this process while it makes a call."""
    return _on_gpu(call) if device.startswith("cuda") else _on_cpu(call)


def _on_gpu(call: Callable[[], Any]) -> Peak:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return Peak(peak, peak - before)


def _on_cpu(call: Callable[[], Any]) -> Peak:
    """Loading the model may have needed more than the forward pass does: forget that peak first where Linux lets us."""
    give_back_freed()
    forgotten = _forget_peak()
    before = _status("VmRSS") if forgotten else _highest()
    call()
    peak = _status("VmHWM") if forgotten else _highest()
    return Peak(peak, peak - before)


def give_back_freed() -> None:
    """Make the allocator return its free pages, that from loading would hide as much of what a forward pass needs."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") > 0
    except (OSError, StopIteration):
        return False


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def resident() -> int:
    """Bytes that this process holds now; where there is no telling, the most that it ever held."""
    return _told("VmRSS")


def peak() -> int:
    """The most bytes that this process held, without what its parent did, which Linux passes on in `getrusage`."""
    return _told("VmHWM")


def _told(field: str) -> int:
    try:
        return _status(field)
    except (OSError, StopIteration):
        return _highest()


def _highest() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
