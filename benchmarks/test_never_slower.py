"""Never a slower op: fails where "auto" runs one more than 3 % slower than the calls that transformers makes."""

from __future__ import annotations

import pytest
import torch

from wavlm_fast.benchmarks.ops.cases import BoundOp, OpCase, op_cases
from wavlm_fast.benchmarks.ops.losers import FOUND, HEAD, compare
from wavlm_fast.benchmarks.ops.providers import op_providers

_SIZES = ("base 1x1", "base 1x2", "large 1x2", "base 1x10", "large 1x10", "base 8x10")
_LARGEST = 40e9  # operations; more of them are left to --all-sizes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every op, size class and dtype."""
    option = metafunc.config.getoption
    cases = []
    for size in _SIZES:
        model, _, sizes = size.partition(" ")
        batch, _, seconds = sizes.partition("x")
        cases += op_cases(model, int(batch), float(seconds))
    wanted = [case for case in cases if case.operations <= _LARGEST or option("--all-sizes")]
    dtypes = [dtype for dtype in option("--dtype") if dtype != "fp16"]
    pairs = [pytest.param(case, dtype, id=f"{case.name}, {dtype}") for case in wanted for dtype in dtypes]
    metafunc.parametrize(("case", "dtype"), pairs)


def test_never_slower(case: OpCase, dtype: str, request: pytest.FixtureRequest) -> None:
    """Side by side; who loses is told again at the end."""
    providers, _ = op_providers("cpu")
    if request.config.getoption("--device") != "cpu":
        pytest.skip("on a GPU `make bench` compares")
    made = providers[f"wavlm_fast cpu {dtype}"], providers[f"torch {dtype}"]
    ours, theirs = (BoundOp(case, p, case.build(p.dtype, torch.device("cpu"))) for p in made)
    compared = compare(case.name.removeprefix("op "), dtype, ours, theirs, request.config.getoption("--patience"))
    FOUND.append(compared)
    assert not compared.loses, f"slower than plain torch\n{HEAD}\n{compared}"
