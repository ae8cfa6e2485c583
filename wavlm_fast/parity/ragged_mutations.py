"""Mistakes with packed frames that the harness must see: kernels that take a boundary for another, or see none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ops._define import arguments_of, schemas
from .alone import PACKED, RESIZED, around_centre, lengths_after, offsets_of
from .mutations import Make, Mutant, Mutation, replaced

Values = dict[str, Any]
# From the right function and the arguments of a call of packed frames, by name.
Wrong = Callable[[Mutant, Values], Any]

_DIFFERENTIATED = tuple(op for op in PACKED if f"{op}_backward" in schemas)


def _make(op: str, wrong: Wrong) -> Make:
    """The mistake, made with packed frames only."""
    names = list(arguments_of(schemas[op]))

    def make(right: Mutant) -> Mutant:
        def mutant(*args: Any) -> Any:
            values = dict(zip(names, args, strict=True))
            return right(*args) if values["offsets"] is None else wrong(right, values)

        return mutant

    return make


def _on(op: str, name: str, wrong: Wrong, within: str | None = None) -> Mutation:
    """A mistake in `op`, or in `within`, which the reference's `op` is made of."""
    touched = within or op
    return Mutation(name, op.removesuffix("_backward"), lambda: replaced(touched, _make(touched, wrong)), ragged=True)


def _call(right: Mutant, values: Values, **changes: Any) -> Any:
    return right(*(values | changes).values())


def _lengths(values: Values) -> list[int]:
    return values["offsets"].diff().tolist()


def _joined(parts: list[Any], dims: tuple[int, ...]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dims[0])
    return tuple(torch.cat(column, dim) for column, dim in zip(zip(*parts, strict=True), dims, strict=True))


def _boundary_shifted(op: str) -> Wrong:
    """One frame more for an utterance, one fewer for the next: two for whom the output stays of its size."""

    def wrong(right: Mutant, values: Values) -> Any:
        lengths = _lengths(values)
        most = values["rel_bias"].shape[1] // 2 + 1 if "rel_bias" in values else sum(lengths)
        frames = sum(lengths_after(op, values, lengths))
        for i in range(len(lengths) - 1):
            for by in (1, -1):
                other = list(lengths)
                other[i] += by
                other[i + 1] -= by
                out = lengths_after(op, values, other)
                if min(*other, *out) > 0 and max(other) <= most and sum(out) == frames:
                    moved = {"offsets": offsets_of(other)}
                    return _call(right, values, **moved, **({"out_offsets": offsets_of(out)} if op in RESIZED else {}))
        return _call(right, values)

    return wrong


def _end_unwritten(right: Mutant, values: Values) -> Any:
    """The last frame of the first utterance (of utterances, the first) is not written."""
    found = _call(right, values)
    out = found if isinstance(found, Tensor) else found[0]
    made = values["out_offsets"] if values.get("out_offsets") is not None else values["offsets"]
    fresh, at = torch.empty_like(out), made[1].item() - 1
    if out.dim() == 2:
        fresh[1:] = out[1:]
    else:
        fresh[:, :at], fresh[:, at + 1 :] = out[:, :at], out[:, at + 1 :]
    return fresh if isinstance(found, Tensor) else (fresh, *found[1:])


def _one_utterance(right: Mutant, values: Values) -> Any:
    """Attention over all frames as if they were one utterance's."""
    frames = int(values["offsets"][-1])
    rel_bias = values["rel_bias"]
    beyond = max(frames - 1 - rel_bias.shape[1] // 2, 0)
    wide = torch.nn.functional.pad(rel_bias[None], (beyond, beyond), mode="replicate")[0]
    found = _call(right, values, rel_bias=wide, offsets=offsets_of([frames]))
    return (*found[:4], around_centre(found[4], rel_bias.shape[1] // 2 + 1)) if "grad" in values else found


def _bias_of_the_longest(right: Mutant, values: Values) -> Any:
    """The centre is looked for where the longest utterance's would be, in a bias of more frames."""
    return _call(right, values, rel_bias=values["rel_bias"][:, : 2 * max(_lengths(values)) - 1])


# The dimension of frames of what attention takes and gives.
_FRAMES = {"grad": 1, "q": 1, "k": 1, "v": 1, "out": 1, "gate": 2, "lse": 2}


def _attention_alone(bias_of: Callable[[Tensor, int], Tensor]) -> Wrong:
    """Each utterance as a batch of its own, with this part of the bias; so dropout counts its rows within it."""

    def wrong(right: Mutant, values: Values) -> Any:
        parts = []
        for first, end in pairwise(values["offsets"].tolist()):
            present = {name: dim for name, dim in _FRAMES.items() if name in values}
            own = {name: values[name].narrow(dim, first, end - first) for name, dim in present.items()}
            parts.append(_call(right, values, **own, rel_bias=bias_of(values["rel_bias"], end - first), offsets=None))
        if "grad" not in values:
            return _joined(parts, (1, 2))
        whole = torch.zeros_like(values["rel_bias"])
        for *_, drel_bias in parts:
            around_centre(whole, (drel_bias.shape[1] + 1) // 2).add_(drel_bias)
        return *_joined([part[:-1] for part in parts], (1, 1, 1, 2)), whole

    return wrong


def _bias_from_its_start(rel_bias: Tensor, frames: int) -> Tensor:
    return rel_bias[:, : 2 * frames - 1]


def _neighbours_leak(right: Mutant, values: Values) -> Any:
    """As if there were no boundary."""
    return _call(right, values, offsets=None)


def _pooled_together(right: Mutant, values: Values) -> Tensor:
    return _call(right, values, offsets=None).expand(len(_lengths(values)), -1).contiguous()


def _statistics_together(right: Mutant, values: Values) -> Any:
    """Group norm over all utterances: as one, whose windows happen not to overlap."""
    if values["norm"] != "group":
        return _call(right, values)
    taps = values["weight"].shape[2]
    own = values["waveform"].split(_lengths(values), 1)
    windows = torch.cat([x.unfold(1, taps, values["stride"]) for x in own], 1)  # [1, N, K]
    dense = {"offsets": None, "out_offsets": None, "out_frames": None}
    return _call(right, values, waveform=windows.reshape(1, -1), stride=taps, **dense)


def _window_across(frames: str) -> Wrong:
    """The last window of every utterance but the last one takes the neighbour's first frame in."""

    def wrong(right: Mutant, values: Values) -> Any:
        found, late = _call(right, values), _call(right, values, **{frames: values[frames].roll(-1, 1)})
        ends = values["out_offsets"][1:-1].long() - 1
        pairs = [(found, late)] if isinstance(found, Tensor) else zip(found, late, strict=True)
        made = [x.index_copy(1, ends, y[:, ends]) if x.numel() else x for x, y in pairs]
        return made[0] if isinstance(found, Tensor) else tuple(made)

    return wrong


def _share_missing(index: int) -> Wrong:
    """The first utterance adds nothing to one of the gradients."""

    def wrong(right: Mutant, values: Values) -> Any:
        made = values["out_offsets"] if values.get("out_offsets") is not None else values["offsets"]
        grad = values["grad"].clone()
        grad[:, : made[1].item()] = 0
        without = _call(right, values, grad=grad)
        return tuple(without[i] if i == index else x for i, x in enumerate(_call(right, values)))

    return wrong


_ATTENTION, _POSITIONAL = "gated_attention", "positional_conv"
MUTATIONS: tuple[Mutation, ...] = (
    *(_on(op, "a boundary one frame off", _boundary_shifted(op)) for op in PACKED),
    *(_on(f"{op}_backward", "a boundary one frame off in the gradient", _boundary_shifted(op))
      for op in _DIFFERENTIATED),
    *(_on(op, "last frame of an utterance unwritten", _end_unwritten) for op in PACKED),
    _on("waveform_conv", "statistics over all utterances", _statistics_together),
    _on("feature_encoder", "statistics over all utterances", _statistics_together, within="waveform_conv"),
    _on("stats_pool", "statistics over all utterances", _pooled_together),
    _on("waveform_conv", "a window across a boundary", _window_across("waveform")),
    _on("feature_encoder", "a window across a boundary", _window_across("x"), within="strided_conv"),
    _on("strided_conv", "a window across a boundary", _window_across("x")),
    _on("tdnn", "a window across a boundary", _window_across("x")),
    _on(_POSITIONAL, "neighbours within reach of the taps", _neighbours_leak),
    _on(f"{_POSITIONAL}_backward", "neighbours within reach of the taps in the gradient", _neighbours_leak),
    _on(_ATTENTION, "keys of all utterances", _one_utterance),
    _on(f"{_ATTENTION}_backward", "keys of all utterances in the gradient", _one_utterance),
    _on("encoder_layer", "keys of all utterances", _one_utterance),
    _on(_ATTENTION, "centre of the bias at the longest utterance", _bias_of_the_longest),
    _on("encoder_layer", "centre of the bias at the longest utterance", _bias_of_the_longest),
    _on(_ATTENTION, "centre of the bias at each utterance", _attention_alone(_bias_from_its_start)),
    _on("encoder_layer", "centre of the bias at each utterance", _attention_alone(_bias_from_its_start),
        within=_ATTENTION),
    _on(_ATTENTION, "dropout's rows counted within an utterance", _attention_alone(around_centre)),
    _on(f"{_ATTENTION}_backward", "dropout's rows counted within an utterance in the gradient",
        _attention_alone(around_centre)),
    _on(f"{_ATTENTION}_backward", "an utterance's share of drel_bias missing", _share_missing(4)),
    *(_on(f"{op}_backward", "an utterance's share of dweight missing", _share_missing(1))
      for op in ("waveform_conv", "strided_conv", _POSITIONAL, "tdnn")),
    *(_on(f"{op}_backward", "an utterance's share of dbias missing", _share_missing(2))
      for op in ("waveform_conv", "strided_conv", _POSITIONAL, "tdnn")),
)  # fmt: skip
