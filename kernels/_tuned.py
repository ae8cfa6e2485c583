"""The file of tuned choices: JSON, from what was launched where to the configuration that was fastest.

Entries are keyed by device name, Triton version, kernel and a hash of its list of configurations, so that what another
version measured is never read. Processes may read and write at once. What cannot be read or written is told once in the
log and costs nothing but the choices.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ..files import remove_unfinished, write_atomically

logger = logging.getLogger("wavlm_fast")

FOLDER = "WAVLM_FAST_CACHE_DIR"
_SEPARATOR = " | "


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

    digest = hashlib.sha256(repr(configs).encode()).hexdigest()[:12]
    return _SEPARATOR.join((device, f"triton {triton.__version__}", kernel, digest, repr(what)))


def exist() -> bool:
    """Whether there are choices at all, for whatever device."""
    return bool(_known(path()))


def read(key: str, configs: tuple[dict[str, int], ...]) -> dict[str, int] | None:
    """The choice at a key; None where there is none among `configs`."""
    found = _known(path()).get(key)
    return found if found in configs else None


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


def count(device: str) -> int:
    """How many choices the file holds for a device under this version of Triton."""
    import triton

    start = _SEPARATOR.join((device, f"triton {triton.__version__}", ""))
    return sum(key.startswith(start) for key in _load(path()))


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
