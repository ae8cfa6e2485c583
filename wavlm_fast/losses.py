"""The losses of the classes with heads, as transformers defines them, of the valid frames of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.wavlm import modeling_wavlm as hf

from ._private import EVERY_NEGATIVE_CTC_LABEL_PADS


def with_loss(
    model: PreTrainedModel, outputs: ModelOutput, labels: Tensor | None, lengths: Sequence[int] | Tensor
) -> ModelOutput:
    """The outputs of a forward without labels as of one with them."""
    if labels is None:
        return outputs
    return type(outputs)(**{**outputs, "loss": _loss(model, outputs["logits"], labels, lengths)})


def _loss(model: Any, logits: Tensor, labels: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
    """The loss of a batch, a scalar; of one utterance what transformers gives for it alone.

    Args:
        model: a WavLM with a head.
        logits: `[B, T, V]` for CTC and frame classification, else `[B, V]`.
        labels: as the class takes them.
        lengths: `[B]`, the valid frames.
    """
    if isinstance(model, hf.WavLMForCTC):
        return _ctc(model, logits, labels.to(logits.device), lengths)
    if isinstance(model, hf.WavLMForAudioFrameClassification):
        return _of_frames(logits, labels.to(logits.device), lengths)
    if isinstance(model, hf.WavLMForXVector):
        return model.objective(logits, labels)
    return F.cross_entropy(logits.view(-1, model.config.num_labels), labels.view(-1))


def _ctc(model: PreTrainedModel, logits: Tensor, labels: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
    blank = model.config.pad_token_id
    given = labels >= 0 if EVERY_NEGATIVE_CTC_LABEL_PADS else (labels != -100) & (labels != blank)
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(
            log_probs,
            labels.masked_select(given),
            torch.as_tensor(lengths, device=logits.device),
            given.sum(-1),
            blank=blank,
            reduction=model.config.ctc_loss_reduction,
            zero_infinity=model.config.ctc_zero_infinity,
        )


def _of_frames(logits: Tensor, labels: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
    """The mean over valid frames."""
    ends = torch.as_tensor(lengths, device=logits.device)[:, None]
    valid = torch.arange(logits.shape[1], device=logits.device) < ends
    classes = labels.view(logits.shape).argmax(-1).masked_fill(~valid, -100)
    return F.cross_entropy(logits.flatten(0, 1), classes.flatten())
