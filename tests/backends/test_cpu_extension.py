"""Loading the extension, the sentence that stands where it cannot be used, and who is told."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

import wavlm_fast
from wavlm_fast import backends, doctor, ops, report
from wavlm_fast.backends import cpu
from wavlm_fast.backends.cpu import extension

needs_extension = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))


def folder_with(path, record, library=b""):
    path.joinpath("_build.json").write_text(json.dumps(record))
    if library is not None:
        path.joinpath("_C.so").write_bytes(library)
    return path


def test_never_installed(tmp_path):
    assert (
        extension._find_and_load(tmp_path) == "extension not built: wavlm-fast was not installed, only put on the path"
    )


def test_failed_build_gives_its_reason(tmp_path):
    folder = folder_with(tmp_path, {"failed": "no C++ compiler found (c++ does not exist)"}, library=None)
    assert extension._find_and_load(folder) == "extension not built: no C++ compiler found (c++ does not exist)"


@pytest.mark.parametrize("built_with", ["2.10.0", "2.99.0+cpu"])
def test_built_with_whatever_torch(tmp_path, built_with):
    problem = extension._find_and_load(folder_with(tmp_path, {"torch": built_with}, library=b"not a library"))
    assert problem.startswith("extension cannot be loaded: ")


@pytest.mark.parametrize(
    ("installed", "old"), [("2.9.1+cpu", True), ("1.13.0", True), ("2.10.0a0", False), ("3.0", False)]
)
def test_torch_may_be_too_old(tmp_path, monkeypatch, installed, old):
    monkeypatch.setattr(torch, "__version__", installed)
    problem = extension._find_and_load(folder_with(tmp_path, {}, library=b"not a library"))
    assert (problem == f"extension needs torch 2.10 or newer, got {installed}") == old
    if old:
        monkeypatch.setattr(extension, "problem", lambda: problem)
        assert extension.mending() == "pip install --upgrade torch"


def test_built_from_other_sources(tmp_path):
    tmp_path.joinpath("csrc").mkdir()
    tmp_path.joinpath("csrc", "dispatch.h").write_text("")
    tmp_path.joinpath("package").mkdir()
    record = {"torch": torch.__version__, "sources": "0"}
    problem = extension._find_and_load(folder_with(tmp_path / "package", record))
    assert problem == "extension is older than the sources in csrc/: install wavlm-fast again"


@needs_extension
def test_the_extension_is_of_the_sources_beside_it():
    assert extension._digest_of(extension._FOLDER.parent / "csrc") in (None, cpu.build_record()["sources"])


def test_unloadable_library(tmp_path):
    problem = extension._find_and_load(folder_with(tmp_path, {"torch": torch.__version__}, library=b"not a library"))
    assert problem.startswith("extension cannot be loaded: ")


def test_without_extension_auto_falls_back_and_the_name_raises(monkeypatch):
    monkeypatch.setattr(extension, "problem", lambda: "extension not built: no C++ compiler found")
    x, w = torch.randn(2, 8), torch.ones(8)
    choice = backends.choose("add_layer_norm", (x, x, w, w, 1e-5, True))
    assert choice.backend == "reference"
    assert choice.refused == (("cpu", "extension not built: no C++ compiler found"),)
    assert cpu.isa() is None
    assert cpu.threads() is None
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
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_run_on_the_threads_of_torch(threads):
    code = "from wavlm_fast.backends import cpu; print(cpu.extension.problem(), cpu.extension._threads())"
    assert ended(code, OMP_NUM_THREADS=str(threads)).stdout.split() == ["None", str(threads)]


@needs_extension
def test_who_computes_does_not_depend_on_threads(monkeypatch):
    """Neither on how many torch has, nor on how many a loop gets at the moment."""
    monkeypatch.setattr(extension, "_threads", lambda: 1)
    x, w, before = torch.randn(2, 8), torch.ones(8), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert extension.problem() is None
            assert backends.choose("add_layer_norm", (x, x, w, w, 1e-5, True)).backend == "cpu"
    finally:
        torch.set_num_threads(before)


def ended(code, **environment):
    run = [sys.executable, "-c", code]
    return subprocess.run(run, env={**os.environ, **environment}, capture_output=True, text=True, check=True)


ASKED = "from wavlm_fast.backends.cpu import isa, extension as e; print(isa(), e.problem(), e.mending(), sep='\\n')"


def test_another_extension_by_its_path(tmp_path):
    file = tmp_path / "other.so"
    file.write_bytes(b"not a library")
    isa, problem, mending = ended(ASKED, WAVLM_FAST_EXTENSION=str(file)).stdout.splitlines()
    assert isa == "None"
    assert problem.startswith("extension cannot be loaded: ")
    assert str(file) in problem
    assert mending == "unset WAVLM_FAST_EXTENSION"


@needs_extension
def test_another_extension_is_not_compared_with_sources(tmp_path, monkeypatch):
    installed = next(extension._FOLDER.glob("_C*.so"))
    tmp_path.joinpath("other.so").symlink_to(installed)
    monkeypatch.setattr(extension, "_digest_of", lambda sources: "of other sources")
    monkeypatch.setattr(extension, "build_record", lambda folder=None: {"sources": "0"})
    monkeypatch.setenv("WAVLM_FAST_EXTENSION", str(tmp_path / "other.so"))
    load, loaded = torch.ops.load_library, []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(path) or load(path))
    assert extension.problem.__wrapped__() is None
    assert loaded == [str(tmp_path / "other.so")]
    monkeypatch.setenv("WAVLM_FAST_EXTENSION", "")
    assert extension.problem.__wrapped__().startswith("extension is older than the sources")


@needs_extension
@pytest.mark.parametrize(
    ("wanted", "used", "said"),
    [
        ("default", "default", ""),
        ("sse9", None, "WAVLM_FAST_CPU_ISA=sse9 is none of default, "),
    ],
)
def test_forced_level(wanted, used, said):
    run = ended(ASKED, WAVLM_FAST_CPU_ISA=wanted)
    assert run.stdout.splitlines()[0] == (used or ended(ASKED, WAVLM_FAST_CPU_ISA="").stdout.splitlines()[0])
    assert said in run.stderr
    assert bool(said) == ("WAVLM_FAST_CPU_ISA" in run.stderr)


@needs_extension
@pytest.mark.skipif("avx512_bf16" not in cpu.isa_levels(), reason="this CPU or build has no dot products of bfloat16")
@pytest.mark.parametrize(("gain", "pay"), [(2.0, True), (1.2, True), (1.19, False), (0.5, False)])
def test_dot_products_are_used_where_they_pay(gain, pay):
    level, reason = torch.ops.wavlm_fast_cpu.isa_for(gain)
    assert level == ("avx512_bf16" if pay else "avx512")
    assert reason.startswith("" if pay else "bfloat16 is multiplied as float32: ")
    assert pay == (f"reach {100 * gain:.0f} % of" not in reason)


def test_report_and_doctor_say_how_bfloat16_is_multiplied(monkeypatch):
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(cpu, "arithmetic", lambda: "bfloat16 is multiplied as float32: it rains")
    assert str(report(model.bfloat16())).endswith("bfloat16 is multiplied as float32: it rains")
    assert "rains" not in str(report(model.float()))
    found = {**doctor.extension(), "level": "avx512", "levels": ["avx512"], "problem": None}
    assert doctor._extension_line(found).endswith("; bfloat16 is multiplied as float32: it rains")


MENDING = "pip install --force-reinstall --no-cache-dir --no-deps ."


@pytest.fixture
def missing(monkeypatch, caplog):
    """A machine without the extension; the warnings that a user of it has seen."""
    monkeypatch.setattr(extension, "problem", lambda: "extension not built: no C++ compiler found")
    monkeypatch.setattr(extension, "build_record", lambda: {"failed": "no C++ compiler found"})
    monkeypatch.setattr(backends, "_warned", set())
    caplog.set_level(logging.WARNING, logger="wavlm_fast")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "wavlm_fast"]


def test_missing_kernels_are_told_once_with_what_mends_it(missing):
    x, w = torch.randn(2, 8), torch.ones(8)
    for _ in range(2):
        ops.add_layer_norm(x, x, w, w)
        ops.stats_pool(x[None])
    (told,) = missing()
    assert "extension not built: no C++ compiler found" in told
    assert told.endswith(MENDING)


def test_what_kernels_would_not_have_taken_is_no_warning(missing):
    ops.stats_pool(torch.randn(1, 2, 8).double())
    assert not missing()


def test_without_kernels_by_choice_nothing_is_told(missing, monkeypatch):
    x = torch.randn(1, 2, 8)
    with backends.use_backend("reference"):
        ops.stats_pool(x)
    monkeypatch.setenv("WAVLM_FAST_BACKEND", "reference")
    ops.stats_pool(x)
    monkeypatch.delenv("WAVLM_FAST_BACKEND")
    monkeypatch.setattr(extension, "build_record", lambda: {"failed": "WAVLM_FAST_NO_EXTENSION is set"})
    ops.stats_pool(x)
    assert not missing()


def test_who_asks_is_told_without_a_warning(missing):
    doctor.examine()
    model = wavlm_fast.WavLMModel(wavlm_fast.WavLMConfig(num_hidden_layers=1)).eval()
    assert "extension not built" in str(wavlm_fast.report(model))
    assert not missing()


def test_the_warning_is_seen_by_default_and_is_no_error():
    code = """
import torch, wavlm_fast
from wavlm_fast import ops
from wavlm_fast.backends.cpu import extension
extension.problem = lambda: "extension not built: it rains"
for _ in range(2):
    ops.stats_pool(torch.ones(1, 2, 8))
"""
    for filters in ("ignore", "error::UserWarning"):
        run = ended(code, PYTHONWARNINGS=filters)
        assert run.stderr.count("extension not built: it rains") == 1
        assert run.stderr.strip().endswith(MENDING)
