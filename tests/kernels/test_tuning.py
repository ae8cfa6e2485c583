"""Every configuration of every kernel, and that a search spoils no result."""

import pytest
import torch
from cases import DTYPES, assert_close, kernel, randn, wide
from test_gated_attention import check as check_attention
from test_gated_attention import inputs as attention_inputs
from test_pointwise import compare as compare_pointwise
from test_products import compare as compare_products
from test_waveform_conv import check as check_waveform
from test_waveform_conv import inputs as waveform_inputs

from wavlm_fast.backends.reference import TABLE as REFERENCE
from wavlm_fast.kernels import _tuning

HALF = DTYPES[-1]  # the half precision that this device computes rightly


def attention():
    for dtype, T, D, lengths, dropout in ((HALF, 140, 64, [131], 0.0), (torch.float32, 70, 96, None, 0.2)):
        check_attention(attention_inputs(1, T, 1, D, lengths, dropout, dtype))


def far_attention():
    check_attention(attention_inputs(1, 270, 1, 16, [260], far=20, dtype=HALF))


def strided_conv():
    for dtype in (HALF, torch.float32):
        x, weight = randn(1, 150, 64, dtype=dtype), randn(48, 64, 3, dtype=dtype, scale=192**-0.5)
        vector = randn(48, dtype=dtype)
        compare_products("strided_conv", [x, weight, vector, 2, vector + 1, vector, 1e-5, "gelu"])
        compare_products("strided_conv", [x, weight, None, 2, None, None, 1e-5, "gelu"])


def positional_conv():
    x, weight = randn(1, 70, 48, dtype=HALF), randn(48, 24, 4, dtype=HALF, scale=96**-0.5)
    compare_products("positional_conv", [x, weight, randn(48, dtype=HALF), 2, "gelu", True])


def tdnn():
    weight = randn(40, 3 * 32, scale=96**-0.5)
    compare_products("tdnn", [randn(2, 150, 32), weight, randn(40), 3, 2, "relu"], save=False)


def linear_act():
    weight = randn(80, 64, dtype=HALF, scale=1 / 8)
    compare_products("linear_act", [randn(150, 64, dtype=HALF), weight, randn(80, dtype=HALF), "gelu"])


def position_gate():
    compare_pointwise("position_gate", [randn(1, 37, 2 * 64) * 3, randn(8, 64, scale=1 / 8), randn(8), randn(2) + 1])


def stats_pool():
    compare_pointwise("stats_pool", [randn(2, 150, 70) + 3, torch.tensor([150, 131])], saved=True)


def waveform_conv():
    for norm in ("none", "group", "layer"):
        check_waveform(waveform_inputs(1, 5 * 70, 20, 10, 5, norm, "gelu"))


def layer_norm():
    x, y, w, b = randn(3, 600), randn(3, 600, seed=1), randn(600), randn(600, seed=1)
    backward = x, y, x, w, 1e-5, [True] * 3
    for op, args in (("add_layer_norm", (x, y, w, b, 1e-5, True)), ("add_layer_norm_backward", backward)):
        truth, plain = REFERENCE[op].fn(*wide(args)), REFERENCE[op].fn(*args)
        for found, true, theirs in zip(kernel(op)(*args), truth, plain):
            assert_close(found, true, theirs, tiny=8)


OPS = [
    attention, far_attention, strided_conv, positional_conv, tdnn, linear_act, position_gate, stats_pool,
    waveform_conv, layer_norm,
]  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("index", range(1, _tuning.MOST))
def test_alternatives_match_float64(op, index):
    with _tuning.forced(index):
        op()


@pytest.mark.parametrize("op", [op for op in OPS if op is not far_attention], ids=lambda op: op.__name__)
def test_a_search_leaves_results_right(op, monkeypatch, tmp_path):
    """Every configuration is launched before the launch that counts, as a search does."""
    searched = []

    def measure(launches):
        for launch in launches:
            launch()
        searched.append(len(launches))
        return [float(len(launches) - index) for index in range(len(launches))]

    monkeypatch.setenv("WAVLM_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(_tuning, "_can_tune", lambda device: True)
    monkeypatch.setattr(_tuning, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for tunable in _tuning.TUNABLES:
        tunable.forget()
    try:
        op()
    finally:
        for tunable in _tuning.TUNABLES:
            tunable.forget()
    assert searched
