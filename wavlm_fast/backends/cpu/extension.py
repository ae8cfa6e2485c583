"""The C++ extension, made of csrc/: its kernels by their schemas, and why they cannot be had.

It is loaded when somebody first asks for its `problem`, never by an import. Kernels have a namespace of their own,
`wavlm_fast_cpu`, which leaves the ops' registration (fake, autograd, autocast) the only one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ... import derived
from ...ops import schemas

logger = logging.getLogger("wavlm_fast")

# The path of another extension to load instead of the installed one, as is: for builds with sanitizers and the like.
ENVIRONMENT_VARIABLE = "WAVLM_FAST_EXTENSION"
DTYPES = (torch.float32, torch.bfloat16)  # of frames
PAIRS = ("avx512_bf16", "neon_bf16")  # levels that multiply pairs of bfloat16
RESIZED = "Tensor? offsets=None, Tensor? out_offsets=None, int? out_frames=None"  # as in ops/_packed.py
_FOLDER = Path(__file__).parents[2]
_OLDEST_TORCH = (2, 10)  # with the stable interface that the extension is written to
_UNWANTED = "WAVLM_FAST_NO_EXTENSION is set"  # as setup.py writes it
_library = torch.library.Library("wavlm_fast_cpu", "DEF")


def kernel(schema: str) -> Callable[..., Any]:
    """Declare a kernel of csrc/ and get what calls it."""
    _library.define(schema)
    overload = getattr(torch.ops.wavlm_fast_cpu, schema.partition("(")[0]).default
    return overload.op  # which the overload would call: 0.5 us


def kernel_of_op(name: str) -> Callable[..., Any]:
    """The same of one that has the name and the schema of an op."""
    return kernel(name + schemas[name])


_isa = kernel("isa() -> str")
_isa_levels = kernel("isa_levels() -> str[]")
_isa_problem = kernel("isa_problem() -> str")
_isa_reason = kernel("isa_reason() -> str")
kernel("isa_for(float gain) -> str[]")  # for tests
_threads = kernel("threads() -> int")
_kept_scratch = kernel("kept_scratch() -> int")
_release_scratch = kernel("release_scratch() -> ()")
_fingerprint = kernel("fingerprint(Tensor x, int samples) -> int")
for _schema in ("peak(str dtype) -> float", "begin_task_log(int threads) -> ()", "end_task_log() -> float[]"):
    kernel(_schema)  # for benchmarks


@cache
def problem() -> str | None:
    """Why the kernels cannot be used, a sentence; None when they can."""
    given = os.environ.get(ENVIRONMENT_VARIABLE)
    found = _load(Path(given)) if given else _find_and_load(_FOLDER)
    if found is None:
        derived.use_fingerprint(_fingerprint)
        if _isa_problem():
            logger.warning("%s", _isa_problem())
    return found


def mending() -> str | None:
    """What to do to make the kernels usable; None when they are, or when the user wanted none."""
    if problem() is None or build_record().get("failed") == _UNWANTED:
        return None
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return f"unset {ENVIRONMENT_VARIABLE}"
    if _torch_version() < _OLDEST_TORCH:
        return "pip install --upgrade torch"
    # No cache: pip keeps a wheel that it built without kernels, and would take it again.
    line = "pip install --force-reinstall --no-cache-dir --no-deps ."
    return f"in the sources of wavlm-fast, with a C++ compiler at hand, {line}"


def build_record(folder: Path = _FOLDER) -> dict[str, Any]:
    """How the extension was built: {"torch", "compiler", "levels"}, {"failed": a sentence}, or {} if it never was."""
    try:
        return json.loads(folder.joinpath("_build.json").read_text())
    except (OSError, ValueError):
        return {}


def isa() -> str | None:
    """The instruction set level that the C++ kernels use here; None without them."""
    return None if problem() else _isa()


def isa_problem() -> str | None:
    """Why they use another level than they were told to; None when they do not."""
    return None if problem() else _isa_problem() or None


def isa_reason() -> str | None:
    """Why they use a lower level than this CPU has, unasked; None when they do not."""
    return None if problem() else _isa_reason() or None


def isa_levels() -> list[str]:
    """The levels that both the extension and this CPU have, slowest first."""
    return [] if problem() else _isa_levels()


def threads() -> int | None:
    """How many threads the C++ kernels run on now; None without them."""
    return None if problem() else _threads()


def kept_scratch() -> int:
    """Bytes of memory that the C++ kernels keep for their next call, of all threads together."""
    return 0 if problem() else _kept_scratch()


def release_scratch() -> None:
    """Give that memory back; of calls that are running in other threads when they are done."""
    if not problem():
        _release_scratch()


def _find_and_load(folder: Path) -> str | None:
    record = build_record(folder)
    files = sorted(folder.glob("_C*.so"))
    if not files:
        return f"extension not built: {record.get('failed', 'wavlm-fast was not installed, only put on the path')}"
    # In a checkout the sources may have moved on, and with them what the extension is expected to hold.
    if "sources" in record and _digest_of(folder.parent / "csrc") not in (None, record["sources"]):
        return "extension is older than the sources in csrc/: install wavlm-fast again"
    return _load(files[0])


def _load(file: Path) -> str | None:
    if _torch_version() < _OLDEST_TORCH:
        return f"extension needs torch {'.'.join(map(str, _OLDEST_TORCH))} or newer, got {torch.__version__}"
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        return f"extension cannot be loaded: {str(error).splitlines()[0]}"
    return None


def _torch_version() -> tuple[int, ...]:
    return tuple(map(int, torch.__version__.split(".")[:2]))


def _digest_of(sources: Path) -> str | None:
    """What setup.py calls the state of csrc/; None where there are no sources."""
    if not sources.joinpath("dispatch.h").exists():
        return None
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
