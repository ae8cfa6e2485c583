"""Manifests with a record a line or row: NeMo's and lhotse's JSON lines, and tables with a column of paths."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from reprlib import repr as shortened
from typing import Any

from ..errors import UserError
from .utterance import Placed, columns, lines, path_columns, text, unreadable, utterance

_ROWS = 4096  # of a parquet file that are read at a time


def json_lines(path: str) -> Iterator[Placed]:
    """NeMo's manifest (audio_filepath, offset, duration), lhotse's cuts, or any objects with a table's names.

    Raises:
        UserError: the file cannot be read, or a line of it does not name an utterance.
    """
    folder = os.path.dirname(path)
    for place, line in lines(path):
        record = _object(place, text(line).removeprefix("\ufeff"))
        if "recording" in record or "tracks" in record or str(record.get("type")).endswith("Cut"):
            yield _of_cut(place, folder, record)
            continue
        names = columns(record)
        if "path" not in names:
            raise UserError(f"{place}: a field for the path ({path_columns()}) is wanted, got {_named(record)}")
        yield utterance(place, folder, **{ours: record[theirs] for ours, theirs in names.items()})


def separated(path: str) -> Iterator[Placed]:
    """A csv or tsv file with a header. In tsv quotation marks are what they are.

    Raises:
        UserError: the file cannot be read, or a row of it does not name an utterance.
    """
    folder = os.path.dirname(path)
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.lower().endswith(".tsv") else {}
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file, **tabs)
            header = [name.strip().lower() for name in next(rows, [])]
            names = _table_columns(f"{path}:1", header)
            at = {ours: header.index(theirs) for ours, theirs in names.items()}
            for row in rows:
                if row:
                    values = {ours: row[index] if index < len(row) else None for ours, index in at.items()}
                    yield utterance(f"{path}:{rows.line_num}", folder, **values)
    except OSError as error:
        raise unreadable(path, error) from error
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: a row of a table is wanted: {error}") from error


def parquet(path: str) -> Iterator[Placed]:
    """A parquet file; places are rows, counted from 1.

    Raises:
        UserError: pyarrow is missing, the file cannot be read, or a row of it does not name an utterance.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path} needs the pyarrow package to be read, which cannot be imported: {error}") from error
    folder, row = os.path.dirname(path), 0
    try:
        with ParquetFile(path) as file:
            names = _table_columns(path, file.schema_arrow.names)
            for batch in file.iter_batches(_ROWS, columns=list(names.values())):
                for record in batch.to_pylist():
                    row += 1
                    values = {ours: record[theirs] for ours, theirs in names.items()}
                    yield utterance(f"{path}:{row}", folder, **values)
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from error


def _object(place: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: a line of JSON is wanted, got {shortened(line)}: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: a JSON object is wanted, got {shortened(record)}")
    return record


def _of_cut(place: str, folder: str, cut: dict[str, Any]) -> Placed:
    """lhotse's MonoCut of a recording in files, unchanged."""
    kind, recording = cut.get("type", "MonoCut"), cut.get("recording")
    if kind != "MonoCut" or not isinstance(recording, dict):
        got = f"{kind} without a recording" if kind == "MonoCut" else kind
        raise UserError(f"{place}: of lhotse's cuts a MonoCut with its recording is wanted, got {shortened(got)}")
    if recording.get("transforms"):
        changes = shortened(recording["transforms"])
        raise UserError(f"{place}: a recording as its file holds it is wanted, but this one is transformed: {changes}")
    for field in ("id", "start", "duration"):
        if cut.get(field) in (None, ""):
            raise UserError(f"{place}: a cut's field {field} is wanted, got {_named(cut)}")
    source, channel = _source(place, recording.get("sources"), cut.get("channel"))
    return utterance(place, folder, source, id=cut["id"], start=cut["start"], duration=cut["duration"], channel=channel)


def _source(place: str, sources: Any, channel: Any) -> tuple[Any, Any]:
    """The file that holds a channel of a recording, and which of the file's that is."""
    sources = sources if isinstance(sources, list) and all(isinstance(each, dict) for each in sources) else []
    for source in sources:
        channels = source.get("channels")
        numbered = isinstance(channels, list) and channel in channels
        if numbered or (len(sources) == 1 and (channel is None or channels is None)):
            if source.get("type") != "file":
                raise UserError(f"{place}: a recording in a file is wanted, got one of type {source.get('type')!r}")
            return source.get("source"), channels.index(channel) if numbered else channel
    had = shortened([source.get("channels") for source in sources])
    raise UserError(f"{place}: a source with channel {shortened(channel)} is wanted, got sources with channels {had}")


def _table_columns(place: str, header: list[str]) -> dict[str, str]:
    names = columns(header)
    if "path" not in names:
        got = shortened(", ".join(header)) if header else "no header"
        raise UserError(f"{place}: a header with a column for the path ({path_columns()}) is wanted, got {got}")
    return names


def _named(record: dict[str, Any]) -> str:
    return f"the fields {', '.join(map(shortened, record))}" if record else "no fields"
