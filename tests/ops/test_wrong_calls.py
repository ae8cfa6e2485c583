"""Wrong calls of every op and of every entry of csrc/, in a process that may die of them."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from some_calls import BACKWARD, OPS, any_call, call

from wavlm_fast import use_backend
from wavlm_fast.backends import cpu

HERE = Path(__file__).parent
needs_extension = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))
SEEDS = 1000


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux limits it")
def test_wrong_calls_are_refused(tmp_path):
    """As the reference refuses them, if they are wrong for it; and whatever the call, the process lives on."""
    report = tmp_path / "report.jsonl"
    command = [sys.executable, str(HERE / "wrong_calls.py"), "0", str(SEEDS), str(report)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    assert run.returncode == 0, f"died of {lines[-1:]}: {run.stderr[-2000:]}"
    assert lines[-1] == {"done": SEEDS}
    findings = [(before, line) for before, line in pairwise(lines) if "finding" in line]
    assert findings == []


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_right_calls_are_no_wrong_calls(op, backend):
    for seed in range(8):
        with use_backend(backend):
            getattr(torch.ops.wavlm_fast, op)(*any_call(op, seed))


@pytest.mark.parametrize("op", BACKWARD)
def test_a_gradient_must_fit_the_output(op):
    args = call(op, 1)
    for wrong in (args[0][..., :0], args[0][None], args[0].to(torch.int64), args[0].to("meta"), None):
        with pytest.raises((ValueError, TypeError, AttributeError), match="wants|NoneType"):
            getattr(torch.ops.wavlm_fast, op)(wrong, *args[1:])


def _packed(*shape):
    return torch.ops.wavlm_fast_cpu.pack_conv([torch.ones(shape)], False)


def _waveform_conv(taps, norm_weight=None):
    weight = torch.ones(40, 1, taps)
    tail = (None, 5, True, norm_weight, None, 1e-5, "none", False)
    return torch.ones(1, taps + 80), weight, _packed(40, 1, taps), *tail


FRAMES = torch.ones(1, 5, 4)
# What killed the process, or took memory without bound, or was computed all the same.
WRONG = {
    "no output channels": ("packed_conv", lambda: (FRAMES, torch.empty(0), None, 0, 1, 1, 1, False, "none")),
    "no stride": ("packed_conv", lambda: (FRAMES, _packed(8, 1, 4), None, 8, 1, 0, 1, False, "none")),
    "no taps": ("packed_conv", lambda: (FRAMES, torch.empty(0), None, 8, 0, 1, 1, False, "none")),
    "a span that overflows": ("packed_conv", lambda: (FRAMES, _packed(8, 3, 4), None, 8, 3, 1, 2**62, False, "none")),
    "a short bias": ("packed_conv", lambda: (FRAMES, _packed(8, 1, 4), torch.ones(7), 8, 1, 1, 1, False, "none")),
    "many taps before a group norm": ("waveform_conv", lambda: _waveform_conv(8000)),
    "a short norm": ("waveform_conv", lambda: _waveform_conv(10, torch.ones(3))),
    "spectra without bound": ("positional_spectra", lambda: (torch.ones(1).expand(4, 4, 2**24),)),
    "lengths that are no integers": ("stats_pool", lambda: (torch.ones(2, 5, 4), torch.ones(2))),
    "rows that overlap": ("matmul", lambda: (torch.ones(3, 4), torch.ones(4, 5), torch.ones(5).expand(3, 5), False)),
    "no heads": ("position_gate", lambda: (torch.ones(1, 5, 0), torch.ones(8, 4), torch.ones(8), torch.ones(0))),
}


@needs_extension
@pytest.mark.parametrize("wrong", WRONG)
def test_an_entry_checks_what_it_reads(wrong):
    name, args = WRONG[wrong]
    with pytest.raises(RuntimeError, match="expected"):
        getattr(torch.ops.wavlm_fast_cpu, name)(*args())


@needs_extension
def test_lengths_out_of_range_read_nothing_else():
    args = call("gated_attention", 3)
    B, T = args[0].shape[:2]
    args[6:8] = 0.0, None
    for beyond, valid in ((10**12, T), (-(10**12), 0)):
        given, right = ([*args[:5], torch.full((B,), n), *args[6:]] for n in (beyond, valid))
        for a, b in zip(cpu.TABLE["gated_attention"].fn(*given), cpu.TABLE["gated_attention"].fn(*right), strict=True):
            assert torch.equal(a, b)


SHORT_OF_MEMORY = """
import resource, torch
from pathlib import Path
from wavlm_fast.backends import cpu
assert cpu.extension.problem() is None  # it is loaded
torch.set_num_threads(2)
def call(weight):
    return torch.ops.wavlm_fast_cpu.positional_conv(x, weight, None, None, "none", False, False)
weight, x = torch.ones(8, 4, 2**17), torch.ones(1, 5, 8)  # a task's spectra take 64 MB
call(weight[:, :, :8])  # the threads are there
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**25
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    call(weight)
except MemoryError as error:
    print(error)
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux limits it")
def test_what_a_task_throws_arrives():
    run = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=True)
    assert run.stdout == "std::bad_alloc\n"


@needs_extension
def test_a_negated_view_may_be_written_into():
    a, b, out = torch.ones(3, 4), torch.ones(4, 5), torch._neg_view(torch.zeros(3, 5))
    torch.ops.wavlm_fast_cpu.matmul(a, b, out, False)
    torch.testing.assert_close(out.resolve_neg(), a @ b)
