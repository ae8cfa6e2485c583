"""The device that ttsem emulates: kernels for "cuda" run on the CPU, from the compiler's own IR.

An access out of bounds, a race between programs or an undefined result raises `ttsem.sanitize.KernelFault` in the
launch, and memory that nobody wrote reads as NaN.
"""

import contextlib

import numpy as np
from torch.overrides import _get_current_function_mode

from wavlm_fast import backends


@contextlib.contextmanager
def emulated():
    """What `python -m ttsem.sanitize pytest` does around a run, in this process: xdist's workers are others."""
    from triton import knobs
    from ttsem import ops, sanitize

    exact = ops.OPS["math.fma"]

    def fma(interp, op, args):
        single = all(np.asarray(a).dtype == np.float32 for a in args)
        return [fused_multiply_add(*args)] if single else exact(interp, op, args)

    with sanitize.session() as session, knobs.runtime.scope(), replaced(ops.OPS, "math.fma", fma):
        knobs.runtime.add_stages_inspection_hook = stop_at_ttir
        mode = _get_current_function_mode()
        choose = backends.choose
        backends.choose = lambda op, args: _choose_in(mode, choose, op, args)
        try:
            yield session
        finally:
            backends.choose = choose


def stop_at_ttir(backend=None, stages=None, *settings):
    """Compile to the IR that is run, and no further: machine code of fp32 products takes minutes."""
    if stages is None:
        return "ttir", "ttir"  # what the compiler's cache knows such kernels by

    def empty_binary(module, metadata):
        metadata.update(name="", shared=0)
        return b""

    for name in stages.keys() - {"ttir"}:
        del stages[name]
    stages["cubin"] = empty_binary
    return None


@contextlib.contextmanager
def replaced(table, key, value):
    before = table[key]
    table[key] = value
    try:
        yield
    finally:
        table[key] = before


def _choose_in(mode, choose, op, args):
    """ttsem shows tensors on its device, and fills new memory with NaN, in a mode of torch's that is off inside
    registered ops and in backward passes: choose and run kernels in it all the same.
    """
    with mode:
        choice = choose(op, args)

    def run(*args):
        with mode:
            return choice.fn(*args)

    return choice._replace(fn=run)


def fused_multiply_add(a, b, c):
    """a · b + c of float32 arrays, rounded once: what ttsem computes in fractions, one element at a time."""
    with np.errstate(all="ignore"):
        product = np.multiply(a, b, dtype=np.float64)  # exact
        total = np.asarray(product + c)
        # What the sum was rounded by (Knuth's two-sum). Where that is not zero, the odd one of the two doubles around
        # the exact sum rounds to float32 as the exact sum does.
        back = total - product
        error = (product - (total - back)) + (c - back)
        inexact = (error != 0) & np.isfinite(total) & (total.view(np.int64) % 2 == 0)
        return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)
