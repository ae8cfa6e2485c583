"""`wavlm-fast gpu`: what it refuses, and all of it in Triton's interpreter, where next to nothing is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wavlm_fast.backends import load
from wavlm_fast.benchmarks.gpu.card import tables
from wavlm_fast.benchmarks.gpu.card.record import FILE, read
from wavlm_fast.benchmarks.gpu.card.steps import ATTENTION, MODELS, PARITY, PEAKS, PHASES, STAGES, TUNING
from wavlm_fast.ops import OPS

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# What a bare checkout does without. transformers may bring some of it: what it imports itself it has.
ABSENT = ("soundfile", "soxr", "rich", "matplotlib", "pytest", "onnx", "onnxruntime", "openvino", "psutil", "ray",
          "kaldiio", "pyarrow", "setuptools", "peft")  # fmt: skip
BARE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        file = "" if frame is None else frame.f_code.co_filename
        ours = file.startswith({str(ROOT)!r}) and "site-packages" not in file
        if ours and name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def test_without_a_gpu_it_says_so(command, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "gpu: there is no GPU to measure: " in command("gpu", "--out", tmp_path).sentence()


def test_the_cpu_is_for_trying_it(command, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for more in ((), ("--tiny",)):
        said = command("gpu", "--out", tmp_path, "--device", "cpu", *more).sentence()
        assert "with --tiny in Triton's interpreter alone" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "the following arguments are required: --out"),
        (("--out", "x", "--minutes", "0"), "a number of minutes above 0 is wanted, got '0'"),
        (("--out", "x", "--minutes", "nan"), "a number of minutes above 0 is wanted, got 'nan'"),
        (("--out", "x", "--device", "tpu9"), "cuda or cuda:N is wanted, got 'tpu9'"),
    ],
)
def test_wrong_arguments(command, arguments, says):
    assert says in command("gpu", *arguments).sentence()


@needs_triton
def test_a_folder_that_cannot_be_one(command, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        said = command("gpu", "--tiny", "--device", "cpu", "--out", out).sentence()
        assert f"--out {out} cannot be a folder to write into: " in said


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Runs the command as in a bare checkout, in the interpreter: bare(out) -> the process that has ended."""
    packages = tmp_path_factory.mktemp("bare")
    (packages / "sitecustomize.py").write_text(BARE)

    def run(out):
        arguments = ["--tiny", "--device", "cpu", "--minutes", "1", "--out", str(out)]
        return subprocess.run(
            [sys.executable, "-m", "wavlm_fast", "gpu", *arguments],
            cwd=ROOT,
            # Uncompiled everything is called all the same; a compiler for CPUs takes minutes.
            env={**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", "TRITON_INTERPRET": "1",
                 "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip

    return run


@needs_triton
@pytest.mark.slow
def test_whole(bare, tmp_path):
    """All of it, a minute at a time: machines differ in how many that takes."""
    for runs in range(1, 6):
        ended = bare(tmp_path)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        found = read(tmp_path / FILE)
        assert len(found.runs) == runs
        assert found.runs[-1]["seconds"] <= 60
        assert (f"{len(found.left_out)} measurements were left out" in ended.stdout) == bool(found.left_out)
        assert all(f"left out: {name}\n" in ended.stdout for name in found.left_out)
        if not found.left_out:
            break
    assert found.left_out == []
    steps = [line["step"] for line in found.lines]
    assert len(steps) == len(set(steps))
    assert tuple(dict.fromkeys(line["phase"] for line in found.lines)) == PHASES

    parity = found.rows(PARITY)
    kernels = {op for op in OPS if op in load("triton").TABLE}
    there = {(r["name"], r["quantity"], r["dtype"]) for r in parity}
    for quantity in ("forward", "gradient"):
        assert there >= {(op, quantity, dtype) for op in kernels for dtype in ("float32", "float16")}
        assert there >= {(model, quantity, "float32") for model in ("base", "large", "WavLMModel")}
    assert {r["verdict"] for r in parity} == {"pass"}

    attention = found.rows(ATTENTION)
    assert {r["provider"] for r in attention if "provider" in r} == {
        "wavlm_fast triton", "SDPA, dense bias", "SDPA, no bias", "FlexAttention"
    }  # fmt: skip
    assert {r["what"] for r in attention if "what" in r} == {"forward", "backward"}
    assert {r["op"] for r in found.rows(STAGES)} == {"waveform_conv", "strided_conv", "positional_conv"}
    assert {r["what"] for r in found.rows(STAGES)} == {"forward", "forward and backward"}
    for row in (*attention, *found.rows(STAGES)):
        if row.get("fault"):
            assert not row["ours"], row
            assert row["problem"] == "Refusal: FlexAttention computes no gradients on CPUs"
            continue
        assert row["seconds"]["median"] > 0
        assert row["bytes"] > 0
        assert 0 < row["share"] == max(row["of bandwidth"], row["of products"])
    models = found.rows(MODELS)
    assert {r["provider"] for r in models} == {"wavlm_fast", "transformers", "transformers + compile"}
    assert {(r["model"], r["what"]) for r in models} == {
        (model, what) for model in ("base", "large") for what in ("inference", "training step")
    }  # fmt: skip
    assert all(r["problem"] is None and r["seconds"]["median"] > 0 for r in models)
    assert len(found.rows(PEAKS)) == 3
    assert found.rows(TUNING)
    for table in tables.tables(found):
        assert table.plain() in ended.stdout

    before = (tmp_path / FILE).read_bytes()
    again = bare(tmp_path)
    assert again.returncode == 0, again.stderr
    more = (tmp_path / FILE).read_bytes().removeprefix(before).splitlines()
    assert [list(json.loads(line)) for line in more] == [["run"]]  # nothing was left to measure
    assert tables.tables(found)[1].plain() in again.stdout
