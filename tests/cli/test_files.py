"""Files are whole or absent; what killed runs left is removed, what live ones are writing is not."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import soundfile

from wavlm_fast import console, files

fcntl = pytest.importorskip("fcntl", reason="there are no such locks there")

# files.py alone: the package would take seconds to import.
WRITER = f"""
import runpy, sys
from pathlib import Path
write = runpy.run_path({files.__file__!r})["write_atomically"]
def save(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
    file.write(b" and half")
write(Path(sys.argv[1]), save)
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing tmp_path / "target"; a line on its standard input lets it go on."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "target"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_being_written_stays(writer, tmp_path):
    (unfinished,) = names(tmp_path)
    assert files.remove_unfinished(tmp_path) == []
    assert names(tmp_path) == [unfinished]
    writer.communicate("go on\n")
    assert (tmp_path / "target").read_bytes() == b"half and half"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])  # as itself it knows no SIGTERM
def test_what_a_killed_run_left_is_removed(writer, tmp_path, how):
    writer.send_signal(how)
    writer.wait()
    (unfinished,) = names(tmp_path)
    assert files.remove_unfinished(tmp_path) == [tmp_path / unfinished]
    assert names(tmp_path) == []


def test_a_run_of_extract_removes_it(command, tiny, tmp_path):
    left = tmp_path / f".wavlm-fast.{files._HOST}.abcd1234.tmp"
    left.write_bytes(b"half")
    soundfile.write(tmp_path / "one.wav", [0.1, -0.1] * 400, 16000)
    assert command("extract", tmp_path / "one.wav", "--out", tmp_path, "--model", tiny).status == 0
    assert names(tmp_path) == [".wavlm-fast", "manifest.jsonl", "one.npy", "one.wav"]


def test_whatever_writes_json_removes_it(tmp_path):
    (tmp_path / f".wavlm-fast.{files._HOST}.abcd1234.tmp").write_bytes(b"half")
    console.write_json(str(tmp_path / "found.json"), {})
    assert names(tmp_path) == ["found.json"]


def left_behind(folder, host, days=0.0):
    path = folder / f".wavlm-fast.{host}.abcd1234.tmp"
    path.write_bytes(b"half")
    then = time.time() - days * 86_400
    os.utime(path, (then, then))
    return path


def test_of_another_host_it_takes_a_day(tmp_path):
    """Its locks may not be seen here."""
    left_behind(tmp_path, "elsewhere", days=0.9)
    assert files.remove_unfinished(tmp_path) == []
    path = left_behind(tmp_path, "elsewhere", days=1.1)
    with path.open("r+b") as file:  # where they are seen they count
        fcntl.flock(file, fcntl.LOCK_EX)
        assert files.remove_unfinished(tmp_path) == []
    assert files.remove_unfinished(tmp_path) == [path]


def test_without_locks_it_takes_a_day(tmp_path, monkeypatch):
    def refused(descriptor, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refused)
    left_behind(tmp_path, files._HOST, days=0.9)
    assert files.remove_unfinished(tmp_path) == []
    path = left_behind(tmp_path, files._HOST, days=1.1)
    assert files.remove_unfinished(tmp_path) == [path]
    files.write_atomically(tmp_path / "target", lambda file: file.write(b"x"))
    assert names(tmp_path) == ["target"]


def test_files_of_others_stay(tmp_path):
    there = [".wavlm-fast.tmp", ".target.abcd1234.tmp", "wavlm-fast.host.abcd1234.tmp", ".wavlm-fast.a.b.tmp.npz"]
    for name in there:
        (tmp_path / name).touch()
    (tmp_path / f".wavlm-fast.{files._HOST}.link0000.tmp").symlink_to(tmp_path / there[0])
    before = names(tmp_path)
    assert files.remove_unfinished(tmp_path) == []
    assert names(tmp_path) == before
    assert files.remove_unfinished(tmp_path / "missing") == []


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Another run may look just then: it holds the lock, or has removed the file already."""
    lock, calls = files._lock, []

    def meanwhile(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            return False
        if len(calls) == 2:
            for path in tmp_path.iterdir():
                path.unlink()
        return lock(descriptor)

    monkeypatch.setattr(files, "_lock", meanwhile)
    files.write_atomically(tmp_path / "target", lambda file: file.write(b"whole"))
    assert (tmp_path / "target").read_bytes() == b"whole"
    assert len(calls) == 3


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    target = tmp_path / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    files.write_atomically(target, lambda file: file.write(b"x"))
    assert target.read_bytes() == b"x"


def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    console.write_json(str(pipe), {"a": 1})
    reader.join()
    assert heard == ['{\n "a": 1\n}\n']
    assert pipe.is_fifo()


def test_text_with_the_name_of_a_file_that_is_no_utf_8(tmp_path):
    console.write_file(tmp_path / "page", "caf\udce9 é", "page")
    assert (tmp_path / "page").read_text(encoding="utf-8") == r"caf\udce9 é"


FOLDER = f"""
import runpy, sys
from pathlib import Path
with runpy.run_path({files.__file__!r})["unfinished_folder"](Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_an_unfinished_folder_stays_as_long_as_its_process(tmp_path, killed):
    process = subprocess.Popen(
        [sys.executable, "-c", FOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    (unfinished,) = tmp_path.iterdir()
    assert files.remove_unfinished(tmp_path) == []
    assert names(unfinished) == ["weights"]
    if killed:
        process.kill()
        process.communicate()
        assert files.remove_unfinished(tmp_path) == [unfinished]
    else:
        process.communicate("go on\n")
    assert names(tmp_path) == []


def test_an_unfinished_folder_goes_with_an_error(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), files.unfinished_folder(tmp_path) as folder:
        (folder / "weights").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_what_another_library_wrote_gets_ordinary_permissions(tmp_path):
    path = tmp_path / "weights"
    path.touch(0o600)
    files.settle(path)
    path.with_name("usual").touch()
    assert path.stat().st_mode == path.with_name("usual").stat().st_mode
