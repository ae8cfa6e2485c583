"""The activations that kernels fuse, and their derivatives. `NAME` is that of wavlm_fast/ops/_activation.py."""

import triton
import triton.language as tl


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _tanh_inner(x):
    """The sigmoid of twice the argument of gelu_tanh's tanh: (1 + tanh(u)) / 2."""
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activate(x, NAME: tl.constexpr):
    if NAME == "gelu":
        return x * _normal_cdf(x)
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
        return _normal_cdf(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        half = _tanh_inner(x)
        return half + x * half * (1 - half) * 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)
    elif NAME == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, x.dtype)
