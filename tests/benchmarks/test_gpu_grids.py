"""No launch asks for more programs than a grid can have, an hour of audio and a batch of 256 included."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("triton")

from wavlm_fast.benchmarks.gpu.cases import DTYPES, MODELS, cases

LIMITS = (2**31 - 1, 65_535, 65_535)  # of CUDA; HIP's are no smaller
SIZES = {"an hour": (1, 3600 * 16_000), "a batch of 256": (256, 160_000)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_every_grid_is_within_the_limits(model, dtype, size):
    batch, samples = SIZES[size]
    launches = [
        launch for case in cases(model, DTYPES[dtype], batch=batch, samples=samples) for launch in case.launches()
    ]
    assert len(launches) > 40
    for launch in launches:
        assert all(1 <= n <= limit for n, limit in zip(launch.grid, LIMITS, strict=False)), (launch.kernel, launch.grid)



@pytest.mark.parametrize("model", MODELS)
def test_ten_seconds_fill_a_gpu(model):
    """One program and more for each of 132 multiprocessors, of what is short and of every layer."""
    names = {"position_gate_fwd_kernel", "position_gate_bwd_kernel", "add_layer_norm_fwd_kernel",
             "add_layer_norm_bwd_kernel"}  # fmt: skip
    found = {launch.name: math.prod(launch.grid) for case in cases(model, DTYPES["bf16"], batch=1)
             for launch in case.launches() if launch.name in names}  # fmt: skip
    assert set(found) == names
    assert min(found.values()) >= 132, found
