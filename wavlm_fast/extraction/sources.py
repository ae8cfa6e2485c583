"""What is to be extracted: folders, globs, files, lists and manifests, as utterances, one after the other.

An input is, in this order:

- `-`: a list on standard input, a path a line, or ended by NUL characters where there are any.
- a folder: Kaldi's where it holds a wav.scp, else every audio file below it, by ending.
- a file, by its name: Kaldi's wav.scp (any .scp), with the `segments` that are beside it or that are the next input;
  Kaldi's `segments`, with the wav.scp beside it; .jsonl or .json, of NeMo or lhotse, and .gz of these; .csv, .tsv and
  .parquet with a column of paths; anything else is audio.
- a pattern such as `corpus/**/*.wav`: the audio files that match.

Ids come from the manifest. Otherwise:

- below a folder, or the folder before the first wildcard of a pattern: the path from there, without its ending.
- in a list or manifest: the path below the manifest's folder (the working directory for standard input), else as it is
  written, without root, leading `..` and ending. Where a line says where it starts, -START-END follow, in milliseconds.
- files given one by one: the name without its ending; of those that share it, as many folders before it as it takes to
  tell all of them apart.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, TextIO

from ..errors import UserError
from . import kaldi, manifests, trees
from .utterance import ENDINGS, Placed, Utterance, text, utterance, without_ending

__all__ = ["Utterance", "utterances"]

_LIST = "standard input"
_PIECE = 1 << 20  # bytes of a list that are read at a time
_IN_MEMORY = 1 << 24  # bytes of a list, beyond which it is put by in a temporary file
_MANIFESTS: dict[str, Callable[[str], Iterator[Placed]]] = {
    ".jsonl": manifests.json_lines,
    ".json": manifests.json_lines,
    ".jsonl.gz": manifests.json_lines,
    ".json.gz": manifests.json_lines,
    ".csv": manifests.separated,
    ".tsv": manifests.separated,
    ".parquet": manifests.parquet,
}


def utterances(
    inputs: Sequence[str], *, stdin: TextIO | None = None, leave_out: Path | None = None
) -> Iterator[Utterance]:
    """Every utterance of the inputs, in their order, sorted within folders and patterns; read as they are asked for.

    Audio is not opened: whether a file exists and can be decoded shows when it is loaded.

    Args:
        inputs: what the module's docstring says.
        stdin: where `-` is read.
        leave_out: a folder that is not read where it lies below an input, such as the one that is written to.

    Raises:
        UserError: an input does not exist or holds no audio, a manifest cannot be read, a line of it names no
            utterance, or two utterances have one id. The message is one sentence naming file and line.
    """
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as listed:
        if "-" in inputs:
            _put_by(stdin, listed)
        seen: set[int] = set()
        for count, (place, one) in enumerate(_placed(inputs, listed, leave_out)):
            key = hash(one.id)  # a million ids would be hundreds of megabytes
            if key in seen:
                _refuse_repeated(islice(_placed(inputs, listed, leave_out), count), place, one.id)
            seen.add(key)
            yield one


def _refuse_repeated(before: Iterator[Placed], place: str, id: str) -> None:
    """Look from the beginning for who had the id first; nobody, where only the hashes are equal."""
    for first, one in before:
        if one.id == id:
            raise UserError(f"ids must differ, but {id} is that of {first} and of {place}")


def _placed(inputs: Sequence[str], listed: IO[bytes], leave_out: Path | None) -> Iterator[Placed]:
    alone = _ids_of_files([each for each in inputs if _is_audio(each)])
    waiting = deque(inputs)
    while waiting:
        each = waiting.popleft()
        if each == "-":
            yield from _list(listed)
        elif os.path.isdir(each):
            scp = os.path.join(each, "wav.scp")
            found = ((each, path) for path in trees.tree(each, leave_out))
            yield from _kaldi(scp, None) if os.path.isfile(scp) else _below(f"the folder {each}", found)
        elif each.endswith(".scp"):
            yield from _kaldi(each, waiting.popleft() if waiting and kaldi.is_segments(waiting[0]) else None)
        elif kaldi.is_segments(each):
            yield from kaldi.segments(each, os.path.join(os.path.dirname(each), "wav.scp"))
        elif reader := _reader(each):
            yield from reader(each)
        elif each in alone:
            yield each, Utterance(alone[each], each)
        elif trees.is_glob(each):
            yield from _below(f"the pattern {each}", trees.glob(each, leave_out))
        else:
            raise UserError(f"audio, a folder of it or a list is wanted, but {each} does not exist")


def _is_audio(path: str) -> bool:
    listing = path == "-" or path.endswith(".scp") or kaldi.is_segments(path) or _reader(path)
    return not listing and os.path.exists(path) and not os.path.isdir(path)


def _reader(path: str) -> Callable[[str], Iterator[Placed]] | None:
    return next((read for ending, read in _MANIFESTS.items() if path.lower().endswith(ending)), None)


def _ids_of_files(paths: Sequence[str]) -> dict[str, str]:
    named: dict[str, dict[str, list[str]]] = defaultdict(dict)  # name without ending -> path -> its parts
    for path in paths:
        parts = without_ending(os.path.abspath(path)).split(os.sep)
        named[parts[-1]][path] = parts
    ids: dict[str, str] = {}
    for group in named.values():
        longest = max(map(len, group.values()))
        for count in range(1, longest + 1):
            ends = {path: "/".join(parts[-count:]) for path, parts in group.items()}
            if len(set(ends.values())) == len(ends):
                break
        ids.update((path, end.lstrip("/")) for path, end in ends.items())
    return ids


def _below(where: str, found: Iterator[tuple[str, str]]) -> Iterator[Placed]:
    """Of folders and the paths below them; at least one."""
    path = None
    for folder, path in found:
        place = os.path.join(folder, path)
        yield place, Utterance(without_ending(path.replace(os.sep, "/")), place)
    if path is None:
        raise UserError(f"audio files are wanted ({' '.join(sorted(ENDINGS))}), but {where} holds none")


def _kaldi(scp: str, segments: str | None) -> Iterator[Placed]:
    beside = os.path.join(os.path.dirname(scp), "segments")
    segments = segments or (beside if os.path.isfile(beside) else None)
    return kaldi.segments(segments, scp) if segments else kaldi.recordings(scp)


def _put_by(stdin: TextIO | None, listed: IO[bytes]) -> None:
    """The list as bytes: a path need not be text."""
    stdin = stdin or sys.stdin
    if hasattr(stdin, "buffer"):
        shutil.copyfileobj(stdin.buffer, listed)
        return
    for piece in iter(partial(stdin.read, _PIECE), ""):
        listed.write(piece.encode("utf-8", "surrogateescape"))


def _list(listed: IO[bytes]) -> Iterator[Placed]:
    separator = b"\0" if any(b"\0" in piece for piece in _pieces(listed)) else b"\n"
    for number, path in enumerate(_split(_pieces(listed), separator), 1):
        path = path if separator == b"\0" else path.rstrip(b"\r")
        if path:
            yield utterance(f"{_LIST}:{number}", "", text(path))


def _split(pieces: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    rest = b""
    for piece in chain(pieces, [separator]):
        *whole, rest = (rest + piece).split(separator)
        yield from whole


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Wherever others have read to meanwhile."""
    at = 0
    while file.seek(at) == at and (piece := file.read(_PIECE)):
        at += len(piece)
        yield piece
