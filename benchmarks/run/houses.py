"""Whose class runs a case: transformers', Microsoft's own or torchaudio's, with the same weights in each."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from wavlm_fast import conversion, original, restore
from wavlm_fast.errors import first_line

from .cases import Output

_MICROSOFT, _TORCHAUDIO = "s3prl.upstream.wavlm.WavLM", "torchaudio"


@dataclass(frozen=True)
class House:
    """A class of WavLM."""

    family: str  # of whoever runs it as it is
    cls: str
    build: Callable[[nn.Module], nn.Module]  # of transformers' WavLMModel one with the same weights
    run: Callable[[nn.Module, Tensor], Tensor]  # waveforms [B, S] to the last hidden states [B, T, C]
    note: Callable[[], str] = lambda: ""
    package: str = ""  # without which there is no such class

    def why_not(self) -> str | None:
        """Why no case can run it; None when they can."""
        if not self.package:
            return None
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} not installed (make test-clients makes an environment that has it)"
        try:
            importlib.import_module(self.package)
        except Exception as error:  # a broken installation raises what it likes
            return f"import {self.package} fails: {first_line(error)}"
        return None


class InHouse(Output):
    """A house's model as a function of its waveforms."""

    def __init__(self, model: nn.Module, house: House) -> None:
        super().__init__(model, "")
        self.house = house

    @classmethod
    def of(cls, module: Output, house: str) -> InHouse:
        """The WavLMModel in `module`, in the class of another house; no parameter is shared."""
        made = HOUSES[house]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has a newer weight norm
            return cls(made.build(module.model).eval(), made)

    def forward(self, input_values: Tensor) -> Tensor:
        return self.house.run(self.model, input_values)


def _microsoft() -> tuple[ModuleType, str]:
    """A module with Microsoft's class, and which it is."""
    try:
        return importlib.import_module(_MICROSOFT), f"{_MICROSOFT}, a copy of Microsoft's class"
    except Exception as error:  # not installed, or broken
        ours = f"{original.__name__}.WavLM restored to plain torch"
        return original, f"{ours}, in place of {_MICROSOFT}: {first_line(error)}"


def _as_microsoft(model: nn.Module) -> nn.Module:
    theirs, (cfg, state, _) = _microsoft()[0], conversion.to_microsoft(model.config, model.state_dict(), False)
    made = restore(theirs.WavLM(theirs.WavLMConfig(cfg)))  # ours is fast from the start
    made.load_state_dict(state)
    return made


def _as_torchaudio(model: nn.Module) -> nn.Module:
    arguments, state, _ = conversion.to_torchaudio(model.config, model.state_dict())
    made = importlib.import_module(f"{_TORCHAUDIO}.models").wavlm_model(**arguments)
    made.load_state_dict(state)
    return made


HOUSES = {
    "transformers": House("transformers", "WavLMModel", copy.deepcopy, lambda model, x: model(x).last_hidden_state),
    "original": House(
        "Microsoft", "WavLM", _as_microsoft, lambda model, x: model.extract_features(x)[0], lambda: _microsoft()[1]
    ),
    "torchaudio": House(
        "torchaudio", "Wav2Vec2Model", _as_torchaudio, lambda model, x: model(x)[0], package=_TORCHAUDIO
    ),
}
