"""What the tests of the C++ kernels ask of every op: no worse than plain torch, the same for any number of threads."""

from __future__ import annotations

import torch

from wavlm_fast.backends.cpu import TABLE
from wavlm_fast.backends.reference import TABLE as REFERENCE


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def doubled(args):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def assert_no_worse(name, found, plain, truth, floor=0.0):
    """Each output: err(ours) <= 2 err(plain) + 4 units in the last place of its largest value + `floor`."""
    for n, (ours, theirs, true) in enumerate(zip(found, plain, truth, strict=True)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.is_contiguous()
        assert torch.equal(ours.isnan(), true.isnan())
        if true.numel() == 0:
            continue
        unit = max(torch.finfo(ours.dtype).eps, 2**-23)  # float32 inside, whatever a gradient is handed back in
        ours, theirs, true = (x.double().nan_to_num(0.0) for x in (ours, theirs, true))
        allowed = 2 * (theirs - true).abs().max() + 4 * unit * true.abs().max() + floor
        error = (ours - true).abs().max()
        assert error <= allowed, f"output {n} of {name}: error {error:.2e}, allowed {allowed:.2e}"


def check(op, *args, floor=0.0):
    """The outputs of the C++ op, no worse than the reference's."""
    found, plain = as_tuple(TABLE[op].fn(*args)), as_tuple(REFERENCE[op].fn(*args))
    assert_no_worse(op, found, plain, as_tuple(REFERENCE[op].fn(*doubled(args))), floor)
    return found if len(found) > 1 else found[0]


def check_threads(op, *args):
    """The same bits on one, two and three threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(as_tuple(TABLE[op].fn(*args)))
    finally:
        torch.set_num_threads(before)
    for threads, other in enumerate(results[1:], 2):
        for n, (a, b) in enumerate(zip(results[0], other, strict=True)):
            off = (a != b).nonzero()
            assert torch.equal(a, b), (
                f"output {n} of {op} {list(a.shape)} on {threads} threads is another in {len(off)} places from "
                f"{off[0].tolist()} to {off[-1].tolist()}: {b[tuple(off[0])]} for {a[tuple(off[0])]}"
            )
