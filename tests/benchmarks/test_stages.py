"""Every op of a forward is in the breakdown, whatever its name."""

from types import SimpleNamespace

import pytest
import torch

from wavlm_fast import use_backend
from wavlm_fast.benchmarks.run import cases, flops, rounds, stages
from wavlm_fast.benchmarks.run.providers import Subject


@pytest.fixture
def subject(tiny):
    case = cases.CASES["base 1x0.5"]
    return Subject(tiny(), case.inputs(), None, 1)


def op(name, namespace="wavlm_fast"):
    return SimpleNamespace(_schema=SimpleNamespace(name=f"{namespace}::{name}"))


def test_breakdown(subject):
    case = cases.CASES["base 1x0.5"]
    found = {row["stage"]: row for row in rounds.run_stages(case, subject, "ours", torch.float32, None)}
    assert list(found)[: len(flops.STAGES) - 1] == [stage for stage in flops.STAGES if stage != "head"]
    assert list(found)[-3:] == [stages.OTHER_OPS, stages.REST, stages.WHOLE]
    assert found["attention"]["ops"].startswith("2 gated_attention")
    assert found["qkv"]["ops"] == "2 linear_act"
    assert found["feature encoder"]["ops"] == "6 strided_conv"
    counted = sum(row["gflop"] or 0 for name, row in found.items() if name != stages.WHOLE)
    assert counted == pytest.approx(sum(case.operations().values()) / 1e9)
    assert found[stages.WHOLE]["gflop"] == pytest.approx(counted)
    assert all(row["seconds"] > 0 for name, row in found.items() if name != stages.REST)


def test_no_op_of_ours_is_missed(subject, monkeypatch):
    """Counted once more where the backend is chosen."""
    from wavlm_fast import backends

    module = subject.module.copy(fast=True)
    call = cases.bound(module, subject.inputs)
    call()
    chosen, choose = [], backends.choose
    with stages.in_steps(module), stages.Clock(module) as clock:
        monkeypatch.setattr(backends, "choose", lambda name, args: chosen.append(name) or choose(name, args))
        call()
    counted = sum(count for ops in clock.ops.values() for name, count in ops.items() if name in set(chosen))
    assert counted == len(chosen) > 20


def test_steps_are_taken_where_no_kernel_is_a_whole_layer(subject):
    module = subject.module.copy(fast=True)
    call = cases.bound(module, subject.inputs)
    with use_backend("reference"), stages.in_steps(module), stages.Clock(module) as clock:
        call()
    assert "gated_attention" in clock.ops["attention"]
    assert not {"encoder_layer", "feature_encoder"} & {name for ops in clock.ops.values() for name in ops}


def test_steps_are_taken_only_where_asked_for(subject):
    module = subject.module.copy(fast=True)
    with stages.Clock(module) as before, stages.in_steps(module):
        pass
    call = cases.bound(module, subject.inputs)
    with stages.Clock(module) as clock:
        call()
    assert not before.ops
    assert any("encoder_layer" in ops for ops in clock.ops.values())


def test_ops_to_come(subject):
    module = subject.module.copy(fast=True)
    clock = stages.Clock(module)
    layer = module.model.encoder.layers[1]
    x = torch.ones(1, 3, 32)
    weight, norm = layer.attention.out_proj.weight, layer.final_layer_norm.weight
    assert clock.stage(op("new_op"), (x,)) == "new_op"
    assert clock.stage(op("new_op"), (x, weight, norm)) == "out proj + norms"
    assert clock.stage(op("new_op"), (x, [weight, norm])) == "out proj + norms"
    assert clock.stage(op("new_op"), (x, torch.ones(96, 32))) == "qkv"
    assert clock.stage(op("gated_attention"), (x,)) == "attention"
    assert clock.stage(op("add", "aten"), (x,)) == stages.OTHER_OPS


def test_operations_of_a_stage_that_is_spread_over_ops_are_not_guessed(subject, monkeypatch):
    """Where the work of a stage is in two rows, neither is credited with it."""
    monkeypatch.setattr(stages.Clock, "stage", lambda self, op, args: "qkv" if op.is_view else "qkv + gate")
    case = cases.CASES["base 1x0.5"]
    found = {row["stage"]: row for row in rounds.run_stages(case, subject, "ours", torch.float32, None)}
    assert found["qkv"]["gflop"] is found["qkv + gate"]["gflop"] is None
