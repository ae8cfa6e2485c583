"""Tables and JSON come out whole."""

import io
import json
import math

import pytest
from rich.console import Console

from wavlm_fast import console
from wavlm_fast.errors import UserError


@pytest.mark.parametrize("terminal", [False, True])
def test_a_narrow_console_loses_no_number(terminal):
    shown = console.table("layer", *(f"column {index}" for index in range(8)))
    shown.add_row("layer 12", *(f"{index}.23e-05" for index in range(8)))
    file = io.StringIO()
    width = 60 if terminal else console._PLAIN_WIDTH
    console.print_table(Console(file=file, width=width, force_terminal=terminal, color_system=None), "Title", shown)
    assert file.getvalue().startswith("Title\n")
    for index in range(8):
        assert f"column {index}" in file.getvalue()
        assert f"{index}.23e-05" in file.getvalue()
    assert "\u2026" not in file.getvalue()


def test_json_has_no_nan_and_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "found.json"
    console.write_json(str(target), {"a": [math.nan, math.inf, 1.5], "b": (None, "x")})
    assert json.loads(target.read_text()) == {"a": [None, None, 1.5], "b": [None, "x"]}
    with pytest.raises(TypeError):
        console.write_json(str(target), {"a": object()})
    assert json.loads(target.read_text())["b"] == [None, "x"]
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        console.write_json(str(tmp_path), {})
