"""Micro-benchmarks: `pytest benchmarks`, one for every op and provider. Whoever computes something wrong fails."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from wavlm_fast import backends
from wavlm_fast.benchmarks.ops.cases import BoundOp, OpCase, Truth, op_cases
from wavlm_fast.benchmarks.ops.providers import DTYPES, OpProvider, Refusal, op_providers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every case and provider. Its name holds both: two saved runs are compared by names."""
    option = metafunc.config.getoption
    available, _ = op_providers(option("--device"))
    cases = op_cases(option("--model"), option("--batch"), option("--seconds"))
    found = [
        pytest.param(case, provider, id=f"{case.name}, {name}")
        for case in cases
        for name, provider in available.items()
        if name.rpartition(" ")[2] in option("--dtype")
        and (provider.ops is None or case.op in provider.ops)
        and (option("--peers") or provider.ours or provider.family == "torch")
    ]
    metafunc.parametrize(("case", "provider"), found)


@lru_cache(maxsize=len(DTYPES))  # a case in each dtype; memory would not do for those of all cases
def _truth(case: OpCase, dtype: torch.dtype, device: torch.device) -> tuple[Truth, dict[str, Any]]:
    return Truth(case, dtype, device), case.build(dtype, device)


def test_op(benchmark: Any, case: OpCase, provider: OpProvider) -> None:
    """Verify, then time."""
    truth, values = _truth(case, provider.dtype, provider.device)
    try:
        call = BoundOp(case, provider, values)
        verdict = truth.verdict(*call.result())
    except (Refusal, backends.BackendUnavailable) as refusal:
        pytest.skip(str(refusal))
    assert verdict.problem is None, verdict.problem
    benchmark.group = case.name
    benchmark.extra_info |= {"error": verdict.error, "allowed": verdict.allowed, "gflop": case.operations / 1e9}
    benchmark(_finished(call, provider.device))


def _finished(call: BoundOp, device: torch.device) -> Any:
    """The call as the clock wants it: done when it returns."""
    if device.type != "cuda":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize(device)

    return run
