"""Nothing of ours forks: a forked child hangs where torch's threads, which it does not have, hold a lock."""

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from wavlm_fast import cli

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("wavlm_fast", "benchmarks", "kernels") for path in (ROOT / folder).rglob("*.py")]
STARTERS = {"Process", "Pool", "Manager", "ProcessPoolExecutor", "DataLoader", "set_start_method", "get_context"}
CONTEXTS = {"mp_context", "multiprocessing_context", "method"}


def forks(source):
    """Lines that start processes in any way but by spawning them, or by running a program."""
    return sorted({node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and _forks(node)})


def _forks(call):
    named = call.func
    name = named.attr if isinstance(named, ast.Attribute) else getattr(named, "id", "")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("fork", "forkpty") or "preexec_fn" in keywords:
        return True
    if name == "DataLoader" and not getattr(keywords.get("num_workers"), "value", "num_workers" in keywords):
        return False
    if name not in STARTERS:
        return False
    of = ast.unparse(named.value) if isinstance(named, ast.Attribute) else ""
    given = [*call.args[:1], *(keywords[word] for word in CONTEXTS & set(keywords))]
    return "'spawn'" not in of + "".join(ast.unparse(value) for value in given)


@pytest.mark.parametrize(
    "line",
    [
        "os.fork()",
        "subprocess.run(command, preexec_fn=os.setsid)",
        "multiprocessing.Process(target=work)",
        "Pool(4)",
        "multiprocessing.get_context()",
        "multiprocessing.get_context('fork').Pool(4)",
        "multiprocessing.set_start_method('forkserver')",
        "ProcessPoolExecutor(4)",
        "ProcessPoolExecutor(4, mp_context=get_context('fork'))",
        "DataLoader(data, num_workers=2)",
        "DataLoader(data, num_workers=workers)",
    ],
)
def test_what_is_looked_for_is_found(line):
    assert forks(line) == [1]


@pytest.mark.parametrize(
    "line",
    [
        "multiprocessing.get_context('spawn').Pool(4)",
        "ProcessPoolExecutor(4, mp_context=get_context('spawn'))",
        "DataLoader(data)",
        "DataLoader(data, num_workers=0)",
        "DataLoader(data, num_workers=2, multiprocessing_context='spawn')",
        "subprocess.run(command)",
        "torch.random.fork_rng()",
    ],
)
def test_what_is_no_fork_is_not(line):
    assert forks(line) == []


def test_nothing_of_ours_forks():
    assert len(SOURCES) > 100
    found = [f"{path.relative_to(ROOT)}:{line}" for path in SOURCES for line in forks(path.read_text())]
    assert found == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks there")
def test_a_command_that_forks_is_noticed(monkeypatch, command):
    """As every test here runs its commands, so that a fork in a library of others is noticed too."""

    def run(args):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    monkeypatch.setattr(cli, "_module", lambda name: SimpleNamespace(add_arguments=lambda parser: None, run=run))
    with pytest.raises(AssertionError, match="doctor forked"):
        command("doctor")
