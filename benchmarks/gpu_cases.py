"""The launches that WavLM makes on a GPU, recorded: every op at the shapes of the base and the large model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from wavlm_fast.backends.triton import TABLE

from .gpu_compile import Launch, record

BATCH, SAMPLES = 8, 160_000  # 8 utterances of 10 s at 16 kHz
FRAMES = 499
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Model:
    """The sizes of a WavLM that decide its launches."""

    channels: int
    heads: int
    feed_forward: int
    layers: int
    norm: str  # of the feature encoder
    conv_bias: bool


MODELS = {"base": Model(768, 12, 3072, 12, "group", False), "large": Model(1024, 16, 4096, 24, "layer", True)}


@dataclass(frozen=True)
class Case:
    """One op call: the arguments of its schema, as tensors without memory."""

    model: str
    op: str
    args: tuple[Any, ...]
    what: str = ""

    def launches(self) -> list[Launch]:
        """What the Triton backend launches for it."""
        return record(TABLE[self.op].fn, *self.args)


def _maker(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return make


def cases(model: str, dtype: torch.dtype, backward: bool = True) -> Iterator[Case]:
    """All ops of a model, forward and backward."""
    sizes, new = MODELS[model], _maker(dtype)
    for build in (_attention, _waveform, _strided, _positional, _linear, _norm, _gate, _head):
        for op, args, what in build(sizes, new):
            if backward or not op.endswith("_backward"):
                yield Case(model, op, args, what)


def _attention(m: Model, new: Callable[..., torch.Tensor]) -> Iterator[tuple[str, tuple, str]]:
    D = m.channels // m.heads
    q, k, v = new(BATCH, FRAMES, 3, m.heads, D).unbind(2)
    gate = new(BATCH, m.heads, FRAMES, dtype=torch.float32)
    rel_bias = new(m.heads, 2 * FRAMES - 1, dtype=torch.float32)
    lengths = new(BATCH, dtype=torch.int64)
    out = new(BATCH, FRAMES, m.heads, D)
    yield "gated_attention", (q, k, v, gate, rel_bias, lengths, 0.0, None, D**-0.5), ""
    operands = (out, q, k, v, gate, rel_bias, lengths, out, gate)
    yield "gated_attention_backward", (*operands, 0.0, None, D**-0.5), ""


def _wanted(*tensors: torch.Tensor | None) -> list[bool]:
    return [t is not None for t in tensors]


def _waveform(m: Model, new: Callable[..., torch.Tensor]) -> Iterator[tuple[str, tuple, str]]:
    waveform, weight, vector = new(BATCH, SAMPLES), new(512, 1, 10), new(512)
    bias = vector if m.conv_bias else None
    args = (waveform, weight, bias, 5, m.norm, vector, vector, 1e-5, "gelu")
    yield "waveform_conv", args, ""
    wanted = _wanted(waveform, weight, bias, vector, vector)
    yield "waveform_conv_backward", (new(BATCH, (SAMPLES - 10) // 5 + 1, 512), *args, wanted), ""


def _strided(m: Model, new: Callable[..., torch.Tensor]) -> Iterator[tuple[str, tuple, str]]:
    frames = (SAMPLES - 10) // 5 + 1
    norm = new(512) if m.norm == "layer" else None
    bias = new(512) if m.conv_bias else None
    for kernel in (3, 3, 3, 3, 2, 2):
        x, weight, after = new(BATCH, frames, 512), new(512, 512, kernel), (frames - kernel) // 2 + 1
        out, tail = new(BATCH, after, 512), (2, norm, norm, 1e-5, "gelu")
        yield "strided_conv", (x, weight, bias, *tail, False), f"k{kernel} {frames}"
        args = (out, x, weight, bias, out, *tail, _wanted(x, weight, bias, norm, norm))
        yield "strided_conv_backward", args, f"k{kernel} {frames}"
        frames = after


def _positional(m: Model, new: Callable[..., torch.Tensor]) -> Iterator[tuple[str, tuple, str]]:
    x, weight, bias = new(BATCH, FRAMES, m.channels), new(m.channels, m.channels // 16, 128), new(m.channels)
    yield "positional_conv", (x, weight, bias, 16, "gelu", True, False), ""
    yield "positional_conv_backward", (x, x, weight, bias, x, 16, "gelu", True, [True] * 3), ""


def _linear(m: Model, new: Callable[..., torch.Tensor]) -> Iterator[tuple[str, tuple, str]]:
    x, weight, bias = new(BATCH, FRAMES, m.channels), new(m.feed_forward, m.channels), new(m.feed_forward)
    out = new(BATCH, FRAMES, m.feed_forward)
    yield "linear_act", (x, weight, bias, "gelu", False), ""
    yield "linear_act_backward", (out, x, weight, bias, out, "gelu", [True] * 3), ""


def _norm(m: Model, new: Callable[..., torch.Tensor]) -> Iterator[tuple[str, tuple, str]]:
    x, w = new(BATCH, FRAMES, m.channels), new(m.channels)
    yield "add_layer_norm", (x, x, w, w, 1e-5, True), ""
    yield "add_layer_norm_backward", (x, x, x, w, 1e-5), ""


def _gate(m: Model, new: Callable[..., torch.Tensor]) -> Iterator[tuple[str, tuple, str]]:
    x, weight, bias = new(BATCH, FRAMES, m.channels), new(8, m.channels // m.heads), new(8)
    grad = new(BATCH, m.heads, FRAMES, dtype=torch.float32)
    yield "position_gate", (x, weight, bias, new(m.heads)), ""
    yield "position_gate_backward", (grad, x, weight, bias, new(m.heads)), ""


def _head(m: Model, new: Callable[..., torch.Tensor]) -> Iterator[tuple[str, tuple, str]]:
    frames, channels = FRAMES, 512
    for width, kernel, dilation in ((512, 5, 1), (512, 3, 2), (512, 3, 3), (512, 1, 1), (1500, 1, 1)):
        x, weight, bias = new(BATCH, frames, channels), new(width, kernel * channels), new(width)
        frames -= (kernel - 1) * dilation
        out = new(BATCH, frames, width)
        yield "tdnn", (x, weight, bias, kernel, dilation, "relu"), f"k{kernel} d{dilation} {width}"
        args = (out, x, weight, bias, out, kernel, dilation, "relu", [True] * 3)
        yield "tdnn_backward", args, f"k{kernel} d{dilation} {width}"
        channels = width
    x, lengths = new(BATCH, frames, channels), new(BATCH, dtype=torch.int64)
    yield "stats_pool", (x, lengths), ""
    yield "stats_pool_backward", (new(BATCH, 2 * channels), x, lengths, new(BATCH, 2 * channels)), ""
