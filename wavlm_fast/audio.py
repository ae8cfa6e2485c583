"""Audio files to 16 kHz mono waveforms, for the command line and for whoever wants the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import UserError
from .inputs import SAMPLE_RATE as RATE

RECEPTIVE_FIELD = 400  # samples that make the first frame, with the conv stack of every published WavLM
_SHIFT = 1600  # samples by which the utterances of a batch are shifted against each other, so that none are alike
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

    @property
    def seconds(self) -> float:
        """Duration of the waveform."""
        return self.samples / RATE

    def __str__(self) -> str:
        channels = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        return f"{self.path}: {self.seconds:.2f} s, {self.format}, {self.rate} Hz, {channels}"


def clip() -> Path:
    """The clip of real speech that comes with the package: 7.1 s, 16 kHz, mono."""
    return Path(__file__).parent / "data" / "speech.flac"


def load(path: str | Path, *, at_least: int = RECEPTIVE_FIELD) -> tuple[torch.Tensor, AudioInfo]:
    """Read an audio file (wav, flac, ogg, mp3 and whatever else libsndfile knows).

    Channels are averaged; any other rate than 16 kHz is resampled by soxr at its HQ setting. Values are not rescaled:
    full scale is +-1.

    Args:
        path: the file.
        at_least: samples at 16 kHz that are wanted, normally the model's receptive field.

    Returns:
        waveform: [S] float32 at 16 kHz.
        info: where it came from.

    Raises:
        AudioError: the path is missing or a directory; the file is empty, is no audio that can be decoded, holds NaN or
            infinite samples, or is too short.
    """
    path = Path(path)
    _check_path(path)
    waveform, info = _read(path)
    if info.frames == 0:
        raise AudioError(_no_samples(path))
    if len(waveform) < at_least:
        raise AudioError(
            f"{path} is too short: at least {at_least} samples at {RATE} Hz are needed "
            f"({1000 * at_least / RATE:g} ms, the model's receptive field), and it gives {len(waveform)}"
        )
    return torch.from_numpy(waveform), info


def check(path: str | Path) -> None:
    """Open an audio file without decoding it, to refuse early what `load` would refuse for its header.

    Raises:
        AudioError: as `load`.
    """
    path = Path(path)
    _check_path(path)
    with _opened(path) as file:
        if file.frames == 0:
            raise AudioError(_no_samples(path))


def fit(waveform: torch.Tensor, samples: int) -> torch.Tensor:
    """[S] -> [samples]: repeated as often as it takes, then cut."""
    times = -(-samples // len(waveform))
    return waveform.repeat(times)[:samples]


def utterances(batch: int, samples: int, path: str | Path | None = None) -> torch.Tensor:
    """[B, S] of real speech: a file, or the clip, shifted from one to the next, repeated to the length."""
    speech, _ = load(path or clip())
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
    try:
        with soundfile.SoundFile(path) as file:
            yield file
    # TypeError: soundfile takes a name ending in .raw for headerless samples and asks for their rate.
    except (soundfile.SoundFileError, TypeError) as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise AudioError(f"{path} cannot be read as audio (wanted wav, flac, ogg or mp3): {reason}") from error


def _read(path: Path) -> tuple[np.ndarray, AudioInfo]:
    frames = 0
    pieces = []
    with _opened(path) as file:
        resampler = _resampler(file.samplerate)
        for block in _mono_blocks(file):
            _check_finite(path, block, frames, file.samplerate)
            frames += len(block)
            pieces.append(resampler(block, False))
        pieces.append(resampler(np.zeros(0, np.float32), True))
        waveform = np.concatenate(pieces)
        coding = f"{file.format} {file.subtype}"
        return waveform, AudioInfo(str(path), coding, file.samplerate, file.channels, frames, len(waveform))


def _mono_blocks(file: Any) -> Iterator[np.ndarray]:
    """[S] float32 blocks, channels averaged."""
    size = max(1, _BLOCK_SECONDS * file.samplerate // max(1, file.channels))
    while True:
        block = file.read(size, dtype="float32", always_2d=True)  # [S, channels]
        if len(block) == 0:
            return
        yield block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)


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
