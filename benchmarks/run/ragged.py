"""Ways to run utterances of different lengths: what each hears, and what it has to equal."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .cases import Case, Output
from .providers import ALONE, EXACT, UNIFORM, Subject


class Alone(Output):
    """A model that runs the utterances of a padded batch one at a time; zeros past the ends of what has frames."""

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        rows = zip(input_values, attention_mask.sum(-1).tolist(), strict=True)
        parts = [getattr(self.model(row[None, :samples]), self.output)[0] for row, samples in rows]
        return torch.stack(parts) if parts[0].dim() == 1 else pad_sequence(parts, batch_first=True)


def seen(case: Case, subject: Subject, way: str) -> Subject:
    """The subject as a way of running it has it: with other inputs, or with a model that gets utterances singly."""
    if way == UNIFORM:
        return replace(subject, inputs=case.uniform.inputs())
    return replace(subject, module=Alone(subject.module.model, subject.module.output)) if way == ALONE else subject


def judged(case: Case, subject: Subject, way: str) -> Subject:
    """The subject that says what is right: of exact batches, the utterances one at a time."""
    return seen(case, subject, ALONE if way == EXACT else way)
