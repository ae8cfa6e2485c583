"""What a gradient launches on a GPU follows from which gradients are wanted."""

from __future__ import annotations

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from wavlm_fast.benchmarks.gpu.cases import DTYPES, Case, cases
from wavlm_fast.ops._define import arguments_of, schemas

VIEWS = ("view", "t", "transpose", "permute", "unsqueeze", "slice", "select", "unbind", "expand", "empty", "new_empty",
         "empty_like", "detach", "alias", "unflatten", "squeeze", "_unsafe_view", "as_strided")  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts what torch itself would launch: its calls that compute."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def launched(case: Case, wanted: list[bool]) -> list[str]:
    """Kernels of ours and calls of torch's in a gradient of which some are wanted."""
    at = list(arguments_of(schemas[case.op])).index("wanted")
    with Launches() as of_torch:
        ours = Case(case.model, case.op, (*case.args[:at], wanted, *case.args[at + 1 :])).launches()
    return [*(launch.name for launch in ours), *of_torch.names]


def backward(op: str) -> Case:
    return next(case for case in cases("base", DTYPES["bf16"], batch=1) if case.op == op)


def test_of_a_frozen_linear_layer_one_product_is_left():
    case = backward("linear_act_backward")
    assert len(launched(case, [True, True, True])) == 5  # activation, its sums, two products, rounding of the sums
    assert launched(case, [True, False, False]) == ["finish_bwd_kernel", "mm"]
    grad, x, weight, bias, *_ = case.args
    plain = Case("base", case.op, (grad, x, weight, bias, x.new_empty(0), "none", None))
    assert launched(plain, [True, False, False]) == ["mm"]
    assert launched(plain, [False, True, False]) == ["mm"]


def test_attention_skips_what_nobody_wants():
    case = backward("gated_attention_backward")
    everything = set(launched(case, [True] * 5))
    assert everything - set(launched(case, [True, True, True, True, False])) == {
        "gated_attention_bwd_dbias_kernel", "zeros_like",
    }  # fmt: skip
    assert "gated_attention_bwd_dkv_kernel" not in launched(case, [True, False, False, True, True])
    assert "gated_attention_bwd_dkv_kernel" in launched(case, [False, False, True, False, False])


@pytest.mark.parametrize("op", ["add_layer_norm_backward", "position_gate_backward"])
def test_of_frozen_parameters_one_launch_is_left(op):
    case = backward(op)
    count = len(case.args[list(arguments_of(schemas[op])).index("wanted")])
    assert len(launched(case, [True] * count)) > 1
    (name,) = launched(case, [True, *[False] * (count - 1)])
    assert name == op.removesuffix("_backward") + "_bwd_kernel"


@pytest.mark.parametrize("op", ["strided_conv_backward", "positional_conv_backward", "tdnn_backward"])
def test_convolutions_multiply_for_what_is_wanted(op):
    case = backward(op)
    count = len(case.args[list(arguments_of(schemas[op])).index("wanted")])
    of_weight = launched(case, [False, True, *[False] * (count - 2)])
    of_x = launched(case, [True, *[False] * (count - 1)])
    assert "frames_product_kernel" not in of_weight
    assert "frames_product_bwd_weight_kernel" in of_weight
    assert "frames_product_bwd_weight_kernel" not in of_x
    assert "frames_product_kernel" in of_x
    assert "sum" not in of_x
