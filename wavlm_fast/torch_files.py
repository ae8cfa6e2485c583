"""Reads Microsoft's and torchaudio's checkpoints without running what is in them, and says what else a file is."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import UserError, first_line

_GATES = ("grep_linear.weight", "gru_rel_pos_linear.weight")  # Microsoft's; torchaudio's and transformers'
# What tells the relatives apart, in fairseq's names and Microsoft's: of one that has several of them the first counts.
_RELATIVES = {
    "spk_proj": "a UniSpeech-SAT",
    "label_embs_concat": "a HuBERT",
    "quantizer.": "a wav2vec 2.0",
    "encoder.pos_conv.0.0.": "a data2vec",
}


class Found(NamedTuple):
    """What a file holds."""

    house: str  # "microsoft" or "torchaudio"
    cfg: dict[str, Any] | None  # Microsoft's; torchaudio's files have none
    state: dict[str, Tensor]
    said: list[str]  # what else it holds


def read(path: Path) -> Found:
    """Read a checkpoint, its weights mapped from the file where its layout allows.

    Raises:
        UserError: it holds code, is damaged or holds no WavLM. Weights that are too many or too few are not noticed.
    """
    content = _content(path)
    if not isinstance(content, dict):
        raise UserError(f"weights of a WavLM are wanted, but {path} holds an object of type {type(content).__name__}")
    state = content.get("model")
    if isinstance(state, dict):
        others = [f"{key} of the file stays behind" for key in content if key not in ("cfg", "model")]
        found = Found("microsoft", content.get("cfg"), state, others)
    else:
        found = Found("torchaudio", None, content, [])
    _refuse_what_is_no_weight(path, found.state)
    _refuse_relatives(path, found.state)
    _refuse_other_layouts(path, found)
    return found


def _content(path: Path) -> Any:
    if not path.exists():
        raise UserError(f"a checkpoint is wanted, but {path} does not exist")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise UserError(f"a checkpoint is wanted, but {path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=start == b"PK\3\4")
    except pickle.UnpicklingError as error:
        code = re.search(r"\bGLOBAL (\S+)", str(error)) or _code(path)
        if code is not None:
            name = code if isinstance(code, str) else code[1]
            raise UserError(f"{path} holds {name}, which is code, not weights: it is not loaded") from error
        raise UserError(f"a file of torch.save is wanted, but {path} is none") from error
    except Exception as error:  # whatever a broken file makes torch raise
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript archive, which is code, not weights: it is not loaded") from error
        raise UserError(f"{path} is cut off or damaged: {first_line(error).split('. ')[0]}") from error


def _code(path: Path) -> str | None:
    """The first thing that a plain pickle would import; torch names it only in files of its own."""
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for operation, argument, _ in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    return str(argument).replace(" ", ".")
                if operation.name == "STACK_GLOBAL" and len(strings) > 1:
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # no pickle
        pass
    return None


def _refuse_what_is_no_weight(path: Path, state: Mapping[Any, Any]) -> None:
    if not state:
        raise UserError(f"weights of a WavLM are wanted, but {path} holds none")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            came = type(value).__name__
            raise UserError(f"weights by name are wanted, but {path} holds {str(key)[:80]!r}, of type {came}")
        if value.layout is not torch.strided:
            raise UserError(f"dense weights are wanted, but {key} of {path} is {value.layout}")


def _refuse_relatives(path: Path, state: Mapping[str, Tensor]) -> None:
    """A model of the same build whose attention has no gated relative position bias."""
    if any(key.endswith(_GATES) for key in state):
        return
    if any(".self_attn.q_proj." in key for key in state):
        kinds = (kind for part, kind in _RELATIVES.items() if any(key.startswith(part) for key in state))
        kind, whose = next(kinds, "a HuBERT or wav2vec 2.0"), "fairseq's or Microsoft's"
    elif any("encoder.transformer.layers." in key for key in state):
        kind = "a HuBERT" if any(key.startswith("logit_generator.") for key in state) else "a HuBERT or wav2vec 2.0"
        whose = "torchaudio's"
    else:
        raise UserError(f"weights of a WavLM are wanted, but those of {path} are others, such as {next(iter(state))}")
    raise UserError(
        f"{path} is {kind} of {whose} code: no gated relative position bias in its attention, nothing of it is WavLM"
    )


def _refuse_other_layouts(path: Path, found: Found) -> None:
    whole = f'a dict of "cfg" and "model" is wanted, but {path}'
    if found.house == "microsoft":
        if not isinstance(found.cfg, dict):
            raise UserError(f"{whole} has no cfg")
    elif any(".self_attn." in key for key in found.state):
        raise UserError(f"{whole} holds Microsoft's weights without their cfg")
    elif not any("encoder.transformer." in key for key in found.state):
        raise UserError(f"{path} holds transformers' weights without their config.json: the folder of both is wanted")
