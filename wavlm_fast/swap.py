"""Putting the fast modules in place of transformers' own, and back."""

from __future__ import annotations

import gc
import importlib
from types import ModuleType
from typing import TypeVar

import torch
from torch import nn
from transformers.models.wavlm import modeling_wavlm as hf

from . import families
from ._private import let_record
from .derived import forget, releasing
from .families.models import Model
from .families.transformers import MODULES
from .freed import refuse
from .inputs import SAMPLE_RATE
from .models import MODELS
from .modules._originals import StandIn
from .padding import check_mode, set_mode

Module = TypeVar("Module", bound=nn.Module)

# transformers' class -> the class that stands in for it.
FAST_CLASSES = {fast.original: fast.twin for fast in (*MODULES, *MODELS)}

# Of models that are built while installed.
_padding = "transformers"

# Where transformers offers its model classes.
_NAMESPACES = ("transformers", "transformers.models.wavlm", "transformers.models.wavlm.modeling_wavlm")


def accelerate(model: Module, keep_originals: bool = True, padding: str | None = None) -> Module:
    """Make a live WavLM fast, in place: transformers', Microsoft's own or a copy of it, torchaudio's.

    Every module of a WavLM in `model` becomes the fast class that stands in for it. Parameters, buffers, names, hooks
    and modes stay as they are, and so does everything around: adapters, DDP, user classes. On a model that is fast
    already it does nothing. A class of Microsoft's or torchaudio's code is tried first, once: where a copy computes
    something else than the published one, its own code runs, and `report` says so.

    Args:
        model: a WavLM, or any module that contains one.
        keep_originals: with False, weights that the CPU kernels use in packed form are packed now and their originals
            freed, which halves the memory of the model. What is left does inference without gradients, on the CPU, in
            the present dtype; whatever needs an original (`train`, `state_dict`, saving, copying, other dtypes or
            devices, attention weights as outputs) raises a RuntimeError that says so. The model must be in `eval` mode.
            Where nothing is packed (GPUs, the reference backend) nothing is freed.
        padding: what a padded batch means, one with an `attention_mask`, `padding_mask` or `lengths`. "transformers",
            which is the default: the model's own numbers, which depend on how much padding there is. "exact": every row
            as if it were alone and unpadded, zeros past its end in every output that has frames, and nothing computed
            on padding, which must be at the end of a row. None leaves a model that is fast already in the mode that it
            is in.

    Returns:
        `model`.

    Raises:
        TypeError: there is no WavLM in it.
        ValueError: originals are to be freed of a model that is in training mode; `padding` is another word, or "exact"
            for something that has only parts of a WavLM.
    """
    if padding is not None:
        check_mode(padding)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    if not any(isinstance(m, tuple(FAST_CLASSES)) for m in modules) and not families.recognises(model):
        raise TypeError(f"accelerate wants a WavLM, got {_describe(model)}{families.why_none(model)}")
    whole = any(isinstance(m, hf.WavLMPreTrainedModel) for m in modules)
    if padding == "exact" and not whole and not families.has_whole(model):
        raise ValueError(f"padding 'exact' wants a whole WavLM, got {_describe(model)}, which has only parts of one")
    if not keep_originals and any(m.training for m in modules):
        raise ValueError("accelerate frees the originals of a model that is in eval mode, this one trains: call eval()")
    _swap(modules, FAST_CLASSES)
    families.make_fast(model)
    if padding is not None:
        set_mode(model, padding)
    if not keep_originals:
        _free_originals(model)
    return model


def _free_originals(model: nn.Module) -> None:
    """Have every WavLM in the model pack what it uses, and free what was packed, weight by weight."""
    inside = [m for m in model.modules() if isinstance(m, (hf.WavLMPreTrainedModel, Model))]
    parts = {part for m in inside for part in m.modules() if part is not m}
    for wavlm in inside:
        if wavlm not in parts:  # a head runs what it contains
            wavlm.requires_grad_(False)
            like = next(p for p in wavlm.parameters() if p.is_floating_point())
            with torch.no_grad(), releasing():
                waveforms = torch.zeros((1, SAMPLE_RATE), dtype=like.dtype, device=like.device)
                wavlm.run(wavlm, waveforms) if isinstance(wavlm, Model) else wavlm(waveforms)


def restore(model: Module) -> Module:
    """Undo `accelerate`: the modules' own classes, bit for bit, in place.

    Args:
        model: any module; what is not fast in it stays as it is.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no torch module.
        RuntimeError: weights were freed by `accelerate(model, keep_originals=False)`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore wants a torch module, got {_describe(model)}")
    refuse("restore()", model.parameters())
    set_mode(model, "transformers")
    modules = list(model.modules())
    _swap(modules, {type(m): m.original for m in modules if isinstance(m, StandIn) and m.is_twin()})
    forget(model.parameters())
    return model


def install(padding: str = "transformers") -> None:
    """Make transformers build fast WavLMs: its classes, and so its Auto classes, pipelines and Trainers.

    While installed, `transformers.WavLMModel` is `wavlm_fast.WavLMModel`, a subclass of the class that it replaces. So
    do torchaudio's factories and bundles, where it is installed. Copies of Microsoft's class have no name by which they
    could be found. Models that exist already stay as they are; `accelerate` them.

    Args:
        padding: of the models that are built while installed, as `accelerate` takes it.

    Raises:
        ValueError: `padding` is another word.
    """
    check_mode(padding)
    global _padding
    _padding = padding
    _offer({fast.__name__: fast for fast in MODELS})
    for family in families.COPIED:
        if hasattr(family, "install"):
            family.install(accelerate_new)


def accelerate_new(model: nn.Module) -> None:
    """`accelerate` a model that has just been built, in the mode that `install` said."""
    accelerate(model, padding=_padding)


def uninstall() -> None:
    """Undo `install`. Models built in between stay fast; `restore` them."""
    global _padding
    _padding = "transformers"
    _offer({fast.__name__: fast.original for fast in MODELS})
    for family in families.COPIED:
        if hasattr(family, "uninstall"):
            family.uninstall()


def _offer(classes: dict[str, type]) -> None:
    # transformers runs its own __init__ a second time when its processors are imported: who imported it before that
    # holds another module of that name, which nothing but its type leads to (`isinstance` would ask objects themselves,
    # and some answer with a warning).
    modules = [m for m in gc.get_objects() if issubclass(type(m), ModuleType)]
    holders = [m for m in modules if vars(m).get("__name__") == "transformers"]
    for namespace in (*holders, *map(importlib.import_module, _NAMESPACES)):
        for name, cls in classes.items():
            setattr(namespace, name, cls)


def _swap(modules: list[nn.Module], classes: dict[type, type]) -> None:
    for module in modules:
        new = classes.get(type(module))
        if new is None:
            continue
        module.__class__ = new
        if isinstance(module, hf.WavLMPreTrainedModel):
            let_record(module)


def _describe(model: object) -> str:
    return f"a {type(model).__module__}.{type(model).__name__}"
