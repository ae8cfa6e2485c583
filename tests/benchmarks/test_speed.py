"""The README's plot: its bars are as long as the figures say, and it can be read on any background."""

import re
import xml.etree.ElementTree as ElementTree

import made_up
import pytest

from wavlm_fast.benchmarks.page import speed

SVG = "{http://www.w3.org/2000/svg}"


def drawn(found):
    """The plot's texts, and the lengths of its bars."""
    root = ElementTree.fromstring(speed.svg(found))
    bars = [(rect.get("class"), float(rect.get("width"))) for rect in root.iter(f"{SVG}rect")]
    return [text.text for text in root.iter(f"{SVG}text")], [bar for bar in bars if bar[0] != "card"]


def shown(found):
    """The rows that it shows: of every plain case in float32, transformers, OpenVINO and ours."""
    cases = ("length 1x3", "base 1x10", "base 1x120", "base 8x10")
    providers = ("transformers fp32", "OpenVINO f32", "wavlm_fast fp32")
    return [made_up.row(found, case, provider) for case in cases for provider in providers]


def test_a_bar_for_every_figure():
    found = made_up.document()
    texts, bars = drawn(found)
    rows = shown(found)
    longest = max(row["factor"] for row in rows)
    full = max(width for _, width in bars)
    assert [kind for kind, _ in bars] == ["ours" if row["ours"] else "theirs" for row in rows]
    assert [width for _, width in bars] == pytest.approx([full * row["factor"] / longest for row in rows], abs=0.06)
    for row in rows:
        figure = f"{row['factor']:.1f}"
        if row["ours"]:
            faster = made_up.row(found, row["case"], "transformers fp32")["ours_faster"]["median"]
            figure += f" ({faster:.2f} times)"
        assert figure in texts
    assert [text for text in texts if text.startswith("WavLM-")] == [
        "WavLM-base, one utterance of 3 s",
        "WavLM-base, one utterance of 10 s",
        "WavLM-base, one utterance of 120 s",
        "WavLM-base, 8 utterances of 10 s",
    ]


def test_a_case_without_transformers_or_without_ours_is_left_out():
    found = made_up.document()
    before = len(drawn(found)[1])
    made_up.row(found, "base 1x10", "wavlm_fast fp32")["factor"] = None
    assert len(drawn(found)[1]) == before - 3
    made_up.row(found, "base 8x10", "transformers fp32")["factor"] = None
    assert len(drawn(found)[1]) == before - 6


def test_nothing_at_all():
    assert drawn({})[1] == []


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def _contrast(*colours):
    low, high = sorted(map(_luminance, colours))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_it_has_a_background_of_its_own_on_which_everything_can_be_seen(dark):
    style = ElementTree.fromstring(speed.svg(made_up.document())).find(f"{SVG}style").text
    light, _, inverted = style.partition("@media (prefers-color-scheme: dark)")
    rules = re.findall(r"(?:\.(\w+)|\btext) \{[^}]*?fill: (#\w{6})", inverted if dark else light)
    colours = {name or "text": colour for name, colour in rules}
    assert set(colours) == {"text", "faint", "card", "theirs", "ours"}
    for name, least in (("text", 7), ("faint", 4.5), ("ours", 4.5), ("theirs", 2)):
        assert _contrast(colours[name], colours["card"]) >= least, name
