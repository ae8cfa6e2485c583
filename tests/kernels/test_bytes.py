"""The formulas of benchmarks/gpu/launch_formulas.py against what the interpreter counts, launch by launch."""

from functools import cache

import pytest
import torch
from cases import DEVICE, randn

from wavlm_fast.backends.triton import TABLE
from wavlm_fast.kernels._tuning import forced

if DEVICE != "cpu":
    pytest.skip("the interpreter counts", allow_module_level=True)

from wavlm_fast.benchmarks.gpu.counted_bytes import counting
from wavlm_fast.benchmarks.gpu.launch_bytes import of_launch
from wavlm_fast.benchmarks.gpu.launch_formulas import FORMULAS

HALF = torch.float16
EVERY = 10**9  # programs in one wave: every address counts once per launch


def waveform(B, S, C, norm, dtype=HALF):
    vectors = None if norm == "none" else randn(C, seed=1, dtype=dtype), randn(C, seed=2, dtype=dtype)
    bias = None if norm == "group" else randn(C, seed=3, dtype=dtype)
    return randn(B, S, dtype=dtype), randn(C, 1, 10, dtype=dtype), bias, 5, norm, *vectors, 1e-5, "gelu"


def strided(B, T, C, N, K, norm):
    bias, *vectors = (randn(N, seed=i, dtype=HALF) for i in range(3))
    norms = vectors if norm else (None, None)
    return randn(B, T, C, dtype=HALF), randn(N, C, K, dtype=HALF), bias, 2, *norms, 1e-5, "gelu"


def pool(B, T, C):
    return randn(B, T, C, dtype=HALF), torch.full((B,), T)


def gate(B, T, H, D):
    x, const = randn(B, T, H * D, dtype=HALF), randn(H, dtype=HALF)
    return x, randn(8, D, dtype=HALF), randn(8, dtype=HALF), const


def frames(*shape, seed=0):
    return randn(*shape, seed=seed, dtype=HALF)


TRUE = [True] * 5
ONLY_X = [True, False, False, False, False]
CASES = {
    "waveform_conv group": ("waveform_conv", waveform(2, 5 * 700 + 5, 24, "group")),
    "waveform_conv layer fp32": ("waveform_conv", waveform(1, 5 * 130 + 8, 520, "layer", torch.float32)),
    "waveform_conv none": ("waveform_conv", waveform(2, 400, 512, "none")),
    "waveform_conv_backward group": (
        "waveform_conv_backward",
        (frames(2, 240, 72), *waveform(2, 5 * 241 + 2, 72, "group"), [True, True, False, True, True]),
    ),
    "waveform_conv_backward layer": (
        "waveform_conv_backward", (frames(1, 19, 40), *waveform(1, 101, 40, "layer"), TRUE),
    ),
    "add_layer_norm": (
        "add_layer_norm", (frames(3, 7, 70), frames(3, 7, 70), frames(70), frames(70, seed=1), 1e-5, True),
    ),
    "add_layer_norm without sum": (
        "add_layer_norm", (frames(19, 1100), frames(19, 1100), frames(1100), frames(1100, seed=1), 1e-5, False),
    ),
    "add_layer_norm_backward": (
        "add_layer_norm_backward", (frames(300, 40), frames(300, 40), frames(300, 40), frames(40), 1e-5, TRUE[:3]),
    ),
    "add_layer_norm_backward of x": (
        "add_layer_norm_backward", (frames(300, 40), frames(300, 40), frames(300, 40), frames(40), 1e-5, ONLY_X[:3]),
    ),
    "add_layer_norm_backward of the norm": (
        "add_layer_norm_backward",
        (frames(300, 40)[:0, 0], frames(300, 40), frames(300, 40), frames(40), 1e-5, TRUE[:3]),
    ),
    "position_gate": ("position_gate", gate(2, 37, 3, 48)),
    "position_gate_backward": ("position_gate_backward", (randn(2, 3, 37), *gate(2, 37, 3, 48), TRUE[:4])),
    "position_gate_backward of x": ("position_gate_backward", (randn(2, 3, 37), *gate(2, 37, 3, 48), ONLY_X[:4])),
    "stats_pool": ("stats_pool", pool(2, 300, 70)),
    "stats_pool_backward": ("stats_pool_backward", (frames(2, 140), *pool(2, 300, 70), frames(2, 140))),
    "strided_conv": ("strided_conv", (*strided(2, 301, 40, 72, 3, False), False)),
    "strided_conv norm": ("strided_conv", (*strided(1, 80, 64, 48, 2, True), True)),
    "strided_conv_backward": (
        "strided_conv_backward",
        (frames(1, 149, 136), *strided(1, 299, 144, 136, 3, True)[:3], frames(1, 149, 136, seed=1),
         *strided(1, 299, 144, 136, 3, True)[3:], TRUE),
    ),
    "tdnn": ("tdnn", (frames(2, 170, 48), frames(136, 5 * 48), frames(136), 5, 1, "relu")),
    "tdnn dilated": ("tdnn", (frames(1, 150, 32), frames(40, 3 * 32), frames(40), 3, 3, "relu")),
    "tdnn_backward": (
        "tdnn_backward",
        (frames(1, 144, 40), frames(1, 150, 32), frames(40, 3 * 32), frames(40), frames(1, 144, 40), 3, 3, "relu",
         TRUE[:3]),
    ),
    "tdnn_backward of x": (
        "tdnn_backward",
        (frames(1, 144, 40), frames(1, 150, 32), frames(40, 3 * 32), frames(40), frames(1, 144, 40), 3, 3, "relu",
         ONLY_X[:3]),
    ),
    "positional_conv": (
        "positional_conv", (frames(1, 200, 96), frames(96, 48, 16), frames(96), 2, "gelu", True, False),
    ),
    "positional_conv_backward": (
        "positional_conv_backward",
        (frames(1, 140, 96), frames(1, 140, 96), frames(96, 48, 7), frames(96), frames(1, 140, 96), 2, "gelu", True,
         TRUE[:3]),
    ),
    "linear_act": ("linear_act", (frames(130, 48), frames(72, 48), frames(72), "gelu", True)),
}  # fmt: skip


@cache
def counted_launches(name):
    op, args = CASES[name]
    with counting() as launches:
        TABLE[op].fn(*args)
    return launches


@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_what_is_counted(name):
    launches = counted_launches(name)
    assert launches
    for counted in launches:
        found = of_launch(counted.launch, wave=EVERY)
        assert found == counted.bytes, counted.launch.name


def test_every_kernel_but_those_of_attention_has_a_formula_and_a_case():
    assert {counted.launch.name for name in CASES for counted in counted_launches(name)} == set(FORMULAS)


def test_lanes_that_share_an_address_ask_once_and_programs_that_share_one_ask_twice():
    args = frames(9, 70), frames(9, 70), frames(70), frames(70, seed=1), 1e-5, False
    with counting() as launches:
        TABLE["add_layer_norm"].fn(*args)
    (counted,) = launches
    vectors, rows = 2 * 70 * 2, 3 * 9 * 70 * 2
    assert counted.launch.grid == (2,)
    assert (counted.bytes.asked, counted.bytes.memory) == (2 * vectors + rows, vectors + rows)


def test_a_wave_finds_what_the_wave_before_read_if_both_fit():
    args = frames(4, 128, 64), frames(256, 64), frames(256), 1, 1, "relu"
    with counting() as launches, forced(1):  # large tiles
        TABLE["tdnn"].fn(*args)
    launch = launches[0].launch
    utterance = launch.grid[0]  # programs
    assert utterance > 1 and launch.grid[1] == 4
    once = of_launch(launch, wave=EVERY).memory
    assert of_launch(launch, wave=utterance).memory == once
    weight = 256 * 64 * 2 + 256 * 2
    assert of_launch(launch, wave=utterance, cache=0).memory == once + 3 * weight
