"""What the tests of the kernels share."""

import os
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode

from wavlm_fast import backends

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# The interpreter multiplies bfloat16 wrongly; everything else does not.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


class Poisoned(TorchFunctionMode):
    """Memory that is reserved holds NaN until it is written."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function in (torch.empty, torch.empty_like, torch.Tensor.new_empty) and found.is_floating_point():
            found.fill_(float("nan"))
        return found


def kernel(op):
    """The Triton implementation of `op`, on tensors that it is given on the CPU.

    Interpreted, its outputs are poisoned before; the emulated device knows unwritten memory by itself.
    """
    implementation = backends.load("triton").TABLE[op]

    def run(*args):
        moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) and a.device.type != DEVICE else a for a in args]
        assert implementation.why_not(*moved) is None
        with Poisoned() if DEVICE == "cpu" else nullcontext():
            found = implementation.fn(*moved)
        return found.cpu() if isinstance(found, torch.Tensor) else tuple(f.cpu() for f in found)

    return run


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def wide(args, dtype=torch.float64):
    return [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def assert_close(found, truth, plain, factor=2.0, tiny=4.0, floor=0.0):
    """`found` is no further from the truth than `factor` times plain torch is, plus `tiny` roundings of its dtype.

    Sums differ in their order: the tiny part is in roundings of the largest value. `floor` is for values that cancel.
    """
    assert found.shape == truth.shape
    assert found.dtype == plain.dtype
    truth = truth.double()
    assert torch.equal(found.isnan(), truth.isnan())
    keep = ~truth.isnan() & ~truth.isinf()
    assert torch.equal(found[truth.isinf()].double(), truth[truth.isinf()])
    if not keep.any():
        return
    error = (found.double() - truth)[keep].abs().max().item()
    theirs = (plain.double() - truth)[keep].abs().max().item()
    allowed = factor * theirs + floor
    allowed += tiny * torch.finfo(found.dtype).eps * truth[keep].abs().max().item()
    assert error <= allowed, f"error {error:.3g}, plain torch {theirs:.3g}, allowed {allowed:.3g}"
