"""waveform_conv and its gradients, against the reference in float64."""

import pytest
import torch
from cases import DTYPES, assert_close, kernel, randn, wide

from wavlm_fast.backends.reference import TABLE as REFERENCE
from wavlm_fast.kernels import waveform_conv_backward
from wavlm_fast.kernels._target import pretend


def inputs(B, S, C, K, stride, norm, activation, bias=True, dtype=torch.float32):
    waveform = randn(B, S, dtype=dtype)
    weight = randn(C, 1, K, dtype=dtype, scale=K**-0.5)
    vectors = [randn(C, seed=i, dtype=dtype) for i in range(3)]
    norms = (None, None) if norm == "none" else (vectors[1] + 1, vectors[2])
    return [waveform, weight, vectors[0] if bias else None, stride, norm, *norms, 1e-5, activation]


def check(args, floor=0.0, packed=()):
    """`packed` are the arguments of packed samples, of which the reference computes one utterance after the other."""
    truth, plain = (REFERENCE["waveform_conv"].fn(*a, *packed) for a in (wide(args), args))
    found = kernel("waveform_conv")(*args, *packed)
    assert_close(found, truth, plain)
    grad = randn(*found.shape, seed=4, dtype=found.dtype)
    wanted = [args[i] is not None for i in (0, 1, 2, 5, 6)]
    given = [grad, *args]
    true, theirs = (REFERENCE["waveform_conv_backward"].fn(*a, wanted, *packed) for a in (wide(given), given))
    ours = kernel("waveform_conv_backward")(*given, wanted, *packed)
    for index, (o, t, p) in enumerate(zip(ours, true, theirs, strict=True)):
        # Group norm takes the bias away: its gradient is zero but for rounding.
        cancels = index == 2 and args[4] == "group"
        try:
            assert_close(o, t, p, tiny=16, floor=1e-4 if cancels else floor)
        except AssertionError as error:
            raise AssertionError(f"gradient {index}: {error}") from None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["none", "group", "layer"])
@pytest.mark.parametrize(
    ("B", "S", "C", "K", "stride", "activation"),
    [(2, 200, 32, 10, 5, "gelu"), (1, 10, 16, 10, 5, "gelu"), (2, 97, 40, 7, 3, "relu"), (1, 61, 8, 3, 4, "gelu_tanh")],
)
def test_matches_float64(B, S, C, K, stride, norm, activation, dtype):
    args = inputs(B, S, C, K, stride, norm, activation, dtype=dtype)
    floor = 0.0
    if norm == "group" and K == S:
        # A single frame has no variance: its rstd is eps ** -0.5, which multiplies the rounding of the K-term sum.
        terms = args[1][:, 0].double().abs() @ args[0][0].double().abs()
        floor = 1e-5**-0.5 * K / 2 * torch.finfo(torch.float32).eps * terms.max().item()
    check(args, floor)


@pytest.mark.parametrize("norm", ["none", "group", "layer"])
def test_programs_that_take_several_tiles(norm, monkeypatch):
    monkeypatch.setattr(waveform_conv_backward, "PARTS", 2)
    check(inputs(2, 5 * 70 + 5, 24, 10, 5, norm, "gelu"))


@pytest.mark.parametrize("S", [5 * 70 + 5, 10 + 5 * 7])
def test_layer_norm_of_fewer_frames_at_a_time(S):
    """As on sm_100."""
    with pretend("blackwell"):
        check(inputs(2, S, 24, 10, 5, "layer", "gelu"))


@pytest.mark.parametrize("norm", ["none", "group", "layer"])
def test_more_channels_than_a_tile_of_them(norm):
    check(inputs(1, 60, 130, 10, 5, norm, "gelu"))


def test_more_than_one_part_of_the_gram_matrix():
    check(inputs(1, 5 * 600 + 5, 16, 10, 5, "group", "gelu", bias=False))


@pytest.mark.parametrize(("gain", "offset"), [(1e3, 0.0), (1e-4, 0.0), (1.0, 100.0), (0.0, 0.0), (0.0, 0.5)])
def test_group_norm_of_loud_quiet_offset_and_silent_audio(gain, offset):
    args = inputs(1, 800, 16, 10, 5, "group", "gelu")
    args[0] = args[0] * gain + offset
    truth, plain = (REFERENCE["waveform_conv"].fn(*a) for a in (wide(args), args))
    found = kernel("waveform_conv")(*args)
    assert_close(found, truth, plain)


def test_group_norm_of_smooth_audio_through_a_filter_that_takes_it_away():
    args = inputs(1, 3000, 16, 10, 5, "group", "gelu")
    args[0] = torch.sin(torch.arange(3000) * 0.002)[None] + 1e-3 * args[0]
    args[1] = args[1] - args[1].mean(-1, keepdim=True)
    truth, plain = (REFERENCE["waveform_conv"].fn(*a) for a in (wide(args), args))
    assert_close(kernel("waveform_conv")(*args), truth, plain)


def test_refusals():
    from wavlm_fast.backends.triton import TABLE

    refuse = TABLE["waveform_conv"].why_not
    args = inputs(1, 200, 16, 10, 5, "group", "gelu")
    assert refuse(*args) is None
    assert "15 taps" in refuse(*inputs(1, 200, 16, 16, 5, "group", "gelu"))
    assert "1024 channels" in refuse(*inputs(1, 200, 2048, 10, 5, "none", "gelu"))
    assert "float64" in refuse(*wide(args))
