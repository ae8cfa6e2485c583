"""Files of tuned choices: JSON, from what was launched where to the configuration that was fastest.

One is the user's, and comes first; the other, SHIPPED, comes with the package and holds what was found on borrowed
cards. Entries are keyed by device name, Triton version, kernel, a hash of its source and one of its list of
configurations, so that what was measured on another card, or of another version, is never read. Processes may read and
write at once. What cannot be read or written is told once in the log and costs nothing but the choices.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ..files import remove_unfinished, write_atomically

logger = logging.getLogger("wavlm_fast")

FOLDER = "WAVLM_FAST_CACHE_DIR"
# Written by `python -m benchmarks.results --gpu FILE`.
SHIPPED = Path(__file__).with_name("tuned.json")
_SOURCES = Path(__file__).parent
_SEPARATOR = " | "
# Docstrings and comments, which change no kernel. A `#` in a string ends its line too, which is enough for a hash.
_SAID = re.compile(r'""".*?"""|#[^\n]*', re.DOTALL)
_IMPORTED = re.compile(r"^from \.(\w+) import", re.MULTILINE)
_ITSELF = ("_tuned", "_tuning")  # imported by kernels, and no part of them


def path() -> Path:
    """tuned.json in WAVLM_FAST_CACHE_DIR, else in wavlm_fast of the user's cache folder: XDG_CACHE_HOME, ~/.cache."""
    folder = os.environ.get(FOLDER)
    if folder:
        return Path(folder, "tuned.json")
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    except RuntimeError:  # a user without a home, as in some containers
        caches = Path(tempfile.gettempdir())
    return caches / "wavlm_fast" / "tuned.json"


def place(device: str, kernel: str, configs: tuple[dict[str, int], ...], what: tuple[Hashable, ...]) -> str:
    """The key of one choice: `what` tells apart the launches of one kernel."""
    import triton

    return _SEPARATOR.join(
        (device, f"triton {triton.__version__}", kernel, _source(kernel), _digest(repr(configs)), repr(what))
    )


def current(key: str) -> bool:
    """Whether a key is of the kernels as they are now."""
    _, _, kernel, source, *_ = (*key.split(_SEPARATOR), "", "", "", "")
    return kernel != "" and source == _source(kernel)


@cache
def _source(kernel: str) -> str:
    """A hash of a kernel's file and of those that it imports from this folder."""
    names, found = [kernel.partition(".")[0]], {}
    for name in names:
        path = _SOURCES / f"{name}.py"
        if name in found or name in _ITSELF or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        found[name] = [line.rstrip() for line in _SAID.sub("", text).splitlines() if line.strip()]
        names += _IMPORTED.findall(text)
    return _digest(repr(sorted(found.items())))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def exist() -> bool:
    """Whether there are choices at all, for whatever device."""
    return bool(_known(path()) or _known(SHIPPED))


def read(key: str, configs: tuple[dict[str, int], ...], shipped: bool = True) -> dict[str, int] | None:
    """The choice at a key, the user's before the shipped one; None where there is none among `configs`."""
    for file in (path(), SHIPPED) if shipped else (path(),):
        found = _known(file).get(key)
        if found in configs:
            return found
    return None


def write(key: str, config: dict[str, int]) -> None:
    """Add a choice to the file, or replace it there."""
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file):
            text = json.dumps({**_load(file), key: config}, indent=1, sort_keys=True)
            remove_unfinished(file.parent)
            write_atomically(file, lambda out: out.write(text.encode()))
    except OSError as error:
        _log_once(f"tuned choices are not kept, {file} cannot be written: {error}")


def count(device: str, file: Path | None = None) -> int:
    """How many choices a file, by default the user's, holds for a device, of this Triton and of these kernels."""
    import triton

    start = _SEPARATOR.join((device, f"triton {triton.__version__}", ""))
    return sum(key.startswith(start) and current(key) for key in _load(file or path()))


@cache
def _known(file: Path) -> dict[str, dict[str, int]]:
    """The file as it was when this process first needed it."""
    return _load(file)


def _load(file: Path) -> dict[str, dict[str, int]]:
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _log_once(f"tuned choices are not used, {file} cannot be read: {error}")
        return {}
    return found


@cache
def _log_once(message: str) -> None:
    logger.warning("%s", message)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keep other processes from writing in between. Without locks the last writer wins, and the file stays whole."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(file.with_suffix(".lock"), "w") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
