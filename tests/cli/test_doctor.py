"""`wavlm-fast doctor` tells what is there, and what is not, without failing over it."""

import dataclasses
import json
import sys

import pytest
import torch

import wavlm_fast
from wavlm_fast import backends, doctor, machine, ops
from wavlm_fast.backends import cpu
from wavlm_fast.kernels import _tuned


def lines(ended):
    assert ended.status == 0, ended
    return {line[:12].strip(): line[13:] for line in ended.out.splitlines() if line[:12].strip()}


def test_the_text(command):
    ended = command("doctor")
    said = lines(ended)
    assert said["torch"] == torch.__version__
    assert said["wavlm-fast"] == wavlm_fast.__version__
    assert said["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert f"{torch.get_num_threads()} torch threads" in said["threads"]
    assert said["CPU"].startswith(machine.cpu_name())
    assert said["audio"] == "readable; the clip of the package is 7.1 s of speech, FLAC PCM_16"
    assert said["extension"].startswith(("none: ", "built by "))
    assert said["devices"]
    for op in ops.references:
        assert f"| {op} " in ended.out
    assert "\x1b" not in ended.out


def test_json_says_what_the_chooser_says(command):
    found = json.loads(command("doctor", "--json").out)
    assert found["ops"].keys() == set(ops.references)
    assert found["versions"]["torch"] == torch.__version__
    for op, places in found["ops"].items():
        for dtype in (torch.float32, torch.bfloat16):
            choice = backends.choose(op, doctor.example(op, dtype, "cpu"))
            told = places[f"cpu {str(dtype).removeprefix('torch.')}"]
            assert told["backend"] == choice.backend
            assert told["reasons"] == [f"{name}: {reason}" for name, reason in choice.refused]


def test_what_torch_trains_faster_shows(command, monkeypatch):
    choices = cpu.choices
    monkeypatch.setattr(choices, "processor", lambda: "a made-up processor")
    monkeypatch.setattr(choices.extension, "problem", lambda: None)
    assert lines(command("doctor"))["choices"].endswith("torch's own ops train faster on a made-up processor")
    monkeypatch.setattr(choices, "ROWS", (choices.Row("a made-up processor", "tdnn", "0.70", 9),))
    told = lines(command("doctor"))["choices"]
    assert told == "torch's own tdnn trains faster on a made-up processor up to 9 frames (0.70 x)"


def test_it_asks_about_the_calls_that_the_ops_describe(monkeypatch):
    described = dataclasses.replace(ops.OPS["tdnn"], example=lambda *sizes: {"x": ops.Operand((7, *sizes))})
    monkeypatch.setitem(ops.OPS, "tdnn", dataclasses.replace(described, flops=lambda x: x.shape[1]))
    asked = doctor.example("tdnn", torch.bfloat16, "cpu")
    assert (asked[0].shape, asked[0].dtype, asked[1:]) == ((7, 1, 49, 512, 512, 5, 1), torch.bfloat16, (None,) * 8)


def test_json_to_a_file_comes_beside_the_text(command, tmp_path):
    ended = command("doctor", "--json", tmp_path / "doctor.json")
    assert "What runs where" in ended.out
    assert json.loads((tmp_path / "doctor.json").read_text())["cpu"]["name"] == machine.cpu_name()


def test_a_wish_for_a_backend_shows(command, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_BACKEND", "reference")
    found = json.loads(command("doctor", "--json").out)
    assert found["backend"] == "reference"
    assert found["environment"]["WAVLM_FAST_BACKEND"] == "reference"
    assert {place["backend"] for places in found["ops"].values() for place in places.values()} == {"reference"}


def test_a_backend_that_cannot_be_had_shows(command, monkeypatch):
    backend = backends.load("cpu")
    refusing = backends.Implementation(lambda *args: None, lambda *args: "it rains")
    monkeypatch.setitem(backend.TABLE, "tdnn", refusing)
    ended = command("doctor")
    assert "- cpu: it rains (tdnn)" in ended.out
    monkeypatch.setenv("WAVLM_FAST_BACKEND", "cpu")
    ended = command("doctor")
    assert ended.status == 0
    assert "it rains" in ended.out
    assert any(line.startswith("| tdnn ") and "none" in line for line in ended.out.splitlines())


def test_missing_parts_are_told(command, monkeypatch):
    for module in ("triton", "soundfile"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(cpu.extension, "problem", lambda: "extension not built: no C++ compiler found")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "PACKAGES", (*machine.PACKAGES, "absent"))
    said = lines(command("doctor"))
    assert said["absent"] == "not installed"
    assert said["Triton"].startswith("import") or said["Triton"].startswith("the triton package")
    assert said["extension"] == "none: extension not built: no C++ compiler found"
    assert said["audio"].startswith("reading audio files needs the soundfile package")
    assert said["devices"].startswith("none: this torch")


def test_tuned_choices_of_a_device_show(command, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("WAVLM_FAST_CACHE_DIR", str(tmp_path))
    assert lines(command("doctor"))["tuning"] == f"nothing to tune here; choices would lie in {tmp_path / 'tuned.json'}"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("NVIDIA L4", "NVIDIA H100")[index])
    _tuned.write(_tuned.place("NVIDIA H100", "a_kernel", (), ()), {"num_warps": 4})
    monkeypatch.setattr(_tuned, "SHIPPED", tmp_path / "shipped.json")
    _tuned.SHIPPED.write_text(json.dumps({_tuned.place(f"NVIDIA {n}", "a_kernel", (), ()): {} for n in ("H100", "A")}))
    assert doctor._tuning()["choices"] == {"NVIDIA L4": 0, "NVIDIA H100": 1}
    assert doctor._tuning()["shipped"] == {"NVIDIA L4": 0, "NVIDIA H100": 1}
    said = lines(command("doctor"))["tuning"]
    assert f"1 for NVIDIA H100 in {tmp_path / 'tuned.json'}, 1 for NVIDIA H100 that came with the package" in said
    assert "none for NVIDIA L4: kernels run with their defaults, WAVLM_FAST_AUTOTUNE=1 searches" in said


def test_a_triton_that_breaks_on_import(monkeypatch):
    def broken(name):
        raise RuntimeError("libcuda is from another age")

    monkeypatch.setattr(machine.importlib, "import_module", broken)
    assert machine.triton_problem() == "import triton fails: libcuda is from another age"


def test_cpu_features_are_read_from_the_system(monkeypatch):
    flags = "flags : fpu avx2 fma avx512f avx512_bf16 amx_tile amx_bf16"
    monkeypatch.setattr(machine, "_cpuinfo", lambda: ["model name : Some CPU @ 3 GHz", flags])
    assert machine.cpu_name() == "Some CPU @ 3 GHz"
    assert machine.cpu_features() == ["AVX2", "FMA", "AVX-512", "AVX-512 BF16", "AMX", "AMX BF16"]


def test_features_of_an_arm_processor_are_read_too(monkeypatch):
    monkeypatch.setattr(machine, "_cpuinfo", lambda: ["processor : 0", "Features : fp asimd sve i8mm bf16"])
    assert machine.cpu_features() == ["NEON", "SVE", "ARM BF16"]


def test_a_system_without_cpuinfo(monkeypatch):
    monkeypatch.setattr(machine, "_cpuinfo", list)
    assert machine.cpu_name()
    assert isinstance(machine.cpu_features(), list)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "200000 100000"}, 2.0),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        (
            "4:memory:/a\n2:cpu,cpuacct:/on/the/host",
            {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("2:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_quota_of_a_container(groups, files, quota, tmp_path):
    for name, content in {"groups": groups, **{f"root/{name}": text for name, text in files.items()}}.items():
        tmp_path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        tmp_path.joinpath(name).write_text(content + "\n")
    assert machine.cpu_quota(tmp_path / "root", tmp_path / "groups") == quota
    assert machine.cpu_quota(tmp_path / "root", tmp_path / "none") is None


@pytest.mark.parametrize(("quota", "threads"), [(1.5, 1), (0.5, 1), (None, 2), (2.0, 2)])
def test_more_threads_than_a_quota_allows_show(command, monkeypatch, quota, threads):
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(doctor, "_print_places", lambda *args: None)
    told = lines(command("doctor"))["threads"]
    assert (f"{quota:g} allowed by a quota of time" in told) if quota else "quota" not in told
    assert told.endswith(f"OMP_NUM_THREADS={threads}") == (threads < 2)
