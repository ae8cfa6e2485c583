"""Checks on what users hand to the models: one sentence with what was wanted and what came, before any kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WavLMConfig

from ._private import EVERY_NEGATIVE_CTC_LABEL_PADS

SAMPLE_RATE = 16_000  # Hz, of every published WavLM
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Samples that the convolutions need for one frame."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def check_waveform(waveform: Tensor, convs: Sequence[Any], name: str = "input_values") -> None:
    """Check the input of the feature encoder, whose convolutions are `convs`, under the name that callers know.

    Raises:
        TypeError: not a tensor, not floating point, or not the dtype of the weights outside of autocast.
        ValueError: not `[B, S]`, an empty batch, or too short for one frame.
    """
    if not isinstance(waveform, Tensor):
        raise TypeError(f"{name} must be a tensor of shape [batch, samples], got {type(waveform).__name__}")
    if not waveform.is_floating_point():
        raise TypeError(
            f"{name} must be floating-point samples in -1..1, got {waveform.dtype}; divide integer audio by its "
            "full scale"
        )
    if waveform.dim() != 2:
        raise ValueError(f"{name} must be of shape [batch, samples], got {list(waveform.shape)}")
    if waveform.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one utterance, got shape {list(waveform.shape)}")
    if not all(isinstance(conv, nn.Conv1d) for conv in convs):
        return
    needed = receptive_field([c.kernel_size[0] for c in convs], [c.stride[0] for c in convs])
    if waveform.shape[1] < needed:
        raise ValueError(
            f"{name} must hold at least {needed} samples, the receptive field of one frame, got "
            f"{waveform.shape[1]}"
        )
    wanted = convs[0].weight.dtype
    if waveform.dtype != wanted and not torch.is_autocast_enabled(waveform.device.type):
        raise TypeError(f"{name} must have the dtype of the model, {wanted}, got {waveform.dtype}")


def check_mask(attention_mask: Tensor, input_values: Tensor) -> None:
    """Check an attention mask over samples.

    Raises:
        TypeError: not a tensor.
        ValueError: not the shape of `input_values`, or an utterance without a valid sample (looked for on the CPU only:
            elsewhere it would wait for the device).
    """
    if not isinstance(attention_mask, Tensor):
        kind = type(attention_mask).__name__
        raise TypeError(f"attention_mask must be a tensor of shape [batch, samples], got {kind}")
    if attention_mask.shape != input_values.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_values, {list(input_values.shape)}, got "
            f"{list(attention_mask.shape)}"
        )
    if attention_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    empty = (attention_mask == 0).all(-1)
    if bool(empty.any()):
        rows = empty.nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask must mark at least one sample of every utterance, got all zeros in rows {rows}"
        )


def valid_lengths(valid: Tensor, needed: int, wanted: str) -> list[int]:
    """The valid samples of every row of an exact batch.

    Args:
        valid: `[B, S]` bool.
        needed: how many samples a row must have.
        wanted: what `valid` was made of, as the caller knows it.

    Raises:
        ValueError: a row whose valid samples are not its first, or too few.
    """
    lengths = valid.sum(-1)
    broken = (valid != (torch.arange(valid.shape[1], device=valid.device) < lengths[:, None])).any(-1)
    found, holes = torch.stack([lengths, broken.to(lengths.dtype)]).tolist()  # waits for the device, once
    if any(holes):
        raise ValueError(f"padding 'exact' wants {wanted}, row {holes.index(1)} is none")
    check_lengths_of_rows(found, needed)
    return found


def check_lengths_of_rows(lengths: Sequence[int], needed: int) -> None:
    """Check the valid samples of every row of an exact batch.

    Raises:
        ValueError: a row has fewer than needed.
    """
    for row, length in enumerate(lengths):
        if length < needed:
            raise ValueError(
                f"padding 'exact' wants at least {needed} samples in every row, what the model needs, row {row} has "
                f"{length}"
            )


def check_labels(labels: Tensor, classes: int, utterances: int | None = None) -> None:
    """Check class labels, -100 meaning none.

    Args:
        labels: integers.
        classes: labels lie in 0..classes - 1; looked at on the CPU only: elsewhere it would wait for the device.
        utterances: how many labels there must be, where each utterance has one.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: a label out of range, or another number of labels.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of integers in 0..{classes - 1}, got {kind}")
    if utterances is not None and labels.numel() != utterances:
        raise ValueError(f"labels must hold one label for each of {utterances} utterances, got {labels.numel()}")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (labels >= classes) | ((labels < 0) & (labels != -100))
    if bool(wrong.any()):
        first = labels[wrong].flatten()[0].item()
        raise ValueError(f"labels must lie in 0..{classes - 1}, or be -100 for none, got {first}")


def check_ctc_labels(labels: Tensor, vocabulary: int) -> None:
    """Check CTC labels as `check_labels` does; transformers 4 takes every negative one for padding."""
    if EVERY_NEGATIVE_CTC_LABEL_PADS and isinstance(labels, Tensor):
        labels = labels.clamp(min=0)
    check_labels(labels, vocabulary)


def check_lengths(config: WavLMConfig, *names: str) -> None:
    """Check that some tuples of a config describe the same number of layers.

    Raises:
        ValueError: they do not.
    """
    sizes = {name: len(getattr(config, name)) for name in names}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} of {size}" for name, size in sizes.items())
        raise ValueError(f"the config's {', '.join(names)} must be of one length, got {found}")


def check_checkpoint(source: Any, options: dict[str, Any]) -> None:
    """Check that a checkpoint exists and is a WavLM before anything is built for it.

    Args:
        source: folder or hub id, as `from_pretrained` takes it.
        options: the keyword arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: `source` is written as a path, and nothing is there.
        ValueError: the checkpoint's config is of another architecture.
    """
    if source is None:
        return
    text = str(source)
    looks_like_path = isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if looks_like_path and not Path(text).exists():
        raise FileNotFoundError(f"expected a folder with a WavLM checkpoint, got the missing path {text!r}")
    try:
        config, _ = WavLMConfig.get_config_dict(source, **{k: options[k] for k in _HUB_OPTIONS if k in options})
    except TypeError:  # transformers 4 stumbles over one that holds no object
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"expected a config.json that holds an object in {text!r}, got something else")
    kind = config.get("model_type", "wavlm")
    if kind != "wavlm":
        raise ValueError(f"expected a WavLM checkpoint (model_type 'wavlm') in {text!r}, got model_type {kind!r}")
