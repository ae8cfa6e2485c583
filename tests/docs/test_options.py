"""What the README and docs/ say of the command line its parsers have."""

from __future__ import annotations

import argparse
import re
from functools import cache
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks, named, pages, shell_lines

from wavlm_fast import cli

# Which name options of other programs, too.
REPORTS = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.joinpath("benchmarks").glob("*.md"))]
# Of docker and pip, where they stand by themselves.
OTHERS = {"--cpus", "--cpuset-cpus", "--gpus", "--memory", "--shm-size", "--no-build-isolation"}


@cache
def _parser(command: str) -> argparse.ArgumentParser:
    subparsers = next(a for a in cli.parser(command)._actions if isinstance(a, argparse._SubParsersAction))
    return subparsers.choices[command]


def _options(command: str) -> set[str]:
    return set(_parser(command)._option_string_actions)


def _why_not(words: list[str]) -> str | None:
    """What is wrong with the options behind `wavlm-fast`, told apart by their spelling alone."""
    command = next((word for word in words if not word.startswith("-")), None)
    if command is None or not command.islower():  # --help, COMMAND
        return None
    if command not in cli.COMMANDS:
        return f"there is no command {command}"
    asked = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    wrong = asked - _options(command)
    return f"wavlm-fast {command} has no {', '.join(sorted(wrong))}" if wrong else None


def _spans(page: Path) -> list[str]:
    """Code within sentences and tables."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def _problems(page: Path) -> list[str]:
    found = []
    known = set().union(OTHERS, *map(_options, cli.COMMANDS))
    for span in _spans(page):
        words = span.split()
        if words[:1] == ["wavlm-fast"] or words[:3] == ["python", "-m", "wavlm_fast"]:
            found.append(_why_not(words[1:] if words[0] == "wavlm-fast" else words[3:]))
        elif re.match(r"--[a-z]", span) and page not in REPORTS:
            option = re.match(r"--[a-z-]+", span)[0]
            found.append(None if option in known else f"no command has {option}")
    return [f"{named(page)}: `{problem}`" for problem in found if problem is not None]


@pytest.mark.parametrize("page", [*pages(), *REPORTS], ids=named)
def test_options_that_a_page_names_are_there(page: Path) -> None:
    problems = _problems(page)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", pages(), ids=named)
def test_commands_in_blocks_are_ones_that_the_parser_takes(page: Path, capsys) -> None:
    for line in (line for block in blocks(page) if block.kind == "sh" for line in shell_lines(block)):
        for words in (words for program, *words in line.commands if program == "wavlm-fast"):
            status = _parsed(words)
            assert not status, f"{named(page)}:{line.number}: wavlm-fast {' '.join(words)}: {capsys.readouterr().err}"


def _parsed(words: list[str]) -> int | str | None:
    """The status with which parsing ends the program; None where it goes on."""
    command = next((word for word in words if word in cli.COMMANDS), None)
    try:
        cli.parser(command).parse_args(words)
    except SystemExit as ended:
        return ended.code
    return None


def test_wrong_options_are_found(tmp_path) -> None:
    page = tmp_path / "page.md"
    right = "`wavlm-fast extract --layer 6`, `--layer N`, `wavlm-fast COMMAND --help`, `python -m wavlm_fast doctor`"
    page.write_text(f"`wavlm-fast doctor --out x`, `--layers`, `wavlm-fast fly`; {right}\n")
    assert [problem.split(": ", 1)[1] for problem in _problems(page)] == [
        "`wavlm-fast doctor has no --out`",
        "`no command has --layers`",
        "`there is no command fly`",
    ]
    assert _parsed(["doctor", "--out", "x"]) == 2
    assert _parsed(["doctor", "--json"]) is None
