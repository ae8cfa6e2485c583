"""What the emulated device claims to see, it sees: faults put into kernels on purpose are reported."""

import importlib.util
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import DEVICE, kernel, randn
from emulation import fused_multiply_add
from test_gated_attention import inputs

from wavlm_fast import kernels

pytestmark = pytest.mark.skipif(
    DEVICE != "cuda" or os.environ.get("WAVLM_FAST_TEST_DEVICE") != "ttsem", reason="the device is not emulated"
)


def broken(tmp_path, file, pattern, replacement):
    """The module kernels/`file`.py with one thing changed."""
    source, count = re.subn(pattern, replacement, (Path(kernels.__path__[0]) / f"{file}.py").read_text())
    assert count == 1, f"kernels/{file}.py has {pattern} {count} times"
    path = tmp_path / f"broken_{file}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"wavlm_fast.kernels.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_access_out_of_bounds_is_reported(tmp_path):
    from ttsem.sanitize import KernelFault

    args = [randn(1, 33, 8).to("cuda"), None]
    store = r"tl\.store\(dx_ptr \+ at, dx, mask=.*\)"
    module = broken(tmp_path, "stats_pool", store, "tl.store(dx_ptr + at, dx, mask=inside[None, :])")
    out = kernel("stats_pool")(*args)
    with pytest.raises(KernelFault, match="past the end of the tensor passed as `dx_ptr`"):
        module.stats_pool_backward(torch.ones(1, 16, device="cuda"), *args, out)


def test_a_race_between_programs_is_reported(tmp_path, monkeypatch):
    from ttsem.sanitize import KernelFault

    from wavlm_fast.kernels import gated_attention_backward

    args = [a.to("cuda") if isinstance(a, torch.Tensor) else a for a in inputs(1, 130, 1, 16)]
    saved = kernel("gated_attention")(*args)
    add = r'tl\.atomic_add\((\w+), (\w+), (mask=.*), sem="relaxed"\)'
    module = broken(tmp_path, "gated_attention_dbias", add, r"tl.store(\1, tl.load(\1, \3) + \2, \3)")
    monkeypatch.setattr(gated_attention_backward, "rel_bias_gradient", module.rel_bias_gradient)
    grad = randn(*args[0].shape).to("cuda")
    with pytest.raises(KernelFault, match="program instances .* both touch element"):
        kernel("gated_attention_backward")(grad, *args[:6], *saved, *args[6:], [True] * 5)


def test_memory_that_nobody_wrote_reads_as_nan(tmp_path):
    module = broken(tmp_path, "stats_pool", r"    tl\.store\(part \+ C, squares.*\n", "")
    out = module.stats_pool(randn(1, 33, 8).to("cuda"), None)
    assert not out[:, :8].isnan().any()
    assert out[:, 8:].isnan().all()


def test_memory_that_nobody_wrote_reads_as_nan_inside_ops_and_in_backward(monkeypatch):
    from wavlm_fast import ops, use_backend
    from wavlm_fast.kernels import position_gate

    seen = []

    def look(*outputs):
        def run(x, *rest):
            seen.append((x.device.type, x.new_empty(3).isnan().all().item()))
            return outputs[0] if len(outputs) == 1 else outputs

        return run

    x, parameters = randn(1, 5, 32).to("cuda").requires_grad_(), [randn(8, 16), randn(8), randn(2)]
    monkeypatch.setattr(position_gate, "position_gate", look(randn(1, 2, 5)))
    monkeypatch.setattr(position_gate, "position_gate_backward", look(*(torch.zeros_like(t) for t in (x, *parameters))))
    with use_backend("triton"):
        ops.position_gate(x, *parameters).sum().backward()
    assert seen == [("cuda", True)] * 2


def test_fused_multiply_add_rounds_once():
    from ttsem.ops import _FMA_FORMATS, _fma_scalar

    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, (3, 2000), dtype=np.uint32).view(np.float32)  # every exponent, infinities, NaN
    near = generator.standard_normal((3, 2000)).astype(np.float32)
    near[2] = -near[0] * near[1]  # sums that cancel
    edges = [0.0, -0.0, 1.0, 4097.0, 2.0**-30, 2.0**-149, 0.5, -(2.0**-149), np.inf, -np.inf, np.nan, 3.4028235e38]
    corners = np.stack(np.meshgrid(edges, edges, edges)).reshape(3, -1).astype(np.float32)
    a, b, c = np.concatenate((bits, near, corners), axis=1)
    exact = [_fma_scalar(*map(float, number), _FMA_FORMATS["f32"]) for number in zip(a, b, c)]
    found = fused_multiply_add(a, b, c)
    np.testing.assert_array_equal(found, np.array(exact, np.float32))
    np.testing.assert_array_equal(np.signbit(found[found == 0]), np.signbit(np.array(exact)[found == 0]))
