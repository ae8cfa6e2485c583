"""The ops that WavLM runs on a GPU, at the shapes of the base and the large model, and the launches that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from wavlm_fast.backends.triton import TABLE

from ..run.cases import MODELS as SPECS
from .compile import Launch, record, recording

BATCH, SAMPLES = 8, 160_000  # 8 utterances of 10 s at 16 kHz
KERNELS = (3, 3, 3, 3, 2, 2)  # of the strided convolutions
FRAMES = 499  # that come of them
TO_WAVEFORM = "waveform too"  # the case in which the waveform's own gradient is wanted, which training does not
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

    @classmethod
    def of(cls, name: str) -> Model:
        """Those of one of the MODELS of run/cases.py."""
        c = SPECS[name].config
        sizes = c.hidden_size, c.num_attention_heads, c.intermediate_size, c.num_hidden_layers
        return cls(*sizes, c.feat_extract_norm, c.conv_bias)


MODELS = {name: Model.of(name) for name in ("base", "large")}
# The models' heads have 64 channels. These fill a tile of 128, and leave some of it empty.
WIDE_HEADS = (128, 80)
# What takes packed frames and makes fewer of them.
RESIZED = ("waveform_conv", "strided_conv", "tdnn")


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


@dataclass(frozen=True)
class _New:
    """Makes tensors without memory for `batch` utterances of `samples`."""

    dtype: torch.dtype
    batch: int
    samples: int

    @property
    def frames(self) -> int:
        """After the feature encoder."""
        frames = (self.samples - 10) // 5 + 1
        for kernel in KERNELS:
            frames = (frames - kernel) // 2 + 1
        return frames

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")


def cases(
    model: str, dtype: torch.dtype, backward: bool = True, batch: int = BATCH, samples: int = SAMPLES
) -> Iterator[Case]:
    """All ops of a model, forward and backward; an op that several layers share is there once."""
    sizes, new = MODELS[model], _New(dtype, batch, samples)
    for build in (_attention, _waveform, _strided, _positional, _linear, _norm, _gate, _head):
        for op, args, what in build(sizes, new):
            if backward or not op.endswith("_backward"):
                yield Case(model, op, args, what)


def wide_heads(dtype: torch.dtype, batch: int = BATCH) -> Iterator[Case]:
    """Attention with each of WIDE_HEADS, forward and backward."""
    for D in WIDE_HEADS:
        model, new = replace(MODELS["base"], channels=8 * D, heads=8), _New(dtype, batch, SAMPLES)
        yield from (Case(f"heads of {D}", *found) for found in _attention(model, new))


def packed_stages(model: str, dtype: torch.dtype) -> Iterator[Case]:
    """What makes fewer of packed frames, forward and backward, on BATCH utterances one behind the other."""
    offsets = torch.empty(BATCH + 1, dtype=torch.int32, device="meta")
    for case in cases(model, dtype, batch=1, samples=BATCH * SAMPLES):
        if case.op.removesuffix("_backward") in RESIZED:
            args = (*case.args, offsets, offsets, _out_frames(case))
            yield Case(f"{model} packed", case.op, args, case.what)
        elif case.op.startswith("positional_conv"):
            yield Case(f"{model} packed", case.op, (*case.args, offsets), case.what)
        elif case.op.startswith("stats_pool"):
            # Lengths have nothing to say, and what is pooled is of each utterance.
            args = [a.new_empty(BATCH, a.shape[1]) if a.dim() == 2 else a if a.dim() == 3 else None for a in case.args]
            yield Case(f"{model} packed", case.op, (*args, offsets), case.what)


def _out_frames(case: Case) -> int:
    if case.op.endswith("_backward"):
        return case.args[0].shape[1]
    with recording():
        out = TABLE[case.op].fn(*case.args)
    return (out[0] if isinstance(out, tuple) else out).shape[1]


def packed(dtype: torch.dtype, batch: int = BATCH) -> Iterator[Case]:
    """Ops that know boundaries, on `batch` utterances packed into as many frames as uniform ones have."""
    new = _New(dtype, batch, SAMPLES)
    heads = {"base": MODELS["base"]}
    heads |= {f"heads of {D}": replace(MODELS["base"], channels=8 * D, heads=8) for D in WIDE_HEADS}
    for name, model in heads.items():
        yield from (Case(name, *found) for found in _packed_attention(model, new))


def _packed_attention(m: Model, new: _New) -> Iterator[tuple[str, tuple, str]]:
    D, frames, longest = m.channels // m.heads, new.batch * new.frames, 2 * new.frames
    q, k, v = new(1, frames, 3, m.heads, D).unbind(2)
    gate = new(1, m.heads, frames, dtype=torch.float32)
    rel_bias = new(m.heads, 2 * longest - 1, dtype=torch.float32)
    out, offsets = new(1, frames, m.heads, D), new(new.batch + 1, dtype=torch.int32)
    yield "gated_attention", (q, k, v, gate, rel_bias, None, 0.0, None, D**-0.5, offsets), "packed"
    operands = (out, q, k, v, gate, rel_bias, None, out, gate)
    yield "gated_attention_backward", (*operands, 0.0, None, D**-0.5, offsets), "packed"


def _attention(m: Model, new: _New) -> Iterator[tuple[str, tuple, str]]:
    D = m.channels // m.heads
    q, k, v = new(new.batch, new.frames, 3, m.heads, D).unbind(2)
    gate = new(new.batch, m.heads, new.frames, dtype=torch.float32)
    rel_bias = new(m.heads, 2 * new.frames - 1, dtype=torch.float32)
    lengths = new(new.batch, dtype=torch.int64)
    out = new(new.batch, new.frames, m.heads, D)
    yield "gated_attention", (q, k, v, gate, rel_bias, lengths, 0.0, None, D**-0.5), ""
    operands = (out, q, k, v, gate, rel_bias, lengths, out, gate)
    yield "gated_attention_backward", (*operands, 0.0, None, D**-0.5), ""


def _wanted(*tensors: torch.Tensor | None) -> list[bool]:
    return [t is not None for t in tensors]


def _waveform(m: Model, new: _New) -> Iterator[tuple[str, tuple, str]]:
    waveform, weight, vector = new(new.batch, new.samples), new(512, 1, 10), new(512)
    bias = vector if m.conv_bias else None
    args = (waveform, weight, bias, 5, m.norm, vector, vector, 1e-5, "gelu")
    yield "waveform_conv", args, ""
    grad = new(new.batch, (new.samples - 10) // 5 + 1, 512)
    for first, what in ((None, ""), (waveform, TO_WAVEFORM)):
        yield "waveform_conv_backward", (grad, *args, _wanted(first, weight, bias, vector, vector)), what


def _strided(m: Model, new: _New) -> Iterator[tuple[str, tuple, str]]:
    frames = (new.samples - 10) // 5 + 1
    norm = new(512) if m.norm == "layer" else None
    bias = new(512) if m.conv_bias else None
    for kernel in KERNELS:
        x, weight, after = new(new.batch, frames, 512), new(512, 512, kernel), (frames - kernel) // 2 + 1
        out, tail = new(new.batch, after, 512), (2, norm, norm, 1e-5, "gelu")
        yield "strided_conv", (x, weight, bias, *tail, False), f"k{kernel} {frames}"
        args = (out, x, weight, bias, out, *tail, _wanted(x, weight, bias, norm, norm))
        yield "strided_conv_backward", args, f"k{kernel} {frames}"
        frames = after


def _positional(m: Model, new: _New) -> Iterator[tuple[str, tuple, str]]:
    x, weight, bias = new(new.batch, new.frames, m.channels), new(m.channels, m.channels // 16, 128), new(m.channels)
    by_taps = new(*weight.shape[::-1]).permute(2, 1, 0)  # as the module makes it when no gradient is wanted
    yield "positional_conv", (x, by_taps, bias, 16, "gelu", True, False), ""
    yield "positional_conv_backward", (x, x, weight, bias, x, 16, "gelu", True, [True] * 3), ""


def _linear(m: Model, new: _New) -> Iterator[tuple[str, tuple, str]]:
    x, weight, bias = new(new.batch, new.frames, m.channels), new(m.feed_forward, m.channels), new(m.feed_forward)
    out = new(new.batch, new.frames, m.feed_forward)
    yield "linear_act", (x, weight, bias, "gelu", False), ""
    yield "linear_act_backward", (out, x, weight, bias, out, "gelu", [True] * 3), ""


def _norm(m: Model, new: _New) -> Iterator[tuple[str, tuple, str]]:
    x, w = new(new.batch, new.frames, m.channels), new(m.channels)
    yield "add_layer_norm", (x, x, w, w, 1e-5, True), ""
    yield "add_layer_norm_backward", (x, x, x, w, 1e-5), ""


def _gate(m: Model, new: _New) -> Iterator[tuple[str, tuple, str]]:
    x, weight, bias = new(new.batch, new.frames, m.channels), new(8, m.channels // m.heads), new(8)
    grad = new(new.batch, m.heads, new.frames, dtype=torch.float32)
    yield "position_gate", (x, weight, bias, new(m.heads)), ""
    yield "position_gate_backward", (grad, x, weight, bias, new(m.heads)), ""


def _head(m: Model, new: _New) -> Iterator[tuple[str, tuple, str]]:
    frames, channels = new.frames, 512
    for width, kernel, dilation in ((512, 5, 1), (512, 3, 2), (512, 3, 3), (512, 1, 1), (1500, 1, 1)):
        x, weight, bias = new(new.batch, frames, channels), new(width, kernel * channels), new(width)
        frames -= (kernel - 1) * dilation
        out = new(new.batch, frames, width)
        yield "tdnn", (x, weight, bias, kernel, dilation, "relu"), f"k{kernel} d{dilation} {width}"
        args = (out, x, weight, bias, out, kernel, dilation, "relu", [True] * 3)
        yield "tdnn_backward", args, f"k{kernel} d{dilation} {width}"
        channels = width
    x, lengths = new(new.batch, frames, channels), new(new.batch, dtype=torch.int64)
    yield "stats_pool", (x, lengths), ""
    yield "stats_pool_backward", (new(new.batch, 2 * channels), x, lengths, new(new.batch, 2 * channels)), ""
