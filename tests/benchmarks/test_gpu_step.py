"""Bytes and launches of a training step, counted on tensors without memory."""

import pytest
import torch

pytest.importorskip("triton")

from wavlm_fast.benchmarks.gpu import bytes as gpu_bytes
from wavlm_fast.benchmarks.gpu import step
from wavlm_fast.benchmarks.gpu.launch_bytes import Bytes

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
KERNELS = {
    "gated_attention": ("fwd",),
    "gated_attention_backward": ("bwd_dq", "bwd_dkv", "bwd_dbias"),
}


@pytest.fixture(scope="module")
def found():
    """By way and by whom. Attention's bytes are of one head, and not counted here: that takes the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        of_head = {f"{op} gated_attention_{name}_kernel": Bytes(1, 1000) for op in KERNELS for name in KERNELS[op]}
        patch.setattr(gpu_bytes, "attention", lambda *sizes: of_head)
        rows = list(step.steps("base", torch.bfloat16, (1, 4000), SMALL))
    return {(row.way, row.who): row for row in rows}


def test_everybody_is_there(found):
    assert set(found) == {(way, who) for way in step.WAYS for who in (step.THEIRS, step.ALL, step.OURS)}
    for row in found.values():
        assert (row.kernels > 0) == (row.who != step.THEIRS)
        assert row.torch > 0 and row.bytes > 0


def test_what_nobody_asked_for_is_what_frozen_weights_save(found):
    for way in step.WAYS:
        everything, ours = found[way, step.ALL], found[way, step.OURS]
        assert ours.kernels <= everything.kernels and ours.bytes <= everything.bytes
    everything, ours = found["LoRA", step.ALL], found["LoRA", step.OURS]
    assert ours.launches < 0.9 * everything.launches
    assert ours.bytes < 0.9 * everything.bytes
    assert found["LoRA", step.OURS].kernels < found["everything", step.OURS].kernels


def test_a_frozen_feature_encoder_has_no_backward(found):
    assert found["feature encoder frozen", step.OURS].kernels < found["everything", step.OURS].kernels
    assert found["feature encoder frozen", step.THEIRS].bytes < found["everything", step.THEIRS].bytes


def test_views_and_what_is_made_of_other_ops_cost_nothing_by_themselves():
    x, weight = torch.empty(4, 6, 8, device="meta"), torch.empty(5, 8, device="meta")
    with step._Counting(False) as counted:
        torch.nn.functional.linear(x.reshape(24, 8).contiguous(), weight)
    assert dict(counted.names) == {"mm": 1}
    assert counted.total == 4 * (24 * 8 + 5 * 8 + 24 * 5)


def test_the_table(found):
    lines = list(step.table(list(found.values())))
    assert len(lines) == 2 + len(found)
    theirs = next(line for line in lines if "transformers" in line)
    assert " 100 % " in theirs
    assert lines[-1].startswith("copies of the position bias, made anew in every layer: ")
