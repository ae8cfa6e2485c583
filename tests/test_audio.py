"""Audio files become the waveform that they hold, or one clear sentence."""

import importlib.resources
import os
import sys

import numpy as np
import pytest
import soundfile
import soxr
import torch

from wavlm_fast import audio
from wavlm_fast.audio import AudioError

RATE = 16000


def tone(seconds, rate, hertz=1000.0, level=0.5):
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path


def level_and_frequency(waveform, rate=RATE):
    """Amplitude and frequency in Hz of the strongest tone, away from the ends."""
    inner = waveform[len(waveform) // 4 : 3 * len(waveform) // 4].numpy().astype(np.float64)
    window = np.hanning(len(inner))
    spectrum = np.abs(np.fft.rfft(inner * window))
    peak = int(spectrum.argmax())
    return spectrum[peak - 1 : peak + 2].max() * 2 / window.sum(), peak * rate / len(inner)


def test_the_clip_is_short_mono_speech_at_16_khz():
    path = audio.clip()
    assert path.stat().st_size < 200_000
    waveform, info = audio.load(path)
    assert (info.rate, info.channels, info.format) == (RATE, 1, "FLAC PCM_16")
    assert waveform.dtype == torch.float32
    assert waveform.shape == (info.samples,)
    assert 6 <= info.seconds <= 10
    rms = waveform.unfold(0, 1600, 1600).square().mean(1).sqrt()  # of every tenth of a second
    assert rms.max() > 0.05  # somebody speaks
    assert rms.min() < 0.01  # and pauses
    assert waveform.abs().max() < 1


def test_the_clip_states_its_licence_and_ships_with_the_package():
    data = importlib.resources.files("wavlm_fast") / "data"
    assert "public domain" in (data / "README.md").read_text().lower()
    assert (data / "speech.flac").is_file()


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_a_tone_keeps_its_frequency_level_and_duration_at_any_rate(tmp_path, rate):
    waveform, info = audio.load(write(tmp_path / "tone.wav", tone(2, rate), rate, subtype="FLOAT"))
    level, frequency = level_and_frequency(waveform)
    assert frequency == pytest.approx(1000, abs=1)
    assert level == pytest.approx(0.5, rel=0.01)
    assert len(waveform) == pytest.approx(2 * RATE, abs=1)
    assert info.rate == rate
    assert info.seconds == pytest.approx(2, abs=1e-3)


def test_what_16_khz_cannot_hold_is_filtered_out(tmp_path):
    waveform, _ = audio.load(write(tmp_path / "high.wav", tone(2, 44100, hertz=10000), 44100, subtype="FLOAT"))
    assert waveform[4000:-4000].abs().max() < 1e-3


def test_blocks_leave_no_seam(tmp_path, monkeypatch):
    path = write(tmp_path / "tone.wav", tone(4, 44100), 44100, subtype="FLOAT")
    whole, _ = audio.load(path)
    monkeypatch.setattr(audio, "_BLOCK_SECONDS", 0.1)
    monkeypatch.setattr(audio, "_mono_blocks", lambda file, *_: small_blocks(file))
    pieces, info = audio.load(path)
    assert info.frames == 4 * 44100
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=0)
    expected = torch.from_numpy(soxr.resample(tone(4, 44100), 44100, RATE, quality="HQ"))
    torch.testing.assert_close(pieces[800:-800], expected[800:-800], atol=1e-4, rtol=0)


def small_blocks(file):
    while len(block := file.read(4410, dtype="float32", always_2d=True)):
        yield block.mean(axis=1)


def test_long_files_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "_BLOCK_SECONDS", 1)
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (5 * RATE + 7, 2)).astype(np.float32)
    waveform, info = audio.load(write(tmp_path / "noise.wav", samples, subtype="FLOAT"))
    assert info.frames == len(samples)
    np.testing.assert_allclose(waveform.numpy(), samples.mean(axis=1), atol=1e-7)


def test_sixteen_bits_at_16_khz_come_through_untouched(tmp_path):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, RATE, dtype=np.int16)
    waveform, _ = audio.load(write(tmp_path / "exact.flac", samples))
    np.testing.assert_array_equal(waveform.numpy(), samples.astype(np.float32) / 2**15)


@pytest.mark.parametrize("channels", [2, 3])
def test_channels_are_averaged(tmp_path, channels):
    samples = np.zeros((RATE, channels), np.float32)
    samples[:, 0] = tone(1, RATE)
    waveform, info = audio.load(write(tmp_path / "left.wav", samples, subtype="FLOAT"))
    assert info.channels == channels
    np.testing.assert_allclose(waveform.numpy(), samples[:, 0] / channels, atol=1e-7)


def test_opposite_channels_cancel(tmp_path):
    samples = np.stack([tone(1, 44100), -tone(1, 44100)], axis=1)
    waveform, _ = audio.load(write(tmp_path / "opposite.wav", samples, 44100, subtype="FLOAT"))
    assert waveform.abs().max() == 0


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_formats(tmp_path, extension, rate):
    if extension.upper() not in soundfile.available_formats():
        pytest.skip(f"this libsndfile ({soundfile.__libsndfile_version__}) cannot write {extension}")
    samples = np.stack([tone(2, rate)] * 2, axis=1)
    waveform, info = audio.load(write(tmp_path / f"tone.{extension}", samples, rate))
    level, frequency = level_and_frequency(waveform)
    assert frequency == pytest.approx(1000, abs=1)
    assert level == pytest.approx(0.5, rel=0.05)  # ogg and mp3 are lossy
    assert info.format.startswith(extension.upper())
    assert info.seconds == pytest.approx(2, abs=0.1)  # mp3 may be padded to whole frames


def refused(path, **options):
    with pytest.raises(AudioError) as raised:
        audio.load(path, **options)
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert str(path) in sentence
    return sentence


def test_a_missing_path(tmp_path):
    path = tmp_path / "nobody.wav"
    assert refused(path) == f"an audio file is wanted, but {path} does not exist"


def test_a_directory(tmp_path):
    assert refused(tmp_path) == f"an audio file is wanted, but {tmp_path} is a directory"


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.wav"
    path.touch()
    assert refused(path) == f"an audio file is wanted, but {path} is empty (0 bytes)"


@pytest.mark.parametrize("name", ["text.wav", "text.mp3", "text.flac", "text.raw", "text"])
def test_a_file_that_is_no_audio(tmp_path, name):
    path = tmp_path / name
    path.write_text("no audio at all\n" * 100)
    assert refused(path).startswith(f"{path} cannot be read as audio (wanted wav, flac, ogg or mp3): ")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write(tmp_path / "secret.wav", tone(1, RATE))
    path.chmod(0)
    assert refused(path).endswith("cannot be opened: Permission denied")


def test_a_file_without_samples(tmp_path):
    path = write(tmp_path / "nothing.wav", np.zeros(0, np.float32))
    assert refused(path) == f"an audio file with samples is wanted, but {path} holds none"
    with pytest.raises(AudioError, match="holds none"):
        audio.check(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 40 * RATE])  # the second is beyond the first block
def test_samples_that_are_not_finite(tmp_path, value, at):
    samples = np.zeros((41 * RATE, 2), np.float32)
    samples[at, 1] = value
    sentence = refused(write(tmp_path / "bad.wav", samples, subtype="FLOAT"))
    assert sentence.endswith(f"holds NaN or infinity, first at sample {at} ({at / RATE:.3f} s)")


def test_too_short_says_what_is_needed_and_what_came(tmp_path):
    path = write(tmp_path / "short.wav", tone(399 / RATE, RATE))
    assert refused(path) == (
        f"{path} is too short: at least 400 samples at 16000 Hz are needed (25 ms, the model's receptive field), "
        "and it gives 399"
    )
    path = write(tmp_path / "short8.wav", np.zeros(100), 8000)
    assert refused(path).endswith("and it gives 200")  # counted after resampling
    path = write(tmp_path / "enough.wav", np.zeros(400))
    assert len(audio.load(path)[0]) == 400
    assert "at least 401 samples" in refused(path, at_least=401)


def test_without_soundfile_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(AudioError, match="needs the soundfile package"):
        audio.load(audio.clip())


def test_without_soxr_only_other_rates_fail(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    audio.load(audio.clip())
    with pytest.raises(AudioError, match="audio at 8000 Hz needs the soxr package to become 16000 Hz"):
        audio.load(write(tmp_path / "tone.wav", tone(1, 8000), 8000))


def test_check_refuses_by_the_header_alone(tmp_path):
    audio.check(audio.clip())
    with pytest.raises(AudioError, match="does not exist"):
        audio.check(tmp_path / "nobody.wav")


def test_fit_repeats_and_cuts():
    waveform = torch.arange(3.0)
    assert audio.fit(waveform, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert audio.fit(waveform, 2).tolist() == [0, 1]
    assert audio.fit(waveform, 3).tolist() == [0, 1, 2]


@pytest.mark.skipif(os.name != "posix", reason="names are text there")
def test_a_name_that_is_no_utf_8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    try:
        write(os.fsencode(path), tone(0.125, RATE))
    except (OSError, soundfile.LibsndfileError):
        pytest.skip("this file system takes UTF-8 only")
    waveform, info = audio.load(path)
    assert len(waveform) == 2000
    assert os.fsencode(info.path) == os.fsencode(path)
    path.write_bytes(b"no audio")
    assert "cannot be read as audio" in refused(path)
