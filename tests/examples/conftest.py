"""The examples as modules, the tiny models of the documentation's pages, and recordings."""

import importlib.util
import sys
from pathlib import Path

import pytest
import soundfile

from wavlm_fast import audio

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "docs"))
from doc_hub import write_hub  # noqa: E402


@pytest.fixture(scope="session")
def example():
    """example("diarization") -> examples/diarization.py as a module."""
    loaded = {}

    def load(name):
        if name not in loaded:
            spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
            loaded[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """hub("microsoft/wavlm-base-plus-sv") -> the folder of a tiny model that stands for it."""
    cache = tmp_path_factory.mktemp("hub")
    write_hub(cache)
    return lambda name: str(next(cache.glob(f"models--{name.replace('/', '--')}/snapshots/*")))


@pytest.fixture(scope="session")
def speech():
    """`[S]` float32, 7.1 s at 16 kHz."""
    return audio.load(audio.clip())[0].numpy()


@pytest.fixture
def corpus(tmp_path, speech):
    """A tree of five short recordings."""
    spans = {"anna/1": (0.5, 1.5), "anna/2": (2.0, 2.8), "ben/3": (3.0, 4.2), "ben/4": (4.0, 5.1), "5": (5.0, 6.3)}
    for name, (begin, end) in spans.items():
        file = tmp_path / "corpus" / f"{name}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, speech[int(begin * audio.RATE) : int(end * audio.RATE)], audio.RATE)
    return tmp_path / "corpus"
