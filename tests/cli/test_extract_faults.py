"""Extraction that is killed, runs out of disk, or meets a corpus in which many things are wrong."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from wavlm_fast import audio, files

# A process that has imported everything and run nothing: what it forks extracts at once.
ZYGOTE = """
import os, sys, time
from wavlm_fast import cli, extract
from wavlm_fast.extraction.folder import Folder
extract._MOST_SECONDS = 1.0
commit = Folder.commit
Folder.commit = lambda *args: (time.sleep(0.05), commit(*args))  # blocks take as long as loading a model
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            status = cli.main(line.rstrip("\\n").split("\\t"))
        except SystemExit as error:
            status = error.code
        except BaseException:
            status = 99
        os._exit(status)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture
def zygote():
    with subprocess.Popen(
        [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process
        process.stdin.close()


def ended(zygote, arguments, kill_after=None):
    """The exit status of a run, killed after so many seconds."""
    zygote.stdin.write("\t".join(map(str, arguments)) + "\n")
    child = int(zygote.stdout.readline())
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(child, signal.SIGKILL)
    return int(zygote.stdout.readline())


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["npy", "webdataset"])
def test_killed_again_and_again(zygote, tiny, tmp_path, kind):
    """Killed at random moments, the run ends with the very bytes of one that nobody killed."""
    corpus, generator = tmp_path / "corpus", np.random.default_rng(2)
    for i in range(40):
        path = corpus / f"{i % 3}" / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, generator.uniform(-0.3, 0.3, int(generator.uniform(4000, 16000))), 16000)
    (corpus / "broken.wav").write_text("no audio")
    words = ["extract", corpus, "--model", tiny, "--layer", "1", "--format", kind, "--batch-seconds", "1", "--out"]
    once, killed = tmp_path / "once", tmp_path / "killed"
    assert ended(zygote, ["--version"]) == 0  # it has imported everything
    assert ended(zygote, [*words, once]) == 3
    started = time.perf_counter()
    assert ended(zygote, [*words, killed]) == 3  # the first one was slower
    took = time.perf_counter() - started
    assert tree(killed) == tree(once)
    shutil.rmtree(killed)
    draws, kills, stages = random.Random(5), 0, set()
    for _ in range(12):
        if ended(zygote, [*words, killed], draws.uniform(0, took)) == -signal.SIGKILL:
            kills += 1
            stages.add(len(list(killed.glob(".wavlm-fast/blocks/*.jsonl"))))
        else:  # it was faster: once more from the beginning
            assert tree(killed) == tree(once)
            shutil.rmtree(killed)
    assert ended(zygote, [*words, killed]) == 3
    assert kills >= 3
    assert len(stages) >= 3, "the kills hit the run at one stage only"
    assert tree(killed) == tree(once)


def mounted(folder, *options):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    yield mounted(tmp_path / "disk", "-o", "size=256k")
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def recordings(folder, count, samples=8000):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(3)
    for i in range(count):
        soundfile.write(folder / f"{i:04d}.wav", generator.uniform(-0.3, 0.3, samples), 16000)
    return folder


def test_a_disk_that_fills_up(command, tiny, tmp_path, small_disk, monkeypatch):
    monkeypatch.setattr("wavlm_fast.extract._MOST_SECONDS", 2.0)
    corpus, out = recordings(tmp_path / "corpus", 60), small_disk / "out"
    words = ("extract", corpus, "--out", out, "--model", tiny, "--layer", "1", "--batch-seconds", "2")
    sentence = command(*words).sentence()
    assert "nothing more can be written into" in sentence
    assert "No space left on device; what is done is kept" in sentence
    kept = list(out.rglob("*.npy"))
    assert kept
    assert all(np.load(path).shape == (24, 32) for path in kept)
    assert not list(out.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    ended = command(*words)
    assert ended.status == 0
    assert " 0 kept" not in ended.out
    command(*words[:3], tmp_path / "once", *words[4:])
    assert tree(out) == tree(tmp_path / "once")


def test_a_read_only_output(command, tiny, tmp_path):
    corpus = recordings(tmp_path / "corpus", 1)
    if os.geteuid() == 0:
        folder = mounted(tmp_path / "disk", "-o", "ro")
    else:
        folder = tmp_path / "disk"
        folder.mkdir(mode=0o500)
    try:
        sentence = command("extract", corpus, "--out", folder / "out", "--model", tiny).sentence()
        assert sentence.startswith(f"wavlm-fast extract: the output folder {folder / 'out'} cannot be made: ")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_is_lost(command, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("wavlm_fast.extract._MOST_SECONDS", 1.0)
    corpus, out = recordings(tmp_path / "corpus", 12), tmp_path / "out"
    write = files.write_atomically

    def lose(target, save, **options):
        if target.name == "0005.npy":
            out.rename(tmp_path / "lost")
        write(target, save, **options)

    words = ("extract", corpus, "--out", out, "--model", tiny, "--layer", "1", "--batch-seconds", "1")
    with monkeypatch.context() as context:
        context.setattr("wavlm_fast.extraction.writers.write_atomically", lose)
        assert "nothing more can be written into" in command(*words).sentence()
    assert not out.exists()
    (tmp_path / "lost").rename(out)
    ended = command(*words)
    assert ended.status == 0
    assert " 0 kept" not in ended.out
    assert len(list(out.glob("*.npy"))) == 12


def test_a_file_that_shrinks_while_it_is_read(command, tiny, tmp_path, monkeypatch):
    corpus = recordings(tmp_path / "corpus", 3)
    opened = audio._opened

    def shrinking(path):
        file = opened(path)
        if path.name == "0001.wav":
            os.truncate(path, 2000)
        return file

    monkeypatch.setattr(audio, "_opened", shrinking)
    ended = command("extract", corpus, "--out", tmp_path / "out", "--model", tiny, "--layer", "1")
    assert ended.status == 3
    (error,) = lines(tmp_path / "out" / "errors.jsonl")
    assert error["id"] == "0001"
    assert "0001.wav" in error["error"]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.npy")) == ["0000.npy", "0002.npy"]


def spoil(path, way):
    """Break a recording in one of ten ways."""
    content = path.read_bytes()
    if way == 0:
        path.write_bytes(b"")
    elif way == 1:
        path.write_bytes(content[:20])
    elif way == 2:
        path.write_bytes(content[:-50])
    elif way == 3:
        path.write_text("<html>404</html>")
    elif way == 4:
        soundfile.write(path, np.zeros(0), 16000)
    elif way == 5:
        soundfile.write(path, np.zeros(200), 16000)
    elif way == 6:
        soundfile.write(path, np.full(900, np.nan), 16000, subtype="FLOAT")
    elif way == 7:
        soundfile.write(path, np.full(900, np.inf), 16000, subtype="FLOAT")
    elif way == 8:
        path.unlink()
        path.symlink_to(path.with_name("nowhere.wav"))
    else:
        path.write_bytes(random.Random(0).randbytes(2000))


@pytest.mark.slow
def test_two_thousand_files_of_which_some_are_broken(command, tiny, tmp_path):
    corpus, generator, broken = tmp_path / "corpus", np.random.default_rng(4), set()
    names = ("plain", "two words", "new\nline", "dé\u0301jà", "日本", "'\"", "-dash", "per%20cent", "dot.dot", "*")
    for i in range(2000):
        path = corpus / f"{i % 7}" / f"{names[i % 10]} {i // 7}.wav"  # the same names in several folders
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, generator.uniform(-0.3, 0.3, int(generator.uniform(500, 1500))), 16000)
        if i % 50 == 0:
            spoil(path, i // 50 % 10)
            broken.add(path.relative_to(corpus).with_suffix("").as_posix())
    out = tmp_path / "out"
    ended = command("extract", corpus, "--out", out, "--model", tiny, "--layer", "1")
    assert ended.status == 3, ended
    assert "1960 extracted, 0 kept, 40 failed" in ended.out
    errors = lines(out / "errors.jsonl")
    assert {error["id"] for error in errors} == broken
    assert all(error["error"] and "\n" not in error["error"] for error in errors)
    _, *records = lines(out / "manifest.jsonl")
    assert len({record["file"] for record in records}) == len(records) == 1960
    assert all((out / record["file"]).is_file() for record in records)
