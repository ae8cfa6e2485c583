"""The blocks of a Markdown page that a reader may copy, and what the page says of how they run.

A block of Python or of shell lines runs as it stands. Two comments in front of one say more:

    <!-- given                 what the block takes for granted: Python, run before it in the page's namespace
    model = ...
    -->
    <!-- not run: a reason -->  leaves the next block out
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
RUN = ("python", "sh")
# What else a fence may hold. Other names for Python and shell would be blocks that nothing runs.
SHOWN = ("", "text", "console", "json", "yaml", "toml", "diff", "dockerfile", "cpp", "html", "xml")
_WANTED = f"a fence is one of {', '.join(filter(None, (*RUN, *SHOWN)))}, or bare"
_GIVEN = re.compile(r"<!--\s*given\b[ \t]*\n(.*?)-->", re.DOTALL)
_NOT_RUN = re.compile(r"<!--\s*not run\b:?\s*(.*?)\s*-->", re.DOTALL)
# A command of one of these reaches for the network or takes a machine's time: it is looked at, not run.
NOT_RUN_PROGRAMS = ("pip", "make", "git", "docker", "uv", "conda", "sudo")


@dataclass(frozen=True)
class Block:
    """A piece of a page."""

    kind: str  # as the fence says
    line: int  # of the page, from 1, on which the text begins
    text: str
    given: bool = False  # a comment, which the reader does not see
    not_run: str | None = None  # the reason why it is left out


class PageError(ValueError):
    """A page that does not keep to the rules above."""


def pages() -> list[Path]:
    """The README and all of docs/."""
    return [ROOT / "README.md", *sorted(ROOT.joinpath("docs").rglob("*.md"))]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else str(page)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order, those in directives too.

    Raises:
        PageError: a fence has another name for Python or shell, a reason is missing, or one stands before no block.
    """
    return list(_blocks(page.read_text(encoding="utf-8"), named(page), 0))


def _blocks(text: str, page: str, above: int) -> Iterator[Block]:
    not_run: str | None = None
    asked = 0
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.map is None or token.type not in ("html_block", "fence", "paragraph_open", "heading_open"):
            continue
        line = above + token.map[0] + 1
        if token.type == "html_block":
            for comment in _GIVEN.finditer(token.content):
                before = token.content[: comment.start(1)].count("\n")
                yield Block("python", line + before, comment[1], given=True)
            for comment in _NOT_RUN.finditer(token.content):
                not_run, asked = comment[1], line
                if not not_run:
                    raise PageError(f"{page}:{line}: why a block is not run is missing")
            continue
        if token.type == "fence":
            info = token.info.strip()
            if info.startswith("{"):
                if info.startswith(("{code", "{sourcecode")):
                    raise PageError(f"{page}:{line}: {_WANTED}, got {info!r}")
                if not info.startswith("{eval-rst}"):
                    yield from _blocks(token.content, page, line)
            elif info in RUN:
                yield Block(info, line + 1, token.content, not_run=not_run)
                not_run = None
            elif info not in SHOWN:
                raise PageError(f"{page}:{line}: {_WANTED}, got {info!r}")
        if not_run is not None:
            raise PageError(f'{page}:{asked}: "not run" stands directly in front of a block of {" or ".join(RUN)}')
    if not_run is not None:
        raise PageError(f'{page}:{asked}: "not run" stands in front of nothing')


@dataclass(frozen=True)
class Line:
    """A command of a shell block, with the lines that it goes on over."""

    number: int  # of the page
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command in it, without variables set for it and without redirections."""
        lexer = shlex.shlex(self.text, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        found: list[list[str]] = [[]]
        words = iter(lexer)
        for word in words:
            if word[0] in ";&|":
                found.append([])
            elif word[0] in "<>":
                next(words, None)
                if found[-1] and found[-1][-1].isdigit():  # 2>&1
                    found[-1].pop()
            elif found[-1] or not re.match(r"\w+=", word):
                found[-1].append(word)
        return [command for command in found if command]

    @property
    def left_out(self) -> bool:
        """Whether one of its commands is one that is not run."""
        return any(
            Path(words[0]).name in NOT_RUN_PROGRAMS or words[1:3] == ["-m", "pip"] for words in self.commands
        )


def shell_lines(block: Block) -> list[Line]:
    """The commands of a shell block, one by one."""
    found: list[Line] = []
    begun = None
    for number, text in enumerate(block.text.splitlines(), block.line):
        if begun is not None:
            begun = Line(begun.number, f"{begun.text}\n{text}")
        elif text.strip() and not text.lstrip().startswith("#"):
            begun = Line(number, text)
        if begun is not None and not re.search(r"(\\|\||&&)\s*$", text):
            found.append(begun)
            begun = None
    return found if begun is None else [*found, begun]
