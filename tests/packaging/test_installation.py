"""Wheel, sdist and editable install; with a compiler and without; beside another package named `kernels`."""

import json
import shutil
import tarfile
import zipfile

import pytest
from installations import ROOT, SAID, Environment, add_stand_in, make_clone

from wavlm_fast import __version__

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

# Imports everything that an installation promises, and prints the extension's problem.
USE = """
import importlib.util, pathlib, sys
import wavlm_fast, wavlm_fast.kernels
from wavlm_fast.backends import cpu
from transformers.models.wavlm import modeling_wavlm
assert importlib.util.find_spec("wavlm_fast.kernels.add_layer_norm") is not None
if importlib.util.find_spec("triton"):
    import wavlm_fast.kernels.add_layer_norm as kernel
    assert pathlib.Path(kernel.__file__).is_file()
print("from", pathlib.Path(wavlm_fast.__file__).parent)
print("problem:", cpu.extension.problem())
"""


def build(kind, clone, out, **variables):
    """A wheel or sdist by the build backend, in the environment that runs the tests."""
    call = f"import build_backend; print(build_backend.build_{kind}({str(out)!r}))"
    out.mkdir(exist_ok=True)
    log = Environment.running().python("-c", call, cwd=clone, **variables)
    return out / log.splitlines()[-1], log


def assert_only_wavlm_fast(names):
    tops = {name.split("/")[0] for name in names}
    assert "wavlm_fast" in tops
    assert {top for top in tops if not top.endswith(".dist-info")} == {"wavlm_fast"}


@pytest.fixture(scope="module")
def wheel_installation(tmp_path_factory):
    """(environment, wheel) with the extension compiled, and the stand-in beside it."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("wheel")
    wheel, _ = build("wheel", make_clone(folder / "repository", with_objects=True), folder / "dist")
    environment = Environment.create(folder / "venv")
    environment.install(wheel, cwd=folder)
    add_stand_in(environment)
    return environment, wheel


@pytest.fixture(scope="module")
def editable_installation(tmp_path_factory):
    """(environment, clone) without the extension, and the stand-in beside it."""
    folder = tmp_path_factory.mktemp("editable")
    clone = make_clone(folder / "repository")
    environment = Environment.create(folder / "venv")
    log = environment.install("-e", clone, cwd=folder, WAVLM_FAST_NO_EXTENSION="1")
    assert log.count(SAID) == 1
    add_stand_in(environment)
    return environment, clone


def test_wheel_holds_the_package_and_nothing_else(wheel_installation):
    _, wheel = wheel_installation
    assert wheel.name.startswith(f"wavlm_fast-{__version__}-py3-none-")
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert set(json.loads(archive.read("wavlm_fast/_build.json"))) == {"torch", "compiler", "levels", "sources"}
    assert_only_wavlm_fast(names)
    data = {"wavlm_fast/data/speech.flac", "wavlm_fast/kernels/tuned.json", "wavlm_fast/py.typed"}
    assert {"wavlm_fast/_C.so", "wavlm_fast/kernels/add_layer_norm.py", *data} <= set(names)


def test_wheel_works(wheel_installation, tmp_path):
    environment, _ = wheel_installation
    found = environment.python("-c", USE, cwd=tmp_path)
    assert f"from {environment.site_packages}" in found
    assert "problem: None" in found


def test_editable_works_from_anywhere(editable_installation, tmp_path):
    environment, clone = editable_installation
    for folder in (tmp_path, clone):
        found = environment.python("-c", USE, cwd=folder)
        assert f"from {clone}" in found
        assert "problem: extension not built: WAVLM_FAST_NO_EXTENSION is set" in found


def test_sdist_builds_a_wheel(tmp_path):
    sdist, _ = build("sdist", make_clone(tmp_path / "repository"), tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    shutil.unpack_archive(sdist, tmp_path)
    assert {"docs/conf.py", "docs/index.md", "docs/entry/index.html", "docs/static/pages.css"} <= names
    assert {"build_backend.py", "csrc/dispatch.h", "csrc/add_layer_norm_kernel.cpp"} <= names
    assert {"kernels/add_layer_norm.py", "examples/service.py", "examples/tour.ipynb", "Makefile", "LICENSE"} <= names
    assert {"CITATION.cff", "wavlm_fast/py.typed"} <= names
    assert not {name for name in names if name.endswith((".so", "_build.json"))}
    wheel, log = build(
        "wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "dist", WAVLM_FAST_NO_EXTENSION="1"
    )
    assert log.count(SAID) == 1
    assert wheel.name == f"wavlm_fast-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert_only_wavlm_fast(names)
    beside = {path.relative_to(ROOT) for folder in ("kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    data = {"wavlm_fast/_build.json", "wavlm_fast/kernels/tuned.json", "wavlm_fast/py.typed"}
    assert data | {f"wavlm_fast/{path}" for path in beside} <= set(names)
    environment = Environment.create(tmp_path / "venv")
    environment.install(wheel, cwd=tmp_path)
    assert "WAVLM_FAST_NO_EXTENSION is set" in environment.python("-c", USE, cwd=tmp_path)


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_kernels_is_the_other_package(kind, request, tmp_path):
    environment, _ = request.getfixturevalue(f"{kind}_installation")
    _, clone = request.getfixturevalue("editable_installation")
    for folder in (tmp_path, clone):
        assert environment.python("-c", "import which_kernels", cwd=folder) == "the stand-in\n"
        assert environment.python("-m", "which_kernels", cwd=folder) == "the stand-in\n"


def test_from_the_repository_root_transformers_finds_no_kernels(tmp_path):
    environment = Environment.create(tmp_path / "venv")
    clone = make_clone(tmp_path / "repository")
    question = "from transformers.utils import is_kernels_available as a; print('available:', a())"
    here, there = (environment.python("-c", question, cwd=folder) for folder in (clone, tmp_path))
    assert here == there


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("no compiler", "no C++ compiler found (/nonexistent/c++ does not exist)"),
        ("failing compiler", "compiling csrc/ failed"),
    ],
)
def test_installs_without_what_the_extension_needs(broken, reason, tmp_path):
    variables = {"CXX": "/nonexistent/c++"}
    if broken == "failing compiler":
        if shutil.which("c++") is None:
            pytest.skip("no C++ compiler to take the probe")
        compiler = tmp_path / "c++"
        compiler.write_text('#!/bin/sh\ncase "$*" in *csrc*) echo "error: broken" >&2; exit 1;; esac\nexec c++ "$@"\n')
        compiler.chmod(0o755)
        variables = {"CXX": str(compiler)}
    clone = make_clone(tmp_path / "repository")
    clone.joinpath("wavlm_fast", "_C.so").write_text("left by an older build")
    environment = Environment.create(tmp_path / "venv")
    log = environment.install("-e", clone, cwd=tmp_path, **variables)
    assert log.count(SAID) == 1
    assert reason in log
    assert f"problem: extension not built: {reason}" in environment.python("-c", USE, cwd=tmp_path)
