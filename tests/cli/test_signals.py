"""Ctrl-C ends the command line with status 130 and one line at any moment; SIGTERM leaves nothing half written."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from wavlm_fast import _signals, cli
from wavlm_fast._signals import Terminated

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are others there")

# Whoever runs tests in the background of a script has had Ctrl-C ignored, for these processes too.
LISTENING = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
INTERRUPTED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"


def in_new_process(*command, path=(), **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])}
    options = {"capture_output": True, "text": True, "env": environment, "cwd": ROOT, "check": False, **options}
    return subprocess.run([sys.executable, *map(str, command)], **options)


def script():
    """What pip makes of the entry in pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text()
    module, function = re.search(r'^wavlm-fast = "([\w.]+):(\w+)"$', project, re.MULTILINE).groups()
    return f"import re\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"


@pytest.fixture
def interrupted(tmp_path):
    """Runs a process to which Ctrl-C happens while wavlm_fast imports the first of what it needs."""
    (tmp_path / "sitecustomize.py").write_text(LISTENING)
    (tmp_path / "transformers.py").write_text(INTERRUPTED)
    (tmp_path / "wavlm-fast").write_text(script())

    def run(*command):
        return in_new_process(*command, path=[tmp_path], timeout=60)

    run.folder = tmp_path
    return run


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "wavlm_fast", "doctor"],
        ["-X", "dev", "-mwavlm_fast", "extract", "-m", "x"],
        ["-m", "wavlm_fast.cli"],
        ["-m", "benchmarks", "--quick"],
        ["{folder}/wavlm-fast", "demo", "a.wav"],
    ],
)
def test_ctrl_c_while_it_starts(interrupted, command):
    done = interrupted(*(word.format(folder=interrupted.folder) for word in command))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "wavlm-fast: interrupted\n")


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import wavlm_fast"],
        ["-c", "import wavlm_fast", "-m", "wavlm_fast"],
        ["-m", "theirs"],
        ["{folder}/theirs/__main__.py"],
        ["{folder}/benchmarks/__main__.py"],
    ],
)
def test_a_program_of_somebody_else_s_keeps_its_own_ctrl_c(interrupted, command):
    for name in ("theirs", "benchmarks"):
        (interrupted.folder / name).mkdir()
        (interrupted.folder / name / "__init__.py").write_text("import wavlm_fast\n")
        (interrupted.folder / name / "__main__.py").write_text("import wavlm_fast\n")
    done = interrupted(*(word.format(folder=interrupted.folder) for word in command))
    assert done.stderr.endswith("KeyboardInterrupt\n")
    assert done.returncode in (1, 130, -signal.SIGINT)


def test_nothing_is_imported_before_the_handler_is_in_place():
    """What Python has not loaded by itself would be a moment in which Ctrl-C still ends in a traceback."""
    look = (
        "import os, sys\n"
        "text, before = open(sys.argv[1]).read(), {*sys.modules}\n"
        "exec(text)\n"
        "print({*sys.modules} - before - {'__future__'})\n"
    )
    done = in_new_process("-S", "-c", look, _signals.__file__)  # what others have Python load may be anything
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_ctrl_c_that_is_ignored_stays_ignored(interrupted):
    (interrupted.folder / "sitecustomize.py").write_text(LISTENING.replace("default_int_handler", "SIG_IGN"))
    (interrupted.folder / "transformers.py").write_text(INTERRUPTED.replace("time.sleep(20)", "os._exit(7)"))
    assert interrupted("-m", "wavlm_fast", "doctor").returncode == 7


def test_sigterm_while_a_file_is_written(tiny, tmp_path):
    """What was begun is written to its end, nothing else is, and the status is that of a shell."""
    for name in ("one", "two"):
        soundfile.write(tmp_path / f"{name}.wav", np.random.default_rng(0).uniform(-0.3, 0.3, 8000), 16000)
    kill = (
        "import os, signal, time\n"
        "from wavlm_fast.extraction import writers\n"
        "write, killed = writers.write_atomically, []\n"
        "def slowly(target, save, **options):\n"
        "    def halfway(file):\n"
        "        if not killed:\n"
        "            killed.append(os.kill(os.getpid(), signal.SIGTERM))\n"
        "            time.sleep(0.5)\n"
        "        save(file)\n"
        "    write(target, halfway, **options)\n"
        "writers.write_atomically = slowly\n"
    )
    (tmp_path / "wavlm-fast").write_text(kill + script())
    (tmp_path / "sitecustomize.py").write_text(LISTENING)
    out = tmp_path / "out"
    paths = [tmp_path / "one.wav", tmp_path / "two.wav"]
    done = in_new_process(tmp_path / "wavlm-fast", "extract", *paths, "--out", out, "--model", tiny, path=[tmp_path])
    assert (done.returncode, done.stderr) == (143, "wavlm-fast extract: terminated\n")
    written = list(out.glob("*.npy"))
    assert written
    assert all(np.load(path).shape == (3, 24, 32) for path in written)
    assert not list(out.rglob("*.tmp"))


@pytest.fixture
def guarded(monkeypatch):
    """This process as one of the command line; whatever ends it at once is noted instead."""
    ended = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(_signals, "_guarding", True)
    monkeypatch.setattr(_signals, "_quit", ended.append)
    signal.signal(signal.SIGINT, _signals._end)
    yield ended
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated)],
)
def test_while_a_command_runs_signals_are_exceptions(guarded, number, error):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.raises(error), _signals.raising():
        signal.raise_signal(number)
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    assert guarded == []
    signal.raise_signal(signal.SIGINT)
    assert guarded == [130]


def test_under_nohup_the_terminal_may_go(guarded):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with _signals.raising():
        signal.raise_signal(signal.SIGHUP)


def test_ctrl_c_ends_at_once_but_while_a_command_runs(guarded, monkeypatch, command):
    """Importing the command and parsing its arguments are the start still; after it, Python only tidies up."""

    def add_arguments(parser):
        signal.raise_signal(signal.SIGINT)

    def run(args):
        assert guarded == [130]
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "_module", lambda name: SimpleNamespace(add_arguments=add_arguments, run=run))
    ended = command("doctor")
    assert (ended.status, ended.err) == (130, "wavlm-fast doctor: interrupted\n")
    assert guarded == [130]
    signal.raise_signal(signal.SIGINT)
    assert guarded == [130, 130]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_what_python_would_drop_ends_it_too(guarded, capsys, error, status):
    class Dying:
        def __del__(self):
            raise error

    with _signals.raising():
        Dying()
    assert guarded == [status]
    assert capsys.readouterr().err == ""


def test_terminated_is_a_status_of_its_own(monkeypatch, command):
    def run(args):
        raise Terminated

    monkeypatch.setattr(cli, "_module", lambda name: SimpleNamespace(add_arguments=lambda parser: None, run=run))
    ended = command("doctor")
    assert (ended.status, ended.err) == (143, "wavlm-fast doctor: terminated\n")
