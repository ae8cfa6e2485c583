"""Whether an audio file ends where its container says: what libsndfile knows and does not tell.

libsndfile takes a file that was cut for a shorter one, and of two streams joined into one file reads the first.
What is looked at, by container:

- wav (RIFF, RIFX, RF64, BW64), w64, aiff, au, caf: the length of the audio that the header announces. None is announced
  where a program that could not go back wrote the largest numbers there are: ffmpeg, sox and others into a pipe.
- ogg (Vorbis, Opus, FLAC): its pages. The last one is marked as such, and a first one comes once.
- mp3: another recording after the end that its Xing or Info header tells. Its frames are counted as they are decoded.
- flac: another recording after the first. Its samples are counted as they are decoded.

A header may announce less than the file holds: other things may follow the audio.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_NEARLY = 4200  # bytes by which programs stay below the largest number, for what else their header counts
_LARGEST_MP3_FRAME = 2881  # bytes
_PIECE = 1 << 20  # bytes
_FLAC = b"fLaC\x00\x00\x00\x22"  # and the head of the block that always comes first


@dataclass(frozen=True)
class _Chunks:
    """How a container lays out its chunks: name, length, content."""

    header: int  # bytes before the first
    length: str  # as struct writes it
    name: int = 4  # bytes
    align: int = 2  # of the next chunk's start, counted from this one's
    inclusive: bool = False  # whether a length counts name and length too


_CHUNKS = {
    b"RIFF": _Chunks(12, "<I"),
    b"RIFX": _Chunks(12, ">I"),
    b"RF64": _Chunks(12, "<I"),
    b"BW64": _Chunks(12, "<I"),
    b"FORM": _Chunks(12, ">I"),
    b"caff": _Chunks(8, ">q", align=1),
    b"riff": _Chunks(40, "<Q", name=16, align=8, inclusive=True),
}
_AU = {b".snd": ">II", b"dns.": "<II"}


def wrong_end(path: Path) -> str | None:
    """Say in half a sentence how a file contradicts its container about where it ends; None where it does not.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = _behind_tags(file)
        file.seek(start)
        head = file.read(12)
        if head[:4] == b"OggS":
            return _of_pages(file, start, size)
        if head[:4] == b"fLaC":
            return _of_flac(file, start)
        if head[:4] in _AU:
            return _of_audio(size, *struct.unpack(_AU[head[:4]], head[4:].ljust(8, b"\0")))
        if head[:4] in _CHUNKS:
            return _of_chunks(file, size, head[:4])
        return _of_mp3(file, start, size)


def _joined(at: int) -> str:
    return f"another recording begins at byte {at}, and is not read"


def _behind_tags(file: BinaryIO) -> int:
    """Where the audio begins: ID3 tags may come first."""
    at = 0
    while (head := _read(file, at, 10))[:3] == b"ID3" and len(head) == 10:
        a, b, c, d = head[6:]  # seven bits each
        at += 10 + (a << 21 | b << 14 | c << 7 | d)
    return at


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _of_audio(size: int, start: int, length: int, wide: bool = False) -> str | None:
    """Of audio that begins at `start` and whose length is announced, in 32 bits or in 64 (`wide`)."""
    unknown = length < 0 or length >= 1 << 62 if wide else length >= 2**32 - _NEARLY or abs(length - 2**31) <= _NEARLY
    if unknown:
        return None
    if length > size - start:  # a pad byte after an odd length is not counted, and may be missing
        return f"its header announces {length} bytes of audio, and {max(0, size - start)} are there"
    return None


def _of_chunks(file: BinaryIO, size: int, kind: bytes) -> str | None:
    layout = _CHUNKS[kind]
    width = layout.name + struct.calcsize(layout.length)
    at, wide, long = layout.header, struct.calcsize(layout.length) == 8, None
    while len(head := _read(file, at, width)) == width:
        name, (length,) = head[:4], struct.unpack(layout.length, head[layout.name :])
        content = length - width if layout.inclusive else length
        if name == b"ds64":  # lengths that need 64 bits: of the file, and of its audio
            long = struct.unpack("<QQ", file.read(16).ljust(16, b"\0"))[1]
        if name in (b"data", b"SSND"):
            if length == 0xFFFFFFFF and long is not None:
                content, wide = long, True
            return _of_audio(size, at + width, content, wide)
        if content < 0:
            return None
        at += width + content
        at += -(at - layout.header) % layout.align
    return None


def _of_pages(file: BinaryIO, at: int, size: int) -> str | None:
    begun = last = False
    while (head := _read(file, at, 27))[:4] == b"OggS" and len(head) == 27:
        first, last = bool(head[5] & 2), bool(head[5] & 4)
        if first and begun:
            return _joined(at)
        begun = begun or not first
        end = at + 27 + head[26] + sum(file.read(head[26]))
        if end > size:
            return "it ends within a page"
        at = end
    return None if last else f"none of its pages, which end at byte {at}, is marked as the last"


def _of_flac(file: BinaryIO, start: int) -> str | None:
    at, tail = start + 1, b""  # not mapped into memory: where the file is cut meanwhile, that would end the process
    while piece := _read(file, at, _PIECE):
        found = (tail + piece).find(_FLAC)
        if found >= 0:
            return _joined(at - len(tail) + found)
        at += len(piece)
        tail = (tail + piece)[1 - len(_FLAC) :]
    return None


def _of_mp3(file: BinaryIO, start: int, size: int) -> str | None:
    """The first frame may hold, in place of sound, how many bytes the stream has."""
    head = _read(file, start, 64)
    if len(head) < 64 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:  # layer III
        return None
    at = max(head.find(b"Xing"), head.find(b"Info"))
    flags = head[at + 7] if at > 0 else 0
    if not flags & 2:
        return None
    field = at + 8 + 4 * (flags & 1)
    end = start + int.from_bytes(head[field : field + 4], "big")
    # The number may be off by the frame that holds it.
    if end + _LARGEST_MP3_FRAME >= size:
        return None
    other = _read(file, end, 4)
    frame = other[:1] == head[:1] and other[1] & 0xFE == head[1] & 0xFE and other[2] & 0x0C == head[2] & 0x0C
    return _joined(end) if frame or other[:3] == b"ID3" else None
