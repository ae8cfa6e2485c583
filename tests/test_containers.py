"""Audio that ends before its container says so is refused, or taken as far as it goes and said to be."""

import struct

import numpy as np
import pytest
import soundfile
import torch
from test_audio import RATE, refused, write

from wavlm_fast import audio, containers
from wavlm_fast.audio import AudioError


def noise(frames=40000, channels=1):
    shape = frames if channels == 1 else (frames, channels)
    return np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)


def cut(path, keep):
    """A copy of the first bytes, beside it: a number of them, a share of them, or all but a few."""
    content = path.read_bytes()
    keep = int(keep * len(content)) if isinstance(keep, float) else keep
    shorter = path.with_name(f"cut {path.name}")
    shorter.write_bytes(content[:keep])
    return shorter


def written(tmp_path, kind, samples=None, **options):
    if kind not in soundfile.available_formats():
        pytest.skip(f"this libsndfile ({soundfile.__libsndfile_version__}) does not know {kind}")
    return write(tmp_path / f"{kind}.audio", noise() if samples is None else samples, format=kind, **options)


def taken(path, whole):
    """What is there of a file that is refused unless it may be incomplete: the beginning of the whole one."""
    sentence = refused(path)
    found, info = audio.load(path, allow_truncated=True)
    assert info.incomplete in sentence
    assert str(info).endswith(f"; taken as far as it goes: {info.incomplete}")
    expected, whole_info = audio.load(whole)
    assert whole_info.incomplete is None
    assert "as far as it goes" not in str(whole_info)
    assert 0 < len(found) < len(expected)
    return found, expected[: len(found)]


@pytest.mark.parametrize("keep", [0.5, -100, -3], ids=["half", "the last samples", "the last bytes"])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF"])
def test_a_header_that_announces_more_than_comes(tmp_path, kind, keep):
    whole = written(tmp_path, kind)
    path = cut(whole, keep)
    if kind == "CAF" and keep == 0.5:  # libsndfile refuses by itself what lacks so much
        assert "cannot be read as audio" in refused(path)
        return
    found, expected = taken(path, whole)
    assert torch.equal(found, expected)
    assert "is cut or damaged: its header announces 800" in refused(path)  # bytes; some count their header too
    with pytest.raises(AudioError, match="bytes of audio, and [0-9]+ are there"):
        audio.check(path)
    audio.check(path, allow_truncated=True)


@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT", "ULAW", "IMA_ADPCM"])
def test_a_cut_wav_of_any_coding_and_order(tmp_path, subtype, endian):
    if not soundfile.check_format("WAV", subtype, endian):
        pytest.skip("libsndfile does not write that")
    whole = written(tmp_path, "WAV", subtype=subtype, endian=endian)
    assert "bytes of audio, and" in refused(cut(whole, 0.7))
    assert audio.load(whole)[1].incomplete is None


@pytest.mark.parametrize(("kind", "subtype"), [("FLAC", None), ("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_a_cut_stream(tmp_path, kind, subtype):
    whole = written(tmp_path, kind, subtype=subtype)
    found, expected = taken(cut(whole, 0.6), whole)
    assert len(found) > 10_000
    same = len(found) - (3000 if kind in ("MP3", "OGG") else 0)  # what overlaps with the next frame is lost
    torch.testing.assert_close(found[:same], expected[:same], atol=1e-3, rtol=0)


def test_what_can_be_decoded_is_counted(tmp_path):
    path = cut(written(tmp_path, "FLAC"), 0.5)
    assert "its header announces 40000 samples, and 16384 samples (1.024 s) can be decoded" in refused(path)


def test_a_flac_that_is_cut_between_two_frames_is_cut(tmp_path):
    whole = written(tmp_path, "FLAC")
    content = whole.read_bytes()
    head = content[content.find(b"\xff\xf8") :][:4]  # of every frame; its number comes next
    assert "40000 samples, and 16384" in refused(cut(whole, content.find(head + b"\4")))


def test_a_damaged_middle_is_no_end(tmp_path):
    path = written(tmp_path, "FLAC")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert "is cut or damaged: its header announces 40000 samples, and 16384" in refused(path)


def test_an_ogg_without_its_last_page(tmp_path):
    whole = written(tmp_path, "OGG", subtype="VORBIS")
    last = whole.read_bytes().rfind(b"OggS")
    assert f"none of its pages, which end at byte {last}, is marked as the last" in refused(cut(whole, last))
    assert "it ends within a page" in refused(cut(whole, -1))


def test_whole_files_of_every_format_are_whole(tmp_path):
    tried = set()
    for kind in set(soundfile.available_formats()) - {"RAW", "SD2"}:  # without a header; with a second file
        for subtype in soundfile.available_subtypes(kind):
            for channels in (1, 2):
                path = tmp_path / f"{kind} {subtype} {channels}"
                try:
                    write(path, noise(4001, channels), format=kind, subtype=subtype)
                except soundfile.LibsndfileError:  # listed, and yet not for this rate or number of channels
                    continue
                assert audio.load(path)[1].incomplete is None, path.name
                audio.check(path)
                tried.add(kind)
    assert {"WAV", "FLAC", "OGG", "AIFF"} <= tried


def wav(riff, data, behind=b"", frames=8001):
    """A wav of 16 bits whose header says what it is told to."""
    pcm = (noise(frames) * 2**15).astype("<i2").tobytes()
    about = struct.pack("<IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    return b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + about + b"data" + struct.pack("<I", data) + pcm + behind


LARGEST = 2**32 - 1


@pytest.mark.parametrize(
    ("riff", "data"),
    [
        pytest.param(LARGEST, LARGEST, id="ffmpeg"),
        pytest.param(LARGEST, LARGEST - 36, id="less the header"),
        pytest.param(0x7FFFF024, 0x7FFFF000, id="sox"),
        pytest.param(2**31 - 1, 2**31 - 37, id="31 bits, less the header"),
        pytest.param(2**31 + 36, 2**31, id="31 bits"),
    ],
)
def test_a_wav_that_was_written_into_a_pipe_announces_nothing(tmp_path, riff, data):
    path = tmp_path / "piped.wav"
    path.write_bytes(wav(riff, data))
    audio.check(path)
    waveform, info = audio.load(path)
    assert len(waveform) == 8001
    assert info.incomplete is None


def test_an_au_and_a_flac_of_unknown_length(tmp_path):
    au, flac = written(tmp_path, "AU"), written(tmp_path, "FLAC")
    content = au.read_bytes()
    au.write_bytes(content[:8] + b"\xff" * 4 + content[12:])
    content = bytearray(flac.read_bytes())
    count = int.from_bytes(content[18:26], "big") >> 36 << 36  # the last 36 bits are the samples
    content[18:26] = count.to_bytes(8, "big")
    flac.write_bytes(content)
    for path in (au, flac):
        waveform, info = audio.load(path)
        assert len(waveform) == info.frames == 40000
        assert info.incomplete is None
        audio.check(path)
    assert refused(cut(flac, 0.5)).partition(": ")[2].startswith("16384 samples (1.024 s) can be decoded")


def test_what_follows_the_announced_audio_is_not_heard(tmp_path):
    path = tmp_path / "more.wav"
    for behind in (b"LIST\x04\0\0\0INFO", b"TAG" + bytes(125), bytes(512)):
        path.write_bytes(wav(36 + 8000, 8000, behind))
        waveform, info = audio.load(path)
        assert len(waveform) == 4000
        assert info.incomplete is None


def test_a_pad_byte_may_be_missing(tmp_path):
    path = write(tmp_path / "odd.wav", noise(4001), subtype="PCM_U8")
    content = path.read_bytes()
    assert content.endswith(b"\0")  # the pad
    path.write_bytes(content[:-1])
    assert audio.load(path)[1].incomplete is None
    path.write_bytes(content[:-2])
    assert "announces 4001 bytes of audio, and 4000 are there" in refused(path)


def test_what_comes_before_the_audio_may_be_of_odd_length(tmp_path):
    path = tmp_path / "noted.wav"
    content = wav(36 + 14 + 16002, 16002)
    path.write_bytes(content[:36] + b"note\5\0\0\0hello\0" + content[36:])
    waveform, info = audio.load(path)
    assert (len(waveform), info.incomplete) == (8001, None)
    assert "announces 16002 bytes of audio, and 16000 are there" in refused(cut(path, -2))


@pytest.mark.parametrize("kind", ["FLAC", "MP3", "OGG"])  # of wav and others libsndfile refuses two
def test_of_two_recordings_in_one_file_only_the_first_is_read(tmp_path, kind):
    path = written(tmp_path, kind, noise(24000))
    first, _ = audio.load(path)
    at = path.stat().st_size
    path.write_bytes(2 * path.read_bytes())
    assert f"another recording begins at byte {at}, and is not read" in refused(path)
    found, info = audio.load(path, allow_truncated=True)
    assert torch.equal(found, first)
    assert "another recording" in str(info)


def test_tags_before_the_audio(tmp_path):
    """An ID3 tag of 300 bytes, its length in sevens of bits, before the container."""
    tag = b"ID3\x04\0\0" + bytes([0, 0, 2, 44]) + bytes(300)
    whole = written(tmp_path, "OGG", subtype="VORBIS")
    tagged = tmp_path / "tagged"
    for keep, says in ((None, None), (-1, "it ends within a page")):
        tagged.write_bytes(tag + whole.read_bytes()[:keep])
        assert containers.wrong_end(tagged) == says


@pytest.mark.parametrize("size", [1, 4, 11, 12, 13, 20, 40, 60])
@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "MP3", "OGG"])
def test_a_stump_of_a_header_is_refused_in_one_sentence(tmp_path, kind, size):
    path = cut(written(tmp_path, kind, noise(2000)), size)
    containers.wrong_end(path)
    refused(path)
    with pytest.raises(AudioError):
        audio.load(path, allow_truncated=True)


@pytest.mark.parametrize("piece", [1 << 20, 100, 9])
def test_a_second_flac_is_found_wherever_pieces_meet(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(containers, "_PIECE", piece)
    path = written(tmp_path, "FLAC", noise(600))
    content = path.read_bytes()
    for more in range(12):
        path.write_bytes(content + bytes(more) + content)
        assert containers.wrong_end(path) == f"another recording begins at byte {len(content) + more}, and is not read"
    path.write_bytes(content + bytes(30))
    assert containers.wrong_end(path) is None
