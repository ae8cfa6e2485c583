"""Wrong calls of every op and of every entry of csrc/, in a process that may die of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from some_calls import BACKWARD, OPS, call

from wavlm_fast import use_backend
from wavlm_fast.backends import cpu

HERE = Path(__file__).parent
needs_extension = pytest.mark.skipif(cpu.EXTENSION_PROBLEM is not None, reason=str(cpu.EXTENSION_PROBLEM))
SEEDS = 1200


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
    findings = [(before, line) for before, line in zip(lines, lines[1:], strict=False) if "finding" in line]
    assert findings == []


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_right_calls_are_no_wrong_calls(op, backend):
    for seed in range(5):
        with use_backend(backend):
            getattr(torch.ops.wavlm_fast, op)(*call(op, seed))


@pytest.mark.parametrize("op", BACKWARD)
def test_a_gradient_must_fit_the_output(op):
    args = call(op, 1)
    for wrong in (args[0][..., :0], args[0][None], args[0].to(torch.int64), args[0].to("meta"), None):
        with pytest.raises((ValueError, TypeError, AttributeError), match="wants|NoneType"):
            getattr(torch.ops.wavlm_fast, op)(wrong, *args[1:])


# What killed the process, or took memory without bound, or was computed all the same.
NATIVE = {
    "no output channels": lambda n: n.packed_conv(
        torch.ones(1, 5, 4), torch.empty(0), None, 0, 1, 1, 1, False, "none"
    ),
    "no stride": lambda n: n.packed_conv(torch.ones(1, 5, 4), _packed(n), None, 8, 1, 0, 1, False, "none"),
    "no taps": lambda n: n.packed_conv(torch.ones(1, 5, 4), torch.empty(0), None, 8, 0, 1, 1, False, "none"),
    "span that overflows": lambda n: n.packed_conv(
        torch.ones(1, 5, 4), n.pack_conv([torch.ones(8, 3, 4)], False), None, 8, 3, 1, 2**62, False, "none"
    ),
    "bias too short": lambda n: n.packed_conv(torch.ones(1, 5, 4), _packed(n), torch.ones(7), 8, 1, 1, 1, False, "none"),
    "many taps before a group norm": lambda n: n.waveform_conv(
        torch.ones(1, 9000), torch.ones(2, 1, 8000), n.pack_conv([torch.ones(2, 1, 8000)], False), None, 5, True, None, None, 1e-5,
        "none", False,
    ),
    "norm too short": lambda n: n.waveform_conv(
        torch.ones(1, 90), torch.ones(40, 1, 10), n.pack_conv([torch.ones(40, 1, 10)], False), None, 5, True, torch.ones(3), None, 1e-5,
        "none", False,
    ),
    "spectra without bound": lambda n: n.positional_spectra(torch.ones(1).expand(4, 4, 2**24)),
    "lengths that are no integers": lambda n: n.stats_pool(torch.ones(2, 5, 4), torch.ones(2)),
    "rows of the output that overlap": lambda n: n.matmul(torch.ones(3, 4), torch.ones(4, 5), torch.ones(5).expand(3, 5), False),
    "no heads": lambda n: n.position_gate(torch.ones(1, 5, 0), torch.ones(8, 4), torch.ones(8), torch.ones(0)),
}  # fmt: skip


def _packed(native):
    return native.pack_conv([torch.ones(8, 1, 4)], False)


@needs_extension
@pytest.mark.parametrize("wrong", NATIVE)
def test_an_entry_checks_what_it_reads(wrong):
    with pytest.raises(RuntimeError, match="expected"):
        NATIVE[wrong](torch.ops.wavlm_fast_cpu)


@needs_extension
def test_lengths_out_of_range_read_nothing_else():
    args = call("gated_attention", 3)
    B, T = args[0].shape[:2]
    args[6:8] = 0.0, None
    for beyond, valid in ((10**12, T), (-(10**12), 0)):
        given, right = ([*args[:5], torch.full((B,), n), *args[6:]] for n in (beyond, valid))
        for a, b in zip(cpu.TABLE["gated_attention"].fn(*given), cpu.TABLE["gated_attention"].fn(*right), strict=True):
            assert torch.equal(a, b)


@needs_extension
def test_a_negated_view_may_be_written_into():
    a, b, out = torch.ones(3, 4), torch.ones(4, 5), torch._neg_view(torch.zeros(3, 5))
    torch.ops.wavlm_fast_cpu.matmul(a, b, out, False)
    torch.testing.assert_close(out.resolve_neg(), a @ b)
