"""Links and headings of Markdown, and the anchors that GitHub gives headings."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

_EXTERNAL = re.compile(r"https?://[\w-]+(\.[\w-]+)+(:\d+)?([/?#][^\s<>\"]*)?|mailto:[^\s@]+@[^\s@]+")


@dataclass(frozen=True)
class Link:
    """What a page points to, a page or a picture."""

    line: int
    target: str


@cache
def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[Link]:
    """All links and images of a page, those in its tables too."""
    line = 0
    for token in _tokens(page):
        line = token.map[0] + 1 if token.map else line
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                yield Link(line, str(target))
        if token.type in ("html_block", "inline"):
            for target in re.findall(r"<(?:a|img)\s[^>]*?(?:href|src)=\"([^\"]*)\"", token.content):
                yield Link(line, target)


def headings(page: Path) -> list[tuple[int, str]]:
    """Level and text of each heading."""
    found, tokens = [], _tokens(page)
    for token, inline in itertools.pairwise(tokens):
        if token.type == "heading_open":
            shown = (t.content for t in inline.children or () if t.type in ("text", "code_inline"))
            found.append((int(token.tag[1]), "".join(shown)))
    return found


def anchors(page: Path) -> set[str]:
    """What may stand behind # in a link to the page: GitHub's names, a repeated one numbered."""
    seen: Counter[str] = Counter()
    found = set()
    for _, text in headings(page):
        name = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def why_broken(page: Path, target: str) -> str | None:
    """Why a link of a page leads nowhere; None where it leads somewhere, or outside in the form of an address."""
    if re.match(r"\w+:", target):
        return None if _EXTERNAL.fullmatch(target) else "is no address"
    path, _, anchor = target.partition("#")
    if path.startswith("/"):
        return "is a path from the root, which means another place on GitHub than here"
    to = (page.parent / path).resolve() if path else page
    if not to.exists():
        return "is not there"
    if anchor and to.suffix == ".md" and anchor not in anchors(to):
        return f"has no such heading; there are {', '.join(sorted(anchors(to)))}"
    return None
