"""Private names of torch and transformers: all in one module, and each can go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wavlm_fast import _private

ROOT = Path(__file__).parent.parent
NAMES = [(name.owner, name.name) for name in _private.NAMES]


@pytest.fixture(scope="module")
def lives():
    """(owner, name) -> how life without it went; a process that forks for each, so that nothing is imported twice."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork, and a process for each name would import transformers each time")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    command = [sys.executable, str(ROOT / "tests" / "private_names.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return {(owner, name): said for owner, name, said in map(json.loads, done.stdout.splitlines())}


@pytest.mark.xdist_group("private")
@pytest.mark.parametrize(("owner", "name"), [("", ""), *NAMES], ids=lambda part: part or "none")
def test_without_a_name_everything_is_as_with_transformers(lives, owner, name):
    assert lives[owner, name] in ("there", "deleted", "hidden"), lives[owner, name]


@pytest.mark.xdist_group("private")
def test_names_that_torch_and_transformers_do_without_are_deleted_for_real(lives):
    expected = {("torch.cpu", "_is_amx_tile_supported"), ("torch.ops.aten", "_unsafe_view"),
                ("transformers.activations", "GELUActivation"), ("torch.ops.mkldnn", "_linear_pointwise")}
    assert expected <= {name for name, said in lives.items() if said == "deleted"}


def test_nothing_is_missing_from_the_versions_that_are_supported():
    assert _private.missing() == ()
