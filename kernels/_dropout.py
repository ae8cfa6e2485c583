"""The attention dropout's counter-based hash, as wavlm_fast/ops/_dropout.py defines it."""

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed_ptr, row):
    """The hash of the seed and of each row, a row being (b·H + h)·T + i."""
    seed = tl.load(seed_ptr).to(tl.uint32)
    return _mix(seed + _mix(row.to(tl.uint32)))


@triton.jit
def keep(row_key, key_frame, threshold):
    """Whether weights are kept, of shapes that broadcast; `threshold` is floor(p·2**24)."""
    u = _mix(row_key + key_frame.to(tl.uint32) * 0x9E3779B9)
    return (u >> 8) >= threshold.to(tl.uint32)
