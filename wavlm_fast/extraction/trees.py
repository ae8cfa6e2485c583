"""Audio files below a folder, in one order whoever asks: those of a tree, and those that a glob means."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import UserError
from .utterance import ENDINGS

_MAGIC = frozenset("*?[")


@dataclass
class _Level:
    """A folder that is being read, and those above it."""

    below: tuple[str, ...]  # names of the folders on the way
    identity: os.stat_result
    names: Iterator[str]
    folders: frozenset[str]


def is_glob(path: str) -> bool:
    """Whether a path that does not exist is a pattern."""
    return not _MAGIC.isdisjoint(path)


def glob(pattern: str, leave_out: Path | None = None) -> Iterator[tuple[str, str]]:
    """Audio files that match, by ending too: each as the folder in front of the first wildcard, and the path below it.

    `**` stands for any number of folders, none included; names that begin with a dot are not looked at.
    """
    parts = pattern.replace(os.sep, "/").split("/")
    first = next(index for index, part in enumerate(parts) if is_glob(part))
    folder = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "")
    if folder and not os.path.isdir(folder):
        raise UserError(f"the folder {folder} of the pattern {pattern} does not exist")
    for path in tree(folder, leave_out, [part for part in parts[first:] if part not in ("", ".")]):
        yield folder, path


def tree(folder: str, leave_out: Path | None = None, pattern: Sequence[str] = ("**",)) -> Iterator[str]:
    """Paths of audio files, by ending, relative to the folder: depth first, sorted by name.

    Names that begin with a dot are left out, and what is no file. Links are followed, but not into a folder in which
    they lie.

    Args:
        folder: where.
        leave_out: a folder below it that is not read, nor has to exist yet.
        pattern: of the paths, part by part.

    Raises:
        UserError: a folder cannot be read.
    """
    levels = [_level(folder, (), _identity(folder or "."), pattern)]
    while levels:
        level = levels[-1]
        name = next(level.names, None)
        if name is None:
            levels.pop()
        elif name not in level.folders:
            if _matches((*level.below, name), pattern):
                yield os.path.join(*level.below, name)
        else:
            below = (*level.below, name)
            identity = _identity(os.path.join(folder, *below))
            if not (_is(identity, leave_out) or any(os.path.samestat(identity, above.identity) for above in levels)):
                levels.append(_level(folder, below, identity, pattern))


def _level(root: str, below: tuple[str, ...], identity: os.stat_result, pattern: Sequence[str]) -> _Level:
    folder = os.path.join(root, *below) or "."
    files, folders = [], set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if _leads_on((*below, entry.name), pattern):
                        folders.add(entry.name)
                elif os.path.splitext(entry.name)[1].lower() in ENDINGS and _is_file(entry):
                    files.append(entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error
    files.extend(folders)
    return _Level(below, identity, iter(sorted(files)), frozenset(folders))


def _identity(folder: str) -> os.stat_result:
    try:
        return os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: str, error: OSError) -> UserError:
    return UserError(f"the folder {folder} cannot be read: {error.strerror or error}")


def _is_file(entry: os.DirEntry[str]) -> bool:
    """A link to nothing counts: somebody misses that file."""
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))


def _is(identity: os.stat_result, folder: Path | None) -> bool:
    try:
        return folder is not None and os.path.samestat(identity, folder.stat())
    except OSError:
        return False


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        return len(pattern) == 1 or any(_matches(names[skip:], pattern[1:]) for skip in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _leads_on(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether something in a folder may match."""
    for name, part in zip(names, pattern, strict=False):
        if part == "**":
            return True
        if not fnmatchcase(name, part):
            return False
    return len(names) < len(pattern)
