"""The reference of environment variables and the code that reads them name the same ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from doc_blocks import ROOT

from wavlm_fast.machine import VARIABLES

PAGE = ROOT / "docs" / "reference" / "environment.md"
OURS = re.compile(r"WAVLM_FAST_[A-Z_]*[A-Z]")
HERE = Path(__file__).parent
# Where each section's variables are read.
CODE = {
    "Users": [ROOT / "wavlm_fast", ROOT / "kernels", ROOT / "benchmarks", ROOT / "csrc"],
    "Building": [ROOT / "setup.py", ROOT / "build_backend.py"],
    "Tests": [ROOT / "tests"],
}


def _files(places: list[Path], suffix: str) -> Iterator[Path]:
    for place in places:
        yield from place.rglob(f"*{suffix}") if place.is_dir() else [place]


def _in_python(places: list[Path]) -> set[str]:
    """What is fetched from os.environ by a name that stands there, and every string that is a name of ours."""
    texts = [file.read_text() for file in _files(places, ".py") if HERE not in file.parents]
    trees = [ast.parse(text) for text in texts if "environ" in text or "WAVLM_FAST_" in text]
    constants = {
        target.id: node.value.value
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and OURS.fullmatch(node.value):
            found.add(node.value)
        for name in _asked_for(node):
            if isinstance(name, ast.Constant):
                found.add(name.value)
            elif isinstance(name, ast.Name) and name.id in constants:
                found.add(constants[name.id])
    return found


def _asked_for(node: ast.AST) -> Iterator[ast.expr]:
    """The names in os.environ.get(name), os.getenv(name), os.environ[name] and name in os.environ."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
        yield node.args[0]
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
        yield node.slice
    elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
        yield node.left


def _in_cpp(places: list[Path]) -> set[str]:
    return {name for file in _files(places, ".cpp") for name in re.findall(rf'"({OURS.pattern})"', file.read_text())}


def _read() -> dict[str, set[str]]:
    """By section. What the build reads others only name, and tests set what they do not read."""
    building = _in_python(CODE["Building"])
    users = (_in_python(CODE["Users"]) | _in_cpp([ROOT / "csrc"])) - building - {"PYTHONPATH"}
    tests = {name for name in _in_python(CODE["Tests"]) if OURS.fullmatch(name)} - users - building
    return {"Users": users, "Building": building, "Tests": tests}


def _told() -> dict[str, set[str]]:
    sections = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    tables = dict(zip(sections[::2], sections[1::2], strict=True))
    return {name: set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) for name, text in tables.items()}


def test_every_variable_that_is_read_is_in_the_reference_and_no_other() -> None:
    assert _told() == _read()


def test_the_makefile_and_every_page_name_variables_that_are_there() -> None:
    known = set.union(*_told().values())
    for file in (ROOT / "Makefile", ROOT / "CONTRIBUTING.md", ROOT / "README.md", *ROOT.joinpath("docs").rglob("*.md")):
        text = file.read_text()
        # Names of C++ macros are told of beside them.
        named = set(OURS.findall(text)) - {"WAVLM_FAST_ISA", "WAVLM_FAST_DISPATCH"}
        assert named <= known, f"{file.relative_to(ROOT)}: {named - known}"


def test_doctor_shows_what_steers_us() -> None:
    ours = {name for name in _told()["Users"] if OURS.fullmatch(name)}
    assert {name for name in VARIABLES if OURS.fullmatch(name)} == ours | {"WAVLM_FAST_NO_EXTENSION"}
