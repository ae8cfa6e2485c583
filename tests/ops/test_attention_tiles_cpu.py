"""bfloat16 attention on AMX tiles, without such a CPU: emulated, and done by what stands in for the unit."""

from __future__ import annotations

import pytest
import test_encoder_layer as layer
import test_gated_attention_cpu as in_registers
import test_packed_attention_cpu as packed
import torch

from wavlm_fast.backends import cpu
from wavlm_fast.backends.cpu import tiles

pytestmark = pytest.mark.skipif(cpu.isa() != "avx512_bf16", reason="tiles go with the level avx512_bf16")
BF16 = torch.bfloat16
KERNEL = in_registers.KERNEL
# B, T, H, D, lengths. Tiles have 16 rows and 32 numbers: rests of queries, of keys and of heads, and none.
CASES = [
    *in_registers.CASES[:-1],
    (1, 16, 1, 32, None),
    (2, 33, 2, 48, [33, 17]),
    (1, 129, 1, 64, None),
    (1, 160, 1, 96, [159]),
    (1, 140, 1, 128, None),
    (1, 40, 1, 200, None),
]
# What holds by dot products holds on tiles.
ALIKE = {
    "no key": lambda: in_registers.test_no_key_gives_zeros(BF16),
    "no scale": lambda: in_registers.test_scales(0.0, BF16),
    "negative scale": lambda: in_registers.test_scales(-0.2, BF16),
    "strides": lambda: in_registers.test_strides(BF16),
    "minus infinity": lambda: in_registers.test_rows_whose_bias_is_minus_infinity(100, BF16),
    "dropout": lambda: in_registers.test_dropout_draws_the_mask_of_the_reference(BF16, 131),
    "NaN": lambda: in_registers.test_nan_reaches_its_own_rows_only(BF16),
    "threads": lambda: in_registers.test_threads_do_not_change_a_bit(1, 1, BF16),
    "packed": lambda: packed.test_attention_is_that_of_each_utterance_alone((1, 150, 7, 131, 1, 49), 2, 64, BF16),
    "packed, odd": lambda: packed.test_attention_against_float64((3, 5, 140, 1), 1, 33, (0.0, None), BF16),
}


@pytest.mark.parametrize(("B", "T", "H", "D", "lengths"), CASES)
def test_against_float64(B, T, H, D, lengths, emulated):
    in_registers.test_against_float64(B, T, H, D, lengths, BF16)


@pytest.mark.parametrize("alike", ALIKE.values(), ids=ALIKE)
def test_as_by_dot_products(alike, emulated):
    alike()


def found(kind, *args):
    tiles.use(tiles.ATTENTION, kind)
    try:
        return KERNEL(*args)
    finally:
        tiles.use(tiles.ATTENTION, "none")


@pytest.mark.parametrize("case", tiles._TRIALS[tiles.ATTENTION].right, ids=str)
def test_what_is_exact_is_that_of_dot_products(case):
    """To the bit, whatever is summed first: what the trial asks of a unit."""
    operands = case.operands()
    outs = []
    for kind in ("none", "emulated"):
        tiles.use(tiles.ATTENTION, kind)
        outs.append(case.runner(*operands)())
    tiles.use(tiles.ATTENTION, "none")
    assert torch.equal(*outs)
    assert (outs[0].double() - case.truth(*operands)).abs().max() <= 2**-8 * outs[0].abs().max()


@pytest.mark.parametrize("D", [64, 80])
def test_emulation_is_the_manual_to_the_bit(D, trapped):
    """Numbers whose sums depend on their order, and some whose products or sums are denormal."""
    q, k, v, *rest = in_registers.operands(1, 149, 1, D, BF16)
    v = v.clone()
    v[:, ::3] *= 2.0**-120
    v[:, ::5] *= 2.0**-7
    args = (q, k, v, *rest, torch.tensor([141]), 0.0, None, D**-0.5)
    emulated, manual, dots = (found(kind, *args) for kind in ("emulated", "trapped", "none"))
    assert all(map(torch.equal, emulated, manual))
    assert not torch.equal(emulated[1], dots[1])


@pytest.mark.parametrize(("B", "T", "H"), [(1, 300, 2), (3, 30, 2)])
def test_a_task_configures_tiles_once(B, T, H, trapped):
    """And releases them: `trapped` counts the threads that have not."""
    args = (*in_registers.operands(B, T, H, 64, BF16), None, 0.0, None, 0.125)
    before = trapped.configured()
    tiles.use(tiles.ATTENTION, "trapped")
    torch.ops.wavlm_fast_cpu.begin_task_log(2)
    try:
        KERNEL(*args)
    finally:
        _, _, tasks, *_ = torch.ops.wavlm_fast_cpu.end_task_log()
        tiles.use(tiles.ATTENTION, "none")
    assert trapped.configured() - before == tasks > 1


@pytest.mark.parametrize("name", ["gated_attention", "encoder_layer"])
def test_a_first_call_decides(name, trial):
    used = trial()
    if name == "gated_attention":
        args = (*in_registers.operands(1, 20, 2, 64, BF16), None, 0.0, None, 0.125, None)
        first, second = (cpu.TABLE[name].fn(*args)[0] for _ in range(2))
        assert torch.equal(first, found("unit", *args)[0])
    else:
        first, second = (cpu.TABLE[name].fn(*layer.operands(BF16), *layer.tail()) for _ in range(2))
    assert torch.equal(first, second)
    assert used[tiles.ATTENTION][:2] == ["none", "unit"]


def test_float32_makes_no_trial(trial):
    used = trial()
    cpu.TABLE["gated_attention"].fn(*in_registers.operands(1, 20, 2, 64, torch.float32), None, 0.0, None, 0.125, None)
    assert not used[tiles.ATTENTION]
