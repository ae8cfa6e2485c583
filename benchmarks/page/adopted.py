"""The record of a GPU, taken into the repository: what `python -m benchmarks.results --gpu FILE` does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from wavlm_fast import console
from wavlm_fast.errors import UserError
from wavlm_fast.kernels import _tuned

from ..gpu.card import models, tables
from ..gpu.card.record import Found, read
from ..gpu.card.steps import MODELS, TINY, TUNING
from .table import NONE, figure

README = Path(__file__).parents[2] / "README.md"
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "gpu.md"
Config = dict[str, int]
CARD = "card.jsonl"  # the latest record that was taken in, beside that of the latest full run


def adopt(file: Path, folder: Path) -> None:
    """Keep the record in `file` in the folder, as `CARD`, let the README and the guide say what is in it, and ship its
    choices.

    Raises:
        UserError: there is no such record, it tells nothing of a GPU, or this is no checkout.
    """
    found = read(file)
    if found.head.get("sizes") == TINY:
        raise UserError(f"the record {file} is of toy sizes, which say nothing of a GPU")
    if tables.counted(found)[1] == 0:
        raise UserError(f"the record {file} has no comparison with float64 in it")
    changed, guide = readme(_read(README, "README"), found), guide_to(_read(GUIDE, "guide"), found)
    shipped = choices(found, _shipped())
    console.write_file(folder / CARD, file.read_text(encoding="utf-8"), "record")
    console.write_file(README, changed, "README")
    console.write_file(GUIDE, guide, "guide")
    console.write_file(_tuned.SHIPPED, json.dumps(shipped, indent=1, sort_keys=True) + "\n", "tuned choices")


def choices(found: Found, before: dict[str, Config]) -> dict[str, Config]:
    """What ships from now on: what the search of a record found, and what other records did. Choices of kernels that
    have changed since are left out.

    Raises:
        UserError: the record's choices are no configurations.
    """
    new = {}
    for row in found.rows(TUNING):
        made = row.get("choices") or {}
        if not isinstance(made, dict) or not all(map(_is_config, made.values())):
            raise UserError(f"the choices of {row['step']} are not what `wavlm-fast gpu` writes")
        new |= made
    return {key: config for key, config in {**before, **new}.items() if _tuned.current(key)}


def _is_config(value: object) -> bool:
    return isinstance(value, dict) and all(type(number) is int for number in value.values())


def _shipped() -> dict[str, Config]:
    return json.loads(_tuned.SHIPPED.read_text(encoding="utf-8")) if _tuned.SHIPPED.exists() else {}


def _read(page: Path, kind: str) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the {kind} {page} cannot be read: {error.strerror or error}") from error


def readme(text: str, found: Found) -> str:
    """The README's marked places, filled in.

    Raises:
        UserError: a place is missing.
    """
    return _filled(text, found, _PLACES, "README")


def guide_to(text: str, found: Found) -> str:
    """The guide's to GPUs.

    Raises:
        UserError: a place is missing.
    """
    return _filled(text, found, {"gpu-ran": _ran}, "guide to GPUs")


def _filled(text: str, found: Found, places: dict[str, Callable[[Found], str]], kind: str) -> str:
    for name, says in places.items():
        place = re.compile(rf"(<!-- {name} -->).*?(<!-- /{name} -->)", re.DOTALL)
        said = says(found)
        text, count = place.subn(lambda marks, said=said: f"{marks[1]}{said}{marks[2]}", text)
        if count != 1:
            raise UserError(f"the {kind} has {count} places <!-- {name} -->, and one is wanted")
    return text


def _first(found: Found) -> str:
    return f"The figures here are of CPUs; what an {_device(found)} says of the Triton kernels is under their heading."


def _where(found: Found) -> str:
    return f"run on an {_device(found)}; for others interpreted, emulated and compiled, and never run"


def _heading(found: Found) -> str:
    return ", on a GPU and without"


def _ran(found: Found) -> str:
    right, compared = tables.counted(found)
    those = "all" if right == compared else f"{right}"
    return (
        f"they have run on an {_device(found)}, where {those} of {compared} comparisons with float64 are right "
        "(benchmarks/RESULTS.md, On a GPU)."
    )


def _figure(found: Found) -> str:
    right, compared = tables.counted(found)
    shown = [f"{right} of {compared} comparisons right", *filter(None, (_faster(found, *w) for w in _SHOWN))]
    return f"**measured on an {_device(found)}**: {'; '.join(shown)}"


# Model, batch, what it does, and ours that is set against transformers' own.
_SHOWN = (
    ("base", 8, models.INFERENCE, "inference"),
    ("large", 8, models.INFERENCE, "inference"),
    ("base", 8, models.TRAINING, "training"),
)


def _faster(found: Found, model: str, batch: int, what: str, called: str) -> str | None:
    rows = found.rows(MODELS)
    there = (r for r in rows if (r.get("model"), r.get("batch"), r.get("what")) == (model, batch, what))
    row = next((r for r in there if r["provider"] == models.THEIRS), None)
    gained = row and tables.gain(row, rows, "model", "batch", "what")
    said = figure(gained, "{:.2f} times as fast as transformers".format)
    return None if said == NONE else f"{called} of {model}, {batch} × {row['length']:g} s, {row['dtype']}: {said}"


def _device(found: Found) -> str:
    return str(found.head["device"]).partition(" (")[0]


_PLACES: dict[str, Callable[[Found], str]] = {
    "gpu-first": _first,
    "gpu-where": _where,
    "gpu-heading": _heading,
    "gpu-ran": _ran,
    "gpu": _figure,
}
