"""Clients of WavLM from the package index, with `accelerate` and without.

`make test-clients` makes an environment that has them; in any other nothing of this folder is collected.
"""

from __future__ import annotations

import random
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

CLIENTS = ("pyannote", "s3prl", "speechbrain", "torchaudio")
PRESENT = all(map(find_spec, CLIENTS))

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "models")]
pytest.register_assert_rewrite("wavlm_cases", "held_to_truth")


def pytest_ignore_collect(collection_path, config):
    return True if collection_path.name.startswith("test_") and not PRESENT else None


def pytest_configure(config):
    for theirs in (".*weight_norm. is deprecated:FutureWarning", "Support for mismatched key_padding_mask"):
        config.addinivalue_line("filterwarnings", f"ignore:{theirs}")


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    """Whoever asks for published weights is told at once that there are none."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
