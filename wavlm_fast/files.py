"""Files written whole or not at all, and the removal of what killed runs left unfinished.

An unfinished file is named `.wavlm-fast.HOST.RANDOM.tmp` and locked by whoever writes it. The lock goes with its
process, however that ends, so what nobody holds belongs to nobody; process numbers would not do, which containers that
share a folder give out twice. Where there are no locks, or another host's may not be seen, a day without a change
decides.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:64] or "unknown"
_PREFIX, _SUFFIX = ".wavlm-fast.", ".tmp"
_UNFINISHED = re.compile(re.escape(_PREFIX) + r"([A-Za-z0-9-]+)\.\w+" + re.escape(_SUFFIX))
_A_DAY = 86_400.0  # seconds


def write_atomically(target: Path, save: Callable[[Any], None], durable: bool = True) -> None:
    """Write into a temporary file beside the target and rename it; whatever happens, the target is whole or absent.

    Args:
        target: the file.
        save: writes the content to an open binary file.
        durable: also where the machine loses its power; that takes milliseconds.

    Raises:
        OSError: it cannot be written.
    """
    descriptor, name = _new(target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            save(file)
            file.flush()
            if durable:
                os.fsync(descriptor)
            os.chmod(name, 0o666 & ~_umask())
            if fcntl is not None:  # while it is locked: in between somebody could take it for abandoned
                os.replace(name, target)
        if fcntl is None:
            os.replace(name, target)
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def settle(path: Path) -> None:
    """Make durable what another library wrote, with the permissions of a new file.

    Raises:
        OSError: it is not on the disk.
    """
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    os.chmod(path, 0o666 & ~_umask())


@contextlib.contextmanager
def unfinished_folder(parent: Path) -> Iterator[Path]:
    """A new folder, for what is renamed once it is whole; it goes when the block ends, with what is still in it.

    Raises:
        OSError: it cannot be made.
    """
    name = tempfile.mkdtemp(prefix=f"{_PREFIX}{_HOST}.", suffix=_SUFFIX, dir=parent)
    descriptor = os.open(name, os.O_RDONLY) if fcntl is not None else None
    try:
        if descriptor is not None:
            _lock(descriptor)
        yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove from a folder what a writer of this module was killed over; what somebody is writing now stays.

    Returns:
        What was removed.
    """
    removed = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            named = _UNFINISHED.fullmatch(entry.name)
            with contextlib.suppress(OSError):  # renamed or removed meanwhile, or somebody else's
                if named and not entry.is_symlink() and _remove_abandoned(entry, named[1] == _HOST):
                    removed.append(Path(entry.path))
    return removed


def feed(digest: Any, path: Path | str) -> None:
    """Give the bytes of a file to a digest of `hashlib`."""
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file, made if missing, until the block ends.

    Args:
        path: the file.
        wait: for whoever holds it.

    Yields:
        Whether the lock is ours. Where there are no locks everybody gets it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if wait and fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield True
        else:
            yield _lock(descriptor) is not False
    finally:
        os.close(descriptor)


def _new(folder: Path) -> tuple[int, str]:
    """A new unfinished file, locked. Its name holds nothing of the target's, which may be as long as a name can be."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f"{_PREFIX}{_HOST}.", suffix=_SUFFIX, dir=folder)
        if _lock(descriptor) is not False and os.path.exists(name):
            return descriptor, name
        os.close(descriptor)  # another run found it before it was locked


def _remove_abandoned(entry: os.DirEntry[str], ours: bool) -> bool:
    old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _A_DAY
    if not (ours or old):
        return False
    descriptor = os.open(entry.path, os.O_RDONLY if entry.is_dir() else os.O_RDWR)
    try:
        locked = _lock(descriptor)
        abandoned = locked is True or (locked is None and old)
        if abandoned:  # before the lock goes: `_new` looks whether its file is still there
            shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
        return abandoned
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether the lock on a file was free and is ours now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
