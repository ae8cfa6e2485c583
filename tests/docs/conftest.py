"""A place for pages to run in: tiny models under the real ids, a folder with audio, `wavlm-fast` on the PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from doc_blocks import ROOT
from doc_server import ask

HERE = Path(__file__).parent
_START = 120  # seconds
# Stands for the console script: the same command line, in a process forked from one that has imported everything.
_COMMAND = """#!{python} -IS
import os, sys
sys.path.insert(0, {here!r})
from doc_server import ask
words, folder = sys.argv[1:], os.getcwd()
sys.exit(ask({address!r}, {{"command": words, "folder": folder, "environment": dict(os.environ)}}))
"""


class Ran(NamedTuple):
    """How a page ended."""

    status: int
    out: str
    err: str


@dataclass
class Place:
    """Runs pages."""

    address: str
    template: Path
    folders: pytest.TempPathFactory

    def run(self, page: Path) -> Ran:
        """Run a page in a fresh copy of the folder that pages find."""
        folder = self.folders.mktemp(page.stem)
        shutil.copytree(self.template, folder, dirs_exist_ok=True)
        with open(os.devnull) as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            streams = (nothing.fileno(), out.fileno(), err.fileno())
            status = ask(self.address, {"page": str(page), "folder": str(folder)}, streams)
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode(errors="replace"))
        return Ran(status, *said)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Where pages run, each in a fresh copy of the same folder."""
    # A socket's name may not be as long as the names of pytest's folders can be.
    with tempfile.TemporaryDirectory(prefix="pages", dir="/tmp") as short:
        address = f"{short}/socket"
        top = tmp_path_factory.mktemp("place")
        programs, home, template = (top / name for name in ("programs", "home", "template"))
        for folder in (programs, home, template):
            folder.mkdir()
        script = programs / "wavlm-fast"
        script.write_text(_COMMAND.format(python=sys.executable, here=str(HERE), address=address))
        script.chmod(0o755)
        server = subprocess.Popen(
            [sys.executable, HERE / "doc_server.py", address, template],
            env=_environment(programs, home),
            stdin=subprocess.DEVNULL,
        )
        try:
            _wait(server, address)
            yield Place(address, template, tmp_path_factory)
        finally:
            server.kill()
            server.wait()


def _environment(programs: Path, home: Path) -> dict[str, str]:
    """That of a user without a network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "PYTEST_"))}
    return kept | {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "WAVLM_FAST_CACHE_DIR": str(home / "wavlm_fast"),
        "MPLBACKEND": "agg",
        "COLUMNS": "120",
    }


def _wait(server: subprocess.Popen, address: str) -> None:
    until = time.monotonic() + _START
    while not os.path.exists(address):
        assert server.poll() is None, f"the process that runs pages ended with status {server.returncode}"
        assert time.monotonic() < until, f"the process that runs pages is not there after {_START} s"
        time.sleep(0.05)
