"""bfloat16 products on AMX tiles, without such a CPU: their kernels on emulated tiles, and the trial that decides."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cpu_rule import REFERENCE, assert_no_worse, check, check_threads

from wavlm_fast import derived, doctor, report
from wavlm_fast.backends import cpu
from wavlm_fast.backends.cpu import onednn, packed_conv, tiles

pytestmark = pytest.mark.skipif(cpu.isa() != "avx512_bf16", reason="tiles go with the level avx512_bf16")
needs_onednn = pytest.mark.skipif(onednn.why_not() is not None, reason=str(onednn.why_not()))
LINEAR = [
    (1, 768, 96, "gelu"),
    (33, 1000, 97, "none"),
    (31, 3072, 40, "relu"),
    (150, 302, 7, "gelu_tanh"),
    (17, 6, 48, "none"),
]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """What does the unit's instructions, where the CPU stops at them."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        pytest.skip("no C++ compiler found")
    source, library = Path(__file__).with_name("amx_unit.cpp"), tmp_path_factory.mktemp("amx") / "amx_unit.so"
    subprocess.run([*command, "-std=c++20", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(library)


@pytest.fixture(params=["emulated", "trapped"])
def emulated(request, monkeypatch):
    """Tiles without a unit: its arithmetic written out, and its instructions done by a stand-in."""
    monkeypatch.setattr(packed_conv, "_prefers_onednn", lambda: False)
    trapped = request.param == "trapped"
    if trapped and torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU does not stop at the unit's instructions, and nobody asked for it to run them")
    if trapped:
        library = request.getfixturevalue("stand_in")
        library.start()
    tiles.use(request.param)
    yield request.param
    tiles.use("none")
    if trapped:
        library.stop()
        assert library.released()


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
    tiles.use("none")
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
        tiles.use(kind)
        sums.append(cpu.TABLE["linear_act"].fn(torch.ones_like(weight), weight, None, "none", False)[0].item())
    assert sums[0] == 16 != sums[1]  # one after the other, the ones would be lost beside the first number


def test_denormal_numbers_are_zeros(emulated):
    tiny, one = torch.full((1, 2), 2.0**-130).bfloat16(), torch.full((1, 2), 2.0**100).bfloat16()
    assert tiny.count_nonzero() == 2
    assert not cpu.TABLE["linear_act"].fn(tiny, one, None, "none", False)[0].any()


@pytest.fixture
def trial(monkeypatch):
    """Makes a CPU with AMX of this one: the unit is emulated, and what is measured is told."""
    real = tiles.use
    used = []

    def fake(seconds=(1.0, 2.0), problem=""):
        def use(kind):
            used.append(kind)
            real("emulated" if kind == "unit" else kind)

        monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, "1")
        monkeypatch.setattr(tiles, "use", use)
        monkeypatch.setattr(tiles, "_problem", lambda: problem)
        monkeypatch.setattr(tiles, "_seconds", lambda *runners: seconds if [run() for run in runners] else None)
        monkeypatch.setattr(packed_conv, "_has_amx", lambda: True)
        tiles._why_not.cache_clear()
        return used

    yield fake
    real("none")
    tiles._why_not.cache_clear()


def spoil(monkeypatch, change):
    """Let tiles give other numbers."""
    real = tiles.Case.runner

    def runner(case, *operands):
        run = real(case, *operands)
        return lambda: change(run()) if tiles.in_use == "unit" else run()

    def use(kind, real=tiles.use):
        tiles.in_use = kind
        real(kind)

    monkeypatch.setattr(tiles, "in_use", "none", raising=False)
    monkeypatch.setattr(tiles, "use", use)
    monkeypatch.setattr(tiles.Case, "runner", runner)
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
    assert used[-1] == "unit"
    assert said() == "bfloat16 products run on AMX tiles"
    count = len(used)
    assert tiles.why_not() is None
    assert len(used) == count  # tried once


@needs_onednn
@pytest.mark.parametrize("seconds", [(3e-4, 2e-4), (3e-4, 3.2e-4)])
def test_right_and_not_much_faster_stays_in_onednn(seconds, trial):
    used = trial(seconds)
    assert packed_conv.in_onednn(random(1))
    assert tiles.why_not().startswith(f"a product on AMX tiles took 300 µs in a trial, oneDNN {seconds[1] * 1e6:.0f} (")
    assert used[-1] == "none"
    assert said() == f"bfloat16 products run in oneDNN: {tiles.why_not()}"
    x, weights = random(1, 4, 8), [random(8, 8)] * 4
    reason = cpu.TABLE["encoder_layer"].why_not(x, x, None, weights)
    assert reason == f"bfloat16 products run in oneDNN here, one by one: {tiles.why_not()}"


@needs_onednn
@pytest.mark.parametrize("asked", [None, "0", ""])
def test_nobody_who_does_not_ask_gets_tiles(trial, asked, monkeypatch):
    used = trial()
    if asked is None:
        monkeypatch.delenv(tiles.ENVIRONMENT_VARIABLE)
    else:
        monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, asked)
    assert packed_conv.in_onednn(random(1))
    assert said().endswith("so far only emulated, are tried with WAVLM_FAST_AMX_TILES=1")
    assert used == []


@needs_onednn
def test_wrong_is_never_timed(trial, monkeypatch):
    used = trial()
    spoil(monkeypatch, lambda out: out.index_fill(1, torch.tensor(-1), 0.0))
    assert packed_conv.in_onednn(random(1))
    assert said().endswith("products on AMX tiles came out wrong in a trial")
    assert used[-1] == "none"


@needs_onednn
def test_inexact_is_never_timed(trial, monkeypatch):
    used = trial()
    # Whole numbers are left as they are, others lose bits.
    spoil(monkeypatch, lambda out: out if out.frac().eq(0).all() else (out / 4).round() * 4)
    assert packed_conv.in_onednn(random(1))
    assert tiles.why_not() == "products on AMX tiles came out wrong in a trial"
    assert used[-1] == "none"


@needs_onednn
def test_what_linux_refuses_is_not_tried(trial):
    used = trial(problem="Linux does not grant this process AMX: Operation not permitted")
    assert packed_conv.in_onednn(random(1))
    assert "does not grant" in said()
    assert used == []


@needs_onednn
def test_a_trial_that_fails_is_a_reason(trial, monkeypatch):
    used = trial()
    monkeypatch.setattr(tiles, "_is_right", lambda case: 1 / 0)
    assert packed_conv.in_onednn(random(1))
    assert "a trial of products on AMX tiles failed: ZeroDivisionError: division by zero" in said()
    assert used[-1] == "none"


@needs_onednn
def test_a_trial_that_is_broken_off_is_made_again(trial, monkeypatch):
    used = trial()

    def interrupted(case):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiles, "_is_right", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiles.why_not()
    assert used[-1] == "none"
    assert tiles.why_not() is None


@needs_onednn
def test_threads_share_a_trial(trial, monkeypatch):
    trial()
    tries = []
    real = tiles._verdict
    monkeypatch.setattr(tiles, "_verdict", lambda: tries.append(time.sleep(0.05)) or real())
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda _: tiles.why_not(), range(4))] == [None] * 4
    assert len(tries) == 1


@needs_onednn
def test_a_trial_is_the_same_whatever_a_user_has_set(trial):
    trial()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        assert tiles.why_not() is None


def test_a_cpu_without_it_is_left_alone(monkeypatch):
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has it")
    monkeypatch.setattr(tiles, "_why_not", pytest.fail)
    assert not packed_conv.in_onednn(random(1))
    assert tiles._problem() == "the CPU has no AMX BF16"
    with pytest.raises(RuntimeError, match="the CPU has no AMX BF16"):
        tiles.use("unit")


def test_kinds_are_known():
    with pytest.raises(RuntimeError, match="expected none, unit, emulated or trapped"):
        tiles.use("all")
