"""Convolutions and linear layers, forward and backward, against the reference in float64."""

import pytest
import torch
from cases import DEVICE, DTYPES, assert_close, kernel, randn, wide

from wavlm_fast.backends.reference import TABLE as REFERENCE
from wavlm_fast.kernels import _finish_backward
from wavlm_fast.kernels._precision import conv_precision, dot_precision
from wavlm_fast.kernels._target import pretend

SUMS = 8  # sums over frames, in another order than the reference's


def compare(op, args, save=True, floor=0.0, in_order=None, packed=()):
    """Forward and backward of an op that saves what comes before its activation; `args` without `save`.

    `packed` are the arguments of packed frames, of which the reference computes one utterance after the other.

    `in_order` is the output by plain torch too, its sums one product after the other as a program adds them. What torch
    makes of a long sum depends on the CPU: some libraries keep many partial sums, and err a quarter as much.
    """
    tail = (*((True,) if save else ()), *packed)
    truth, plain = (REFERENCE[op].fn(*a, *tail) for a in (wide(args), args))
    found = kernel(op)(*args, *tail)
    truth, plain, found = ((t,) if isinstance(t, torch.Tensor) else t for t in (truth, plain, found))
    if in_order is not None:
        assert_close(in_order, truth[0], truth[0].to(in_order.dtype), tiny=16)
        plain = (max(plain[0], in_order, key=lambda p: (p.double() - truth[0]).abs().max().item()), *plain[1:])
    for f, t, p in zip(found, truth, plain, strict=True):
        assert_close(f, t, p)
    grad = randn(*found[0].shape, seed=9, dtype=args[0].dtype)
    saved = 1 if save else 0
    # The gradient is that of what was saved, as it was rounded: the rounding is the forward's error.
    given = [grad, *args[:3], plain[saved], *args[3:]]
    wanted = [isinstance(a, torch.Tensor) for a in args if a is None or isinstance(a, torch.Tensor)]
    given += [wanted, *packed]
    true, theirs = (REFERENCE[f"{op}_backward"].fn(*a) for a in (wide(given), given))
    ours = kernel(f"{op}_backward")(*given)
    for index, (o, t, p) in enumerate(zip(ours, true, theirs, strict=True)):
        try:
            assert_close(o, t, p, tiny=SUMS, floor=floor)
        except AssertionError as error:
            raise AssertionError(f"gradient {index}: {error}") from None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "C", "N", "K", "stride", "bias", "norm", "activation"),
    [
        (2, 37, 32, 32, 3, 2, True, True, "gelu"),
        (1, 36, 32, 48, 2, 2, False, False, "gelu"),
        (1, 3, 16, 16, 3, 2, True, True, "gelu_tanh"),
        (1, 40, 40, 72, 5, 3, True, True, "relu"),
        (2, 11, 16, 16, 2, 3, True, False, "none"),
        (1, 150, 24, 16, 1, 1, False, True, "none"),
        (9, 64, 16, 16, 2, 1, True, False, "relu"),  # the weight's gradient in more than one part
    ],
)
def test_strided_conv(B, T, C, N, K, stride, bias, norm, activation, dtype):
    x = randn(B, T, C, dtype=dtype)
    weight = randn(N, C, K, dtype=dtype, scale=(C * K) ** -0.5)
    vector = [randn(N, seed=i, dtype=dtype) for i in range(3)]
    args = [x, weight, vector[0] if bias else None, stride]
    args += [vector[1] + 1, vector[2]] if norm else [None, None]
    compare("strided_conv", [*args, 1e-5, activation])


def test_programs_that_take_several_tiles_of_rows(monkeypatch):
    monkeypatch.setattr(_finish_backward, "PARTS", 2)
    x, weight = randn(1, 70, 16), randn(200, 16, 1, scale=1 / 4)
    vectors = [randn(200, seed=i) for i in range(3)]
    compare("strided_conv", [x, weight, vectors[0], 1, vectors[1] + 1, vectors[2], 1e-5, "gelu"])
    compare("strided_conv", [x, weight, vectors[0], 1, None, None, 1e-5, "gelu"])


def test_tf32():
    """Where torch's setting allows it: inputs of ten bits, so errors as of fp16 inputs."""
    args = [randn(2, 37, 32), randn(32, 32, 3, scale=96**-0.5), None, 2, None, None, 1e-5, "none", False]
    truth, coarse = (REFERENCE["strided_conv"].fn(*wide(args, dtype))[0] for dtype in (torch.float64, torch.float16))
    torch.backends.cudnn.allow_tf32 = True
    found = kernel("strided_conv")(*args)[0]
    error, allowed = ((x.double() - truth).abs().max().item() for x in (found, coarse))
    assert error <= 2 * allowed
    if DEVICE == "cuda":  # the interpreter multiplies in full precision
        assert error > 1e-5


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter knows no pieces")
@pytest.mark.parametrize("norm", [True, False])
def test_bf16_pieces_are_as_exact_as_fp32(norm):
    """By the rule for fp32, on a GPU: the emulation computes such a product as one."""
    vectors = [randn(32, seed=i) for i in range(3)]
    weight = randn(32, 32, 3, scale=96**-0.5)
    with pretend("ampere"):
        assert conv_precision(torch.float32, torch.device(DEVICE)) == "bf16x6"
        norms = vectors[1:] if norm else [None, None]
        compare("strided_conv", [randn(2, 37, 32), weight, vectors[0], 2, *norms, 1e-5, "gelu"])


def test_convolutions_follow_the_setting_of_convolutions():
    """Which is not that of products, and is on unless somebody switches it off; torch's on AMD have no TF32."""
    device = torch.device("cpu")
    for products, convolutions in ((True, False), (False, True)):
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions
        assert conv_precision(torch.float32, device) == ("tf32" if convolutions else "ieee")
        assert dot_precision(torch.float32, device) == ("tf32" if products else "ieee")
        assert conv_precision(torch.float16, device) == "ieee"
        for target in ("cdna3", "cdna"):
            with pretend(target):
                assert conv_precision(torch.float32, device) == "ieee"


def test_strided_conv_with_wider_norm_parameters():
    x, weight = randn(1, 9, 16, dtype=torch.float16), randn(16, 16, 3, dtype=torch.float16)
    compare("strided_conv", [x, weight, None, 2, randn(16), None, 1e-5, "gelu"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "C", "N", "K", "dilation", "activation"),
    [
        (2, 30, 32, 48, 5, 1, "relu"),
        (1, 29, 16, 16, 3, 3, "relu"),
        (2, 7, 48, 24, 1, 1, "none"),
        (1, 7, 16, 16, 3, 3, "relu"),
    ],
)
def test_tdnn(B, T, C, N, K, dilation, activation, dtype):
    x, weight = randn(B, T, C, dtype=dtype), randn(N, K * C, dtype=dtype, scale=(C * K) ** -0.5)
    compare("tdnn", [x, weight, randn(N, dtype=dtype), K, dilation, activation], save=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "C", "groups", "K", "activation", "residual"),
    [
        (2, 33, 32, 2, 8, "gelu", True),
        (1, 1, 48, 1, 16, "gelu", True),
        (1, 130, 96, 2, 7, "none", False),
        (1, 5, 64, 4, 32, "relu", True),
    ],
)
def test_positional_conv(B, T, C, groups, K, activation, residual, dtype):
    x = randn(B, T, C, dtype=dtype)
    weight = randn(C, C // groups, K, dtype=dtype, scale=(C // groups * K) ** -0.5)
    compare("positional_conv", [x, weight, randn(C, dtype=dtype), groups, activation, residual])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("shape", [(2, 9, 32), (1, 16), (140, 80)])
def test_linear_act(shape, activation, dtype):
    x, weight = randn(*shape, dtype=dtype), randn(40, shape[-1], dtype=dtype, scale=shape[-1] ** -0.5)
    args = [x, weight, randn(40, dtype=dtype), activation]
    if activation == "none":
        truth, plain = (REFERENCE["linear_act"].fn(*a, False)[0] for a in (wide(args), args))
        return assert_close(kernel("linear_act")(*args, False)[0], truth, plain)
    return compare("linear_act", args)


@pytest.mark.parametrize("op", ["strided_conv", "tdnn", "positional_conv"])
def test_refusals(op):
    from wavlm_fast.backends.triton import TABLE

    x = randn(1, 9, 16).double()
    assert "float64" in TABLE[op].why_not(x, randn(16, 16, 3).double(), None, 1, None, None, 1e-5, "gelu", False)


def test_strided_conv_refuses_a_norm_over_many_channels():
    from wavlm_fast.backends.triton import TABLE

    args = (randn(1, 9, 16), randn(2048, 16, 3), None, 2, randn(2048), None, 1e-5, "gelu", False)
    assert "1024" in TABLE["strided_conv"].why_not(*args)
