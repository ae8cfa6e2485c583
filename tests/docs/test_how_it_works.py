"""The pages of docs/how-it-works hold what their scripts make of the drawings and of the record."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ElementTree

import pytest
from doc_blocks import ROOT
from transformers import WavLMConfig

from wavlm_fast.benchmarks.run import flops

FOLDER = ROOT / "docs" / "how-it-works"
PAGES = sorted(FOLDER.glob("*.md"))
MOST_BYTES = 30_000


def script(name):
    spec = importlib.util.spec_from_file_location(f"how_it_works_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DRAWINGS = script("drawings").drawings()


def test_every_drawing_is_of_the_script_and_on_a_page():
    assert {file.name for file in FOLDER.glob("*.svg")} == set(DRAWINGS)
    shown = re.findall(r"!\[[^\]]+\]\((\S+)\)", "".join(page.read_text() for page in PAGES))
    assert sorted(shown) == sorted(DRAWINGS)


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_as_its_script_makes_it(name):
    made = DRAWINGS[name]
    assert (FOLDER / name).read_text(encoding="utf-8") == made, "run python docs/how-it-works/drawings.py"
    assert len(made.encode()) < MOST_BYTES
    root = ElementTree.fromstring(made)
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        assert 0 < x < width, text.text
        assert 0 < y < height, text.text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_as_they_were_recorded(page):
    text = page.read_text(encoding="utf-8")
    assert script("recorded").filled(text) == text, "run python docs/how-it-works/recorded.py"


def test_a_row_that_was_not_recorded_is_refused():
    with pytest.raises(LookupError, match="no row 'gated_attention 1×3 s'"):
        script("recorded").table("Single ops | op; ms | gated_attention 1×3 s")


def test_the_front_end_has_a_third_of_the_products():
    """As minimal-filtering.md says, of which four convolutions with three taps have nearly all."""
    found = flops.forward(WavLMConfig(), 1, 160_000)
    assert 0.3 < found["feature encoder"] / sum(found.values()) < 0.36
    _, *frames = flops.frames(WavLMConfig(), 160_000)
    products = [taps * count for taps, count in zip((3, 3, 3, 3, 2, 2), frames, strict=True)]
    assert sum(products[:4]) / sum(products) > 0.95
