"""One run of a provider in a process of its own: its time and its peak of memory.

`python -m wavlm_fast.benchmarks.run REQUEST OUTPUT` is that process.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavlm_fast import memory
from wavlm_fast.errors import UserError, first_line

from .cases import MODELS, Case, Output, Spec
from .providers import SHORT, Provider, Subject, providers
from .verify import dense_bytes

_USABLE = 0.8  # of this machine's memory


@dataclass(frozen=True)
class Result:
    """Of the first forward of a process."""

    seconds: float  # packing of weights included
    peak: memory.Peak
    output: Tensor


@dataclass(frozen=True)
class _Request:
    case: Case
    spec: Spec
    provider: str
    subject: Subject  # without its module, which the process builds


def run(case: Case, name: str, provider: Provider, subject: Subject) -> Result | str:
    """Run a case once in a new process; a sentence where that cannot be done."""
    needs, has = dense_bytes(subject.module.model.config, subject.inputs["input_values"], provider.dtype), installed()
    if provider.dense and needs > _USABLE * has:
        return f"needs about {needs / 1e9:.0f} GB for attention weights, this machine has {has / 1e9:.0f}"
    subject.folder.mkdir(exist_ok=True)
    try:
        if provider.prepare is not None:
            provider.prepare(subject)
        with tempfile.TemporaryDirectory() as folder:
            request, output = Path(folder, "request"), Path(folder, "output")
            wanted = _Request(case, MODELS[case.model], name, replace(subject, module=None))
            request.write_bytes(pickle.dumps(wanted))
            found = json.loads(memory.in_new_process(__package__, str(request), str(output)))
            return Result(found["seconds"], memory.Peak(**found["peak"]), torch.load(output))
    except UserError as error:
        return f"the process {error}"
    except Exception as error:  # an exporter raises what it likes
        return first_line(error)


def installed() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def row(case: Case, name: str, provider: Provider, result: Result | str) -> dict[str, Any]:
    """What is said of a provider's memory."""
    sizes = {"model": case.model, "batch": len(case.lengths), "audio": max(case.lengths)}
    head = {"provider": name, "dtype": SHORT[provider.dtype], **sizes}
    if isinstance(result, str):
        return {**head, "peak_bytes": None, "forward_bytes": None, "problem": result}
    return {**head, "peak_bytes": result.peak.total, "forward_bytes": result.peak.forward, "problem": None}


def worst(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """The row of the higher peak."""
    if before is None or before["problem"] or now["problem"]:
        return now
    return max(before, now, key=lambda found: found["peak_bytes"])


def main() -> None:
    """Serve a request."""
    request: _Request = pickle.loads(Path(sys.argv[1]).read_bytes())
    MODELS[request.case.model] = request.spec
    torch.set_num_threads(request.subject.threads)
    subject = replace(request.subject, module=Output.of(request.case.model))
    device = subject.device
    call = providers(device)[0][request.provider].build(subject)
    del subject, request  # with a model in float32 that not everybody goes on to use
    found: list[Any] = []

    def once() -> None:
        start = time.perf_counter()
        result = torch.as_tensor(call()).cpu()
        found.extend((time.perf_counter() - start, result))

    peak = memory.peak_of(once, device)
    torch.save(found[1], sys.argv[2])
    print(json.dumps({"seconds": found[0], "peak": asdict(peak)}))
