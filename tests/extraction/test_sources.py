"""What is to be extracted, in every form that lists come in, or one sentence with the place of what is wrong."""

import csv
import gzip
import io
import json
import os
import sys

import pytest

from wavlm_fast.errors import UserError
from wavlm_fast.extraction.sources import Utterance, utterances

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Paths are relative in most tests, as users write them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(*paths):
    for path in paths:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb"):
            pass


def written(path, *lines):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.writelines(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    return path


def found(*inputs, **options):
    return list(utterances(inputs, **options))


def ids(*inputs, **options):
    return [one.id for one in found(*inputs, **options)]


def refused(*inputs, **options):
    with pytest.raises(UserError) as raised:
        found(*inputs, **options)
    sentence = str(raised.value)
    assert "\n" not in sentence
    return sentence


# Folders


def test_a_tree_by_ending_sorted_with_ids_below_it():
    files("c/b/2.wav", "c/b/1.FLAC", "c/a.mp3", "c/b.wav", "c/a/x.y.ogg", "c/notes.txt", "c/a/x.npy", "c/wav")
    assert found("c") == [
        Utterance("a/x.y", "c/a/x.y.ogg"),
        Utterance("a", "c/a.mp3"),
        Utterance("b/1", "c/b/1.FLAC"),
        Utterance("b/2", "c/b/2.wav"),
        Utterance("b", "c/b.wav"),
    ]
    assert ids("c/") == ids(os.path.abspath("c")) == ids("c")


def test_one_name_in_two_folders_is_two_utterances():
    files("c/one/a.wav", "c/two/a.wav")
    assert ids("c") == ["one/a", "two/a"]
    assert refused("c/one", "c/two") == "ids must differ, but a is that of c/one/a.wav and of c/two/a.wav"


def test_two_formats_of_one_recording():
    files("c/a.wav", "c/a.flac")
    assert refused("c") == "ids must differ, but a is that of c/a.flac and of c/a.wav"
    assert ids("c/**/*.wav") == ["a"]


def test_hidden_files_and_folders_are_left_out():
    files("c/a.wav", "c/._a.wav", "c/.trash/b.wav")
    assert ids("c") == ids("c/**") == ["a"]
    assert ids("c/.trash") == ["b"]


NAMES = ["with  spaces.wav", "new\nline.wav", "tab\t.wav", "日本語 ü.wav", os.fsdecode(b"caf\xe9.wav"), "[a]*?.wav"]


def test_names_of_every_kind(here):
    files(*(f"c/{name}" for name in NAMES))
    expected = sorted(NAMES)
    assert [one.path for one in found("c")] == [f"c/{name}" for name in expected]
    assert ids("c") == [name[:-4] for name in expected]
    listed = b"".join(os.fsencode(f"c/{name}") + b"\0" for name in NAMES)
    assert [one.path for one in found("-", stdin=binary(listed))] == [f"c/{name}" for name in NAMES]
    records = [{"audio_filepath": name} for name in NAMES]
    assert [one.path for one in found(written("c/m.jsonl", *records))] == [f"c/{name}" for name in NAMES]
    with open("c/m.csv", "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([["path"], *([name] for name in NAMES)])
    assert [one.path for one in found("c/m.csv")] == [f"c/{name}" for name in NAMES]
    assert found(*(f"c/{name}" for name in NAMES))[-1] == Utterance("[a]*?", "c/[a]*?.wav")  # no pattern: it exists


def test_links_are_followed_but_not_in_circles():
    files("c/a/x.wav", "elsewhere/y.wav")
    os.symlink("..", "c/a/up")
    os.symlink(".", "c/self")
    os.symlink("../elsewhere", "c/there")
    os.symlink("../a", "c/a/again")
    os.symlink("../c/a", "elsewhere/back")
    os.symlink("x.wav", "c/a/y.wav")
    assert ids("c") == ["a/x", "a/y", "there/back/x", "there/back/y", "there/y"]


def test_a_link_to_nothing_is_a_file_that_somebody_misses_and_a_pipe_is_none():
    files("c/a.wav")
    os.symlink("nowhere", "c/b.wav")
    os.mkfifo("c/c.wav")
    assert ids("c") == ["a", "b"]


def test_what_is_written_to_is_not_read(here):
    files("c/a.wav", "c/b/x.wav")
    reader = utterances(["c"], leave_out=here / "c" / "b" / "out")
    assert next(reader).id == "a"
    files("c/b/out/wrong.wav")  # made while the tree is read
    assert [one.id for one in reader] == ["b/x"]
    os.symlink(here / "c" / "b" / "out", "c/z")
    assert ids("c", leave_out=here / "c" / "b" / "out") == ids("c/**", leave_out=here / "c/b/../b/out") == ["a", "b/x"]
    assert ids("c", leave_out=here / "c") == ["a", "b/out/wrong", "b/x", "z/wrong"]  # beside the audio


def test_a_folder_without_audio():
    files("c/a.txt")
    assert refused("c").startswith("audio files are wanted (.aif .aifc ")
    assert refused("c").endswith("), but the folder c holds none")
    assert refused("c/*.txt").endswith("), but the pattern c/*.txt holds none")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read():
    files("c/b/a.wav")
    os.chmod("c/b", 0)
    assert refused("c") == "the folder c/b cannot be read: Permission denied"


def test_a_folder_that_goes_while_it_is_read():
    files("c/a.wav", "c/b/a.wav")
    reader = utterances(["c"])
    next(reader)
    os.remove("c/b/a.wav")
    os.rmdir("c/b")
    with pytest.raises(UserError, match="^the folder c/b cannot be read: No such file or directory$"):
        next(reader)


def test_utterances_come_as_they_are_asked_for():
    files("c/a.wav", "c/b/1.wav")
    written("m.jsonl", {"path": "a.wav"}, "no JSON")
    assert next(utterances(["c", "nowhere"])).id == "a"
    reader = utterances(["m.jsonl"])
    assert next(reader).id == "a"
    with pytest.raises(UserError, match="m.jsonl:2"):
        next(reader)


# Patterns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("c/*.wav", ["a"]),
        ("c/*", ["a", "b"]),
        ("c/*/*.wav", ["d/a", "e/a"]),
        ("c/**/*.wav", ["a", "d/a", "d/f/a", "e/a"]),
        ("c/**", ["a", "b", "d/a", "d/f/a", "d/f/b", "e/a"]),
        ("c/d/**/[ab].*", ["a", "f/a", "f/b"]),
        ("c/**/f/*", ["d/f/a", "d/f/b"]),
        ("c/**/d/**/a.wav", ["d/a", "d/f/a"]),
        ("c/[!d]/?.wav", ["e/a"]),
        ("*/b.flac", ["c/b"]),
        ("./c//*.wav", ["a"]),
        ("**/f/./b.flac", ["c/d/f/b"]),
    ],
)
def test_patterns(here, pattern, expected):
    files("c/a.wav", "c/b.flac", "c/d/a.wav", "c/d/f/a.wav", "c/d/f/b.flac", "c/d/m.txt", "c/e/a.wav")
    assert ids(pattern) == expected
    assert ids(f"{here}/{pattern}") == expected
    assert all(os.path.exists(one.path) for one in found(pattern))


def test_a_pattern_does_not_look_where_nothing_can_match(monkeypatch):
    files("c/a.wav", "c/d/a.wav", "c/e/f/a.wav")
    looked, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(path) or scandir(path))
    assert ids("c/d*/*.wav") == ["d/a"]
    assert looked == ["c/", "c/d"] or looked == ["c", "c/d"]


def test_a_pattern_below_no_folder():
    assert refused("no/where/*.wav") == "the folder no/where of the pattern no/where/*.wav does not exist"


# Files


def test_files_given_one_by_one_are_named_by_as_much_as_tells_them_apart(here):
    files("a/b/x.wav", "a/c/x.wav", "d/c/x.flac", "d/y.wav", "a/odd.name")
    given = ["a/b/x.wav", "d/y.wav", "a/c/x.wav", str(here / "d/c/x.flac"), "a/odd.name"]
    assert found(*given) == [Utterance(*pair) for pair in zip(["a/b/x", "y", "a/c/x", "d/c/x", "odd.name"], given)]
    assert ids("a/b/x.wav") == ["x"]
    assert ids("a/b/x.wav", "a/c/x.wav") == ["b/x", "c/x"]


def test_a_file_given_twice():
    files("a/x.wav", "a/x.flac")
    assert refused("a/x.wav", "a/x.wav").endswith("x is that of a/x.wav and of a/x.wav")
    assert refused("a/x.wav", "a/x.flac").endswith("a/x is that of a/x.wav and of a/x.flac")
    assert refused("a/x.wav", "./a/x.wav").endswith("a/x is that of a/x.wav and of ./a/x.wav")


def test_what_does_not_exist():
    assert refused("no.wav") == "audio, a folder of it or a list is wanted, but no.wav does not exist"
    for name in ("no.jsonl", "no.json.gz", "no.csv", "no.tsv", "wav.scp"):
        assert refused(name) == f"{name} cannot be read: No such file or directory"


def test_inputs_come_in_their_order():
    files("c/a.wav", "b.wav", "a.wav")
    written("m.jsonl", {"path": "q.wav"})
    assert ids("m.jsonl", "b.wav", "c/*", "-", stdin=io.StringIO("0.wav\n")) == ["q", "b", "a", "0"]


# A list on standard input


def binary(content):
    return io.TextIOWrapper(io.BytesIO(content), encoding="ascii")  # bytes are read past the encoding


def test_a_list():
    inside = os.path.abspath("c/x.wav")
    listed = f"a b.wav\n\n ./d/x.wav\r\n../up/x.wav\n/abs/x.wav\n{inside}\nlast.name"
    expected = ["a b.wav", " ./d/x.wav", "../up/x.wav", "/abs/x.wav", inside, "last.name"]
    names = ["a b", " ./d/x", "up/x", "abs/x", "c/x", "last.name"]
    for stdin in (io.StringIO(listed), binary(listed.encode())):
        assert found("-", stdin=stdin) == [Utterance(*pair) for pair in zip(names, expected)]


def test_a_list_separated_by_nul_may_hold_anything_else():
    for listed in ("a\n.wav\0 b\r\0\0c.wav", "a\n.wav\0 b\r\0\0c.wav\0"):
        assert [one.path for one in found("-", stdin=io.StringIO(listed))] == ["a\n.wav", " b\r", "c.wav"]


def test_a_list_is_standard_input_by_default(monkeypatch):
    monkeypatch.setattr(sys, "stdin", binary(b"a.wav\n"))
    assert ids("-") == ["a"]


def test_a_long_list_in_pieces(monkeypatch):
    from wavlm_fast.extraction import sources

    monkeypatch.setattr(sources, "_PIECE", 7)
    names = [f"{number}" * (number % 5 + 1) for number in range(200)]
    assert ids("-", stdin=binary("\n".join(names).encode())) == names
    assert ids("-", stdin=io.StringIO("\0".join(names))) == names


def test_lines_of_a_list_that_cannot_be_meant():
    assert refused("-", stdin=io.StringIO("a.wav\n\n..\n")).startswith("standard input:3: as id a name or a relative")
    sentence = refused("-", stdin=io.StringIO("a.wav\n\nb.wav\na.flac\n"))
    assert sentence == "ids must differ, but a is that of standard input:1 and of standard input:4"
    assert ids("-", stdin=io.StringIO("")) == []


# NeMo


def test_nemo():
    files("m/a.wav", "b.wav", "m/both.wav", "both.wav")
    outside = {"audio_filepath": "/data/x/c.flac", "duration": 3, "text": "so", "offset": None}
    path = written(
        "m/train.jsonl",
        {"audio_filepath": "a.wav", "duration": 7.1, "text": "hello"},
        {"audio_filepath": "b.wav"},
        "",
        {"audio_filepath": "both.wav", "offset": 1.25, "duration": 0.5, "channel": 1},
        outside,
        {"audio_filepath": os.path.abspath("m/d/e.wav"), "offset": 0},
        {"audio_filepath": "nowhere.wav", "id": 17, "offset": 2, "duration": "1.5"},
    )
    expected = [
        Utterance("a", "m/a.wav", 0.0, 7.1),
        Utterance("b", "b.wav"),  # in the working directory
        Utterance("both-0001250-0001750", "m/both.wav", 1.25, 0.5, 1),  # in the manifest's folder first
        Utterance("data/x/c", "/data/x/c.flac", 0.0, 3.0),
        Utterance("d/e-0000000-end", os.path.abspath("m/d/e.wav")),
        Utterance("17", "m/nowhere.wav", 2.0, 1.5),
    ]
    assert found(path) == expected
    for name, opener in (("m/train.json", open), ("m/t.json.gz", gzip.open), ("m/t.JSONL.GZ", gzip.open)):
        with open(path, "rb") as plain, opener(name, "wb") as copy:
            copy.write(b"\xef\xbb\xbf" + plain.read().replace(b"\n", b"\r\n"))
        assert found(name) == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{path: 1", "a line of JSON is wanted, got '{path: 1': Expecting property name"),
        pytest.param("[" * 100_000, "a line of JSON is wanted", id="nested"),
        ([1], "a JSON object is wanted, got [1]"),
        ({"text": "a"}, "audio_filepath, audio, wav) is wanted, got the fields 'text'"),
        ({}, "is wanted, got no fields"),
        ({"audio_filepath": None}, "the path of an audio file is wanted, got None"),
        ({"audio_filepath": ""}, "the path of an audio file is wanted, got ''"),
        ({"audio_filepath": ["a"]}, "the path of an audio file is wanted, got ['a']"),
        ({"audio_filepath": "a\0.wav"}, "the path of an audio file is wanted, got 'a\\x00.wav'"),
        ({"audio_filepath": "\ud83d.wav"}, "the path of an audio file is wanted, got '\\ud83d.wav'"),
        ({"offset": -0.5}, "as start a number of seconds from 0 on is wanted, got -0.5"),
        ({"offset": NAN}, "as start a number of seconds from 0 on is wanted, got nan"),
        ({"offset": "soon"}, "as start a number of seconds from 0 on is wanted, got 'soon'"),
        ({"offset": True}, "as start a number of seconds from 0 on is wanted, got True"),
        ({"offset": [1]}, "as start a number of seconds from 0 on is wanted, got [1]"),
        ({"duration": 0}, "as duration a number of seconds above 0 is wanted, got 0"),
        ({"duration": -1}, "as duration a number of seconds above 0 is wanted, got -1"),
        ({"duration": NAN}, "as duration a number of seconds above 0 is wanted, got nan"),
        ({"duration": INFINITY}, "as duration a number of seconds above 0 is wanted, got inf"),
        ({"duration": 1e30}, "as duration a number of seconds above 0 is wanted, got 1e+30"),
        ({"duration": 10**400}, "as duration a number of seconds above 0 is wanted, got 1000"),
        ({"duration": {}}, "as duration a number of seconds above 0 is wanted, got {}"),
        ({"offset": 2, "end": 2}, "as end a number of seconds above 2 is wanted, got 2"),
        ({"channel": -1}, "as channel a whole number from 0 on is wanted, got -1"),
        ({"channel": 0.5}, "as channel a whole number from 0 on is wanted, got 0.5"),
        ({"channel": True}, "as channel a whole number from 0 on is wanted, got True"),
        ({"id": "/a"}, "as id a name or a relative path such as a/b is wanted, got '/a'"),
        ({"id": "../a"}, "as id a name or a relative path such as a/b is wanted, got '../a'"),
        ({"id": "a//b"}, "as id a name or a relative path such as a/b is wanted, got 'a//b'"),
        ({"id": "."}, "as id a name or a relative path such as a/b is wanted, got '.'"),
        ({"id": "a\0"}, "as id a name or a relative path such as a/b is wanted, got 'a\\x00'"),
        ({"id": 1.5}, "as id a name or a relative path such as a/b is wanted, got 1.5"),
    ],
)
def test_bad_lines_of_json(line, says):
    if isinstance(line, dict) and line.keys() & {"offset", "duration", "end", "channel", "id"}:
        line = {"audio_filepath": "b.wav", **line}
    sentence = refused(written("bad.jsonl", {"audio_filepath": "a.wav"}, "", line))
    assert sentence.startswith("bad.jsonl:3: ")
    assert says in sentence
    assert len(sentence) < 300


def test_ids_of_manifests_must_differ():
    first = written("m/first.jsonl", {"audio_filepath": "a.wav"}, "", {"audio_filepath": "b.wav"})
    other = written("m/other.csv", "id,path", "c,c.wav", "b,x.wav")
    assert refused(first, other) == "ids must differ, but b is that of m/first.jsonl:3 and of m/other.csv:3"
    assert refused(first, first) == "ids must differ, but a is that of m/first.jsonl:1 and of m/first.jsonl:1"


def test_equal_hashes_are_no_equal_ids(monkeypatch):
    from wavlm_fast.extraction import sources

    monkeypatch.setattr(sources, "hash", len, raising=False)
    assert ids("-", stdin=io.StringIO("a\nb\nc\ndd\n")) == ["a", "b", "c", "dd"]
    assert refused("-", stdin=io.StringIO("a\nb\nc\nb\n")).endswith(
        "b is that of standard input:2 and of standard input:4"
    )


def test_a_compressed_manifest_that_is_cut_or_none():
    with gzip.open("m.jsonl.gz", "wb") as file:
        file.write(b"".join(b'{"path": "%d.wav"}\n' % number for number in range(1000)))
    with open("m.jsonl.gz", "rb") as file:
        content = file.read()
    for name, says in (
        ("cut", " beyond line 962 cannot be read: Compressed file ended before the end-of-stream marker was reached"),
        ("none", " cannot be read: Not a gzipped file (b'{}')"),
        ("damaged", " cannot be read: Error -3 while decompressing data"),
    ):
        broken = {"cut": content[:-100], "none": b"{}", "damaged": content[:30] + b"\xff" * 30 + content[60:]}[name]
        with open(f"{name}.jsonl.gz", "wb") as file:
            file.write(broken)
        assert refused(f"{name}.jsonl.gz").startswith(f"{name}.jsonl.gz{says}")


# Kaldi


def test_kaldi_recordings():
    files("data/b.wav")
    written("data/wav.scp", "r1 /abs/a.wav", "r2\tb.wav", "", "r3   c d/with spaces.wav  ", "日本 e.wav")
    expected = [
        Utterance("r1", "/abs/a.wav"),
        Utterance("r2", "data/b.wav"),
        Utterance("r3", "data/c d/with spaces.wav"),
        Utterance("日本", "data/e.wav"),
    ]
    assert found("data") == found("data/wav.scp") == expected


def test_kaldi_segments():
    written("data/wav.scp", "r1 /abs/a.wav", "r2 /abs/b.wav")
    lines = ["u1 r1 0 1.5", "u2 r2 0.25 -1", "u3 r1 2.5 3 1", "u4 r2 0.00 -1.00"]
    written("data/segments", *lines)
    written("other/dev.segments", lines[2])
    expected = [
        Utterance("u1", "/abs/a.wav", 0.0, 1.5),
        Utterance("u2", "/abs/b.wav", 0.25),
        Utterance("u3", "/abs/a.wav", 2.5, 0.5, 1),
        Utterance("u4", "/abs/b.wav", 0.0),
    ]
    for given in (["data"], ["data/wav.scp"], ["data/segments"], ["data/wav.scp", "data/segments"]):
        assert found(*given) == expected
    assert found("data/wav.scp", "other/dev.segments") == expected[2:3]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("r2", "an id and a path are wanted, got 'r2'"),
        ("r2 sph2pipe -f wav a.sph |", "a file is wanted, got a command, which is not run: 'sph2pipe"),
        ("r2 touch ran|", "a file is wanted, got a command, which is not run: 'touch ran|'"),
        ("r2 -", "an audio file is wanted, got what Kaldi reads otherwise: '-'"),
        ("r2 raw.ark:1234", "an audio file is wanted, got what Kaldi reads otherwise: 'raw.ark:1234'"),
        ("../r2 a.wav", "as id a name or a relative path such as a/b is wanted, got '../r2'"),
    ],
)
def test_bad_lines_of_wav_scp(line, says):
    written("data/wav.scp", "r1 a.wav", "", line)
    for segments in (False, True):
        if segments:
            written("data/segments", "u1 r1 0 1")
        sentence = refused("data")
        assert sentence.startswith("data/wav.scp:3: ")
        assert says in sentence
    assert not os.path.exists("ran")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("u2 r1", "an id, a recording, its start and its end are wanted, got 'u2 r1'"),
        ("u2 r1 0", "an id, a recording, its start and its end are wanted, got times '0'"),
        ("u2 r1 0 1 0 9", "an id, a recording, its start and its end are wanted, got times '0 1 0 9'"),
        ("u2 r7 0 1", "a recording that data/wav.scp lists is wanted, got 'r7'"),
        ("u2 r1 -1 1", "as start a number of seconds from 0 on is wanted, got '-1'"),
        ("u2 r1 2 2", "as end a number of seconds above 2 is wanted, got '2'"),
        ("u2 r1 2 1", "as end a number of seconds above 2 is wanted, got '1'"),
        ("u2 r1 2 -2", "as end a number of seconds above 2 is wanted, got '-2'"),
        ("u2 r1 0 nan", "as end a number of seconds above 0 is wanted, got 'nan'"),
        ("u2 r1 0 1 A", "as channel a whole number from 0 on is wanted, got 'A'"),
    ],
)
def test_bad_segments(line, says):
    written("data/wav.scp", "r1 a.wav")
    sentence = refused(os.path.dirname(written("data/segments", "u1 r1 0 1", line)))
    assert sentence == f"data/segments:2: {says}"


def test_recordings_and_segments_must_differ():
    written("data/wav.scp", "r1 a.wav", "r1 b.wav")
    assert refused("data") == "ids must differ, but r1 is that of data/wav.scp:1 and of data/wav.scp:2"
    written("data/segments", "u1 r1 0 1", "u1 r1 1 2")
    assert refused("data") == "ids must differ, but r1 is that of data/wav.scp:1 and of data/wav.scp:2"
    written("data/wav.scp", "r1 a.wav")
    assert refused("data") == "ids must differ, but u1 is that of data/segments:1 and of data/segments:2"


# lhotse


def cut(**changes):
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "/abs/r.flac"}]}
    recording |= {"sampling_rate": 16000, "num_samples": 160000, "duration": 10.0, "channel_ids": [0]}
    made = {"id": "c-0", "start": 1.5, "duration": 2.25, "channel": 0, "supervisions": [], "recording": recording}
    return {**made, "type": "MonoCut", **changes}


def recording(*sources, **more):
    return {"id": "r", "sources": list(sources), **more}


def source(path="r.wav", channels=(0,), kind="file"):
    return {"type": kind, "channels": list(channels), "source": path}


def test_lhotse_cuts():
    lines = [
        cut(),
        cut(id="c-1", start=0, recording=recording(source(channels=[0, 1])), channel=1),
        cut(id="c-2", recording=recording(source("l.wav", [3]), source("r.wav", [5])), channel=5),
    ]
    expected = [
        Utterance("c-0", "/abs/r.flac", 1.5, 2.25, 0),
        Utterance("c-1", "m/r.wav", 0.0, 2.25, 1),
        Utterance("c-2", "m/r.wav", 1.5, 2.25, 0),  # the first of the second file
    ]
    assert found(written("m/cuts.jsonl", *lines)) == expected
    with open("m/cuts.jsonl", "rb") as plain, gzip.open("m/cuts.jsonl.gz", "wb") as copy:
        copy.write(plain.read())
    assert found("m/cuts.jsonl.gz") == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (cut(type="MultiCut", channel=[0, 1]), "a MonoCut with its recording is wanted, got 'MultiCut'"),
        ({"id": "x", "type": "MixedCut", "tracks": []}, "a MonoCut with its recording is wanted, got 'MixedCut'"),
        ({"id": "x", "type": "PaddingCut"}, "a MonoCut with its recording is wanted, got 'PaddingCut'"),
        (cut(recording=None), "a MonoCut with its recording is wanted, got 'MonoCut without a recording'"),
        (cut(recording=recording()), "a source with channel 0 is wanted, got sources with channels []"),
        (cut(recording={"sources": "r.wav"}), "a source with channel 0 is wanted, got sources with channels []"),
        (cut(channel=1), "a source with channel 1 is wanted, got sources with channels [[0]]"),
        (cut(recording=recording(source("x", [0], "url"))), "a recording in a file is wanted, got one of type 'url'"),
        (
            cut(recording=recording(source("sox x |", [0], "command"))),
            "a recording in a file is wanted, got one of type 'command'",
        ),
        (cut(recording=recording(source(), transforms=[{"name": "Speed"}])), "but this one is transformed: [{'name"),
        (cut(id=None), "a cut's field id is wanted, got the fields 'id', 'start'"),
        (cut(start=None), "a cut's field start is wanted"),
        (cut(duration=None), "a cut's field duration is wanted"),
        (cut(duration=0), "as duration a number of seconds above 0 is wanted, got 0"),
        (cut(start=-1), "as start a number of seconds from 0 on is wanted, got -1"),
        (cut(recording=recording(source(None))), "the path of an audio file is wanted, got None"),
    ],
)
def test_bad_cuts(line, says):
    sentence = refused(written("cuts.jsonl", cut(id="first"), line))
    assert sentence.startswith("cuts.jsonl:2: ")
    assert says in sentence


# Tables


@pytest.mark.parametrize("name", ["path", "file", "filename", "file_name", "audio_filepath", "audio", "wav"])
def test_columns_of_paths(name):
    assert found(written("m/t.csv", f"text, {name.upper()} ", "x,a b.wav")) == [Utterance("a b", "m/a b.wav")]
    assert found(written("m/t.jsonl", {"text": "x", name: "a.wav"})) == [Utterance("a", "m/a.wav")]


def test_csv():
    header = '\ufeffid,"start",end,duration,channel,path,text'
    rows = [
        'u1,1.5,2,,,"a, b.wav","one\ntwo ""three"""',
        "",
        "u2,,,2,1,c.wav",
        "u3,,,,,d.wav,x,y,z",
        ",1,,,,d.wav",
        ",1,9,.5,,d.wav",
    ]
    assert found(written("m/t.csv", header, *rows)) == [
        Utterance("u1", "m/a, b.wav", 1.5, 0.5),
        Utterance("u2", "m/c.wav", 0.0, 2.0, 1),
        Utterance("u3", "m/d.wav"),
        Utterance("d-0001000-end", "m/d.wav", 1.0),
        Utterance("d-0001000-0001500", "m/d.wav", 1.0, 0.5),  # of duration and end, the duration
    ]


def test_tsv_takes_quotation_marks_as_they_are():
    path = written("t.tsv", "path\toffset\tsentence", 'a "x".wav\t0.5\t"Quite', 'b.wav\t\tso", she said')
    assert found(path) == [Utterance('a "x"-0000500-end', 'a "x".wav', 0.5), Utterance("b", "b.wav")]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            [],
            "1: a header with a column for the path (path, file, filename, file_name, audio_filepath, audio, wav) is ",
        ),
        (["id,text", "1,x"], "1: a header with a column for the path ("),
        (["/corpus", "a.wav,16000"], "1: a header with a column for the path ("),
        (["id,path", "1,a.wav", "", '2,"b\n.wav"', "3"], "6: the path of an audio file is wanted, got None"),
        (["id,path", "1,"], "2: the path of an audio file is wanted, got ''"),
        (["start,path", "1,a.wav", "x,a.wav"], "3: as start a number of seconds from 0 on is wanted, got 'x'"),
        (["end,path", "0,a.wav"], "2: as end a number of seconds above 0 is wanted, got '0'"),
        (["channel,path", "left,a.wav"], "2: as channel a whole number from 0 on is wanted, got 'left'"),
        (["path,text", f"a.wav,{'x' * 200_000}"], "2: a row of a table is wanted: field larger than field limit"),
    ],
)
def test_bad_tables(lines, says):
    assert refused(written("t.csv", *lines)).startswith(f"t.csv:{says}")


def test_parquet(monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from wavlm_fast.extraction import manifests

    monkeypatch.setattr(manifests, "_ROWS", 2)
    table = {"text": ["x"] * 3, "audio": ["a.wav", "/abs/b.wav", "c.wav"], "id": [1, 2, 3], "duration": [None, 2.5, 1]}
    os.mkdir("m")
    parquet.write_table(pyarrow.table(table), "m/t.parquet")
    assert found("m/t.parquet") == [
        Utterance("1", "m/a.wav"),
        Utterance("2", "/abs/b.wav", 0.0, 2.5),
        Utterance("3", "m/c.wav", 0.0, 1.0),
    ]
    parquet.write_table(pyarrow.table(table | {"duration": [1.0, 1.0, -1.0]}), "t.parquet")
    assert refused("t.parquet") == "t.parquet:3: as duration a number of seconds above 0 is wanted, got -1.0"
    parquet.write_table(pyarrow.table({"text": ["x"]}), "t.parquet")
    assert refused("t.parquet").endswith("is wanted, got 'text'")
    parquet.write_table(pyarrow.table({"audio": [{"bytes": b"RIFF", "path": None}]}), "t.parquet")
    assert "t.parquet:1: the path of an audio file is wanted, got {" in refused("t.parquet")
    written("t.parquet", "no parquet")
    assert refused("t.parquet").startswith("t.parquet cannot be read: ")


def test_parquet_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    sentence = refused(written("t.parquet", "x"))
    assert sentence.startswith("t.parquet needs the pyarrow package to be read, which cannot be imported: ")
