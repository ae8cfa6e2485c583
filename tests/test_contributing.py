"""What CONTRIBUTING draws is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_ways_from_a_call_to_a_kernel_are_as_drawn() -> None:
    section = ROOT.joinpath("CONTRIBUTING.md").read_text().split("## From a call to a kernel\n")[1].split("\n## ")[0]
    drawing, below = re.search(r"```text\n(.*?)```\n(.*)", section, re.DOTALL).groups()
    ways = [re.findall(r"^  (\S+\.\w+)", way, re.MULTILINE) for way in drawing.split("\n\n")]
    assert len(ways) == 3
    assert all(3 < len(way) <= 6 for way in ways)
    shared = [f"wavlm_fast/{file}" for file in re.findall(r"`(\w+/\w+\.py)`", below)]
    assert len(shared) == 4
    for file in (*shared, *(file for way in ways for file in way)):
        assert ROOT.joinpath(file).is_file(), file
