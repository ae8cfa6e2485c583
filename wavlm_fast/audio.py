"""Audio files to 16 kHz mono waveforms, for the command line and for whoever wants the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .containers import wrong_end
from .errors import UserError
from .inputs import SAMPLE_RATE as RATE

RECEPTIVE_FIELD = 400  # samples that make the first frame, with the conv stack of every published WavLM
_SHIFT = 1600  # samples by which the utterances of a batch are shifted against each other, so that none are alike
_UNKNOWN = 1 << 62  # frames from which on libsndfile means that a file does not say
_MP3_FRAME = 1152  # samples; encoders disagree whether the frame that holds the count is counted
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
    frames: int  # per channel, of the file as decoded
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
    path: str | Path, *, at_least: int = RECEPTIVE_FIELD, allow_truncated: bool = False
) -> tuple[torch.Tensor, AudioInfo]:
    """Read an audio file (wav, flac, ogg, mp3 and whatever else libsndfile knows).

    Channels are averaged; any other rate than 16 kHz is resampled by soxr at its HQ setting. Values are not rescaled:
    full scale is +-1.

    A file that ends before its header says so, or cannot be decoded to its end, is refused unless that is allowed. What
    announces no length (a wav or flac that was written into a pipe, an mp3 without a count) ends where it ends. What
    follows the announced length is not heard; where that is another recording, the file is refused too.

    Args:
        path: the file.
        at_least: samples at 16 kHz that are wanted, normally the model's receptive field.
        allow_truncated: take such a file as far as it goes; `info.incomplete` says why that is not all.

    Returns:
        waveform: [S] float32 at 16 kHz.
        info: where it came from.

    Raises:
        AudioError: the path is missing or a directory; the file is empty, is no audio that can be decoded, is cut,
            holds NaN or infinite samples, or is too short.
    """
    path = Path(path)
    _check_path(path)
    waveform, info = _read(path)
    if info.incomplete and not allow_truncated:
        raise AudioError(_cut(path, info.incomplete))
    if info.frames == 0:
        raise AudioError(_no_samples(path))
    if len(waveform) < at_least:
        raise AudioError(
            f"{path} is too short: at least {at_least} samples at {RATE} Hz are needed "
            f"({1000 * at_least / RATE:g} ms, the model's receptive field), and it gives {len(waveform)}"
        )
    return torch.from_numpy(waveform), info


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
        return wrong_end(path)
    except OSError as error:
        raise AudioError(f"an audio file is wanted, but {path} cannot be read: {error.strerror or error}") from error


def _cut(path: Path, incomplete: str) -> str:
    return f"{path} is cut or damaged: {incomplete} (allow_truncated, or --allow-truncated, takes it as far as it goes)"


def _no_samples(path: Path) -> str:
    return f"an audio file with samples is wanted, but {path} holds none"


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

    class Forward(soundfile.SoundFile):
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


def _read(path: Path) -> tuple[np.ndarray, AudioInfo]:
    frames, failed = 0, None
    pieces = []
    with _opened(path) as file:
        resampler = _resampler(file.samplerate)
        try:
            for block in _mono_blocks(file):
                _check_finite(path, block, frames, file.samplerate)
                frames += len(block)
                pieces.append(resampler(block, False))
        except _soundfile().SoundFileError as error:
            failed = error
        if failed and not frames:
            raise failed
        pieces.append(resampler(np.zeros(0, np.float32), True))
        waveform = np.concatenate(pieces)
        coding = f"{file.format} {file.subtype}"
        incomplete = _wrong_end(path) or _missing(file, frames, failed is not None)
        info = AudioInfo(str(path), coding, file.samplerate, file.channels, frames, len(waveform), incomplete)
        return waveform, info


def _missing(file: Any, frames: int, failed: bool) -> str | None:
    """What was not decoded of a file that announces its samples, or in which decoding failed."""
    known = file.frames < _UNKNOWN
    short = known and frames < file.frames - (_MP3_FRAME if file.format == "MP3" else 0)
    if not short and not failed:
        return None
    announced = f"its header announces {file.frames} samples, and " if known else ""
    return f"{announced}{frames} samples ({frames / file.samplerate:.3f} s) can be decoded"


def _mono_blocks(file: Any) -> Iterator[np.ndarray]:
    """[S] float32 blocks, channels averaged. Where decoding fails, what was decoded before comes first."""
    size = max(1, _BLOCK_SECONDS * file.samplerate // max(1, file.channels))
    while True:
        block = np.full((size, file.channels), np.nan, np.float32)  # [S, channels]
        try:
            failed, block = None, file.read(out=block)
        except _soundfile().SoundFileError as error:
            failed, block = error, block[: int(np.isfinite(block).all(axis=1).cumprod().sum())]
        if len(block):
            yield block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        if failed:
            raise failed
        if len(block) == 0:
            return


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
