"""The ops that WavLM runs on a GPU, at the shapes of the base and the large model, and the launches that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from wavlm_fast.backends.triton import TABLE
from wavlm_fast.ops import OPS, Op, Place, Sizes, empty
from wavlm_fast.ops._define import arguments_of, schemas

from ..run.cases import MODELS as SPECS
from .compile import Launch, record

BATCH, SAMPLES = 8, 160_000  # 8 utterances of 10 s at 16 kHz
TO_WAVEFORM = "waveform too"  # the case in which the waveform's own gradient is wanted, which training does not
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODELS = {name: Sizes.of(SPECS[name].config, BATCH, SAMPLES) for name in ("base", "large")}
FRAMES = MODELS["base"].frames
# The models' heads have 64 channels. These fill a tile of 128, and leave some of it empty.
WIDE_HEADS = (128, 80)

_ORDER = ("gated_attention", "waveform_conv", "strided_conv", "positional_conv", "linear_act", "add_layer_norm",
          "position_gate", "tdnn", "stats_pool")  # fmt: skip
_PACKED_STAGES = ("waveform_conv", "strided_conv", "positional_conv", "tdnn", "stats_pool")
# Linear layers that have no activation, and are torch's.
TORCHS = frozenset({"projection", "qkv", "out proj", "feed-forward out"})
# Options beside those of a place: what takes lengths is given some.
_OPTIONS: dict[str, dict[str, Any]] = {
    "add_layer_norm": {"keep_sum": True},
    "gated_attention": {"lengths": True},
    "stats_pool": {"lengths": True},
}
# What tells the places of an op apart.
_WHAT: dict[str, Callable[[Place], str]] = {
    "strided_conv": lambda place: f"{place.what} {place.sizes[1]}",
    "tdnn": lambda place: f"{place.what} {place.sizes[3]}",
}
_PACKING = ("offsets", "out_offsets", "out_frames")


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


def cases(
    model: str, dtype: torch.dtype, backward: bool = True, batch: int = BATCH, samples: int = SAMPLES
) -> Iterator[Case]:
    """All ops of a model, forward and backward; an op that several layers share is there once."""
    sizes = replace(MODELS[model], batch=batch, samples=samples)
    for op in map(OPS.get, _ORDER):
        for place, what in _places(op, sizes):
            arguments = _arguments(op, dtype, op.at(place, **_OPTIONS.get(op.name, {})))
            yield from _calls(model, op, arguments, what, backward)


def wide_heads(dtype: torch.dtype, batch: int = BATCH) -> Iterator[Case]:
    """Attention with each of WIDE_HEADS, forward and backward."""
    op = OPS["gated_attention"]
    for D in WIDE_HEADS:
        arguments = _arguments(op, dtype, op.example(batch, FRAMES, 8, D, lengths=True))
        yield from _calls(f"heads of {D}", op, arguments)


def packed_stages(model: str, dtype: torch.dtype) -> Iterator[Case]:
    """What makes fewer of packed frames, forward and backward, on BATCH utterances one behind the other."""
    offsets = torch.empty(BATCH + 1, dtype=torch.int32, device="meta")
    sizes = replace(MODELS[model], batch=1, samples=BATCH * SAMPLES)
    for op in map(OPS.get, _PACKED_STAGES):
        for place, what in _places(op, sizes):
            arguments = _arguments(op, dtype, op.at(place))
            packing = {"offsets": offsets}
            if op.is_resizing:
                packing |= {"out_offsets": offsets, "out_frames": _outputs(op, arguments)[0].shape[1]}
            yield from _calls(f"{model} packed", op, arguments | packing, what)


def packed(dtype: torch.dtype, batch: int = BATCH) -> Iterator[Case]:
    """Ops that know boundaries, on `batch` utterances packed into as many frames as uniform ones have."""
    op, offsets = OPS["gated_attention"], torch.empty(batch + 1, dtype=torch.int32, device="meta")
    heads = {"base": (MODELS["base"].heads, MODELS["base"].width)} | {f"heads of {D}": (8, D) for D in WIDE_HEADS}
    for name, (H, D) in heads.items():
        longest = op.example(1, 2 * FRAMES, H, D)
        example = {**op.example(1, batch * FRAMES, H, D), "rel_bias": longest["rel_bias"]}
        yield from _calls(name, op, _arguments(op, dtype, example) | {"offsets": offsets}, "packed")


def _places(op: Op, sizes: Sizes) -> Iterator[tuple[Place, str]]:
    """Where kernels of ours run, and what is said of it."""
    for place in op.places(sizes):
        if place.what not in TORCHS:
            yield place, _WHAT.get(op.name, lambda place: "")(place)


def _arguments(op: Op, dtype: torch.dtype, example: dict[str, Any]) -> dict[str, Any]:
    """The example's arguments without memory: queries, keys and values as views of one product."""
    made = empty(example, dtype, "meta")
    if op.name == "gated_attention":
        q = made["q"]
        made |= zip("qkv", q.new_empty(*q.shape[:2], 3, *q.shape[2:]).unbind(2), strict=True)
    return made


def _outputs(op: Op, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """What a forward returns that is to have a gradient."""
    found = getattr(torch.ops.wavlm_fast, op.name)(*op.for_schema(arguments, save=True))
    return found if isinstance(found, tuple) else (found,)


def _calls(
    model: str, op: Op, arguments: dict[str, Any], what: str = "", backward: bool = True
) -> Iterator[Case]:
    """The forward, and what may follow it."""
    forward = arguments
    if op.name == "positional_conv":  # as the module makes it when no gradient is wanted
        weight = arguments["weight"]
        forward = {**arguments, "weight": weight.new_empty(weight.shape[::-1]).permute(2, 1, 0)}
    yield Case(model, op.name, _in_order(op.name, {"save": False, **forward}), what)
    if not backward:
        return
    name, given = f"{op.name}_backward", _given_backward(op, arguments)
    for first in (False, True) if "waveform" in arguments else (True,):
        gradients = schemas[name].partition("->")[2].count("Tensor")
        wanted = [first, *(arguments[a] is not None for a in tensors(op)[1:gradients])]
        also = TO_WAVEFORM if first and "waveform" in arguments else what
        yield Case(model, name, _in_order(name, {**given, "wanted": wanted}), also)


def _given_backward(op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
    """The forward's arguments, what it returns, and gradients of that, by their names in the backward's schema."""
    takes = [a for a in arguments_of(schemas[f"{op.name}_backward"]) if a not in (*arguments, *_PACKING, "wanted")]
    grads = [a for a in takes if a.startswith("grad")]
    returned = (*op.outputs, *(a for a in takes if a not in (*op.outputs, *grads)))
    made = dict(zip(returned, _outputs(op, arguments), strict=True))
    return {**arguments, **made, **{a: made.get(a.removeprefix("grad_"), made[returned[0]]) for a in grads}}


def tensors(op: Op) -> list[str]:
    """The arguments of a dense batch that may have gradients."""
    return [a for a, kind in op.arguments.items() if kind in ("Tensor", "Tensor?") and a not in _PACKING]


def _in_order(op: str, given: dict[str, Any]) -> tuple[Any, ...]:
    """As the schema has them, those of packed frames only where they are given."""
    return tuple(given.get(name) for name in arguments_of(schemas[op]) if name in given or name not in _PACKING)
