"""Mistakes that the harness must see: each is made on purpose in an otherwise right backend.

A mutation replaces entries of the reference backend's table, or one function that modules call, and the cases of what
it touches must fail. Whoever adds an op or a case adds the mistakes that it is there to catch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import backends, derived
from ..families import transformers as family
from ..modules import _packing
from ..ops._define import arguments_of, schemas

_BACKEND = "reference"
Mutant = Callable[..., Any]
Make = Callable[[Mutant], Mutant]


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        name: what is done wrong.
        op: whose cases must fail; None for those of the models.
        apply: a context in which the mistake is made.
        ragged: whether those of packed frames must fail; no other cases are tried.
    """

    name: str
    op: str | None
    apply: Callable[[], contextlib.AbstractContextManager[None]]
    ragged: bool = False


@contextmanager
def replaced(op: str, make: Make, backend: str = _BACKEND) -> Iterator[None]:
    """Within the context a backend computes `op` with `make(its own function)`."""
    table = backends.load(backend).TABLE
    right = table[op]
    table[op] = replace(right, fn=make(right.fn))
    try:
        yield
    finally:
        table[op] = right


@contextmanager
def _patched(module: Any, name: str, make: Make) -> Iterator[None]:
    right = getattr(module, name)
    setattr(module, name, make(right))
    try:
        yield
    finally:
        setattr(module, name, right)


def _with(**changes: Callable[[Any], Any] | int | float | str | bool | None) -> Callable[[str], Make]:
    """A mutant that calls the right function with some arguments changed, by their names in the schema."""

    def of(op: str) -> Make:
        names = _argument_names(op)

        def make(right: Mutant) -> Mutant:
            def wrong(*args: Any) -> Any:
                values = dict(zip(names, args, strict=True))
                for name, change in changes.items():
                    values[name] = change(values) if callable(change) else change
                return right(*values.values())

            return wrong

        return make

    return of


def _argument_names(op: str) -> list[str]:
    return list(arguments_of(schemas[op]))


def _output(index: int, change: Callable[[Tensor, dict[str, Any]], Tensor]) -> Callable[[str], Make]:
    """A mutant that spoils one output of the right function."""

    def of(op: str) -> Make:
        names = _argument_names(op)

        def make(right: Mutant) -> Mutant:
            def wrong(*args: Any) -> Any:
                found = right(*args)
                values = dict(zip(names, args, strict=True))
                if isinstance(found, Tensor):
                    return change(found, values)
                return tuple(change(x, values) if i == index else x for i, x in enumerate(found))

            return wrong

        return make

    return of


def _unwritten_tail(out: Tensor, args: dict[str, Any]) -> Tensor:
    """All but the last frame of the last utterance is written to fresh memory."""
    fresh = torch.empty_like(out)
    flat, last = fresh.view(-1), out.shape[-1]
    flat[: out.numel() - last] = out.reshape(-1)[: out.numel() - last]
    return fresh


def _negated(x: Tensor, args: dict[str, Any]) -> Tensor:
    return -x


def _zeroed(x: Tensor, args: dict[str, Any]) -> Tensor:
    return torch.zeros_like(x)


def _shifted(dim: int, by: int = 1) -> Callable[[Tensor, dict[str, Any]], Tensor]:
    return lambda x, args: x.roll(by, dim)


def _no_residual(out: Tensor, args: dict[str, Any]) -> Tensor:
    return out - args["x"] if args["residual"] else out


def _lse_of_two(out: Tensor, args: dict[str, Any]) -> Tensor:
    return out / torch.log(torch.tensor(2.0, dtype=out.dtype))


def _tanh(values: dict[str, Any]) -> str:
    return "gelu_tanh" if values["activation"] == "gelu" else values["activation"]


def _of(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    """The argument `name`, changed; None stays."""
    return lambda values: None if values[name] is None else change(values[name])


def _reordered(name: str, *order: int) -> Callable[[dict[str, Any]], list]:
    """The list `name` in another order."""
    return lambda values: [values[name][i] for i in order]


def _biased_std(out: Tensor, args: dict[str, Any]) -> Tensor:
    frames = args["x"].shape[1]
    lengths = args["lengths"]
    count = torch.full(out.shape[:1], frames) if lengths is None else lengths
    mean, std = out.chunk(2, -1)
    return torch.cat((mean, std * ((count - 1) / count).sqrt().to(std.dtype)[:, None]), -1)


def _unbiased_norm(values: dict[str, Any]) -> Tensor | None:
    """Dividing the squares by n - 1 is a gain smaller by sqrt((n - 1) / n)."""
    gain, channels = values["norm_weight"], values["weight"].shape[0]
    if gain is None or values.get("norm", "layer") != "layer":
        return gain
    return gain * ((channels - 1) / channels) ** 0.5


def _unbiased_group_norm(values: dict[str, Any]) -> Tensor | None:
    gain = values["norm_weight"]
    if gain is None or values["norm"] != "group":
        return gain
    frames = (values["waveform"].shape[1] - values["weight"].shape[2]) // values["stride"] + 1
    return gain * ((frames - 1) / frames) ** 0.5 if frames > 1 else gain


def _batch_statistics(right: Mutant) -> Mutant:
    """Group norm over all utterances together: as one long utterance, whose windows happen not to overlap."""

    def wrong(waveform: Tensor, weight: Tensor, bias: Tensor | None, stride: int, norm: str, *rest: Any) -> Tensor:
        if norm != "group" or rest[-1] is not None:  # of packed frames: ragged_mutations.py
            return right(waveform, weight, bias, stride, norm, *rest)
        windows = waveform.unfold(1, weight.shape[2], stride)  # [B, T, K]
        out = right(windows.reshape(1, -1), weight, bias, weight.shape[2], norm, *rest)
        return out.view(*windows.shape[:2], -1)

    return wrong


def _positional_shift(right: Mutant) -> Mutant:
    """With an even kernel the first frame is dropped where the last is to go."""

    def wrong(x: Tensor, weight: Tensor, *rest: Any) -> Any:
        if weight.shape[2] % 2:
            return right(x, weight, *rest)
        # One tap of zeros more in front is a kernel of odd size whose centre lies one tap earlier.
        return right(x, torch.nn.functional.pad(weight, (1, 0)), *rest)

    return wrong


@contextmanager
def _gate_after_projection() -> Iterator[None]:
    """The gate from the queries instead of the attention module's input, as the paper's text suggests."""
    seen: dict[str, tuple] = {}
    gate_of = backends.load(_BACKEND).TABLE["position_gate"].fn

    def remember(right: Mutant) -> Mutant:
        def wrong(x: Tensor, *parameters: Tensor) -> Tensor:
            seen["parameters"] = parameters
            return right(x, *parameters)

        return wrong

    def use(right: Mutant) -> Mutant:
        def wrong(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *rest: Any) -> Any:
            return right(q, k, v, gate_of(q.flatten(2), *seen["parameters"]), *rest)

        return wrong

    with replaced("position_gate", remember), replaced("gated_attention", use):
        yield


def _interleaved(values: dict[str, Any]) -> Tensor:
    """Rows of the two gates alternating, where the first four belong to one and the last four to the other."""
    return values["weight"].view(2, 4, -1).transpose(0, 1).reshape(8, -1)


def _stale(right: Mutant) -> Mutant:
    return lambda source: (source.shape, source.dtype, source.device)


def _on(op: str, name: str, mutant: Callable[[str], Make]) -> Mutation:
    return Mutation(name, op.removesuffix("_backward"), lambda: replaced(op, mutant(op)))


def _made(op: str, name: str, make: Make) -> Mutation:
    return Mutation(name, op.removesuffix("_backward"), lambda: replaced(op, make))


_ATTENTION = "gated_attention"
_ATTENTION_BACKWARD = "gated_attention_backward"
MUTATIONS: tuple[Mutation, ...] = (
    _on(_ATTENTION, "gate dropped", _with(gate=lambda v: torch.ones_like(v["gate"]))),
    _on(_ATTENTION, "gate of the next frame", _with(gate=lambda v: v["gate"].roll(1, 2))),
    _on(_ATTENTION, "gate of the next head", _with(gate=lambda v: v["gate"].roll(1, 1))),
    _on(_ATTENTION, "gate of the first utterance", _with(gate=lambda v: v["gate"][:1].expand_as(v["gate"]))),
    _on(_ATTENTION, "bias dropped", _with(rel_bias=lambda v: torch.zeros_like(v["rel_bias"]))),
    _on(_ATTENTION, "bias shifted by one frame", _with(rel_bias=lambda v: v["rel_bias"].roll(1, 1))),
    _on(_ATTENTION, "bias of i - j", _with(rel_bias=lambda v: v["rel_bias"].flip(1))),
    _on(_ATTENTION, "bias of another head", _with(rel_bias=lambda v: v["rel_bias"].roll(1, 0))),
    _on(_ATTENTION, "bias scaled with the scores", _with(rel_bias=lambda v: v["rel_bias"] * v["scale"])),
    _on(_ATTENTION, "lengths ignored", _with(key_lengths=None)),
    _on(_ATTENTION, "one key too many", _with(key_lengths=_of("key_lengths", lambda x: x + 1))),
    _on(_ATTENTION, "one key too few", _with(key_lengths=_of("key_lengths", lambda x: (x - 1).clamp_min(0)))),
    _on(_ATTENTION, "no keys taken for all keys", _with(key_lengths=lambda v: None if v["key_lengths"] is None else (
        torch.where(v["key_lengths"] == 0, v["q"].shape[1], v["key_lengths"])))),
    _on(_ATTENTION, "k and v swapped", _with(k=lambda v: v["v"], v=lambda v: v["k"])),
    _on(_ATTENTION, "q and k swapped", _with(q=lambda v: v["k"], k=lambda v: v["q"])),
    _on(_ATTENTION, "scale missing", _with(scale=1.0)),
    _on(_ATTENTION, "scale always of the head dim", _with(scale=lambda v: v["q"].shape[-1] ** -0.5)),
    _on(_ATTENTION, "dropout ignored", _with(dropout_p=0.0)),
    _on(_ATTENTION, "another dropout mask", _with(seed=_of("seed", lambda x: x + 1))),
    _on(_ATTENTION, "dropout unscaled", _output(0, lambda out, v: out * (1 - v["dropout_p"]))),
    _on(_ATTENTION, "log-sum-exp to base two", _output(1, _lse_of_two)),
    _on(_ATTENTION, "strides assumed", _output(0, _shifted(1))),
    _on(_ATTENTION, "last frame unwritten", _output(0, _unwritten_tail)),
    _on(_ATTENTION_BACKWARD, "sign of dgate", _output(3, _negated)),
    _on(_ATTENTION_BACKWARD, "sign of drel_bias", _output(4, _negated)),
    _on(_ATTENTION_BACKWARD, "drel_bias shifted", _output(4, _shifted(1))),
    _on(_ATTENTION_BACKWARD, "drel_bias of one utterance", _output(4, lambda x, v: x / v["q"].shape[0])),
    _on(_ATTENTION_BACKWARD, "dgate dropped", _output(3, _zeroed)),
    _on(_ATTENTION_BACKWARD, "dq unscaled", _output(0, lambda x, v: x / v["scale"])),
    _on(_ATTENTION_BACKWARD, "dk and dv swapped", _with(k=lambda v: v["v"], v=lambda v: v["k"])),
    _on(_ATTENTION_BACKWARD, "lengths ignored", _with(key_lengths=None)),
    _on(_ATTENTION_BACKWARD, "gate dropped", _with(gate=lambda v: torch.ones_like(v["gate"]))),
    _on(_ATTENTION_BACKWARD, "dropout ignored", _with(dropout_p=0.0)),
    _on(_ATTENTION_BACKWARD, "last frame of dk unwritten", _output(1, _unwritten_tail)),
    _on("position_gate", "weights of the gates interleaved", _with(weight=_interleaved)),
    _on("position_gate", "gates swapped", _with(
        weight=lambda v: v["weight"].roll(4, 0), bias=lambda v: v["bias"].roll(4))),
    _on("position_gate", "bias dropped", _with(bias=lambda v: torch.zeros_like(v["bias"]))),
    _on("position_gate", "constant dropped", _with(const=lambda v: torch.ones_like(v["const"]))),
    _on("position_gate", "constant of another head", _with(const=lambda v: v["const"].roll(1))),
    _on("position_gate", "two forgotten", _output(0, lambda x, v: x - 2)),
    _on("position_gate", "heads and frames swapped", _output(0, lambda x, v: x.transpose(1, 2).reshape(x.shape))),
    _on("position_gate", "last frame unwritten", _output(0, _unwritten_tail)),
    _on("position_gate_backward", "sign of dconst", _output(3, _negated)),
    _on("position_gate_backward", "dweight of one row in four", _output(1, lambda x, v: x / 4)),
    _on("position_gate_backward", "dx dropped", _output(0, _zeroed)),
    _on("waveform_conv", "tanh gelu for erf gelu", _with(activation=_tanh)),
    _on("waveform_conv", "eps of 1e-6", _with(eps=1e-6)),
    _on("waveform_conv", "norm by unbiased variance", _with(norm_weight=_unbiased_norm)),
    _on("waveform_conv", "group norm by unbiased variance", _with(norm_weight=_unbiased_group_norm)),
    _made("waveform_conv", "statistics over the batch", _batch_statistics),
    _on("waveform_conv", "bias dropped", _with(bias=None)),
    _on("waveform_conv", "norm bias dropped", _with(norm_bias=None)),
    _on("waveform_conv", "taps reversed", _with(weight=lambda v: v["weight"].flip(2))),
    _on("waveform_conv", "one sample late", _with(waveform=lambda v: v["waveform"].roll(-1, 1))),
    _on("waveform_conv", "last frame unwritten", _output(0, _unwritten_tail)),
    _on("waveform_conv_backward", "sign of dwaveform", _output(0, _negated)),
    _on("waveform_conv_backward", "activation ignored", _with(activation="none")),
    _on("waveform_conv_backward", "dweight off by a thousandth", _output(1, lambda x, v: x * 1.001)),
    _on("feature_encoder", "tanh gelu for erf gelu", _with(activation=_tanh)),
    _on("feature_encoder", "eps of 1e-6", _with(eps=1e-6)),
    _on("feature_encoder", "biases dropped", _with(biases=lambda v: [])),
    _on("feature_encoder", "norm biases dropped", _with(norm_biases=lambda v: [0 * b for b in v["norm_biases"]])),
    _on("feature_encoder", "taps of all layers reversed", _with(weights=lambda v: [w.flip(2) for w in v["weights"]])),
    _on("feature_encoder", "one sample late", _with(waveform=lambda v: v["waveform"].roll(-1, 1))),
    _on("feature_encoder", "last frame unwritten", _output(0, _unwritten_tail)),
    _on("strided_conv", "tanh gelu for erf gelu", _with(activation=_tanh)),
    _on("strided_conv", "eps of 1e-6", _with(eps=1e-6)),
    _on("strided_conv", "norm by unbiased variance", _with(norm_weight=_unbiased_norm)),
    _on("strided_conv", "bias dropped", _with(bias=None)),
    _on("strided_conv", "one frame late", _with(x=lambda v: v["x"].roll(-1, 1))),
    _on("strided_conv", "taps reversed", _with(weight=lambda v: v["weight"].flip(2))),
    _on("strided_conv", "last frame unwritten", _output(0, _unwritten_tail)),
    _on("strided_conv", "wrong values kept for the backward pass", _output(1, lambda x, v: x * 1.01)),
    _on("strided_conv_backward", "sign of dx", _output(0, _negated)),
    _on("strided_conv_backward", "last frame of dx unwritten", _output(0, _unwritten_tail)),
    _on("positional_conv", "residual dropped", _output(0, _no_residual)),
    _on("positional_conv", "residual always added", _with(residual=True)),
    _made("positional_conv", "first frame dropped instead of last", _positional_shift),
    _on("positional_conv", "tanh gelu for erf gelu", _with(activation=_tanh)),
    _on("positional_conv", "bias dropped", _with(bias=None)),
    _on("positional_conv", "last frame unwritten", _output(0, _unwritten_tail)),
    _on("positional_conv_backward", "residual forgotten", _with(residual=False)),
    _on("positional_conv_backward", "dx one frame late", _output(0, _shifted(1))),
    _on("linear_act", "bias dropped", _with(bias=None)),
    _on("linear_act", "tanh gelu for erf gelu", _with(activation=_tanh)),
    _on("linear_act", "activation dropped", _with(activation="none")),
    _on("linear_act", "last row unwritten", _output(0, _unwritten_tail)),
    _on("linear_act_backward", "activation ignored", _with(activation="none")),
    _on("linear_act_backward", "sign of dbias", _output(2, _negated)),
    _on("add_layer_norm", "residual dropped", _with(residual=lambda v: torch.zeros_like(v["residual"]))),
    _on("add_layer_norm", "eps of 1e-6", _with(eps=1e-6)),
    _on("add_layer_norm", "unbiased variance", _with(
        weight=lambda v: v["weight"] * (1 - 1 / v["x"].shape[-1]) ** 0.5)),
    _on("add_layer_norm", "sum is x", _output(0, lambda out, v: v["x"].clone())),
    _on("add_layer_norm", "bias dropped", _with(bias=lambda v: torch.zeros_like(v["bias"]))),
    _on("add_layer_norm", "last row unwritten", _output(1, _unwritten_tail)),
    _on("add_layer_norm_backward", "gradient of the sum forgotten", _with(
        grad_sum=lambda v: torch.zeros_like(v["grad_sum"]))),
    _on("add_layer_norm_backward", "sign of dweight", _output(1, _negated)),
    _on("encoder_layer", "lengths ignored", _with(key_lengths=None)),
    _on("encoder_layer", "bias shifted by one frame", _with(rel_bias=lambda v: v["rel_bias"].roll(1, 1))),
    _on("encoder_layer", "queries and keys swapped", _with(weights=_reordered("weights", 1, 0, 2, 3, 4, 5))),
    _on("encoder_layer", "values taken for keys", _with(weights=_reordered("weights", 0, 2, 2, 3, 4, 5))),
    _on("encoder_layer", "biases of queries and values swapped", _with(biases=_reordered("biases", 2, 1, 0, 3, 4, 5))),
    _on("encoder_layer", "norms swapped", _with(norms=_reordered("norms", 2, 3, 0, 1))),
    _on("encoder_layer", "eps swapped", _with(eps=_reordered("eps", 1, 0))),
    _on("encoder_layer", "norms on the other side", _with(norm_first=lambda v: not v["norm_first"])),
    _on("encoder_layer", "constant of the gate dropped", _with(
        gate=lambda v: [*v["gate"][:2], torch.ones_like(v["gate"][2])])),
    _on("encoder_layer", "tanh gelu for erf gelu", _with(activation=_tanh)),
    _on("encoder_layer", "scale missing", _with(scale=1.0)),
    _on("encoder_layer", "last frame unwritten", _output(0, _unwritten_tail)),
    _on("tdnn", "dilation ignored", _output(0, lambda x, v: x.roll(v["dilation"] - 1, 1))),
    _on("tdnn", "taps innermost in the weight", _with(
        weight=lambda v: v["weight"].unflatten(1, (-1, v["kernel_size"])).transpose(1, 2).flatten(1))),
    _on("tdnn", "relu dropped", _with(activation="none")),
    _on("tdnn", "bias dropped", _with(bias=None)),
    _on("tdnn", "last frame unwritten", _output(0, _unwritten_tail)),
    _on("tdnn_backward", "relu ignored", _with(activation="none")),
    _on("tdnn_backward", "sign of dweight", _output(1, _negated)),
    _on("stats_pool", "biased deviation", _output(0, _biased_std)),
    _on("stats_pool", "lengths ignored", _with(lengths=None)),
    _on("stats_pool", "one frame too many", _with(lengths=_of("lengths", lambda x: x + 1))),
    _on("stats_pool", "deviations first", _output(0, lambda x, v: x.roll(x.shape[1] // 2, 1))),
    _on("stats_pool_backward", "lengths ignored", _with(lengths=None)),
    Mutation("gate from the projected queries", None, _gate_after_projection),
    Mutation("stale derived weights", None, lambda: _patched(derived, "_state", _stale)),
    Mutation("padding not zeroed", None, lambda: _patched(family, "zero_padding", lambda right: lambda x, mask: x)),
    Mutation("mask ignored in attention", None, lambda: replaced(_ATTENTION, _with(key_lengths=None)(_ATTENTION))),
    Mutation("bias of one frame further in all layers", None, lambda: replaced(
        _ATTENTION, _with(rel_bias=lambda v: v["rel_bias"].roll(1, 1))(_ATTENTION))),
    Mutation("second norm of a layer at another eps", None, lambda: replaced(
        "add_layer_norm", _with(eps=1e-2)("add_layer_norm"))),
    Mutation("utterances of a packed batch in another order", None, lambda: _patched(
        _packing.Packing, "padding", lambda right: lambda self, t: lambda x: right(self, t)(x).roll(1, 0))),
    Mutation("packed frames embedded as one utterance", None, lambda: _patched(
        family.FastWavLMPositionalConvEmbedding, "added_to", lambda right: lambda self, x, _=None: right(self, x))),
    Mutation("pooling over all frames", None, lambda: replaced("stats_pool", _with(lengths=None)("stats_pool"))),
)  # fmt: skip
