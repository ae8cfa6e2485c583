"""What the code says of itself, and what was measured, in the places of pages that ask for it.

A page has an empty block where a text of code belongs: {commands}, {ops}, {measured}. The text is put there before the
page is read, so that its headings, links and tables are those of any page.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import measured

from wavlm_fast import backends, cli, ops

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_WIDTH = 84  # characters that a block of code shows
_PLACE = re.compile(r"^```\{(commands|ops|measured)\}\n```$", re.MULTILINE)


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the texts into a page's source."""
    source[0] = _PLACE.sub(lambda place: "\n".join(WRITERS[place[1]]()), source[0])


def commands() -> Iterator[str]:
    """A section for each command: what it does, how it is called, its arguments and options."""
    for command in cli.COMMANDS:
        yield from _command(command)


def _command(command: str) -> Iterator[str]:
    os.environ["COLUMNS"] = str(_WIDTH)  # as wide as argparse writes
    parser = cli.parser(command)._subparsers._group_actions[0].choices[command]
    yield from (f"## {parser.prog}", "", parser.description, "", "```text", parser.format_usage().strip(), "```", "")
    yield from ("```{eval-rst}", f".. program:: {parser.prog}", "")
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        yield from (f".. option:: {_invocation(action)}", "", f"   {in_rst(_help(parser, action))}", "")
    yield from ("```", "")


def _invocation(action: argparse.Action) -> str:
    """How an argument is written: `--layer N [N ...]`."""
    named = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
    if action.choices is not None and action.metavar is None:
        named = "{" + ",".join(map(str, action.choices)) + "}"
    repeated = {None: named, 0: "", "*": f"[{named} ...]", "+": f"{named} [{named} ...]", "?": f"[{named}]"}
    return ", ".join(f"{option} {repeated[action.nargs]}".strip() for option in action.option_strings or ("",))


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return (action.help or "") % {**vars(action), "prog": parser.prog}


def in_rst(text: str) -> str:
    """Text that reStructuredText shows as it is, but for code in backticks."""
    return re.sub(r"([\\*|_])", r"\\\1", " ".join(text.split()))


def all_ops() -> Iterator[str]:
    """A table of all ops, then a section for each."""
    yield from ("| op | equivalent to | `cpu` | `triton` |", "|---|---|---|---|")
    for name in ops.OPS:
        cells = (f"[`{name}`](#{name})", equivalent(name), implemented(name, "cpu"), implemented(name, "triton"))
        yield f"| {' | '.join(cells)} |"
    for name in ops.OPS:
        yield from _op(name)


def equivalent(name: str) -> str:
    """What an op's docstring says that it is equivalent to."""
    text = inspect.getdoc(getattr(ops, name)).split("\n\nArgs:")[0]
    found = re.search(r"[Ee]quivalent to,? (.*?)(?=\.(\s|$))", text, re.DOTALL)
    if found is None:
        raise ValueError(f"the docstring of wavlm_fast.ops.{name} does not say what the op is equivalent to")
    return " ".join(found[1].split()).replace("|", r"\|")


def implemented(name: str, backend: str) -> str:
    """What of an op a backend has a kernel for; "-" where the reference computes it."""
    table = backends.load(backend).TABLE
    if name not in table:
        return "-"
    return "forward and backward" if f"{name}_backward" in table else "forward"


def _op(name: str) -> Iterator[str]:
    yield from ("", f"## {name}", "", "```{eval-rst}", f".. autofunction:: wavlm_fast.ops.{name}", "```", "")
    yield from ("Schemas, in torch's notation (`torch.ops.wavlm_fast`):", "", "```text")
    for each in (name, f"{name}_backward"):
        if each in ops.schemas:
            yield from textwrap.wrap(f"{each}{ops.schemas[each]}", _WIDTH, subsequent_indent="    ")
    yield from ("```", "")


WRITERS = {"commands": commands, "ops": all_ops, "measured": measured.text}


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
