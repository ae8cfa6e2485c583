"""A tiny checkpoint on disk, and the command line called in this process."""

import os
from dataclasses import dataclass

import pytest
import torch
from tiny_checkpoints import tiny_config
from transformers import Wav2Vec2Config, WavLMModel

from wavlm_fast import cli, memory
from wavlm_fast.sensitive import make_sensitive

forked = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: forked.append(os.getpid()))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a WavLM checkpoint of two layers of 32 channels."""
    folder = tmp_path_factory.mktemp("tiny")
    make_sensitive(WavLMModel(tiny_config())).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_architecture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wav2vec2")
    Wav2Vec2Config().save_pretrained(folder)
    return folder


@dataclass
class Ended:
    """How a command ended and what it said."""

    status: int
    out: str
    err: str

    def sentence(self):
        """The one sentence on standard error of a command that refused its user's input."""
        assert self.status == 2, self
        assert self.err.endswith("\n"), self
        assert self.err.count("\n") == 1, self
        assert "Traceback" not in self.err
        return self.err.strip()


@pytest.fixture
def command(capsys):
    """Calls the command line: command("demo", "--model", path) -> Ended."""
    threads = torch.get_num_threads()

    def call(*arguments):
        capsys.readouterr()
        forked.clear()
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        assert not forked, f"{' '.join(map(str, arguments))} forked this process, which has run torch"
        return Ended(status, said.out, said.err)

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def no_probe(monkeypatch):
    """Measure no memory: its two processes take seconds."""
    asked = []

    def measure(provider, **options):
        asked.append((provider, options))
        return memory.Peak(3 * 2**20, 2**20)

    monkeypatch.setattr(memory, "measure", measure)
    return asked
