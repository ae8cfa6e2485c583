"""The estimate's arithmetic on a device that nobody sells, and its sums against benchmarks/run/flops.py."""

import json
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from wavlm_fast.benchmarks.gpu import roofline as gpu_roofline
from wavlm_fast.benchmarks.gpu.architectures import ARCHITECTURES
from wavlm_fast.benchmarks.gpu.code import Mix
from wavlm_fast.benchmarks.gpu.compile import Built, Product
from wavlm_fast.benchmarks.gpu.devices import DEVICES, Device
from wavlm_fast.benchmarks.gpu.launch_bytes import Bytes
from wavlm_fast.benchmarks.gpu.pieces import Call, TorchOp, calls, trips
from wavlm_fast.benchmarks.gpu.roofline import ESTIMATE, estimate, main, moved, of_call, of_launch
from wavlm_fast.benchmarks.run import cases, flops

BATCH, SAMPLES = 2, 32_000
# 1000 operations of the matrix unit per processor and clock.
MADE_UP = Device("made up", ARCHITECTURES["sm_90"], 10, 1e9, 1e13, 5e12, 1e12, 1e11, 2**20, "")
LOOP = Mix(Counter(matrix=4, exp=8), Counter(half=250))


def made_up(launch=None, architecture=None):
    """Eight warps: 2 clocks of the matrix unit before the loop, in which 2 and 128 of exponentials are spent."""
    whole = Mix(Counter(matrix=8, exp=8), Counter(half=500))
    return Built(128, 0, 0, 8, 1, [LOOP], whole, [Product(16, 16, 16, "half")])


def all_calls(model="base", train=False):
    return list(calls(model, torch.bfloat16, BATCH, SAMPLES, train))


@pytest.fixture
def product():
    """A launch of 512 channels."""
    call = next(c for c in all_calls() if c.op == "strided_conv")
    return call.launches[0]


def test_a_launch_takes_its_units_as_long_as_its_loop_and_waves_say(product):
    launch = replace(product, grid=(3, 7, 1))  # 21 programs are 3 rounds of 10 processors
    found = of_launch(launch, made_up(), MADE_UP)
    assert trips(launch) == 3 * 512 / launch.arguments["BLOCK_K"]
    assert found["matrix"] == pytest.approx((4 + 2 * (trips(launch) - 1)) * 3 / 1e9)
    assert found["exp"] == pytest.approx(128 * trips(launch) * 3 / 1e9)
    assert found["fp64"] == 0


def test_a_call_takes_the_longer_of_units_and_memory(product, monkeypatch):
    monkeypatch.setattr(gpu_roofline, "build", made_up)
    monkeypatch.setattr(gpu_roofline, "_built", {})
    units = of_launch(product, made_up(), MADE_UP)
    few, many = 1000, 10**12
    call = Call("stage", "op", 1, (product, product), (), few)
    monkeypatch.setattr(gpu_roofline, "bytes_of_launch", lambda launch, wave, cache: Bytes(0, few))
    assert of_call(call, MADE_UP, moved(call, MADE_UP)) == {"exp": pytest.approx(2 * units["exp"])}
    large = replace(call, bytes=many)
    assert of_call(large, MADE_UP, moved(large, MADE_UP)) == {"memory": many / 1e11}
    monkeypatch.setattr(gpu_roofline, "bytes_of_launch", lambda launch, wave, cache: Bytes(0, many))
    assert of_call(call, MADE_UP, moved(call, MADE_UP)) == {"memory": 2 * many / 1e11}


def test_a_smaller_cache_moves_more(product):
    call = Call("stage", "op", 1, (product,), (), 0)
    large, none = (moved(call, replace(MADE_UP, cache=cache)) for cache in (2**30, 0))
    read = product.arguments["x_ptr"].nbytes + product.arguments["weight_ptr"].nbytes
    assert read < large < none


def test_what_torch_runs_takes_the_longer_of_arithmetic_and_memory():
    ops = (TorchOp("mm", 1e10, "half", 10**7), TorchOp("mm", 1e10, "fp32", 10**7), TorchOp("gelu", 0, "half", 10**9))
    call = Call("stage", "op", 1, (), ops, 5)
    assert of_call(call, MADE_UP, moved(call, MADE_UP)) == pytest.approx({"matrix": 1e-3, "fp32": 1e-2, "memory": 1e-2})


@pytest.mark.parametrize("model", ["base", "large"])
def test_operations_are_those_of_the_formula(model):
    """Of every stage that multiplies matrices, counted from its launches and from torch's own products."""
    found = defaultdict(int)
    for call in all_calls(model):
        for launch in call.launches:
            a, count = launch.arguments, 0
            if launch.name == "frames_product_kernel":
                count = 2 * BATCH * a["units"] * a["GROUPS"] * a["length"] * a["N"]
                if call.op == "linear_act":  # one row of all utterances' frames
                    count //= BATCH
            elif launch.name == "gated_attention_fwd_kernel":
                count = 4 * launch.grid[1] * a["T"] ** 2 * a["D"]
            found[call.stage] += call.times * count
        found[call.stage] += call.times * sum(op.operations for op in call.around)
    truth = flops.forward(cases.MODELS[model].config, BATCH, SAMPLES)
    for stage in set(truth) - {"waveform conv", "gate", "norms", "head"}:
        assert found[stage] == truth[stage], stage
    assert set(found) == set(truth) - {"head"}


def test_a_training_step_has_every_backward():
    forward, step = Counter(c.op for c in all_calls()), Counter(c.op for c in all_calls(train=True))
    assert {op: n for op, n in step.items() if not op.endswith("_backward")} == forward
    assert {op.removesuffix("_backward") for op in step if op.endswith("_backward")} == set(forward) - {"layer_norm"}


def test_the_sum_of_an_estimate(monkeypatch):
    monkeypatch.setattr(gpu_roofline, "build", made_up)
    monkeypatch.setattr(gpu_roofline, "_built", {})
    found = {train: estimate("base", MADE_UP, "bf16", 1, train, 2.0) for train in (False, True)}
    operations = sum(flops.forward(cases.MODELS["base"].config, 1, 32_000).values())
    assert sum(s.operations for s in found[False].stages) == operations
    assert sum(s.operations for s in found[True].stages) == 3 * operations
    assert found[False].seconds == pytest.approx(sum(sum(s.bounds.values()) for s in found[False].stages))
    assert found[True].seconds > 2 * found[False].seconds
    # qkv: twelve products of 99 frames and their bias; the matrix unit would take 0.35 ms, memory 0.5 ms.
    (qkv,) = (s for s in found[False].stages if s.name == "qkv")
    moved = 12 * 2 * (99 * 768 + 3 * 768 * 768 + 3 * 768 + 99 * 3 * 768)
    assert (qkv.launches, qkv.bound, qkv.bytes) == (12, "memory", moved)
    assert qkv.seconds == pytest.approx(moved / 1e11)


def test_every_table_says_that_it_is_an_estimate(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_roofline, "build", made_up)
    monkeypatch.setattr(gpu_roofline, "_built", {})
    path = tmp_path / "estimates.json"
    chosen = ["--model", "base", "--batch", "1", "--dtype", "bf16", "--mode", "forward"]
    assert main([*chosen, "--device", "H100", "MI300X", "--stages", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count(ESTIMATE) == 3
    assert "not measured" in ESTIMATE
    content = json.loads(path.read_text())
    assert content["what"] == ESTIMATE
    assert [e["device"] for e in content["estimates"]] == ["H100", "MI300X"]


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_data_sheets_agree_with_the_architectures(device):
    """Peaks per processor and clock are those of the architecture; the L4 alone adds fp32 sums at full speed."""
    theirs = device.architecture.rates.matrix
    factor = 2 if device.name == "L4" else 1
    for type_ in ("half", "tf32"):
        assert device.rates.matrix[type_] == pytest.approx(factor * theirs[type_], rel=0.02)
    assert device.source
