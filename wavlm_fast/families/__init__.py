"""The houses in which WavLM lives: transformers', Microsoft's, torchaudio's. A family is one file here.

It says how its modules map onto the stages (`modules/`) and what its boundary looks like: fast classes, each a stage
and a subclass of theirs. transformers' classes are known by name; those of the others are copied, so each of their
files has `recognised(model)`, which finds in any module what its fast classes can stand in for, `relative(model)`,
which names a model of the same house that is no WavLM, and where a model's layers are, for `truncate`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from torch import nn

from ._copies import make_fast, recognisers, stand_ins
from .models import Model

COPIED: tuple[ModuleType, ...] = ()
__all__ = [
    "COPIED",
    "has_norm_behind",
    "has_whole",
    "make_fast",
    "recognises",
    "stand_ins",
    "transformer_of",
    "why_none",
]

# transformers' folders of models of this kind, and the names of these.
_RELATIVES = {
    "data2vec": "data2vec",
    "hubert": "HuBERT",
    "sew": "SEW",
    "sew_d": "SEW-D",
    "unispeech": "UniSpeech",
    "unispeech_sat": "UniSpeech-SAT",
    "wav2vec2": "wav2vec 2.0",
}


def find() -> None:
    """Look for the families' files, once more."""
    global COPIED
    names = [found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    COPIED = tuple(module for module in modules if hasattr(module, "recognised"))
    recognisers[:] = [module.recognised for module in COPIED]


find()


def recognises(model: nn.Module) -> bool:
    """Whether there is a WavLM of a copied house in a module, or parts of one."""
    return isinstance(model, nn.Module) and any(any(True for _ in family.recognised(model)) for family in COPIED)


def has_whole(model: nn.Module) -> bool:
    """Whether there is a whole WavLM of a copied house in a module, whose batches can be exact."""
    return any(issubclass(base, Model) for family in COPIED for _, base in family.recognised(model))


def transformer_of(model: nn.Module) -> nn.Module | None:
    """What holds the layers, `layers`, and `layer_norm` of a copied house's WavLM; None of anything else."""
    return next((found for family in COPIED if (found := family.transformer_of(model)) is not None), None)


def has_norm_behind(transformer: nn.Module) -> bool:
    """Whether `layer_norm` of what `transformer_of` has found stands behind the layers."""
    return any(family.has_norm_behind(transformer) for family in COPIED)


def why_none(model: object) -> str:
    """The end of a sentence that says what a model is in which no WavLM was found."""
    if not isinstance(model, nn.Module):
        return ", which contains none"
    relative = next((found for family in COPIED if (found := family.relative(model)) is not None), None)
    place = type(model).__module__.split(".")
    if relative is None and place[:2] == ["transformers", "models"] and place[2] in _RELATIVES:
        relative = f"a {_RELATIVES[place[2]]} of transformers' code"
    if relative is None:
        return ", which contains none"
    return f": this is {relative}: no gated relative position bias in its attention, nothing of it is WavLM"
