"""What is done with a block, in whichever process: decode, compute, write, record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from .. import audio
from ..errors import UserError, first_line
from ..files import feed
from ..inputs import SAMPLE_RATE
from .blocks import Block
from .extractor import Extractor, Output, batches
from .folder import Folder, Record, changed, utterance_key
from .sources import Utterance
from .writers import FORMATS


@dataclass(frozen=True)
class Loaded:
    """An utterance in memory, or why it is not."""

    record: Record  # its first lines of the manifest
    waveform: Tensor | None  # [S] at 16 kHz
    error: str | None = None


@dataclass(frozen=True)
class Worker:
    """Extracts blocks into an output. It pickles as long as its extractor has not run: a process makes its own model.

    Args:
        extractor: what is computed.
        folder: where it is written.
        kind: the format, of `FORMATS`.
        about: of the run, for formats that say it in every file.
        allow_truncated: take files that end early as far as they go.
    """

    extractor: Extractor
    folder: Folder
    kind: str
    about: dict[str, Any]
    allow_truncated: bool = False

    def load(self, utterance: Utterance) -> Loaded:
        """Decode one utterance. What is wrong with a file is its error; nothing raises."""
        record: Record = {"id": utterance.id, "audio": utterance.path}
        if utterance.start:
            record["start"] = utterance.start
        if utterance.duration is not None:
            record["duration"] = utterance.duration
        if utterance.channel is not None:
            record["channel"] = utterance.channel
        try:
            waveform, info = audio.load(
                utterance.path,
                at_least=self.extractor.samples_needed,
                start=utterance.start,
                duration=utterance.duration,
                channel=utterance.channel,
                allow_truncated=self.allow_truncated,
            )
            found = changed(utterance.path) or [0, 0]
            record.update(seconds=len(waveform) / SAMPLE_RATE, sha256=_digest(utterance.path, *found))
            if info.incomplete:
                record["incomplete"] = info.incomplete
        except (UserError, OSError, MemoryError) as error:
            return Loaded(record, None, first_line(error))
        return Loaded(record, waveform)

    def computed(self, utterances: Sequence[Loaded]) -> Iterator[tuple[Record, Output | Exception]]:
        """Features of the utterances of a block, batch by batch, and of those that have none the error."""
        good = [(u.record, u.waveform) for u in utterances if u.waveform is not None]
        for loaded in utterances:
            if loaded.waveform is None:
                yield loaded.record, UserError(loaded.error)
        budget = self.extractor.batch_seconds * SAMPLE_RATE
        for indices in batches([len(waveform) for _, waveform in good], budget):
            outputs = self.extractor.outputs([good[i][1] for i in indices])
            yield from zip((good[i][0] for i in indices), outputs, strict=True)

    def writing(self, block: Block) -> BlockWriter:
        """What writes a block."""
        return BlockWriter(self, block)

    def run(self, block: Block, earlier: dict[str, Record]) -> tuple[list[Record], int]:
        """All of it, one after the other; as `BlockWriter.close`."""
        writing = self.writing(block)
        for record, output in self.computed([self.load(u) for u in writing.remaining(earlier)]):
            writing.write(record, output)
        return writing.close()


class BlockWriter:
    """Writes a block and commits it."""

    def __init__(self, worker: Worker, block: Block) -> None:
        self.worker, self.block = worker, block
        self.writer = FORMATS[worker.kind](worker.folder, block.index, worker.about)
        self.records: dict[str, Record] = {}
        self.kept = 0

    def remaining(self, earlier: dict[str, Record]) -> list[Utterance]:
        """The utterances to extract: where each is a file of its own, those that an earlier list had are kept."""
        remaining = []
        for utterance in self.block.utterances:
            key = utterance_key(utterance.id, utterance.path, utterance.start, utterance.duration)
            record = None if self.writer.shards else earlier.get(key)
            if record is not None and self.worker.folder.stands(record):
                self.records[utterance.id] = record
                self.kept += 1
            else:
                remaining.append(utterance)
        return remaining

    def write(self, record: Record, output: Output | Exception) -> None:
        """Write the features of an utterance, or remember its error.

        Raises:
            OSError: nothing more can be written.
        """
        if not isinstance(output, Exception):
            try:
                if isinstance(output, str):
                    record["text"] = output
                else:
                    if self.worker.extractor.of_frames:
                        record["frames"] = output.shape[-2]
                    record.update(shape=list(output.shape), dtype=str(output.dtype).removeprefix("torch."))
                self.writer.write(record, output)
            except UserError as error:
                output = error
        if isinstance(output, Exception):
            kept = ("id", "audio", "start", "duration", "channel")
            record = {k: v for k, v in record.items() if k in kept}
            record.update(error=first_line(output), changed=changed(record["audio"]))
        self.records[record["id"]] = record

    def close(self) -> tuple[list[Record], int]:
        """Commit the block. What of it is new, and how many utterances were kept."""
        self.writer.close()
        self.worker.folder.commit(self.block, [self.records[u.id] for u in self.block.utterances])
        return list(self.records.values())[self.kept :], self.kept


@lru_cache(maxsize=64)  # several utterances of a file follow each other
def _digest(path: str, size: int, changed_at: int) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    feed(digest, path)
    return digest.hexdigest()
