"""The state of an output: which blocks are done, what the run was asked for, and the manifest of the whole.

A block's record is written when everything of it is, and is the only thing that says so; whatever a killed run left
beside is written again. Records lie in `.wavlm-fast/`, the manifest is made from them at the end of every run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import locked, remove_unfinished, write_atomically
from .blocks import Block

STATE = ".wavlm-fast"
_SETTINGS = "settings.json"

Record = dict[str, Any]


class Folder:
    """An output, of one run or of several that share it.

    Args:
        out: a folder, made if missing; or a file that all features end in, with its parts in a hidden folder beside it
            and its manifests named after it.
        one_file: whether it is a file.
    """

    def __init__(self, out: Path, one_file: bool = False) -> None:
        self.out, self.one_file = out, one_file
        self.root = out.with_name(f".{out.name}{STATE}") if one_file else out
        self.state = self.root if one_file else out / STATE
        names = ("manifest.jsonl", "errors.jsonl")
        beside = (out.with_name(f"{out.stem}.{name}") for name in names) if one_file else (out / name for name in names)
        self.manifest, self.errors = beside

    def begin(self, settings: dict[str, Any], afresh: bool) -> None:
        """Make the folders, and hold the settings of this run against those that are there.

        Raises:
            UserError: the output is of other settings; or a folder cannot be made or written.
        """
        path = self.state / _SETTINGS
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.state.joinpath("blocks").mkdir(parents=True, exist_ok=True)
            for folder in (self.root, self.state, self.state / "blocks"):
                remove_unfinished(folder)
            if afresh:
                path.unlink(missing_ok=True)
                for record in self._records():
                    record.unlink()
            text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
            if not path.exists():
                write_atomically(path, lambda file: file.write(text.encode()))
        except OSError as error:
            raise UserError(f"the output folder {self.root} cannot be made: {error.strerror or error}") from error
        found = _read_json(path)
        for name in sorted({*settings, *found}):
            if settings.get(name) != found.get(name):
                raise UserError(
                    f"{self.out} was extracted with {name} {found.get(name)!r}, and {settings.get(name)!r} is asked "
                    "for: take another --out, or --force to begin again"
                )

    @contextmanager
    def held(self, share: str) -> Iterator[None]:
        """Hold a share of the output while it is worked on.

        Raises:
            UserError: another run does.
        """
        with locked(self.state / f"{share}.lock") as free:
            if not free:
                raise UserError(f"another run is writing into {self.out}")
            yield

    def done(self, block: Block) -> list[Record] | None:
        """The records of a block that is complete: its files are there, and what was wrong has not changed since."""
        records = self._read(self._record_of(block.index), block.key)
        return records if records is not None and all(map(self.stands, records)) else None

    def stands(self, record: Record) -> bool:
        """Whether what a record says still holds."""
        if "error" in record:
            return record.get("changed") == changed(record["audio"])
        with suppress(OSError):
            return self.root.joinpath(record["file"]).stat().st_size == record["bytes"]
        return False

    def left_from(self, index: int) -> dict[str, Record]:
        """Records by utterance that an earlier list of utterances left behind, from a block on."""
        left = {}
        for path in self._records():
            if int(path.stem) >= index:
                left.update({_utterance_key(r): r for r in self._read(path) or () if "error" not in r})
        return left

    def commit(self, block: Block, records: list[Record]) -> None:
        """Say that a block is complete."""
        lines = [json.dumps({"block": block.key})] + [json.dumps(record) for record in records]
        content = "".join(line + "\n" for line in lines).encode()
        write_atomically(self._record_of(block.index), lambda file: file.write(content))

    def records(self) -> Iterator[Record]:
        """Those of all blocks, as far as they are done."""
        for path in self._records():
            yield from self._read(path) or ()

    def prune(self, count: int) -> None:
        """The list has so many blocks: records of others go."""
        for path in self._records():
            if int(path.stem) >= count:
                path.unlink()

    def finish(self, settings: dict[str, Any]) -> tuple[int, int]:
        """Write the manifests of what is done.

        Returns:
            How many utterances are done, and how many failed.
        """
        with locked(self.state / "finish.lock", wait=True):
            shown = ({**r, "file": self.out.name} if self.one_file and "file" in r else r for r in self.records())
            good = _lines(self.manifest, shown, lambda r: "error" not in r, {"settings": settings})
            bad = _lines(self.errors, self.records(), lambda r: "error" in r)
        return good, bad

    def _record_of(self, index: int) -> Path:
        return self.state / "blocks" / f"{index:06d}.jsonl"

    def _records(self) -> list[Path]:
        return sorted(self.state.glob("blocks/*.jsonl"))

    def _read(self, path: Path, key: str | None = None) -> list[Record] | None:
        """The records of a block; None where there are none, or they are of another."""
        try:
            head, *records = map(json.loads, path.read_text().splitlines())
        except (OSError, ValueError):
            return None
        return records if key in (None, head["block"]) else None


def changed(path: str) -> list[int] | None:
    """What of a file tells that it was changed: size and time; None where there is none."""
    with suppress(OSError):
        found = Path(path).stat()
        return [found.st_size, found.st_mtime_ns]
    return None


def utterance_key(identity: str, path: str, start: float, duration: float | None) -> str:
    """What makes an utterance another one."""
    return json.dumps([identity, path, start, duration])


def _utterance_key(record: Record) -> str:
    return utterance_key(record["id"], record["audio"], record.get("start", 0.0), record.get("duration"))


def _lines(path: Path, records: Iterator[Record], keep: Any, head: Record | None = None) -> int:
    """Write those of the records that are kept; none at all where there is nothing to say."""
    count = 0

    def save(file: Any) -> None:
        nonlocal count
        if head is not None:
            file.write((json.dumps(head) + "\n").encode())
        for record in filter(keep, records):
            count += 1
            file.write((json.dumps(record) + "\n").encode())

    write_atomically(path, save)
    if head is None and count == 0:
        path.unlink()
    return count


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"the settings in {path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}
