"""bfloat16 products on AMX tiles, without such a CPU: their kernels on emulated tiles, and the trial that decides."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_rule import REFERENCE, assert_no_worse, check, check_threads

from wavlm_fast import derived, doctor, report
from wavlm_fast.backends import cpu
from wavlm_fast.backends.cpu import onednn, packed_conv, tiles

pytestmark = pytest.mark.skipif(cpu.isa() != "avx512_bf16", reason="tiles go with the level avx512_bf16")
needs_onednn = pytest.mark.skipif(onednn.why_not() is not None, reason=str(onednn.why_not()))
WORKS = (tiles.PRODUCTS, tiles.ATTENTION)
LINEAR = [
    (1, 768, 96, "gelu"),
    (33, 1000, 97, "none"),
    (31, 3072, 40, "relu"),
    (150, 302, 7, "gelu_tanh"),
    (17, 6, 48, "none"),
]


def random(*shape, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def linear(rows, C, channels, activation):
    x, weight = random(rows, C), random(channels, C, seed=1, scale=C**-0.5)
    x[..., 3] *= 50
    return x, weight, random(channels, seed=2), activation, False


@pytest.mark.parametrize("sizes", LINEAR)
def test_linear_act(sizes, emulated):
    check("linear_act", *linear(*sizes))
    check_threads("linear_act", *linear(*sizes))


@pytest.mark.parametrize(("T", "K", "stride"), [(31, 3, 2), (201, 3, 2), (30, 2, 2), (50, 5, 3)])
def test_strided_conv(T, K, stride, emulated):
    x, weight = random(2, T, 80), random(72, 80, K, seed=1, scale=0.1)
    for save in (False, True):  # minimal filtering, and the direct form
        check("strided_conv", x, weight, random(72, seed=2), stride, None, None, 1e-5, "gelu", save)


def test_filtering_gives_way_to_what_is_not_finite(emulated):
    x, weight = random(1, 31, 80), random(72, 80, 3, seed=1, scale=0.1)
    x[0, 9, 4] = torch.inf
    check("strided_conv", x, weight, None, 2, None, None, 1e-5, "none", False)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("lengths", [None, [12, 40, 9]])
def test_tdnn(lengths, learns, emulated):
    packed = (None, None, None)
    if lengths is not None:
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        packed = (ends, (ends - 8 * torch.arange(4)).int(), 61 - 24)
    x, weight = random(1, 61, 70), random(50, 70 * 5, seed=1, scale=0.1)
    weight.requires_grad_(learns)  # multiplied as it is
    with torch.no_grad():
        check("tdnn", x, weight, random(50, seed=2), 5, 2, "relu", *packed)


@pytest.mark.parametrize("copies", [True, False])
def test_rows_that_crowd_the_cache_are_copied(copies, emulated):
    before = torch.ops.wavlm_fast_cpu.copies_pay()
    try:
        torch.ops.wavlm_fast_cpu.copies_pay(copies)
        check("linear_act", *linear(140, 2054, 100, "gelu"))
        check("linear_act", *linear(140, 2048, 100, "gelu"))
    finally:
        torch.ops.wavlm_fast_cpu.copies_pay(before)


def test_a_weight_that_learns_gives_the_same_numbers(emulated):
    x, weight, *rest = linear(40, 302, 97, "none")
    weight = torch.nn.Parameter(weight)
    run = cpu.TABLE["linear_act"].fn
    with torch.no_grad():
        weight.add_(0)
        as_it_is = run(x, weight, rest[0], "none", True)[0]
        assert derived.nbytes([weight]) == 0
        assert torch.equal(run(x, weight, rest[0], "none", False)[0], as_it_is)
        assert derived.nbytes([weight]) > 0


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_fused_layer(norm_first, emulated):
    rows, inner, heads, T = 64, 150, 4, 37
    shapes = [(rows, rows)] * 4 + [(inner, rows), (rows, inner)]
    weights = [random(*shape, seed=i, scale=0.2) for i, shape in enumerate(shapes)]
    biases = [random(shape[0], seed=10 + i) for i, shape in enumerate(shapes)]
    gate = [random(8, rows // heads, seed=20), random(8, seed=21), random(heads, seed=22)]
    norms = [random(rows, seed=30 + i, scale=0.3) for i in range(4)]
    rel_bias, lengths = random(heads, 2 * T - 1, seed=40).float(), torch.tensor([T, T - 9])
    args = (random(2, T, rows, seed=50), rel_bias, lengths, weights, biases, gate, norms)
    found = cpu.TABLE["encoder_layer"].fn(*args, [1e-5, 1e-3], 0.25, "gelu", norm_first)
    for work in WORKS:
        tiles.use(work, "none")
    plain = cpu.TABLE["encoder_layer"].fn(*args, [1e-5, 1e-3], 0.25, "gelu", norm_first)
    wide = [[t.double() for t in a] if isinstance(a, list) else a.double() if a is not lengths else a for a in args]
    true = REFERENCE["encoder_layer"].fn(*wide, [1e-5, 1e-3], 0.25, "gelu", norm_first)
    assert_no_worse("encoder_layer", (found,), (plain,), (true,))


def test_a_row_knows_of_no_other(emulated):
    x, *rest = linear(37, 302, 60, "gelu")
    run = cpu.TABLE["linear_act"].fn
    whole = run(x, *rest)[0]
    x[:5] = torch.nan
    assert torch.equal(run(x, *rest)[0][5:], whole[5:])
    assert torch.equal(run(x[20:23], *rest)[0], whole[20:23])


def test_first_and_second_numbers_of_pairs_are_summed_apart(emulated):
    weight = torch.tensor([2.0**24, 1, *[0, 1] * 15, -(2.0**24), *[0] * 31]).bfloat16()[None]
    sums = []
    for kind in (emulated, "none"):
        tiles.use(tiles.PRODUCTS, kind)
        sums.append(cpu.TABLE["linear_act"].fn(torch.ones_like(weight), weight, None, "none", False)[0].item())
    assert sums[0] == 16 != sums[1]  # one after the other, the ones would be lost beside the first number


def test_emulation_is_the_manual_to_the_bit(trapped):
    """Numbers whose sums depend on their order, and some that are denormal or whose products are."""
    x, *rest = linear(37, 302, 40, "none")
    x[::3] *= 2.0**-125
    x[::7] *= 2.0**-10
    found = []
    for kind in ("emulated", "trapped", "none"):
        tiles.use(tiles.PRODUCTS, kind)
        found.append(cpu.TABLE["linear_act"].fn(x, *rest)[0])
    assert torch.equal(*found[:2])
    assert not torch.equal(*found[1:])


def test_denormal_numbers_are_zeros(emulated):
    tiny, one = torch.full((1, 2), 2.0**-130).bfloat16(), torch.full((1, 2), 2.0**100).bfloat16()
    assert tiny.count_nonzero() == 2
    assert not cpu.TABLE["linear_act"].fn(tiny, one, None, "none", False)[0].any()


def spoil(monkeypatch, change):
    """Let tiles give other numbers."""

    def spoiled(real):
        def runner(case, *operands):
            run = real(case, *operands)
            return lambda: change(run()) if tiles.in_use == "unit" else run()

        return runner

    def use(work, kind, real=tiles.use):
        tiles.in_use = kind
        real(work, kind)

    monkeypatch.setattr(tiles, "in_use", "none", raising=False)
    monkeypatch.setattr(tiles, "use", use)
    for cls in (tiles.Case, tiles.Attention):
        monkeypatch.setattr(cls, "runner", spoiled(cls.runner))
    monkeypatch.setattr(tiles, "_seconds", pytest.fail)


def said():
    """What report and doctor say of it."""
    told = report(torch.nn.Linear(2, 2).bfloat16()).arithmetic
    assert doctor.extension()["reason"] == told
    return told


@needs_onednn
def test_right_and_faster_is_chosen(trial):
    used = trial()
    assert not packed_conv.in_onednn(random(1))
    assert said() == "bfloat16 products run on AMX tiles, attention too"
    assert [used[work][-1] for work in WORKS] == ["unit", "unit"]
    counts = [*map(len, used.values())]
    assert [tiles.why_not(work) for work in WORKS] == [None, None]
    assert [*map(len, used.values())] == counts  # tried once


@needs_onednn
@pytest.mark.parametrize("seconds", [(3e-4, 2e-4), (3e-4, 3.2e-4)])
def test_right_and_not_much_faster_stays_in_onednn(seconds, trial):
    used = trial(seconds)
    assert packed_conv.in_onednn(random(1))
    reasons = [tiles.why_not(work) for work in WORKS]
    for work, rivals, reason in zip(WORKS, ("oneDNN", "dot products"), reasons, strict=True):
        assert reason.startswith(f"{work} on AMX tiles took 300 µs in a trial, {rivals} {seconds[1] * 1e6:.0f} (")
    assert [used[work][-1] for work in WORKS] == ["none", "none"]
    assert said() == "bfloat16 products run in oneDNN: {}; attention by dot products: {}".format(*reasons)
    x, weights = random(1, 4, 8), [random(8, 8)] * 4
    reason = cpu.TABLE["encoder_layer"].why_not(x, x, None, weights)
    assert reason == f"bfloat16 products run in oneDNN here, one by one: {reasons[0]}"


@needs_onednn
@pytest.mark.parametrize("asked", [None, "0", ""])
def test_nobody_who_does_not_ask_gets_tiles(trial, asked, monkeypatch):
    used = trial()
    if asked is None:
        monkeypatch.delenv(tiles.ENVIRONMENT_VARIABLE)
    else:
        monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, asked)
    assert packed_conv.in_onednn(random(1))
    only = "AMX tiles, so far only emulated, are tried with WAVLM_FAST_AMX_TILES=1"
    assert said() == f"bfloat16 products run in oneDNN: {only}"
    assert not any(used.values())


@needs_onednn
def test_wrong_is_never_timed(trial, monkeypatch):
    used = trial()
    spoil(monkeypatch, lambda out: out.index_fill(1, torch.tensor(-1), 0.0))
    assert packed_conv.in_onednn(random(1))
    wrong = "on AMX tiles came out wrong in a trial"
    assert said() == f"bfloat16 products run in oneDNN: products {wrong}; attention by dot products: attention {wrong}"
    assert [used[work][-1] for work in WORKS] == ["none", "none"]


@needs_onednn
@pytest.mark.parametrize("work", WORKS)
def test_inexact_is_never_timed(work, trial, monkeypatch):
    used = trial()
    calls = len(tiles._TRIALS[work].right)
    spoil(monkeypatch, lambda out: out if calls >= len(used[work]) / 2 else out * 1.05)
    assert tiles.why_not(work) == f"{work} on AMX tiles came out wrong in a trial"
    assert len(used[work]) == 2 * calls + 3  # what comes out exact was right: none and unit, each time
    assert used[work][-1] == "none"


@needs_onednn
def test_what_linux_refuses_is_not_tried(trial):
    used = trial(problem="Linux does not grant this process AMX: Operation not permitted")
    assert packed_conv.in_onednn(random(1))
    assert "does not grant" in said()
    assert not any(used.values())


@needs_onednn
def test_products_and_attention_are_decided_apart(trial, monkeypatch):
    used = trial()
    real = tiles._verdict
    lost = {work: f"{work} lose" for work in WORKS}
    monkeypatch.setattr(tiles, "_verdict", lambda work: real(work) if work not in lost else lost[work])
    assert said() == "bfloat16 products run in oneDNN: products lose; attention by dot products: attention lose"
    del lost[tiles.ATTENTION]
    tiles._why_not.cache_clear()
    assert said() == "bfloat16 products run in oneDNN: products lose; attention on AMX tiles"
    assert [used[work][-1] for work in WORKS] == ["none", "unit"]
    lost = {tiles.ATTENTION: "it loses"}
    tiles._why_not.cache_clear()
    assert said() == "bfloat16 products run on AMX tiles; attention by dot products: it loses"
    assert [used[work][-1] for work in WORKS] == ["unit", "none"]


@needs_onednn
def test_a_trial_that_fails_is_a_reason(trial, monkeypatch):
    used = trial()
    monkeypatch.setattr(tiles, "_is_right", lambda work, case: 1 / 0)
    assert packed_conv.in_onednn(random(1))
    assert "a trial of products on AMX tiles failed: ZeroDivisionError: division by zero" in said()
    assert used[tiles.PRODUCTS][-1] == "none"


@needs_onednn
def test_a_trial_that_is_broken_off_is_made_again(trial, monkeypatch):
    used = trial()

    def interrupted(work, case):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiles, "_is_right", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiles.why_not(tiles.PRODUCTS)
    assert used[tiles.PRODUCTS][-1] == "none"
    assert tiles.why_not(tiles.PRODUCTS) is None


@needs_onednn
def test_threads_share_a_trial(trial, monkeypatch):
    trial()
    tries = []
    real = tiles._verdict
    monkeypatch.setattr(tiles, "_verdict", lambda work: tries.append(time.sleep(0.05)) or real(work))
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda _: tiles.why_not(tiles.PRODUCTS), range(4))] == [None] * 4
    assert len(tries) == 1


@needs_onednn
def test_a_trial_is_the_same_whatever_a_user_has_set(trial):
    trial()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        assert tiles.why_not(tiles.PRODUCTS) is None


def test_a_cpu_without_it_is_left_alone(monkeypatch):
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has it")
    monkeypatch.setattr(tiles, "_why_not", pytest.fail)
    assert not packed_conv.in_onednn(random(1))
    assert tiles._problem() == "the CPU has no AMX BF16"
    with pytest.raises(RuntimeError, match="the CPU has no AMX BF16"):
        tiles.use(tiles.PRODUCTS, "unit")


def test_kinds_of_work_and_of_tiles_are_known():
    with pytest.raises(RuntimeError, match="expected none, unit, emulated or trapped"):
        tiles.use(tiles.PRODUCTS, "all")
    with pytest.raises(RuntimeError, match="expected products or attention, got softmax"):
        tiles.use("softmax", "none")
