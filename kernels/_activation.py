"""The activations that kernels fuse, and their derivatives. `NAME` is that of wavlm_fast/ops/_activation.py."""

import triton
import triton.language as tl


@triton.jit
def _normal_tail(z):
    """The normal distribution above z, for 0 <= z < 1e4.

    Its logarithm is nearly a parabola: the polynomial is the best of its degree for z times the result, which comes out
    within 6e-8. An erf of the vendor takes three times as many instructions, AMD's in branches.
    """
    p = -2.1745695448771585e-06
    p = p * z + 3.1680159736424685e-05
    p = p * z - 0.0001507912966189906
    p = p * z - 0.0002190273517044261
    p = p * z + 0.007165401708334684
    p = p * z - 0.05256251245737076
    p = p * z - 0.459187775850296
    p = p * z - 1.1511075496673584
    p = p * z - 0.9999999403953552
    return tl.exp2(p)


@triton.jit
def _size(x):
    """|x|, bounded where the tail is long 0: an infinite x would meet it as infinity times 0."""
    return tl.minimum(tl.abs(x), 16.0)


@triton.jit
def _tanh_inner(x):
    """The sigmoid of twice the argument of gelu_tanh's tanh: (1 + tanh(u)) / 2."""
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activate(x, NAME: tl.constexpr):
    if NAME == "gelu":
        size = _size(x)
        return tl.where(x < 0, 0.0, x) - size * _normal_tail(size)
    elif NAME == "gelu_tanh":
        return x * _tanh_inner(x)
    elif NAME == "relu":
        # Not max: a NaN stays.
        return tl.where(x < 0, 0.0, x)
    else:
        return x


@triton.jit
def activate_slope(x, NAME: tl.constexpr):
    if NAME == "gelu":
        tail = _normal_tail(_size(x))
        return tl.where(x < 0, tail, 1 - tail) + x * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
    elif NAME == "gelu_tanh":
        half = _tanh_inner(x)
        return half + x * half * (1 - half) * 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)
    elif NAME == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, x.dtype)
