"""The WavLM that a subcommand works on: a checkpoint of the user's, or seeded weights."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, WavLMConfig

from .errors import UserError, first_line
from .files import feed
from .inputs import receptive_field as _receptive_field
from .sensitive import make_sensitive
from .truncated import truncate

_PREPROCESSOR = "preprocessor_config.json"
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from, and how its audio is prepared."""

    name: str | None  # local folder or hub id; None for seeded weights
    normalise: bool  # each utterance to zero mean and unit variance first, as the checkpoint was trained

    def __str__(self) -> str:
        if self.name is None:
            return "WavLM-base, seeded sensitive weights (no --model given: not a trained model)"
        prepared = "utterances normalised to zero mean and unit variance" if self.normalise else "waveforms as they are"
        return f"{self.name} ({prepared})"


def load(
    name: str | None,
    dtype: torch.dtype | None = torch.float32,
    seed: int = 0,
    architecture: str = "WavLMModel",
    layers: int | None = None,
) -> tuple[PreTrainedModel, Source]:
    """Build one of transformers' own classes in eval mode, on the CPU.

    Args:
        name: a local folder, a hub id, or None for WavLM-base with seeded sensitive weights.
        dtype: of the parameters; None for that of the checkpoint.
        seed: of the seeded weights.
        architecture: the class.
        layers: how many of the encoder's layers to load, the first ones; None for all.

    Raises:
        UserError: the path or id does not lead to a complete WavLM checkpoint.
    """
    if name is None:
        model: Any = make_sensitive(_transformers_model(WavLMConfig(), architecture), seed)
        if layers is not None:
            model = truncate(model, layers)
        return model.to(dtype).eval(), Source(None, False)
    quieten()
    found = config(name)
    if layers is not None:
        found.num_hidden_layers = layers
    try:
        as_stored: dict[str, Any] = {"dtype": "auto"} if dtype is None else {}  # the default of transformers 5
        loading: Any = _plain_class(architecture).from_pretrained
        model, problems = loading(
            name, config=found, output_loading_info=True, **as_stored
        )
    except Exception as error:  # whatever a broken file makes safetensors, pickle or transformers raise
        raise UserError(f"the WavLM checkpoint {name} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(set(problems["missing_keys"]) - {"masked_spec_embed"})  # only training reads that one
    if missing:
        raise UserError(
            f"a complete WavLM checkpoint is wanted, but {name} lacks {len(missing)} parameters, such as {missing[0]}"
        )
    mismatched = [key if isinstance(key, str) else key[0] for key in problems.get("mismatched_keys") or ()]
    if mismatched:
        raise UserError(f"{name} is not the shape that its config.json says, for example {mismatched[0]}")
    return model.to(dtype).eval(), source(name)


def source(name: str | None) -> Source:
    """What `load` says of a checkpoint, without loading it.

    Raises:
        UserError: the path or id does not lead to one.
    """
    return Source(name, name is not None and _normalises(name, config(name)))


def identity(name: str | None) -> str:
    """A name for the weights of a checkpoint: a digest of a folder's files, or the hub's commit."""
    if name is None:
        return "seeded"
    if not Path(name).is_dir():
        return str(getattr(config(name), "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted(Path(name).iterdir()):
        if path.suffix in _WEIGHTS or path.name == "config.json":
            digest.update(path.name.encode())
            feed(digest, path)
    return digest.hexdigest()[:32]


def prepare(waveform: torch.Tensor, normalise: bool) -> torch.Tensor:
    """[S] -> [1, S], normalised as `Wav2Vec2FeatureExtractor` does if the checkpoint wants that."""
    return (normalised(waveform) if normalise else waveform)[None]


def normalised(waveform: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """[S] at zero mean and unit variance, as `Wav2Vec2FeatureExtractor` makes it; `eps` is added to the variance.

    By numpy, as there: torch's sums depend on how many threads it has.
    """
    samples = waveform.numpy()
    return torch.from_numpy((samples - samples.mean()) / np.sqrt(samples.var() + eps))


def receptive_field(model: Any) -> int:
    """Samples that the model's first frame needs."""
    return _receptive_field(model.config.conv_kernel, model.config.conv_stride)


def accelerated(model: PreTrainedModel) -> PreTrainedModel:
    """A fast copy; the given model stays transformers' own."""
    from . import accelerate

    return accelerate(copy.deepcopy(model))


def quieten() -> None:
    """What goes wrong is told in our one sentence, not also in the loaders' warnings."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _plain_class(architecture: str = "WavLMModel") -> type[PreTrainedModel]:
    """transformers' own class, also while `install` has put ours in its place."""
    return next(c for c in getattr(transformers, architecture).__mro__ if c.__module__.startswith("transformers."))


def _transformers_model(config: WavLMConfig, architecture: str = "WavLMModel") -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        return _plain_class(architecture)(config)


def blank(config: dict[str, Any], architecture: str) -> PreTrainedModel:
    """One of transformers' own classes with weights that mean nothing."""
    return _transformers_model(WavLMConfig.from_dict(config), architecture)


def processor(name: str) -> Any:
    """What turns a checkpoint's CTC logits into text.

    Raises:
        UserError: the checkpoint has none, or it cannot be loaded.
    """
    try:
        return transformers.AutoProcessor.from_pretrained(name)
    except Exception as error:
        raise UserError(f"text needs the processor of {name}, which cannot be loaded: {_first_line(error)}") from error


def transcribed(processor: Any, logits: torch.Tensor) -> str:
    """The text of CTC logits `[T, V]`, by the processor's language model where it has one."""
    if hasattr(processor, "decoder"):
        return processor.decode(logits.float().numpy()).text
    return processor.decode(logits.argmax(-1))


def config_of(name: str | None) -> WavLMConfig:
    """The configuration of what `load` builds, None being the seeded one.

    Raises:
        UserError: as `config`.
    """
    return WavLMConfig() if name is None else config(name)


def config(name: str) -> WavLMConfig:
    """The configuration of a checkpoint.

    Raises:
        UserError: the path or id does not lead to one.
    """
    path = Path(name).expanduser()
    looks_local = (
        os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1 or (os.sep == "\\" and "\\" in name)
    )
    if path.exists() and not path.is_dir():
        raise UserError(f"a model folder or hub id is wanted, but {name} is a file")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"a model folder is wanted, but {name} has no config.json")
    if looks_local and not path.exists():
        raise UserError(f"a model folder or hub id is wanted, but {name} does not exist")
    try:
        found = transformers.PretrainedConfig.get_config_dict(name)[0]
    except TypeError:  # transformers stumbles over one that holds no object
        found = None
    except Exception as error:  # offline, no such id, gated, unreadable JSON: one sentence each
        where = "read" if path.is_dir() else "found locally or fetched from the hub"
        raise UserError(f"the model {name} cannot be {where}: {_first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"a config.json that holds an object is wanted, but that of {name} holds something else")
    if found.get("model_type") != "wavlm":
        came = found.get("model_type") or "a config without model_type"
        raise UserError(f"a WavLM checkpoint is wanted, but {name} is {came}")
    try:
        return WavLMConfig.from_dict(found)
    except Exception as error:
        raise UserError(f"the config of {name} is not valid: {_first_line(error)}") from error


def _normalises(name: str, config: WavLMConfig) -> bool:
    """What preprocessor_config.json says; without one, what the published models of this norm form do.

    Raises:
        UserError: there is one, and it does not say.
    """
    try:
        found = transformers.Wav2Vec2FeatureExtractor.get_feature_extractor_dict(name)[0]
    except Exception as error:  # as for config.json, or there is none
        if isinstance(error, OSError) and not (Path(name).expanduser() / _PREPROCESSOR).exists():
            return config.feat_extract_norm == "layer"
        raise UserError(f"the {_PREPROCESSOR} of {name} cannot be read: {_first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"a {_PREPROCESSOR} that holds an object is wanted, but that of {name} holds something else")
    wanted = found.get("do_normalize", True)  # as Wav2Vec2FeatureExtractor has it
    if not isinstance(wanted, bool):
        raise UserError(f"do_normalize in the {_PREPROCESSOR} of {name} must be true or false, got {wanted!r}")
    return wanted


def _first_line(error: Exception) -> str:
    return first_line(error).strip().rstrip(".:")
