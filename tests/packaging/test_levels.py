"""Instruction set levels that are built: of the processor that the compiler compiles for, those that it knows."""

import runpy
import shlex
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
X86 = ("default", "avx2", "avx512", "avx512_bf16")
ARM = ("default", "neon_bf16")


@pytest.fixture
def setup_py(monkeypatch):
    """What setup.py defines, without running setup."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path("setup.py")


@pytest.fixture
def compiler(tmp_path):
    """Makes a compiler for a target that does not know a flag; what it was asked is in calls."""

    def make(target, unknown="none"):
        script = tmp_path / "compiler"
        calls = shlex.quote(str(tmp_path / "calls"))
        script.write_text(
            f'#!/bin/sh\necho "$*" >> {calls}\n'
            f'case "$*" in -dumpmachine) echo {target};; *{unknown}*) exit 1;; esac\n'
        )
        script.chmod(0o755)
        return [str(script)]

    return make


@pytest.mark.parametrize(
    ("target", "unknown", "levels"),
    [
        ("aarch64-linux-gnu", "none", ARM),
        ("aarch64-linux-gnu", "+bf16", ARM[:1]),
        ("arm64-apple-darwin23.1.0", "none", ARM[:1]),
        ("x86_64-linux-gnu", "none", X86),
        ("x86_64-linux-gnu", "-mavx512bf16", X86[:3]),
        ("riscv64-linux-gnu", "none", ("default",)),
    ],
)
def test_levels_are_those_of_the_compiler(setup_py, compiler, tmp_path, target, unknown, levels):
    assert tuple(setup_py["available_levels"](compiler(target, unknown))) == levels
    asked = (tmp_path / "calls").read_text()
    assert ("-march=armv8.2-a+bf16" in asked) == target.startswith("aarch64")
    assert ("-mavx2" in asked) == target.startswith("x86")


def test_every_level_can_be_chosen(setup_py):
    dispatch = (ROOT / "csrc" / "dispatch.h").read_text()
    names = {name for levels in setup_py["LEVELS"].values() for name in levels}
    assert names == {*X86, *ARM}
    for name in names - {"default"}:
        assert f"WAVLM_FAST_IF_{name.upper()}(case Isa::{name}: return isa_{name}::name();)" in dispatch
