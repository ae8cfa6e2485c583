"""Which torch the extension is built with, what is asked for where there is none, and what is compiled again."""

import ensurepip
import json
import shutil
import time
from pathlib import Path

import pytest
from installations import Environment, make_clone, only_setuptools

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

# As under pip's build isolation: the environment's own packages are off the path, its prefix is what it was.
ISOLATED = "import sys; sys.path = [p for p in sys.path if not p.endswith('-packages')]; import build_backend"
BUILD = f"{ISOLATED}, runpy; sys.argv[1:] = ['build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
ASK = f"{ISOLATED}; print(build_backend.torch_to_ask_for(), build_backend.torch_folder())"
NO_TORCH = "wavlm-fast's C++ kernels are built with the headers of torch 2.10 or newer, and this environment has none"
# Takes every probe, writes empty objects that depend on their source and on one header, and logs how it was called.
COMPILER = """#!/bin/sh
echo "$*" >> "$LOG"
for word in "$@"; do
    [ "$before" = -o ] && out=$word
    [ "$before" = -c ] && source=$word
    before=$word
done
[ -z "$out" ] || : > "$out"
[ -z "$source" ] || echo "$out: $source csrc/dispatch.h" > "${out%.o}.d"
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """(environment, a clone): nothing is installed in it."""
    folder = tmp_path_factory.mktemp("backend")
    only_setuptools(folder / "path")
    return Environment.create(folder / "venv"), make_clone(folder / "repository"), {"PYTHONPATH": str(folder / "path")}


def put_torch(environment, version):
    torch = environment.site_packages / "torch"
    shutil.rmtree(torch, ignore_errors=True)
    if version is not None:
        torch.joinpath("include").mkdir(parents=True)
        torch.joinpath("version.py").write_text(f"debug = False\n__version__ = '{version}'\ncuda = None\n")
    return torch


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+git1234567"])
def test_a_torch_that_isolation_hides_is_found(environment, version):
    environment, clone, variables = environment
    torch = put_torch(environment, version)
    assert environment.python("-c", ASK, cwd=clone, **variables) == f"[] {torch}\n"


@pytest.mark.parametrize("version", [None, "2.9.1+cu128"])
def test_torch_is_asked_for_where_none_is_new_enough(environment, version):
    environment, clone, variables = environment
    put_torch(environment, version)
    assert environment.python("-c", ASK, cwd=clone, **variables) == "['torch>=2.10'] None\n"


@pytest.mark.parametrize("broken", [{"CXX": "/nonexistent/c++"}, {"WAVLM_FAST_NO_EXTENSION": "1"}])
def test_no_torch_is_asked_for_where_nothing_is_compiled(environment, broken):
    environment, clone, variables = environment
    put_torch(environment, None)
    assert environment.python("-c", ASK, cwd=clone, **variables, **broken) == "[] None\n"


def test_without_torch_nothing_is_installed_and_a_sentence_says_what_to_do(environment, tmp_path):
    environment, clone, variables = environment
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    put_torch(environment, None)
    call = f"{ISOLATED}; build_backend.build_wheel({str(tmp_path)!r})"
    log = environment.python("-c", call, cwd=clone, check=False, **variables)
    assert NO_TORCH in log.splitlines()[-1]
    assert "Traceback" not in log
    assert not list(tmp_path.glob("*.whl"))


def test_an_older_setuptools_gets_a_sentence(environment, tmp_path):
    bundled = list(Path(ensurepip.__file__).parent.glob("_bundled/setuptools-6*.whl"))
    if not bundled:
        pytest.skip("this Python brings no setuptools older than 77")
    environment, clone, _ = environment
    shutil.unpack_archive(bundled[0], tmp_path / "older", "zip")
    call = f"{ISOLATED}; build_backend.build_wheel({str(tmp_path)!r})"
    log = environment.python("-c", call, cwd=clone, check=False, PYTHONPATH=str(tmp_path / "older"))
    assert log.splitlines()[-1].startswith("wavlm-fast is built by setuptools 77 or newer, this is 6")
    assert "Traceback" not in log


def test_only_what_has_changed_is_compiled_again(environment, tmp_path):
    environment, _, variables = environment
    clone = make_clone(tmp_path / "repository")
    for source in clone.glob("csrc/*.cpp"):
        if not source.name.startswith(("add_layer_norm.", "add_layer_norm_kernel.", "dispatch.")):
            source.unlink()
    put_torch(environment, "2.13.0")
    compiler, log = tmp_path / "c++", tmp_path / "log"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    header, kernel = clone / "csrc" / "dispatch.h", clone / "csrc" / "add_layer_norm_kernel.cpp"

    def compiled(**more):
        """The commands of a build, by source; the link's is by None."""
        log.write_text("")
        environment.python("-c", BUILD, cwd=clone, CXX=str(compiler), LOG=str(log), **variables, **more)
        calls = [line.split() for line in log.read_text().splitlines() if "csrc/" in line or "-shared" in line]
        return [(words[words.index("-c") + 1] if "-c" in words else None, words) for words in calls]

    first = compiled()
    levels = json.loads(clone.joinpath("wavlm_fast", "_build.json").read_text())["levels"]
    assert sorted(source or "" for source, _ in first) == sorted(
        ["", "csrc/add_layer_norm.cpp", "csrc/dispatch.cpp"] + [f"csrc/{kernel.name}"] * len(levels)
    )
    assert [source for source, _ in compiled()] == [None]
    time.sleep(0.02)
    kernel.touch()
    assert [source for source, _ in compiled()] == [f"csrc/{kernel.name}"] * len(levels) + [None]
    time.sleep(0.02)
    header.touch()
    assert len(compiled()) == len(first)
    put_torch(environment, "2.14.0")
    assert len(compiled()) == len(first)
    flagged = compiled(WAVLM_FAST_CXXFLAGS="-fsanitize=address")
    assert len(flagged) == len(first)
    assert all("-fsanitize=address" in words for _, words in flagged)
