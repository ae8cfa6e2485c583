"""Which questions a borrowed GPU is asked, in which order, and what a time comes to."""

import pytest
import torch

from wavlm_fast.backends import load
from wavlm_fast.benchmarks.gpu.card import models, parity, roof
from wavlm_fast.benchmarks.gpu.card.roof import Roof
from wavlm_fast.benchmarks.gpu.card.steps import MODELS, PARITY, PEAKS, Scale
from wavlm_fast.ops import OPS
from wavlm_fast.parity import run_models
from wavlm_fast.parity.cases import cases_of

GPU = Scale(torch.device("cuda"))  # which nothing here touches
KERNELS = [op for op in OPS if op in load("triton").TABLE]
DTYPES = ("bfloat16", "float16", "float32")


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_every_op_is_compared_once_in_every_dtype_before_anything_is_twice():
    names = [step.name for step in parity.steps(GPU)]
    first = names[: len(KERNELS) * len(DTYPES)]
    for op in KERNELS:
        for dtype in DTYPES:
            assert sum(f"parity of {op}, " in name and name.endswith(f", {dtype}") for name in first) == 1, (op, dtype)


def test_every_case_and_model_is_compared():
    steps = list(parity.steps(GPU))
    assert {step.phase for step in steps} == {PARITY}
    names = [step.name for step in steps]
    assert len(names) == len(set(names))
    cases = sum(len(cases_of(op)) for op in KERNELS) + len(run_models.cases()) + 2
    assert len(names) == len(DTYPES) * cases
    after = len(KERNELS) * len(DTYPES)
    for model in ("base", "large"):
        for dtype in DTYPES:  # right after the ops: the kernels compiled for them are those that are timed
            assert f"parity of {model}, forward and gradients, {dtype}" in names[after : after + 6]


def test_whole_models_in_every_way():
    names = [step.name for step in models.steps(GPU)]
    assert {step.phase for step in models.steps(GPU)} == {MODELS}
    wanted = [
        f"{model} {batch}x10 inference, bf16: {who}"
        for model in ("base", "large")
        for batch in (1, 8, 32)
        for who in ("wavlm_fast", "wavlm_fast, graph", "transformers", "transformers + compile")
    ]
    wanted += [
        f"{model} 8x10 training step, bf16 autocast: {who}"
        for model in ("base", "large")
        for who in ("wavlm_fast", "transformers", "transformers + compile")
    ]
    assert sorted(names) == sorted(wanted)
    compiled = ["compile" in name for name in names]
    assert compiled == sorted(compiled)  # what takes a minute each comes last


def test_peaks_of_memory_and_every_kind_of_product():
    steps = list(roof.steps(GPU))
    assert {step.phase for step in steps} == {PEAKS}
    assert [step.name for step in steps] == [f"peak {w}" for w in ("bandwidth", "bf16", "fp16", "fp32", "tf32")]


def test_shares_of_the_measured_peaks():
    rates = {"bandwidth": 2e12, "bf16": 8e14}
    known = Roof([{"what": what, "rate": rate} for what, rate in rates.items()])
    found = known.shares(0.004, 4_000_000_000, 4e11, torch.bfloat16)
    assert found["of bandwidth"] == pytest.approx(0.5)
    assert found["of products"] == pytest.approx(0.125)
    assert (found["share"], found["bound"]) == (found["of bandwidth"], "memory")
    found = known.shares(0.001, 1_000_000, 4e11, torch.bfloat16)
    assert found["share"] == found["of products"] == pytest.approx(0.5)
    assert found["bound"] == "products"
    found = Roof([{"problem": "out of memory"}]).shares(0.001, 1_000_000, 4e11, torch.bfloat16)
    assert (found["bytes"], found["share"], found["bound"]) == (1_000_000, None, None)
