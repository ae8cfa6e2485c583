"""The C++ add_layer_norm at every instruction set level, and the Triton one under the interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wavlm_fast.backends import cpu, triton

CASES = Path(__file__).with_name("add_layer_norm_cases.py")
LEVELS = ("default", "avx2", "avx512", "avx512_bf16", "neon_bf16")
needs_extension = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))


def compare(backend, **environment):
    """The comparisons of add_layer_norm_cases.py in a process of its own."""
    run = subprocess.run(
        [sys.executable, str(CASES), backend],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_within(rows):
    assert rows
    assert not [row for row in rows if not (row["error"] <= row["allowed"] and row["dtype"])]


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
def test_cpp_matches_float64(level):
    if level not in cpu.isa_levels():
        pytest.skip(f"no {level} in this extension on this CPU")
    assert_within(compare("cpu", WAVLM_FAST_CPU_ISA=level))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_matches_float64():
    assert_within(compare("triton", TRITON_INTERPRET="1"))


def test_interpreter_refuses_bfloat16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.randn(2, 8)
    w = torch.ones(8)
    implementation = triton.TABLE["add_layer_norm"]
    assert implementation.why_not(x, x, w, w, 1e-5, True) is None
    assert "bfloat16" in implementation.why_not(*(t.bfloat16() for t in (x, x, w, w)), 1e-5, True)


@needs_extension
class TestCpp:
    forward = staticmethod(lambda *args: cpu.TABLE["add_layer_norm"].fn(*args, 1e-5, True))
    backward = staticmethod(lambda *args: cpu.TABLE["add_layer_norm_backward"].fn(*args, 1e-5, [True] * 3))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_strided_inputs(self, dtype):
        x, residual = torch.randn(2, 24, 10, 2).to(dtype)[..., 0].transpose(1, 2).unbind(0)
        weight, bias = torch.randn(2, 24, 2).to(dtype)[..., 0]
        found = self.forward(x, residual, weight, bias)
        wanted = self.forward(*(t.contiguous() for t in (x, residual, weight, bias)))
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, wanted, strict=True))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_bad_row_stays_in_its_row(self, bad, dtype):
        x, residual = torch.randn(2, 5, 33).to(dtype)
        weight, bias = torch.randn(2, 33).to(dtype)
        wanted = self.forward(x, residual, weight, bias)
        x[2, 32] = bad
        found = self.forward(x, residual, weight, bias)
        others = [0, 1, 3, 4]
        assert torch.equal(found[0], x + residual) or bad != bad
        assert found[0][2, 32].isnan() if bad != bad else found[0][2, 32] == bad
        assert torch.equal(found[0][others], wanted[0][others])
        assert torch.equal(found[1][others], wanted[1][others])
        assert found[1][2].isnan().any()

    def test_bfloat16_rounds_as_torch(self):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        x = bits.view(torch.bfloat16).view(-1, 256)
        for residual in (torch.zeros_like(x), x.flip(0), torch.randn(x.shape).bfloat16()):
            found, _ = self.forward(x, residual, torch.ones(256), torch.zeros(256))
            torch.testing.assert_close(found, x + residual, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_same_bits_for_any_number_of_threads(self, dtype):
        x, residual, grad_sum, grad_normed = torch.randn(4, 301, 256).to(dtype)
        weight, bias = torch.randn(2, 256).to(dtype)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                total, normed = self.forward(x, residual, weight, bias)
                results.append((total, normed, *self.backward(grad_sum, grad_normed, total, weight)))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_fp32_weights_with_bfloat16_inputs(self):
        x = torch.randn(3, 16).bfloat16()
        weight, bias = torch.randn(2, 16)
        total, normed = self.forward(x, x, weight, bias)
        assert normed.dtype == torch.bfloat16
        _, dweight, dbias = self.backward(x, x, total, weight)
        assert dweight.dtype == dbias.dtype == torch.float32

    def test_the_entry_says_what_it_wanted(self):
        x, w = torch.randn(3, 8), torch.ones(8)
        with pytest.raises(RuntimeError, match=r"expected residual of Float \[3, 8\], got Float \[3, 7\]"):
            self.forward(x, torch.randn(3, 7), w, w)
        with pytest.raises(RuntimeError, match=r"expected weight and bias of \[8\], got \[7\]"):
            self.forward(x, x, w, torch.ones(7))
        with pytest.raises(RuntimeError, match="expected float32 or bfloat16, got Double"):
            self.forward(x.double(), x.double(), w, w)
