"""The Triton kernels against float64, on whatever runs them.

Under TRITON_INTERPRET=1 they run on CPU tensors, otherwise on the device "cuda": with WAVLM_FAST_TEST_DEVICE=cuda a
real one, with WAVLM_FAST_TEST_DEVICE=ttsem the one of emulation.py. Triton reads its flag when a kernel is defined, so
tests/test_kernels_interpreted.py runs this folder in processes of its own, and a plain pytest run leaves it alone.
"""

import contextlib
import os

import pytest
import torch
from emulation import emulated

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = not INTERPRETED and os.environ.get("WAVLM_FAST_TEST_DEVICE") == "ttsem"

session = pytest.StashKey()


def pytest_ignore_collect(collection_path, config):
    if INTERPRETED or EMULATED or os.environ.get("WAVLM_FAST_TEST_DEVICE") == "cuda":
        return None
    return True if collection_path.name.startswith("test_") else None


def pytest_configure(config):
    if EMULATED:
        stack = contextlib.ExitStack()
        config.stash[session] = stack.enter_context(emulated())
        config.add_cleanup(stack.close)


@pytest.fixture(autouse=True)
def every_launch_is_checked(request):
    """A launch of millions of accesses is not searched for races: the shapes of these tests stay below that."""
    if not EMULATED:
        yield
        return
    before = request.config.stash[session].races_unchecked
    yield
    assert request.config.stash[session].races_unchecked == before, "a launch too large to be searched for races"


@pytest.fixture(autouse=True)
def tf32_off():
    """Errors of float32 are those of float32; the tests of TF32 switch it on."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield
    for setting, allowed in zip(settings, before, strict=True):
        setting.allow_tf32 = allowed
