"""Loading the extension, and the sentence that stands where it cannot be loaded."""

import json
import os
import subprocess
import sys

import pytest
import torch

from wavlm_fast import backends
from wavlm_fast.backends import cpu

needs_extension = pytest.mark.skipif(cpu.EXTENSION_PROBLEM is not None, reason=str(cpu.EXTENSION_PROBLEM))


def folder_with(path, record, library=b""):
    path.joinpath("_build.json").write_text(json.dumps(record))
    if library is not None:
        path.joinpath("_C.so").write_bytes(library)
    return path


def test_never_installed(tmp_path):
    assert cpu._load_extension(tmp_path) == "extension not built: wavlm-fast was not installed, only put on the path"


def test_failed_build_gives_its_reason(tmp_path):
    folder = folder_with(tmp_path, {"failed": "no C++ compiler found (c++ does not exist)"}, library=None)
    assert cpu._load_extension(folder) == "extension not built: no C++ compiler found (c++ does not exist)"


def test_built_for_another_torch(tmp_path):
    problem = cpu._load_extension(folder_with(tmp_path, {"torch": "2.3.1", "levels": []}))
    assert problem.startswith("extension built with torch 2.3.1, torch ")
    assert "install wavlm-fast again" in problem


def test_built_from_other_sources(tmp_path):
    tmp_path.joinpath("csrc").mkdir()
    tmp_path.joinpath("csrc", "dispatch.h").write_text("")
    tmp_path.joinpath("package").mkdir()
    record = {"torch": torch.__version__, "sources": "0"}
    problem = cpu._load_extension(folder_with(tmp_path / "package", record))
    assert problem == "extension is older than the sources in csrc/: install wavlm-fast again"


@needs_extension
def test_the_extension_is_of_the_sources_beside_it():
    assert cpu._digest_of(cpu._FOLDER.parent / "csrc") in (None, cpu.build_record()["sources"])


def test_unloadable_library(tmp_path):
    problem = cpu._load_extension(folder_with(tmp_path, {"torch": torch.__version__}, library=b"not a library"))
    assert problem.startswith("extension cannot be loaded: ")


def test_without_extension_auto_falls_back_and_the_name_raises(monkeypatch):
    monkeypatch.setattr(cpu, "EXTENSION_PROBLEM", "extension not built: no C++ compiler found")
    x, w = torch.randn(2, 8), torch.ones(8)
    choice = backends.choose("add_layer_norm", (x, x, w, w, 1e-5, True))
    assert choice.backend == "reference"
    assert choice.refused == (("cpu", "extension not built: no C++ compiler found"),)
    assert cpu.isa() is None
    assert cpu.isa_levels() == []
    with (
        backends.use_backend("cpu"),
        pytest.raises(backends.BackendUnavailable, match="extension not built: no C\\+\\+ compiler found"),
    ):
        backends.choose("add_layer_norm", (x, x, w, w, 1e-5, True))


@needs_extension
def test_the_chooser_takes_cpp():
    x, w = torch.randn(2, 8), torch.ones(8)
    assert backends.choose("add_layer_norm", (x, x, w, w, 1e-5, True)).backend == "cpu"
    double = backends.choose("add_layer_norm", (*(t.double() for t in (x, x, w, w)), 1e-5, True))
    assert double.backend == "reference"
    assert "torch.float64" in double.refused[0][1]


@needs_extension
def test_build_record_matches_the_extension():
    record = cpu.build_record()
    assert set(cpu.isa_levels()) <= set(record["levels"])
    assert cpu.isa() in record["levels"]


@needs_extension
@pytest.mark.parametrize("threads", ["1", "2"])
def test_kernels_run_on_the_threads_of_torch(threads):
    run = subprocess.run(
        [sys.executable, "-c", "from wavlm_fast.backends import cpu; print(cpu.threads())"],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == threads


@needs_extension
@pytest.mark.parametrize(
    ("wanted", "used", "said"),
    [
        ("default", "default", ""),
        ("sse9", None, "WAVLM_FAST_CPU_ISA=sse9 is none of default, avx2, avx512, avx512_bf16; using "),
    ],
)
def test_forced_level(wanted, used, said):
    run = subprocess.run(
        [sys.executable, "-c", "from wavlm_fast.backends import cpu; print(cpu.isa())"],
        env={**os.environ, "WAVLM_FAST_CPU_ISA": wanted},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == (used or cpu.isa_levels()[-1])
    assert said in run.stderr
    assert bool(said) == ("WAVLM_FAST_CPU_ISA" in run.stderr)
