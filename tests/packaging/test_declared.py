"""What is said in more than one place is the same in each: torch's floor, and what the workflows run."""

import re
import shlex
import sys

import pytest
import yaml
from installations import ROOT

MAKEFILE = ROOT.joinpath("Makefile").read_text()
TARGETS = {target for line in re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE) for target in line.split()}


def workflow(name):
    return yaml.safe_load(ROOT.joinpath(".github", "workflows", name).read_text())


def test_the_floor_of_torch(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    import build_backend

    floor = ".".join(map(str, build_backend.TORCH_FLOOR))
    assert f'"torch>={floor}",' in ROOT.joinpath("pyproject.toml").read_text()
    assert f"torch {floor} or newer" in ROOT.joinpath("README.md").read_text()


@pytest.mark.parametrize("name", ["tests.yml", "wheels.yml"])
def test_workflows_run_targets_and_nothing_else(name):
    jobs = workflow(name)["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert runs
    for run in runs:
        make, target = shlex.split(run)[:2]
        assert make == "make"
        assert target in TARGETS or target == "$TARGET", f"make {target}"
    for matrix in [job["strategy"]["matrix"] for job in jobs.values() if "strategy" in job]:
        assert {*matrix.get("target", ()), *(row["target"] for row in matrix.get("include", ()))} <= TARGETS
