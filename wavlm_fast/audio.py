"""Audio files to 16 kHz mono waveforms, for the command line and for whoever wants the same."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .containers import wrong_end
from .errors import UserError
from .inputs import SAMPLE_RATE

RATE = SAMPLE_RATE
RECEPTIVE_FIELD = 400  # samples that make the first frame, with the conv stack of every published WavLM
_SHIFT = 1600  # samples by which the utterances of a batch are shifted against each other, so that none are alike
_UNKNOWN = 1 << 62  # frames from which on libsndfile means that a file does not say
_MP3_FRAME = 1152  # samples; encoders disagree whether the frame that holds the count is counted
_TOO_LONG = 0.01  # seconds by which a range may exceed its file: lists round durations
# Where libsndfile seeks to the very sample that decoding from the beginning comes to. In others it is off (Opus, MP3),
# fails, or writes where it must not.
_SEEKABLE = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC"}
_SEEKABLE_CODINGS = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}
# Vorbis it misses in the last page, which holds at most 255 packets of 4096 samples: it is sent to well before.
_VORBIS_END = 2 * 255 * 4096
_BLOCK_SECONDS = 30  # read, mixed down and resampled at a time: long files never exist at their own rate in memory


class AudioError(UserError):
    """An audio file that cannot be used. The message is one sentence naming the file."""


@dataclass(frozen=True)
class AudioInfo:
    """Where a waveform came from."""

    path: str
    format: str  # container and coding as soundfile names them, such as "FLAC PCM_16"
    rate: int  # Hz, of the file
    channels: int  # of the file
    frames: int  # per channel, of the file as decoded, or of the range of it that was wanted
    samples: int  # of the waveform, at 16 kHz
    incomplete: str | None = None  # why it is not all that the file announces, where that was allowed

    @property
    def seconds(self) -> float:
        """Duration of the waveform."""
        return self.samples / RATE

    def __str__(self) -> str:
        channels = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        about = f"{self.path}: {self.seconds:.2f} s, {self.format}, {self.rate} Hz, {channels}"
        return about if self.incomplete is None else f"{about}; taken as far as it goes: {self.incomplete}"


def clip() -> Path:
    """The clip of real speech that comes with the package: 7.1 s, 16 kHz, mono."""
    return Path(__file__).parent / "data" / "speech.flac"


def load(
    path: str | Path,
    start: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
    *,
    at_least: int = RECEPTIVE_FIELD,
    allow_truncated: bool = False,
) -> tuple[torch.Tensor, AudioInfo]:
    """Read an audio file (wav, flac, ogg, mp3 and whatever else libsndfile knows).

    Channels are averaged, or one of them is taken; any other rate than 16 kHz is resampled by soxr at its HQ setting.
    Values are not rescaled: full scale is +-1.

    A file that ends before its header says so, or cannot be decoded to its end, is refused unless that is allowed. What
    announces no length (a wav or flac that was written into a pipe, an mp3 without a count) ends where it ends. What
    follows the announced length is not heard; where that is another recording, the file is refused too.

    Of a range, start and duration become samples at the file's own rate, each by itself and to the nearest (a half goes
    up), so that ranges of one duration are of one length. It holds exactly these samples of the file, resampled by
    themselves. Nothing before it is decoded, except of formats in which seeking is not exact: Opus, MP3 and ADPCM come
    from the beginning. What exceeds the end by no more than 10 ms (in MP3, a frame more) ends there.

    Args:
        path: the file.
        start: seconds from which on it is read.
        duration: seconds that are read; None: to the end.
        channel: the one that is taken, counted from 0; None: the mean of all.
        at_least: samples at 16 kHz that are wanted, normally the model's receptive field.
        allow_truncated: take such a file as far as it goes; `info.incomplete` says why that is not all.

    Returns:
        waveform: [S] float32 at 16 kHz.
        info: where it came from.

    Raises:
        AudioError: the path is missing or a directory; the file is empty, is no audio that can be decoded, is cut,
            holds NaN or infinite samples, or is too short; it has no such range or channel.
    """
    path = Path(path)
    wanted = _Wanted(start, duration, channel)
    if not (0 <= start < math.inf and (duration is None or 0 < duration < math.inf)):
        raise AudioError(f"a range that begins at 0 s or later and lasts is wanted of {path}, got {wanted}")
    _check_path(path)
    waveform, info = _read(path, wanted)
    if info.incomplete and not allow_truncated:
        raise AudioError(_cut(path, info.incomplete))
    if info.frames == 0:
        raise AudioError(_no_samples(path, "" if wanted.whole else f" in {wanted}"))
    if len(waveform) < at_least:
        raise AudioError(
            f"{path}{'' if wanted.whole else f', {wanted},'} is too short: at least {at_least} samples at {RATE} Hz "
            f"are needed ({1000 * at_least / RATE:g} ms, the model's receptive field), and it gives {len(waveform)}"
        )
    return torch.from_numpy(waveform), info


def duration_of(path: str | Path) -> float | None:
    """Seconds of audio by the file's header alone; None where it does not say.

    Raises:
        AudioError: the path is missing or a directory; the file is empty, or is no audio that can be decoded.
    """
    path = Path(path)
    _check_path(path)
    with _opened(path) as file:
        return file.frames / file.samplerate if file.frames < _UNKNOWN else None


def probe(path: str | Path, start: float = 0.0, duration: float | None = None) -> int | None:
    """About how many samples at 16 kHz `load` would give, by the file's header alone; None where it does not say.

    Raises:
        AudioError: as `duration_of`.
    """
    seconds = duration_of(path)
    if seconds is not None:
        duration = max(0.0, min(seconds - start, math.inf if duration is None else duration))
    return None if duration is None else _samples(duration, RATE)


def check(path: str | Path, *, allow_truncated: bool = False) -> None:
    """Open an audio file without decoding it, to refuse early what `load` would refuse for its header.

    Raises:
        AudioError: as `load`.
    """
    path = Path(path)
    _check_path(path)
    with _opened(path) as file:
        if file.frames == 0:
            raise AudioError(_no_samples(path))
    incomplete = None if allow_truncated else _wrong_end(path)
    if incomplete:
        raise AudioError(_cut(path, incomplete))


def fit(waveform: torch.Tensor, samples: int) -> torch.Tensor:
    """[S] -> [samples]: repeated as often as it takes, then cut."""
    times = -(-samples // len(waveform))
    return waveform.repeat(times)[:samples]


def utterances(
    batch: int, samples: int, path: str | Path | None = None, *, allow_truncated: bool = False
) -> torch.Tensor:
    """[B, S] of real speech: a file, or the clip, shifted from one to the next, repeated to the length."""
    speech, _ = load(path or clip(), allow_truncated=allow_truncated)
    return torch.stack([fit(speech.roll(-_SHIFT * index), samples) for index in range(batch)])


def _check_path(path: Path) -> None:
    try:
        if path.is_dir():
            raise AudioError(f"an audio file is wanted, but {path} is a directory")
        if not path.exists():
            raise AudioError(f"an audio file is wanted, but {path} does not exist")
        if path.stat().st_size == 0:
            raise AudioError(f"an audio file is wanted, but {path} is empty (0 bytes)")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"an audio file is wanted, but {path} cannot be opened: {reason}") from error


def _wrong_end(path: Path) -> str | None:
    try:
        about = path.stat()
        return _wrong_end_of(path, about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise AudioError(f"an audio file is wanted, but {path} cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=1024)  # of a long file many ranges are read
def _wrong_end_of(path: Path, size: int, changed: int) -> str | None:
    return wrong_end(path)


def _cut(path: Path, incomplete: str) -> str:
    return f"{path} is cut or damaged: {incomplete} (allow_truncated, or --allow-truncated, takes it as far as it goes)"


def _no_samples(path: Path, where: str = "") -> str:
    return f"an audio file with samples is wanted, but {path} holds none{where}"


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, its libsndfile is not
        raise AudioError(
            f"reading audio files needs the soundfile package, which cannot be imported: {error}"
        ) from error
    return soundfile


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file in soundfile; what goes wrong while opening or reading it becomes one sentence."""
    soundfile = _soundfile()

    class Forward(soundfile.SoundFile):  # type: ignore[misc, name-defined]
        """After each read soundfile seeks to where it is, which fails in streams of unknown length."""

        def seekable(self) -> bool:
            return False

    try:
        # Names as bytes: soundfile would encode a str strictly, and a name may be no UTF-8.
        with Forward(os.fsencode(path) if os.name == "posix" else str(path)) as file:
            yield file
    # TypeError: soundfile takes a name ending in .raw for headerless samples and asks for their rate.
    except (soundfile.SoundFileError, TypeError) as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".") or "no reason is given"
        raise AudioError(f"{path} cannot be read as audio (wanted wav, flac, ogg or mp3): {reason}") from error


@dataclass(frozen=True)
class _Wanted:
    """What `load` was asked for."""

    start: float
    duration: float | None
    channel: int | None

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.duration is None

    def __str__(self) -> str:
        return f"{'all' if self.duration is None else f'{self.duration:.10g} s'} from {self.start:.10g} s on"

    def within(self, path: Path, file: Any) -> tuple[int, int | None]:
        """The first of the file's samples and how many; None: as many as come. Refuses what its header rules out."""
        if self.channel is not None and not 0 <= self.channel < file.channels:
            raise AudioError(f"channel {self.channel} is wanted of {path}, whose channels are 0 to {file.channels - 1}")
        first = _samples(self.start, file.samplerate)
        count = None if self.duration is None else _samples(self.duration, file.samplerate)
        if self.whole or file.frames >= _UNKNOWN:
            return first, count
        self.check_end(path, file, first, count, file.frames, _wrong_end(path))
        left = file.frames - first
        # Of mp3 more may come than is announced.
        return first, count if count is None or file.format == "MP3" else min(count, left)

    def check_end(
        self, path: Path, file: Any, first: int, count: int | None, end: int, incomplete: str | None = None
    ) -> None:
        """Refuse a range that exceeds the file, which ends at a sample, by more than lists and headers round.

        Where the file is incomplete, that it exceeds the end is no fault of the range's.
        """
        allowed = _samples(_TOO_LONG, file.samplerate) + _unsure(file)
        if first >= end or ((count or 0) > end - first + allowed and not incomplete):
            why = f"; it is cut or damaged: {incomplete}" if incomplete else ""
            raise AudioError(f"{path} ends at {end / file.samplerate:.3f} s, and {self} is wanted{why}")


def _samples(seconds: float, rate: int) -> int:
    return math.floor(round(seconds * rate, 6) + 0.5)  # 6: a half that arithmetic misses is a half


def _unsure(file: Any) -> int:
    return _MP3_FRAME if file.format == "MP3" else 0


def _read(path: Path, wanted: _Wanted, *, seek: bool = True) -> tuple[np.ndarray, AudioInfo]:
    frames, failed = 0, None
    pieces = []
    with _opened(path) as file:
        first, count = wanted.within(path, file)
        at = 0
        if seek and first and (target := _seekable_to(file, first)) and _wrong_end(path) is None:
            try:
                at = file.seek(target)
            except _soundfile().SoundFileError:
                return _read(path, wanted, seek=False)
        resampler = _resampler(file.samplerate)
        try:
            at += sum(len(block) for block in _blocks(file, first - at))
            for block in _mono_blocks(file, wanted.channel, count) if at == first else ():
                _check_finite(path, block, first + frames, file.samplerate)
                frames += len(block)
                pieces.append(resampler(block, False))
        except _soundfile().SoundFileError as error:
            failed = error
        if failed and wanted.whole and not frames:
            raise failed
        pieces.append(resampler(np.zeros(0, np.float32), True))
        waveform = np.concatenate(pieces)
        coding = f"{file.format} {file.subtype}"
        incomplete = _wrong_end(path) or _missing(file, first, count, frames, failed is not None)
        if not wanted.whole and not incomplete and count != 0:
            wanted.check_end(path, file, first, count, at + frames)
        info = AudioInfo(str(path), coding, file.samplerate, file.channels, frames, len(waveform), incomplete)
        return waveform, info


def _seekable_to(file: Any, first: int) -> int:
    """The sample to go to on the way to the first that is wanted."""
    if file.frames >= _UNKNOWN:
        return 0
    if (file.format, file.subtype) == ("OGG", "VORBIS"):
        return max(0, min(first, file.frames - _VORBIS_END))
    return first if file.format in _SEEKABLE and file.subtype in _SEEKABLE_CODINGS else 0


def _missing(file: Any, first: int, count: int | None, frames: int, failed: bool) -> str | None:
    """What was not decoded of a file that announces its samples, or in which decoding failed."""
    known = file.frames < _UNKNOWN
    due = file.frames - first if known else 0
    due = due if count is None else min(due, count)
    if frames >= due - _unsure(file) and not failed:
        return None
    announced = f"its header announces {file.frames} samples, and " if known else ""
    part = f"of those from {first / file.samplerate:.3f} s on " if first else ""
    return f"{announced}{part}{frames} samples ({frames / file.samplerate:.3f} s) can be decoded"


def _mono_blocks(file: Any, channel: int | None = None, count: int | None = None) -> Iterator[np.ndarray]:
    """[S] float32 blocks of at most `count` samples in all, of one channel or averaged."""
    for block in _blocks(file, count):
        yield block[:, channel or 0] if channel is not None or block.shape[1] == 1 else block.mean(axis=1)


def _blocks(file: Any, count: int | None = None) -> Iterator[np.ndarray]:
    """[S, channels] float32 blocks. Where decoding fails, what was decoded before comes first."""
    size = max(1, _BLOCK_SECONDS * file.samplerate // max(1, file.channels))
    while count is None or count > 0:
        block = np.full((size if count is None else min(size, count), file.channels), np.nan, np.float32)
        try:
            failed, block = None, file.read(out=block)
        except _soundfile().SoundFileError as error:
            failed, block = error, block[: int(np.isfinite(block).all(axis=1).cumprod().sum())]
        if len(block):
            yield block
        if failed:
            raise failed
        if len(block) == 0:
            return
        count = None if count is None else count - len(block)


def _check_finite(path: Path, block: np.ndarray, start: int, rate: int) -> None:
    bad = ~np.isfinite(block)
    if bad.any():
        at = start + int(bad.argmax())
        raise AudioError(
            f"finite samples are wanted, but {path} holds NaN or infinity, first at sample {at} ({at / rate:.3f} s)"
        )


def _resampler(rate: int) -> Any:
    """A function from (block, last) to the block at 16 kHz; keeps what it needs of earlier blocks."""
    if rate == RATE:
        return lambda block, last: np.ascontiguousarray(block)
    try:
        import soxr
    except ImportError as error:
        raise AudioError(
            f"audio at {rate} Hz needs the soxr package to become {RATE} Hz, which cannot be imported: {error}"
        ) from error
    stream = soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
    return lambda block, last: stream.resample_chunk(np.ascontiguousarray(block), last=last)
