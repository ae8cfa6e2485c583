"""The Triton kernels against float64, on whatever runs them.

Under TRITON_INTERPRET=1 they run on CPU tensors, otherwise on the device "cuda": a real one, or one that ttsem
emulates. The flag is read when a kernel is defined, so tests/test_kernels_interpreted.py runs this folder in processes
of its own, and a plain pytest run leaves it alone.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path, config):
    if INTERPRETED or os.environ.get("WAVLM_FAST_TEST_DEVICE") == "cuda":
        return None
    return True if collection_path.name.startswith("test_") else None


@pytest.fixture(autouse=True)
def tf32_off():
    """Errors of float32 are those of float32; the tests of TF32 switch it on."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
