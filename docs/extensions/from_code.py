"""Directives for what the code says of itself: `{commands}` of the command line, `{ops}`, and what was measured.

What they write is text that the page's own parser reads, so that headings, links and tables are those of any page.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from wavlm_fast import backends, cli, ops


class Written(SphinxDirective):
    """A directive in whose place a text of its own stands."""

    def text(self) -> str:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(self.text(), allow_section_headings=True)


class Commands(Written):
    """A section for each command: what it does, how it is called, its arguments and options."""

    def text(self) -> str:
        return "\n".join(line for command in cli.COMMANDS for line in _command(command))


def _command(command: str) -> Iterator[str]:
    os.environ["COLUMNS"] = "100"  # as wide as argparse writes
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
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    return f"{text[:1].upper()}{text[1:]}" + ("." if text else "")


def in_rst(text: str) -> str:
    """Text that reStructuredText shows as it is, but for code in backticks."""
    return re.sub(r"([\\*|_])", r"\\\1", " ".join(text.split()))


class Ops(Written):
    """A table of all ops, then a section for each."""

    def text(self) -> str:
        lines = ["| op | equivalent to | `cpu` | `triton` |", "|---|---|---|---|"]
        lines += [
            f"| [`{name}`](#{name}) | {equivalent(name)} | {implemented(name, 'cpu')} | {implemented(name, 'triton')} |"
            for name in ops.OPS
        ]
        return "\n".join([*lines, "", *(line for name in ops.OPS for line in _op(name))])


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
    backward = f"{name}_backward"
    yield from (f"## {name}", "", "```{eval-rst}", f".. autofunction:: wavlm_fast.ops.{name}", "```", "")
    yield from ("Schemas, in torch's notation (`torch.ops.wavlm_fast`):", "", "```text")
    yield from (f"{each}{ops.schemas[each]}" for each in (name, backward) if each in ops.schemas)
    yield from ("```", "")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("commands", Commands)
    app.add_directive("ops", Ops)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
