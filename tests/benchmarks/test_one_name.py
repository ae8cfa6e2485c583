"""benchmarks/ and kernels/ are loaded as parts of wavlm_fast only: under a second name every class would be another."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wavlm_fast.benchmarks.run import cases, fresh
from wavlm_fast.benchmarks.run.providers import Subject, providers

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "kernels")
SOURCES = [path for folder in (*FOLDERS, "wavlm_fast", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
# Runs when a process starts: at its end, every file of ours that it has loaded is a line, with its names.
LOOK = f"""
import atexit, os, sys

def look():
    names = {{}}
    for name, module in list(sys.modules.items()):
        path = os.path.relpath(os.path.realpath(getattr(module, "__file__", None) or os.devnull), {str(ROOT)!r})
        if path.startswith({tuple(f + os.sep for f in FOLDERS)!r}):
            names.setdefault(path, {{}})[id(module)] = name  # `__mp_main__` is `__main__`, not another
    with open(os.path.join(os.path.dirname(__file__), "loaded"), "a") as file:
        print("".join(f"{{path}} {{' '.join(found.values())}}\\n" for path, found in names.items()), end="", file=file)

atexit.register(look)
"""
ALL = """
import importlib, pkgutil, runpy, sys
from wavlm_fast import benchmarks, cli, kernels
for package in (kernels, benchmarks):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
for command in sys.argv[1:]:
    sys.argv[1:] = ["--help"]
    try:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, command
"""


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Lists what processes that are started from here have loaded: loaded() -> {file: names}, over all of them."""
    (tmp_path / "sitecustomize.py").write_text(LOOK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))

    def found():
        names = {}
        for line in (tmp_path / "loaded").read_text().splitlines():
            path, *several = line.split()
            names.setdefault(path, set()).update(several)
        return names

    return found


def imports(text):
    """The modules that a source imports by their full names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "importorskip", "__import__"):
                yield node.args[0].value


def by_own_name(text):
    if not any(folder in text for folder in FOLDERS):  # which is sooner seen than parsed
        return []
    return [name for name in imports(text) if name.partition(".")[0] in FOLDERS]


@pytest.mark.parametrize(
    "line",
    [
        "import kernels",
        "import benchmarks.run.cases",
        "import os, kernels._target as target",
        "from benchmarks import run",
        "def f():\n    from kernels._target import pretend",
        "importlib.import_module('benchmarks.run.cases')",
        "pytest.importorskip('kernels')",
    ],
)
def test_an_import_by_the_folder_s_own_name_is_seen(line):
    assert by_own_name(line)


@pytest.mark.parametrize(
    "line", ["from wavlm_fast import kernels", "from .kernels import _target", "import wavlm_fast.benchmarks.run"]
)
def test_an_import_as_a_part_of_wavlm_fast_is_none(line):
    assert not by_own_name(line)


def test_nobody_imports_the_folders_by_their_own_names():
    assert {path: found for path in SOURCES if (found := by_own_name(path.read_text(encoding="utf-8")))} == {}


def test_all_modules_and_commands_load_once(loaded):
    commands = ("__main__", "results", "gpu_static", "gpu_bytes", "gpu_roofline")
    command = [sys.executable, "-c", ALL, *(f"benchmarks.{name}" for name in commands)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = loaded()
    assert {path: found for path, found in names.items() if len(found) > 1} == {}
    there = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert there - {*names} == {"benchmarks/__main__.py", "benchmarks/run/__main__.py"}


def test_a_process_of_its_own_loads_once(loaded, tiny, tmp_path):
    case, name = cases.CASES["base 1x1"], "wavlm_fast fp32"
    subject = Subject(tiny(), case.inputs(None, False), tmp_path / "exports", 1, "cpu")
    result = fresh.run(case, name, providers("cpu")[0][name], subject)
    assert isinstance(result, fresh.Result), result
    names = loaded()
    assert names["benchmarks/run/fresh.py"] == {"wavlm_fast.benchmarks.run.fresh"}
    assert {path: found for path, found in names.items() if len(found) > 1} == {}


def test_tests_load_once():
    """Whatever has run in this process so far: transformers asks for `kernels` itself, and finds no file of ours."""
    assert not [name for name in sys.modules if name.startswith(tuple(f"{folder}." for folder in FOLDERS))]
