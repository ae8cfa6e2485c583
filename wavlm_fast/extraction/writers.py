"""How features lie on a disk: a file for each utterance, or a shard for each block.

A writer is made for a block, gets its utterances one by one, and says of each where it went. What it writes is the same
to the byte for the same features.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import remove_unfinished, write_atomically
from .extractor import Output, as_array
from .folder import Folder, Record

_UNSAFE = {"": "%", ".": "%2E", "..": "%2E%2E"}  # parts that a path cannot have
# What a file system may say of a name; everything else that it refuses ends the run.
_OF_THE_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ)


class Writer:
    """Writes the features of one block.

    Args:
        folder: the output.
        index: the block's number.
        about: of the run: "what" is written, and the names of "layers", "model" and the like.
    """

    shards = False  # whether a block is one file

    def __init__(self, folder: Folder, index: int, about: dict[str, Any]) -> None:
        self.folder, self.index, self.about = folder, index, about

    def write(self, record: Record, output: Output) -> None:
        """Write the features of an utterance, and where into its record.

        Raises:
            UserError: they cannot be written for what they are; the next can.
            OSError: nothing more can be written.
        """
        raise NotImplementedError

    def close(self) -> None:
        """The block is complete."""

    @classmethod
    def prune(cls, folder: Folder, count: int) -> None:
        """The list has so many blocks: shards of others go."""

    @classmethod
    def finish(cls, folder: Folder, given: str) -> None:
        """Write what stands once for all blocks that are complete. `given` is --out as it was given."""


class _Tree(Writer):
    """A file for each utterance, in folders as its id has them."""

    suffix = ""

    def __init__(self, folder: Folder, index: int, about: dict[str, Any]) -> None:
        super().__init__(folder, index, about)
        self.entered: set[Path] = set()

    def write(self, record: Record, output: Output) -> None:
        name = path_of(record["id"]) + self.suffix
        target = self.folder.root / name
        content = io.BytesIO()
        self.save(content, record, output)
        try:
            if target.parent not in self.entered:
                self._enter(Path(name))
                self.entered.add(target.parent)
            write_atomically(target, lambda file: file.write(content.getbuffer()), durable=False)
        except OSError as error:
            if error.errno in _OF_THE_NAME and self.folder.root.is_dir():
                raise UserError(f"{target} cannot be a file: {error.strerror}") from None
            raise
        record.update(file=name, bytes=content.getbuffer().nbytes)

    def _enter(self, name: Path) -> None:
        """Make the folders of a file below the root, and remove what a killed run left in the last."""
        for parent in reversed(name.parents[:-1]):  # the root is not made again: it may be a lost disk's
            with contextlib.suppress(FileExistsError):
                self.folder.root.joinpath(parent).mkdir()
        remove_unfinished(self.folder.root / name.parent)

    def save(self, file: Any, record: Record, output: Output) -> None:
        """Write the content of a file."""
        raise NotImplementedError


class Npy(_Tree):
    """One array a file, `np.load` reads it."""

    suffix = ".npy"

    def save(self, file: Any, record: Record, output: Output) -> None:
        np.save(file, as_array(output))


class Npz(_Tree):
    """The array with what it is of, `np.load` reads it."""

    suffix = ".npz"

    def save(self, file: Any, record: Record, output: Output) -> None:
        name = {"hidden": "hidden_states"}.get(self.about["what"], self.about["what"])
        np.savez(file, **{name: as_array(output), "audio": record["audio"], "id": record["id"], **self.about})


def _tensor(output: Output) -> Tensor:
    assert isinstance(output, Tensor)  # `check` refuses text
    return output


class Pt(_Tree):
    """One tensor a file, `torch.load` reads it."""

    suffix = ".pt"

    def save(self, file: Any, record: Record, output: Output) -> None:
        torch.save(_tensor(output).clone(), file)  # a view would take its whole storage along


class Safetensors(_Tree):
    """One tensor a file, "features"."""

    suffix = ".safetensors"

    def save(self, file: Any, record: Record, output: Output) -> None:
        from safetensors.torch import save

        file.write(save({"features": _tensor(output).contiguous()}))


class Txt(_Tree):
    """One line of text a file."""

    suffix = ".txt"

    def save(self, file: Any, record: Record, output: Output) -> None:
        file.write(f"{output}\n".encode())


class Lhotse(Npy):
    """npy files, and `features.jsonl`, which lhotse reads as a manifest of features."""

    @classmethod
    def finish(cls, folder: Folder, given: str) -> None:
        def lines() -> Iterator[str]:
            for record in _good(folder):
                shape = record["shape"]
                yield json.dumps(
                    {
                        "type": "wavlm",
                        "num_frames": shape[0],
                        "num_features": shape[1],
                        "frame_shift": 0.02,
                        "sampling_rate": 16000,
                        "start": record.get("start", 0.0),
                        "duration": record["seconds"],
                        "storage_type": "numpy_files",
                        "storage_path": given,
                        "storage_key": record["file"],
                        "recording_id": record["id"],
                        "channels": record.get("channel", 0),
                    }
                )

        _write_lines(folder.root / "features.jsonl", lines())


class _Shard(Writer):
    """One file for the block, there when it is complete."""

    shards = True
    pattern = ""

    def __init__(self, folder: Folder, index: int, about: dict[str, Any]) -> None:
        super().__init__(folder, index, about)
        self.name = self.pattern.format(index)
        self.records: list[Record] = []

    def close(self) -> None:
        if not self.records:  # all of the block failed; what an earlier list left there goes
            self.folder.root.joinpath(self.name).unlink(missing_ok=True)
            return
        write_atomically(self.folder.root / self.name, self.save)
        size = self.folder.root.joinpath(self.name).stat().st_size
        for record in self.records:
            record.update(file=self.name, bytes=size)

    def save(self, file: Any) -> None:
        """Write the content of the shard."""
        raise NotImplementedError

    @classmethod
    def all_in(cls, folder: Folder) -> list[Path]:
        """The shards that are there, in order."""
        return sorted(folder.root.glob(cls.pattern.replace("{:06d}", "[0-9]" * 6)))

    @classmethod
    def prune(cls, folder: Folder, count: int) -> None:
        kept = {cls.pattern.format(index) for index in range(count)}
        for path in cls.all_in(folder):
            if path.name not in kept:
                path.unlink()


class WebDataset(_Shard):
    """A tar for each block: `KEY.npy` or `KEY.txt`, and `KEY.json`, the record."""

    pattern = "shard-{:06d}.tar"

    def __init__(self, folder: Folder, index: int, about: dict[str, Any]) -> None:
        super().__init__(folder, index, about)
        self.content = io.BytesIO()
        self.tar = tarfile.TarFile(fileobj=self.content, mode="w", format=tarfile.PAX_FORMAT)

    def write(self, record: Record, output: Output) -> None:
        # A reader takes a member's name up to its first dot for the key.
        key = path_of(record["id"]).replace(".", "%2E")
        payload = io.BytesIO()
        if isinstance(output, str):
            payload.write(output.encode())
        else:
            np.save(payload, as_array(output))
        self._add(f"{key}.{'txt' if isinstance(output, str) else 'npy'}", payload.getvalue())
        self._add(f"{key}.json", json.dumps(record).encode())
        record["key"] = key
        self.records.append(record)

    def _add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self.tar.addfile(member, io.BytesIO(content))

    def save(self, file: Any) -> None:
        self.tar.close()
        file.write(self.content.getbuffer())


class Kaldi(_Shard):
    """An ark for each block, and `feats.scp` over all of them."""

    pattern = "feats.{:06d}.ark"

    def __init__(self, folder: Folder, index: int, about: dict[str, Any]) -> None:
        super().__init__(folder, index, about)
        self.content = io.BytesIO()

    def write(self, record: Record, output: Output) -> None:
        from kaldiio.matio import write_array

        if not record["id"] or any(c.isspace() for c in record["id"]):
            raise UserError(f"kaldi wants ids without blanks, got {record['id']!r}")
        self.content.write(record["id"].encode("utf-8", "surrogateescape") + b" ")
        record["offset"] = self.content.tell()
        write_array(self.content, np.asarray(as_array(output)).astype(np.float32, copy=False))
        self.records.append(record)

    def save(self, file: Any) -> None:
        file.write(self.content.getbuffer())

    @classmethod
    def finish(cls, folder: Folder, given: str) -> None:
        lines = (f"{r['id']} {os.path.join(given, r['file'])}:{r['offset']}" for r in _good(folder))
        _write_lines(folder.root / "feats.scp", lines)


class Parquet(_Shard):
    """A part for each block, and one file of them all: columns id, seconds, and the vector or text."""

    pattern = "part-{:06d}.parquet"

    def __init__(self, folder: Folder, index: int, about: dict[str, Any]) -> None:
        super().__init__(folder, index, about)
        self.outputs: list[Output] = []

    def write(self, record: Record, output: Output) -> None:
        if isinstance(output, Tensor) and output.dim() != 1:
            raise UserError(f"parquet holds vectors and text, got features of shape {list(output.shape)}")
        self.records.append(record)
        self.outputs.append(output)

    def save(self, file: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if isinstance(self.outputs[0], str):
            values = pa.array(self.outputs)
        else:
            rows = np.stack([as_array(o) for o in self.outputs])
            values = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
        ids = pa.array([r["id"].encode("utf-8", "backslashreplace").decode() for r in self.records])
        seconds = pa.array([r["seconds"] for r in self.records])
        pq.write_table(pa.table({"id": ids, "seconds": seconds, self.about["what"]: values}), file)

    @classmethod
    def finish(cls, folder: Folder, given: str) -> None:
        import pyarrow.parquet as pq

        parts = cls.all_in(folder)

        def save(file: Any) -> None:
            with pq.ParquetWriter(file, pq.read_schema(parts[0])) as writer:
                for part in parts:
                    writer.write_table(pq.read_table(part))

        if parts:
            write_atomically(Path(given), save)


def path_of(identity: str) -> str:
    """The id as a relative path that stays below its folder; of ids that differ the paths do too."""
    parts = identity.replace("%", "%25").replace("\0", "%00").split("/")
    return "/".join(_UNSAFE.get(part, part) for part in parts)


def _good(folder: Folder) -> Iterator[Record]:
    return (record for record in folder.records() if "error" not in record)


def _write_lines(path: Path, lines: Iterator[str]) -> None:
    def save(file: Any) -> None:
        for line in lines:
            file.write((line + "\n").encode("utf-8", "surrogateescape"))

    write_atomically(path, save)


FORMATS: dict[str, type[Writer]] = {
    "npy": Npy,
    "npz": Npz,
    "pt": Pt,
    "safetensors": Safetensors,
    "kaldi": Kaldi,
    "parquet": Parquet,
    "webdataset": WebDataset,
    "lhotse": Lhotse,
    "txt": Txt,
}
_PACKAGES = {"kaldi": "kaldiio", "parquet": "pyarrow", "safetensors": "safetensors"}
_TEXT = ("txt", "parquet", "webdataset")
WITHOUT_BFLOAT16 = ("npy", "npz", "kaldi", "parquet", "webdataset", "lhotse")


def check(kind: str, what: str, dims: int, dtype: torch.dtype) -> None:
    """Check that a format can hold what is asked for.

    Args:
        kind: of FORMATS.
        what: as `Wanted` has it.
        dims: dimensions of the features of an utterance.
        dtype: of the features.

    Raises:
        UserError: it cannot, or the package that writes it is missing.
    """
    package = _PACKAGES.get(kind)
    if package is not None:
        try:
            __import__(package)
        except ImportError:
            raise UserError(
                f"the format {kind} needs the package {package}, which is not installed: "
                "pip install 'wavlm-fast[extract]'"
            ) from None
    if (what == "text") != (kind == "txt") and not (what == "text" and kind in _TEXT):
        wanted = ", ".join(_TEXT) if what == "text" else ", ".join(k for k in FORMATS if k != "txt")
        raise UserError(f"{what} can be written as {wanted}, got {kind}")
    if what == "text":
        return
    if kind == "parquet" and dims != 1:
        raise UserError("parquet holds one vector or text for each utterance: --average frames makes vectors of states")
    if dims > 2 and kind in ("kaldi", "lhotse"):
        raise UserError(f"{kind} holds features of one layer, got several: --layer N or --average layers")
    if dims != 2 and kind == "lhotse":
        raise UserError("lhotse holds features of frames, got one vector for each utterance")
    if dtype == torch.float16 and kind == "kaldi":
        raise UserError("kaldi holds float32, got --dtype-out float16")
    if dtype == torch.bfloat16 and kind in WITHOUT_BFLOAT16:
        raise UserError(f"{kind} has no bfloat16: --dtype-out float32 or float16")
