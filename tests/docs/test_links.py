"""Every link inside the repository leads somewhere, and pages begin as they should."""

from __future__ import annotations

from pathlib import Path

import pytest
from doc_blocks import ROOT, named, pages
from doc_links import anchors, headings, links, why_broken

OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.joinpath("benchmarks").glob("*.md"))]
OWN = [page for page in pages() if page.name != "README.md"]


@pytest.mark.parametrize("page", [*pages(), *OTHERS], ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [(link, why_broken(page, link.target)) for link in links(page)]
    said = [f"{named(page)}:{link.line}: {link.target} {why}" for link, why in broken if why is not None]
    assert not said, "\n".join(said)


@pytest.mark.parametrize("page", OWN, ids=named)
def test_a_page_begins_with_its_title_and_a_sentence(page: Path) -> None:
    assert [level for level, _ in headings(page)].count(1) == 1
    title, blank, sentence = page.read_text(encoding="utf-8").splitlines()[:3]
    assert title.startswith("# ")
    assert blank == ""
    assert sentence[:1].isalnum() or sentence[:1] == "`", f"{named(page)}:3: a sentence is wanted, got {sentence!r}"


def test_broken_links_are_found(tmp_path) -> None:
    page = tmp_path / "page.md"
    table = "| [a](#a-2) |\n|---|\n| [b](b.md) ![c](c.svg) |\n"
    page.write_text(f"# Two `words`, no\n\n## A\n\n## A\n\n{table}\n[d](/e.md)\n")
    assert anchors(page) == {"two-words-no", "a", "a-1"}
    found = [(link.line, link.target, why_broken(page, link.target)) for link in links(page)]
    assert [(line, target) for line, target, _ in found] == [(7, "#a-2"), (9, "b.md"), (9, "c.svg"), (11, "/e.md")]
    assert all(why for _, _, why in found)
    assert [why_broken(page, to) for to in ("#a-1", "page.md#a", "https://example.org/a?b")] == [None] * 3
    assert why_broken(page, "https://a") == "is no address"
