"""The tests of the C++ kernels once more at every lower instruction set level that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wavlm_fast.backends import cpu

FILES = sorted(map(str, Path(__file__).parent.glob("test_*_cpu.py")))


@pytest.mark.skipif("WAVLM_FAST_CPU_ISA" in os.environ, reason="this run is of one level already")
@pytest.mark.parametrize("level", cpu.isa_levels()[:-1])
def test_at_level(level):
    # The level is chosen once per process.
    environment = {**os.environ, "WAVLM_FAST_CPU_ISA": level}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
