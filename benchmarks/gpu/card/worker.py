"""The process that touches the device: says what it finds there, waits for leave, and tells of every step.

`python -m wavlm_fast.benchmarks.gpu.card.worker FOLDER DEVICE full|tiny`, started by supervise.py: a line of JSON to
standard output for each message, and one from standard input, which says when to end. What libraries print goes to
standard error.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch

import wavlm_fast
from wavlm_fast import kernels, machine
from wavlm_fast.console import finite

from . import attention, models, parity, record, roof, stages, tuning
from .session import Message, Session
from .steps import FULL, PEAKS, PHASES, TINY, Scale, Step

_PACE_OF_TINY = 1 / 20  # of the seconds that a real step is thought to take


def head(scale: Scale) -> dict[str, Any]:
    """Everything that figures depend on."""
    on_gpu = scale.device.type == "cuda"
    versions = machine.versions()
    return {
        "device": machine.device_name(str(scale.device)) if on_gpu else "Triton's interpreter",
        "sizes": TINY if scale.tiny else FULL,
        **{name: versions[name] for name in ("torch", "transformers", "triton")},
        "CUDA or ROCm": torch.version.hip or torch.version.cuda,
        "wavlm-fast": wavlm_fast.__version__,
        "kernels": _digest(),
    }


def _digest() -> str:
    """A name for the state of kernels/."""
    digest = hashlib.sha256()
    for folder in kernels.__path__:
        for path in sorted(Path(folder).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def measured(scale: Scale, rows: list[dict[str, Any]]) -> list[Step]:
    """All steps but those that depend on what the others find."""

    def known() -> roof.Roof:
        return roof.Roof([row for row in rows if row["phase"] == PEAKS])

    return [
        *roof.steps(scale), *parity.steps(scale), *attention.steps(scale, known), *stages.steps(scale, known),
        *models.steps(scale),
    ]  # fmt: skip


def _paced(scale: Scale, steps: Iterable[Step]) -> list[Step]:
    return [replace(step, seconds=step.seconds * (_PACE_OF_TINY if scale.tiny else 1)) for step in steps]


def messages(scale: Scale, folder: Path, deadline: float) -> Iterator[Message]:
    """Run what the record in the folder does not have."""
    found = record.read(folder / record.FILE)
    rows = found.rows(*PHASES)
    steps = measured(scale, rows)
    session = Session(found.done, rows, time.time, deadline)
    yield from session.run(_paced(scale, steps))
    if not session.broken:
        yield from session.run(_paced(scale, tuning.steps(scale, folder, steps, rows)))
    if not session.broken:
        yield {"end": True}


def main(arguments: list[str]) -> int:
    """Run as a process."""
    out = _channel()
    folder, device, sizes = arguments
    warnings.filterwarnings("ignore")
    scale = Scale(torch.device(device), sizes == TINY)
    if scale.device.type == "cuda":
        torch.cuda.set_device(scale.device)  # whose events tell the time
    scale.prepare()
    gc.freeze()  # nobody has to look through all of torch for garbage after every step
    _send(out, {"head": head(scale)})
    leave = sys.stdin.readline()
    if leave:
        threading.Thread(target=left_alone, args=(sys.stdin, os._exit), daemon=True).start()
        for message in messages(scale, Path(folder), json.loads(leave)["deadline"]):
            _send(out, message)
    return 0


def left_alone(stream: TextIO, leave: Callable[[int], Any]) -> None:
    """Nobody waits any more for what this process finds: the device is somebody else's, whatever runs there."""
    stream.read()
    leave(1)


def _channel() -> TextIO:
    """Standard output, for messages alone."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def _send(out: TextIO, message: Message) -> None:
    out.write(json.dumps(finite(message)) + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
