"""Checks on what users hand to the models: one sentence with what was wanted and what came, before any kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

SAMPLE_RATE = 16_000  # Hz, of every published WavLM
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Samples that the convolutions need for one frame."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def check_waveform(waveform: Tensor, convs: Sequence[nn.Module]) -> None:
    """Check the input of the feature encoder, whose convolutions are `convs`.

    Raises:
        TypeError: not a tensor, not floating point, or not the dtype of the weights outside of autocast.
        ValueError: not `[B, S]`, an empty batch, or too short for one frame.
    """
    if not isinstance(waveform, Tensor):
        raise TypeError(f"input_values must be a tensor of shape [batch, samples], got {type(waveform).__name__}")
    if not waveform.is_floating_point():
        raise TypeError(
            f"input_values must be floating-point samples in -1..1, got {waveform.dtype}; divide integer audio by its "
            "full scale"
        )
    if waveform.dim() != 2:
        raise ValueError(f"input_values must be of shape [batch, samples], got {list(waveform.shape)}")
    if waveform.shape[0] == 0:
        raise ValueError(f"input_values must hold at least one utterance, got shape {list(waveform.shape)}")
    if not all(isinstance(conv, nn.Conv1d) for conv in convs):
        return
    needed = receptive_field([c.kernel_size[0] for c in convs], [c.stride[0] for c in convs])
    if waveform.shape[1] < needed:
        raise ValueError(
            f"input_values must hold at least {needed} samples, the receptive field of one frame, got "
            f"{waveform.shape[1]}"
        )
    wanted = convs[0].weight.dtype
    if waveform.dtype != wanted and not torch.is_autocast_enabled(waveform.device.type):
        raise TypeError(f"input_values must have the dtype of the model, {wanted}, got {waveform.dtype}")


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


def check_labels(labels: Tensor, classes: int) -> None:
    """Check class labels, -100 meaning none, on the CPU (elsewhere it would wait for the device).

    Raises:
        ValueError: a label outside of 0..classes - 1.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (labels >= classes) | ((labels < 0) & (labels != -100))
    if bool(wrong.any()):
        first = labels[wrong].flatten()[0].item()
        raise ValueError(f"labels must lie in 0..{classes - 1}, or be -100 for none, got {first}")


def check_checkpoint(source: object, options: dict) -> None:
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
    config, _ = PretrainedConfig.get_config_dict(source, **{k: options[k] for k in _HUB_OPTIONS if k in options})
    kind = config.get("model_type", "wavlm")
    if kind != "wavlm":
        raise ValueError(f"expected a WavLM checkpoint (model_type 'wavlm') in {text!r}, got model_type {kind!r}")
