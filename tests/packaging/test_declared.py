"""What is said in more than one place is the same in each: torch's floor, the version, what others are told to run."""

import re
import shlex
import sys

import pytest
import yaml
from installations import ROOT

from wavlm_fast import __version__, cli

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


def test_the_version_is_said_once_and_followed():
    assert f'__version__ = "{__version__}"' in ROOT.joinpath("wavlm_fast", "__init__.py").read_text()
    pyproject = ROOT.joinpath("pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject
    assert 'version = { attr = "wavlm_fast.__version__" }' in pyproject
    found = re.findall(r"^## (\S+)", ROOT.joinpath("CHANGELOG.md").read_text(), re.MULTILINE)
    assert found[0] == __version__
    assert found == sorted(found, reverse=True)


def test_the_citation_is_of_this_version_and_has_the_paper():
    """Its form is `make lint-workflows`'s."""
    citation = yaml.safe_load(ROOT.joinpath("CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f'license = "{citation["license"]}"' in ROOT.joinpath("pyproject.toml").read_text()
    (paper,) = citation["references"]
    assert paper["title"].startswith("WavLM: ")
    assert len(paper["authors"]) == 19
    assert paper["doi"] == "10.1109/JSTSP.2022.3188113"


def commands(text):
    """Make targets and subcommands of ours that a text tells to run, in backquotes or as a label."""
    return re.findall(r"\bmake ([a-z-]+)", text), re.findall(r"\bwavlm-fast ([a-z]+)", text)


FORMS = sorted(ROOT.joinpath(".github", "ISSUE_TEMPLATE").glob("[0-9]-*.yml"))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_forms_ask_for_doctor_and_report(form):
    content = yaml.safe_load(form.read_text())
    asked = {part["attributes"]["label"]: part for part in content["body"]}
    assert {"wavlm-fast doctor", "print(wavlm_fast.report(model))"} <= set(asked)
    needed = {label for label, part in asked.items() if part.get("validations", {}).get("required")}
    assert ({"wavlm-fast doctor", "print(wavlm_fast.report(model))"} <= needed) == (form.stem[2:] in ("wrong", "slow"))
    assert len({part["id"] for part in asked.values()}) == len(asked)


def test_templates_tell_to_run_what_there_is():
    assert len(FORMS) == 4
    texts = [path.read_text() for path in (*FORMS, ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md")]
    targets, subcommands = (set().union(*found) for found in zip(*map(commands, texts), strict=True))
    assert {"test", "test-compat", "lint-types"} <= targets <= TARGETS
    assert {"doctor", "bench", "parity"} <= subcommands <= set(cli.COMMANDS)
