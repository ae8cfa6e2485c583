"""A range of a file is what decoding all of it and cutting gives; what lies outside is refused in one sentence."""

import itertools

import numpy as np
import pytest
import soundfile
import soxr
import torch
from test_audio import RATE, refused, write

from wavlm_fast import audio
from wavlm_fast.audio import AudioError

CODINGS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "ULAW"),
    ("WAV", "MS_ADPCM"),
    ("WAV", "GSM610"),
    ("W64", "PCM_16"),
    ("AIFF", "PCM_16"),
    ("AU", "ALAW"),
    ("CAF", "PCM_16"),
    ("CAF", "ALAC_16"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]
SAMPLES = [(0, 8000), (1, 4000), (1151, 5000), (16_000, 16_000), (54_321, 12_345), (113_000 - 4000, 4000)]


@pytest.fixture(scope="module")
def speech():
    return audio.load(audio.clip())[0].numpy()[:113_000]


def coded(path, samples, kind, subtype, rate=RATE):
    """Written piece by piece: libsndfile's encoders of ogg overflow the stack on long ones."""
    if kind not in soundfile.available_formats() or not soundfile.check_format(kind, subtype):
        pytest.skip(f"this libsndfile ({soundfile.__libsndfile_version__}) does not know {kind} {subtype}")
    with soundfile.SoundFile(
        path, "w", rate, 1 if samples.ndim == 1 else samples.shape[1], subtype, format=kind
    ) as file:
        for start in range(0, len(samples), 8000):
            file.write(samples[start : start + 8000])
    return path


@pytest.mark.parametrize(("kind", "subtype"), CODINGS)
def test_a_range_is_the_slice_of_the_whole_bit_for_bit(tmp_path, speech, kind, subtype):
    path = coded(tmp_path / "speech.audio", speech, kind, subtype)
    whole, _ = audio.load(path)
    for first, count in SAMPLES:
        found, info = audio.load(path, first / RATE, count / RATE)
        assert torch.equal(found, whole[first : first + count]), (first, count)
        assert (info.frames, info.samples, info.incomplete) == (count, count, None)
    found, _ = audio.load(path, 2.5)
    assert torch.equal(found, whole[40_000:])


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100])
@pytest.mark.parametrize("channel", [None, 0, 1])
def test_at_other_rates_it_is_the_slice_resampled_by_itself(tmp_path, speech, rate, channel):
    stereo = np.stack([speech, np.roll(speech, 777)], axis=1)
    path = write(tmp_path / "speech.wav", stereo, rate, subtype="FLOAT")
    first, count = round(1.2345 * rate), round(0.75 * rate)
    part = stereo[first : first + count]
    part = part.mean(axis=1) if channel is None else np.ascontiguousarray(part[:, channel])
    found, info = audio.load(path, 1.2345, 0.75, channel)
    apart = write(tmp_path / "apart.wav", part, rate, subtype="FLOAT")
    assert torch.equal(found, audio.load(apart)[0])
    expected = soxr.resample(part, rate, RATE, quality="HQ")
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4, rtol=0)
    assert (info.rate, info.channels, info.frames) == (rate, 2, count)


def test_seconds_become_the_nearest_sample_and_one_duration_one_length(tmp_path):
    path = write(tmp_path / "count.wav", np.arange(8000, dtype=np.float32) / 8192, RATE, subtype="FLOAT")

    def heard(*span):
        found = audio.load(path, *span)[0] * 8192
        return int(found[0]), len(found)

    assert heard(1000.4 / RATE, 500.4 / RATE) == (1000, 500)
    assert heard(1000.5 / RATE, 500.5 / RATE) == (1001, 501)
    assert heard(0.0625 + 1e-9, 0.03125 - 1e-9) == (1000, 500)
    assert {heard(start / 7, 0.0301)[1] for start in range(3)} == {482}


def decoded(monkeypatch):
    """Counts what is read of a file."""
    counted, blocks = [], audio._blocks

    def counting(file, count=None):
        for block in blocks(file, count):
            counted.append(len(block))
            yield block

    monkeypatch.setattr(audio, "_blocks", counting)
    return counted


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("AIFF", "PCM_24"), ("AU", "ULAW")]
)
def test_what_comes_before_is_not_decoded(tmp_path, monkeypatch, speech, kind, subtype):
    path = coded(tmp_path / "speech.audio", speech, kind, subtype)
    counted = decoded(monkeypatch)
    audio.load(path, 5, 0.5)
    assert sum(counted) == 8000


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "MS_ADPCM"), ("MP3", "MPEG_LAYER_III"), ("OGG", "OPUS")])
def test_where_seeking_is_not_safe_all_before_is_decoded(tmp_path, monkeypatch, speech, kind, subtype):
    path = coded(tmp_path / "speech.audio", speech, kind, subtype)
    counted = decoded(monkeypatch)
    audio.load(path, 5, 0.5)
    assert sum(counted) == 88_000


def test_vorbis_is_sought_where_that_is_exact(tmp_path, monkeypatch, speech):
    """libsndfile misses samples of the last page of an ogg file: they are decoded from well before."""
    pieces = itertools.islice(itertools.cycle([speech, np.zeros(30_000, np.float32)]), 36)
    path = coded(tmp_path / "long.ogg", np.concatenate(list(pieces)), "OGG", "VORBIS")
    whole, _ = audio.load(path)
    counted = decoded(monkeypatch)
    for first, most in (
        (300_000, 3000),
        (len(whole) - 3000, audio._VORBIS_END),
        (len(whole) - 9000, audio._VORBIS_END),
    ):
        counted.clear()
        found, _ = audio.load(path, first / RATE, 3000 / RATE)
        assert torch.equal(found, whole[first : first + 3000])
        assert sum(counted) <= most < len(whole) - 3000


def test_a_file_of_unknown_length_has_ranges_too(tmp_path, speech):
    path = coded(tmp_path / "speech.flac", speech, "FLAC", "PCM_16")
    content = bytearray(path.read_bytes())
    content[18:26] = (int.from_bytes(content[18:26], "big") >> 36 << 36).to_bytes(8, "big")  # the count of samples
    path.write_bytes(content)
    assert audio.duration_of(path) is None
    found, _ = audio.load(path, 3, 1)
    assert torch.equal(found, torch.from_numpy(speech[48_000:64_000]))
    assert len(audio.load(path, 7, 0.07)[0]) == 1000  # 7.0625 s
    assert refused(path, start=7, duration=1) == f"{path} ends at 7.062 s, and 1 s from 7 s on is wanted"
    assert refused(path, start=9) == f"{path} ends at 7.062 s, and all from 9 s on is wanted"


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "OPUS")])
def test_a_range_past_the_end(tmp_path, speech, kind, subtype):
    path = coded(tmp_path / "speech.audio", speech, kind, subtype)  # 7.0625 s
    for duration in (1.0625, 1.07, 1.0725):
        assert len(audio.load(path, 6, duration)[0]) == 17_000
    assert refused(path, start=6, duration=1.0726) == f"{path} ends at 7.062 s, and 1.0726 s from 6 s on is wanted"
    assert refused(path, start=7.0625) == f"{path} ends at 7.062 s, and all from 7.0625 s on is wanted"
    assert refused(path, start=1e200, duration=1).endswith("ends at 7.062 s, and 1 s from 1e+200 s on is wanted")


def test_mp3_may_be_off_by_a_frame(tmp_path, speech):
    path = coded(tmp_path / "speech.mp3", speech, "MP3", "MPEG_LAYER_III")
    whole, _ = audio.load(path)
    end = len(whole) / RATE
    assert torch.equal(audio.load(path, 6, end - 6 + 0.05)[0], whole[96_000:])
    assert "and 2 s from 6 s on is wanted" in refused(path, start=6, duration=2)


@pytest.mark.parametrize(
    "span",
    [(-1.0,), (float("nan"),), (float("inf"),), (0.0, 0.0), (0.0, -1.0), (0.0, float("nan")), (1.0, float("inf"))],
)
def test_no_range_at_all(span):
    with pytest.raises(
        AudioError, match="^a range that begins at 0 s or later and lasts is wanted of .*, got .* s on$"
    ):
        audio.load(audio.clip(), *span)


def test_channels(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (8000, 3)).astype(np.float32)
    path = write(tmp_path / "three.wav", samples, subtype="FLOAT")
    for channel in range(3):
        assert torch.equal(audio.load(path, channel=channel)[0], torch.from_numpy(samples[:, channel].copy()))
    assert refused(path, channel=3) == f"channel 3 is wanted of {path}, whose channels are 0 to 2"
    assert "channel -1 is wanted" in refused(path, channel=-1)


def test_what_is_wrong_elsewhere_does_not_matter(tmp_path):
    samples = np.zeros((3 * RATE, 2), np.float32)
    samples[RATE, 1] = np.nan
    path = write(tmp_path / "bad.wav", samples, subtype="FLOAT")
    audio.load(path, 0, 1)
    audio.load(path, 1.5)
    audio.load(path, channel=0)
    assert refused(path, start=0.5).endswith("holds NaN or infinity, first at sample 16000 (1.000 s)")
    assert refused(path, channel=1).endswith("holds NaN or infinity, first at sample 16000 (1.000 s)")


def test_a_range_that_is_too_short():
    path = audio.clip()
    assert refused(path, start=1, duration=0.02) == (
        f"{path}, 0.02 s from 1 s on, is too short: at least 400 samples at 16000 Hz are needed "
        "(25 ms, the model's receptive field), and it gives 320"
    )
    assert (
        refused(path, duration=1e-6)
        == f"an audio file with samples is wanted, but {path} holds none in 1e-06 s from 0 s on"
    )


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_16"), ("OGG", "VORBIS"), ("FLAC", "PCM_16"), ("CAF", "ALAC_16")]
)
def test_a_range_of_a_cut_file(tmp_path, speech, kind, subtype):
    path = coded(tmp_path / "speech.audio", speech, kind, subtype)
    whole, _ = audio.load(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(0.7 * len(content))])
    if kind == "CAF":  # libsndfile refuses by itself what lacks so much
        assert "cannot be read as audio" in refused(path, start=1, duration=1)
        return
    assert f"{path} is cut or damaged: " in refused(path, start=1)
    assert "is cut or damaged: " in refused(path, start=6, duration=1)
    found, info = audio.load(path, 1, 1, allow_truncated=True)
    assert torch.equal(found, whole[16_000:32_000])
    assert (info.incomplete is None) == (kind == "FLAC")  # whose samples count as they are decoded
    found, info = audio.load(path, 4, 3, allow_truncated=True)
    assert 0 < len(found) < 48_000
    same = len(found) - (3000 if kind == "OGG" else 0)
    assert torch.equal(found[:same], whole[64_000 : 64_000 + same])
    assert info.incomplete
    with pytest.raises(AudioError):
        audio.load(path, 6.9, 0.1, allow_truncated=True)


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")]
)
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_a_file_that_is_cut_while_it_is_read(tmp_path, monkeypatch, speech, kind, subtype, start):
    path = coded(tmp_path / "speech.audio", np.tile(speech, 3), kind, subtype)
    monkeypatch.setattr(audio, "_BLOCK_SECONDS", 1)
    audio.load(path, start)  # and what is remembered of it holds no longer
    blocks = audio._blocks

    def cutting(file, count=None):
        for block in blocks(file, count):
            yield block
            with open(path, "r+b") as other:
                other.truncate(path.stat().st_size // 3)

    monkeypatch.setattr(audio, "_blocks", cutting)
    refused(path, start=start)


def test_what_the_header_says(tmp_path, speech):
    for kind, subtype, rate in (("WAV", "PCM_16", 8000), ("FLAC", "PCM_16", 44_100), ("OGG", "OPUS", 16_000)):
        path = coded(tmp_path / "speech.audio", speech, kind, subtype, rate)
        assert audio.duration_of(path) == pytest.approx(len(speech) / rate)
        assert audio.probe(path) == pytest.approx(len(audio.load(path)[0]), abs=1)
        assert audio.probe(path, 1.5) == pytest.approx(len(audio.load(path, 1.5)[0]), abs=1)
        assert audio.probe(path, 0.5, 1) == RATE
        assert audio.probe(path, 100, 1) == 0
    mp3 = coded(tmp_path / "speech.mp3", speech, "MP3", "MPEG_LAYER_III")
    assert audio.probe(mp3) == pytest.approx(len(audio.load(mp3)[0]), abs=1152)


def test_what_the_header_does_not_say(tmp_path, speech):
    path = coded(tmp_path / "speech.flac", speech, "FLAC", "PCM_16")
    content = bytearray(path.read_bytes())
    content[18:26] = (int.from_bytes(content[18:26], "big") >> 36 << 36).to_bytes(8, "big")
    path.write_bytes(content)
    assert audio.duration_of(path) is audio.probe(path) is audio.probe(path, 1) is None
    assert audio.probe(path, 1, 2) == 2 * RATE
    for wrong in (tmp_path, tmp_path / "nobody.wav"):
        with pytest.raises(AudioError, match="an audio file is wanted, but "):
            audio.probe(wrong)
