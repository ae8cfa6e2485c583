"""Every tile that a kernel may be launched with, on whichever target, at the widths of published models.

Warps and stages are left out: they change nothing in what an emulated device runs.
"""

import pytest
import torch
from cases import DEVICE, DTYPES, randn
from test_gated_attention import check as check_attention
from test_gated_attention import inputs as attention_inputs
from test_pointwise import compare as compare_pointwise
from test_pointwise import compare_add_layer_norm
from test_products import compare as compare_product
from test_waveform_conv import check as check_waveform
from test_waveform_conv import inputs as waveform_inputs

from wavlm_fast.kernels import _tuning

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="too slow under the interpreter, which has test_tuning.py")

TARGETS = ("cuda", "hopper", "cdna")
HALF = DTYPES[-1]
BOTH = (HALF, torch.float32)


class Turns:
    """Stands for `Tunable.launch`: each launch takes its configurations in turn, those of equal tiles once."""

    def __init__(self):
        self.taken = set()
        self.left = False

    def launch(self, tunable, run, device, arguments, sizes, also=()):
        place = tunable.name, arguments, sizes, also, torch.are_deterministic_algorithms_enabled()
        configs = {}
        for target in TARGETS:
            for config in tunable(*arguments, target):
                tiles = sorted((name, size) for name, size in config.items() if not name.startswith("num_"))
                configs.setdefault((place, *tiles), config)
        fresh = [tiles for tiles in configs if tiles not in self.taken]
        self.left |= len(fresh) > 1
        chosen = fresh[0] if fresh else next(iter(configs))
        self.taken.add(chosen)
        return run(configs[chosen])


def attention(D, dtype):
    return lambda: check_attention(attention_inputs(1, 150, 1, D, [139], 0.1, dtype, far=30))


def deterministic_attention():
    torch.use_deterministic_algorithms(True)
    try:
        attention(64, HALF)()
    finally:
        torch.use_deterministic_algorithms(False)


def strided_conv(norm, dtype):
    x, weight = randn(1, 41, 512, dtype=dtype), randn(512, 512, 3, dtype=dtype, scale=1536**-0.5)
    vectors = [randn(512, seed=i, dtype=dtype) for i in range(3)]
    norms = [vectors[1] + 1, vectors[2]] if norm else [None, None]
    return lambda: compare_product("strided_conv", [x, weight, vectors[0], 2, *norms, 1e-5, "gelu"])


def positional_conv(C, dtype):
    x, weight = randn(1, 21, 2 * C, dtype=dtype), randn(2 * C, C, 128, dtype=dtype, scale=(128 * C) ** -0.5)
    return lambda: compare_product("positional_conv", [x, weight, randn(2 * C, dtype=dtype), 2, "gelu", True])


def tdnn(K, dtype):
    x, weight = randn(1, 30, 512, dtype=dtype), randn(200, K * 512, dtype=dtype, scale=(K * 512) ** -0.5)
    bias = randn(200, dtype=dtype)

    def run():
        windows = x.unfold(1, 2 * K - 1, 1)[..., ::2].transpose(2, 3).flatten(2)  # [B, T', K·C]
        total = torch.zeros(*windows.shape[:2], 200)
        for frame, row in zip(windows.float().unbind(2), weight.float().unbind(1), strict=True):
            total += frame[..., None] * row
        in_order = (total + bias).relu().to(dtype)
        compare_product("tdnn", [x, weight, bias, K, 2, "relu"], save=False, in_order=in_order)

    return run


def linear_act(C):
    x, weight = randn(140, C, dtype=HALF), randn(200, C, dtype=HALF, scale=C**-0.5)
    return lambda: compare_product("linear_act", [x, weight, randn(200, dtype=HALF), "gelu"])


def waveform_conv(norm, dtype):
    return lambda: check_waveform(waveform_inputs(1, 5 * 40, 512, 10, 5, norm, "gelu", dtype=dtype))


CASES = {
    **{f"attention {D} {dtype}": attention(D, dtype) for D in (64, 80) for dtype in BOTH},
    "attention, deterministic": deterministic_attention,
    **{f"strided_conv {norm} {d}": strided_conv(norm, d) for norm in (0, 1) for d in BOTH},
    **{f"positional_conv {C} {dtype}": positional_conv(C, dtype) for C in (48, 64) for dtype in BOTH},
    **{f"tdnn {K} {dtype}": tdnn(K, dtype) for K in (1, 5) for dtype in BOTH},
    **{f"linear_act {C}": linear_act(C) for C in (768, 1024)},
    **{f"waveform_conv {norm} {d}": waveform_conv(norm, d) for norm in ("group", "layer") for d in BOTH},
    **{f"add_layer_norm {C}": lambda C=C: compare_add_layer_norm((9, C), HALF) for C in (512, 768, 1024)},
    "position_gate": lambda: compare_pointwise(
        "position_gate", [randn(2, 37, 128) * 3, randn(8, 64, scale=1 / 8), randn(8), randn(2) + 1]
    ),
    "stats_pool": lambda: compare_pointwise("stats_pool", [randn(2, 300, 150), torch.tensor([300, 131])], saved=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_tile_matches_float64(case, monkeypatch):
    turns = Turns()
    monkeypatch.setattr(_tuning.Tunable, "launch", lambda tunable, *args: turns.launch(tunable, *args))
    turns.left = True
    while turns.left:
        turns.left = False
        case()
    assert turns.taken
