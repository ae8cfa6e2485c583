"""The tests of the C++ kernels once more at every lower instruction set level that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wavlm_fast.backends import cpu

HERE = Path(__file__).parent
KERNELS = [*HERE.glob("test_*_cpu.py"), HERE / "test_encoder_layer.py", HERE / "test_feature_encoder.py"]
TESTS = ("pytest", "-q", "-p", "no:cacheprovider", *map(str, KERNELS))
PARITY = ("wavlm_fast", "parity", "--backend", "cpu", "--quick")


@pytest.mark.skipif("WAVLM_FAST_CPU_ISA" in os.environ, reason="this run is of one level already")
@pytest.mark.parametrize("level", [level for level in cpu.isa_levels() if level != cpu.isa()])
@pytest.mark.parametrize("command", [TESTS, PARITY], ids=("tests", "parity"))
def test_at_level(level, command):
    # The level is chosen once per process.
    environment = {**os.environ, "WAVLM_FAST_CPU_ISA": level}
    run = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
