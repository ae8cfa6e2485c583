"""The bars on what the kernels read and write, and the count of torch ops that they are set beside."""

import importlib.util
import json

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from wavlm_fast.benchmarks.gpu import bytes as gpu_bytes
from wavlm_fast.benchmarks.gpu.launch_bytes import Bytes
from wavlm_fast.benchmarks.gpu.torch_bytes import TorchBytes, forward_and_backward, size


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "found.json"
    status = gpu_bytes.main(["--json", str(path)])
    return status, json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.xdist_group("gpu bytes")
def test_every_bar_is_met(found):
    status, content = found
    assert [row["faults"] for row in content["rows"] if row["faults"]] == []
    assert status == 0
    for op in (*gpu_bytes.ASKED, *gpu_bytes.MEMORY):
        assert {row["model"] for row in content["rows"] if row["op"] == op} == {"base", "large"}


@pytest.mark.slow
@pytest.mark.xdist_group("gpu bytes")
def test_nothing_moves_less_than_it_must(found):
    for row in found[1]["rows"]:
        assert row["compulsory"] <= row["memory"] * 1.001 and row["memory"] <= row["asked"]


@pytest.mark.parametrize(("bars", "op"), [("ASKED", "add_layer_norm"), ("MEMORY", "tdnn")])
def test_a_bar_that_is_missed_is_said_and_fails(bars, op, monkeypatch, capsys):
    monkeypatch.setitem(getattr(gpu_bytes, bars), op, 0.99)
    assert gpu_bytes.main(["--op", op]) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"large {op}")
    assert said.endswith("the bar is 0.99")


def test_attention_comes_from_the_count_and_is_multiplied_by_the_heads(monkeypatch, capsys):
    one = Bytes(10**6, 10**5)
    monkeypatch.setattr(gpu_bytes, "attention", lambda *_: dict.fromkeys(gpu_bytes.ASKED, one))
    rows = [row for row in gpu_bytes.rows(torch.bfloat16, "gated_attention") if row.op == "gated_attention"]
    assert [(row.asked, row.memory) for row in rows] == [(n * one.asked, n * one.memory) for n in (12, 16)]


def test_a_failure_of_the_interpreter_is_no_count():
    with pytest.raises(RuntimeError, match="interpreter failed"):
        gpu_bytes.attention(torch.float16, 64, frames=-1)


def test_torch_ops_read_and_write_once_and_views_are_free():
    x, y = torch.empty(6, 4, device="meta"), torch.empty(6, 4, device="meta")
    with TorchBytes() as counted:
        (x + y).view(4, 6).t()
    assert counted.total == 3 * 96
    with TorchBytes() as counted:
        torch.empty_like(x).copy_(x)
    assert counted.total == 2 * 96
    with TorchBytes() as counted:
        torch.relu(x[:1].expand(6, 4))
    assert counted.total == 16 + 96
    with TorchBytes(ignored=[y]) as counted:
        x @ y.t()
    assert counted.total == 0
    assert size(torch.empty(0, 5)) == 0


def test_backward_is_counted_apart():
    x = torch.empty(6, 4, device="meta")
    forward, backward = forward_and_backward(torch.sigmoid, (x,))
    assert (forward, backward) == (2 * 96, 3 * 96)  # the gradient, the saved output and the result
