"""Tiles without a CPU that has them: the unit emulated or stood in for, and a trial that finds what it is told."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from wavlm_fast.backends.cpu import packed_conv, tiles

WORKS = (tiles.PRODUCTS, tiles.ATTENTION)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """What does the unit's instructions, where the CPU stops at them."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        pytest.skip("no C++ compiler found")
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU does not stop at the unit's instructions, and nobody asked for it to run them")
    source, library = Path(__file__).with_name("amx_unit.cpp"), tmp_path_factory.mktemp("amx") / "amx_unit.so"
    subprocess.run([*command, "-std=c++20", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(library)


@pytest.fixture
def trapped(stand_in):
    """The stand-in at work; no thread may keep tiles that have a shape."""
    stand_in.start()
    yield stand_in
    stand_in.stop()
    assert stand_in.released()


@pytest.fixture(params=["emulated", "trapped"])
def emulated(request, monkeypatch):
    """Tiles without a unit: its arithmetic written out, and its instructions done by a stand-in."""
    monkeypatch.setattr(packed_conv, "_prefers_onednn", lambda: False)
    if request.param == "trapped":
        request.getfixturevalue("trapped")
    for work in WORKS:
        tiles.use(work, request.param)
    yield request.param
    for work in WORKS:
        tiles.use(work, "none")


@pytest.fixture
def trial(monkeypatch):
    """Makes a CPU with AMX of this one: the unit is emulated, and what is measured is told."""
    real = tiles.use
    used = {work: [] for work in WORKS}

    def fake(seconds=(1.0, 2.0), problem=""):
        def use(work, kind):
            used[work].append(kind)
            real(work, "emulated" if kind == "unit" else kind)

        monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, "1")
        monkeypatch.setattr(tiles, "use", use)
        monkeypatch.setattr(tiles, "_problem", lambda: problem)
        monkeypatch.setattr(tiles, "_seconds", lambda *runners: seconds if [run() for run in runners] else None)
        monkeypatch.setattr(packed_conv, "_has_amx", lambda: True)
        tiles._why_not.cache_clear()
        return used

    yield fake
    for work in WORKS:
        real(work, "none")
    tiles._why_not.cache_clear()
