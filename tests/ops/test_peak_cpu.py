"""The measured peak, which benchmarks divide by."""

import math

import pytest
import torch

from wavlm_fast.backends import cpu

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))


def test_peaks():
    single, half = (torch.ops.wavlm_fast_cpu.peak(dtype) for dtype in ("float32", "bfloat16"))
    assert 1e8 < single < 1e14
    if cpu.isa() in cpu.extension.PAIRS:
        # The instruction does twice the work in at most the time of two; CPUs with matrix units issue it less often.
        assert half > (0.2 if torch.cpu._is_amx_tile_supported() else 1.5) * single
    else:
        assert math.isnan(half)


def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="expected float32 or bfloat16, got float64"):
        torch.ops.wavlm_fast_cpu.peak("float64")
