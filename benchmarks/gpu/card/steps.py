"""One step of a run, and the sizes that it is run at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from wavlm_fast import measure
from wavlm_fast.backends.triton.launch import interpreted
from wavlm_fast.parity.run_models import FORMS
from wavlm_fast.parity.run_models import config as tiny_config

from ...run import cases
from ...run.providers import SHORT

Row = dict[str, Any]
PEAKS, PARITY, ATTENTION, STAGES, MODELS, TUNING = PHASES = (
    "peaks", "parity", "attention", "stages", "models", "tuning",
)  # fmt: skip
FULL, TINY = "full", "tiny"  # sizes


@dataclass(frozen=True)
class Step:
    """Something to measure: what is lost as a whole where it fails.

    Attributes:
        phase: one of PHASES.
        name: tells it from all others, in words.
        seconds: how long it takes, estimated for a GPU, compilation included.
        run: measures.
        tuned: makes the call that a search for configurations repeats; None where there is nothing to search.
    """

    phase: str
    name: str
    seconds: float
    run: Callable[[], list[Row]]
    tuned: Callable[[], Callable[[], Any]] | None = None


@dataclass(frozen=True)
class Scale:
    """Where and at what sizes a run measures. Triton's interpreter multiplies bfloat16 wrongly, and is asked for none.

    Attributes:
        device: of torch.
        tiny: toy sizes, which show that the command works and nothing else.
    """

    device: torch.device
    tiny: bool = False

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """In which results are compared."""
        found = (torch.bfloat16, torch.float16, torch.float32)
        return found[1:] if interpreted() else found

    @property
    def dtypes_of_models(self) -> tuple[torch.dtype, ...]:
        """In which those of whole models are: the interpreter takes seconds for each."""
        return self.dtypes[-1:] if self.tiny else self.dtypes

    @property
    def half(self) -> torch.dtype:
        """In which speed is measured."""
        return torch.float32 if interpreted() else torch.bfloat16

    @property
    def short(self) -> str:
        """Its name."""
        return SHORT[self.half]

    @property
    def frames(self) -> dict[int, int]:
        """Frames of attention, and batches of that length."""
        return {20: 2} if self.tiny else {500: 8, 1500: 8, 6000: 1}

    @property
    def heads(self) -> tuple[int, int]:
        """Heads of attention, and their channels."""
        return (3, 16) if self.tiny else (12, 64)

    @property
    def seconds(self) -> float:
        """Of one utterance."""
        return 0.04 if self.tiny else 10

    @property
    def batches(self) -> tuple[int, ...]:
        """Of whole models."""
        return (1, 2) if self.tiny else (1, 8, 32)

    @property
    def batch(self) -> int:
        """Of single stages and of training."""
        return 2 if self.tiny else 8

    def prepare(self) -> None:
        """Make base and large what a run of this scale means by them: without anything random, so that they train."""
        for model, form in zip(("base", "large"), FORMS, strict=True):
            small = {**tiny_config(form).to_diff_dict(), "num_hidden_layers": 1}
            options = small if self.tiny else cases.MODELS[model].options
            cases.MODELS[model] = cases.Spec(options={**options, **cases.NOTHING_RANDOM})

    def time(self, call: Callable[[], Any]) -> measure.Timing:
        """Run it often enough for a median."""
        rounds, warm_ups = (1, 0) if self.tiny else (30, 2)
        for _ in range(warm_ups):
            call()
        return measure.Timing.of(measure.interleave({"": call}, rounds, self.device, budget=5)[""])
