"""Single ops at the shapes of a model: each provider verified against float64, then timed in turn with all others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import WavLMConfig

from wavlm_fast import audio, backends, measure, memory
from wavlm_fast.errors import first_line
from wavlm_fast.parity import cases as parity_cases
from wavlm_fast.parity import plain, rule, run_ops

from ..run import flops
from ..run.cases import MODELS
from ..run.peaks import Peaks
from ..run.providers import SHORT
from ..run.rounds import Row
from .providers import OpProvider, Refusal

_INPUTS = frozenset({"waveform"})  # what no model wants a gradient of
_DEFAULT = "base"  # the model that names of cases leave out


@dataclass(frozen=True)
class OpCase:
    """One op at the shapes that it has in a model.

    Attributes:
        op: its name.
        what: the op, and which of its places in the model.
        model: one of MODELS.
        batch, length: utterances, and seconds of each.
        inputs: builds the values, the same at every call.
        operations: by the direct algorithm, as in `flops`.
        training: whether forward and backward run, as one: what one provider saves for the backward, another
            computes again.
    """

    op: str
    what: str
    model: str
    batch: int
    length: float
    inputs: parity_cases.Case
    operations: float
    training: bool = False

    @property
    def name(self) -> str:
        words = ("op", self.what, "training" * self.training, self.model * (self.model != _DEFAULT))
        return f"{' '.join(filter(None, words))} {self.batch}x{self.length:g}"

    def build(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
        """The values by name, rounded to `dtype`; those that the op wants wider are."""
        return run_ops.moved(run_ops.rounded(self.inputs, dtype), torch.device(device))


@dataclass(frozen=True)
class _Call:
    """A call of an op: what the builder of its parity cases takes, and the operations of its forward."""

    op: str
    what: str
    sizes: tuple[Any, ...]
    options: dict[str, Any]
    operations: float = 0.0
    gradients: float = 2.0  # in forwards; 0: it has no gradient


def op_cases(model: str, batch: int, length: float) -> list[OpCase]:
    """Every op of a model, forward, and where it has a gradient forward and backward.

    Args:
        model: one of MODELS.
        batch: utterances.
        length: seconds of each.

    Raises:
        ValueError: the audio is shorter than one frame.
    """
    config, samples = MODELS[model].config, int(length * audio.RATE)
    if flops.frames(config, samples)[-1] < 1:
        raise ValueError(f"{length} s of audio are shorter than one frame")
    made = []
    for call in _calls(config, batch, samples):
        inputs = parity_cases.case_of(call.op, call.what, *call.sizes, **call.options)
        if call.op == "add_layer_norm":  # of a sum that is not kept comes no gradient
            inputs = dataclasses.replace(inputs, upstream=(0, 1) if call.options["keep_sum"] else (1,))
        for training in (False, True) if call.gradients else (False,):
            operations = call.operations * (1 + call.gradients * training)
            bound = dataclasses.replace(inputs, differentiate=training)
            made.append(OpCase(call.op, call.what, model, batch, length, bound, operations, training))
    return made


def _calls(config: WavLMConfig, batch: int, samples: int) -> Iterator[_Call]:
    counted = flops.forward(config, batch, samples)
    yield from _front_end(config, batch, samples, counted)
    T, C, H = flops.frames(config, samples)[-1], config.hidden_size, config.num_attention_heads
    D, inner, layers = C // H, config.intermediate_size, config.num_hidden_layers
    yield _Call(
        "positional_conv", "positional_conv",
        (batch, T, C, config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups), {},
        counted["positional conv"],
    )  # fmt: skip
    feed_forward = ("feed-forward in", C, inner, config.hidden_act), ("feed-forward out", inner, C, "none")
    for stage, narrow, wide, act in (("qkv", C, 3 * C, "none"), *feed_forward):
        options = {"outer": wide, "act": act}
        yield _Call("linear_act", f"linear_act {stage}", (batch, T, narrow), options, counted[stage] / layers)
    stable = config.do_stable_layer_norm
    yield _Call("add_layer_norm", "add_layer_norm", (batch, T, C), {"keep_sum": stable})
    yield _Call("position_gate", "position_gate", (batch, T, H, D), {}, counted["gate"] / layers)
    attention = (batch, T, H, D), {"layout": "packed"}, counted["attention"] / layers
    yield _Call("gated_attention", "gated_attention", *attention)
    if batch > 1:
        attention[1]["lengths"] = _ragged(batch, T)
        yield _Call("gated_attention", "gated_attention ragged", *attention)
    stages = ("qkv", "gate", "attention", "out proj", "feed-forward in", "feed-forward out")
    options = {"act": config.hidden_act, "norm_first": stable}
    count = sum(counted[stage] for stage in stages) / layers
    yield _Call("encoder_layer", "encoder_layer", (batch, T, H, D, inner), options, count, 0.0)
    yield from _head(config, batch, T)


def _ragged(batch: int, frames: int) -> tuple[int, ...]:
    """Lengths from a fifth of the frames to all of them."""
    return tuple(max(1, round(frames * (0.2 + 0.8 * i / (batch - 1)))) for i in range(batch))


def _front_end(config: WavLMConfig, batch: int, samples: int, counted: Mapping[str, float]) -> Iterator[_Call]:
    norm, act, bias = config.feat_extract_norm, config.feat_extract_activation, config.conv_bias
    options = {"bias": bias, "act": act}
    layers = list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))
    first = counted["waveform conv"]
    yield _Call("waveform_conv", "waveform_conv", (batch, samples, *layers[0]), {"norm": norm, **options}, first, 1.0)
    frames = flops.frames(config, samples)
    # One of each kernel: the first, which has the most frames.
    for i in sorted({kernel: i for i, (_, kernel, _) in reversed([*enumerate(layers)][1:])}.values()):
        (inner, _, _), (outer, kernel, stride) = layers[i - 1], layers[i]
        count = 2.0 * batch * frames[i] * inner * outer * kernel
        sizes = (batch, frames[i - 1], inner, outer, kernel, stride)
        yield _Call("strided_conv", f"strided_conv k{kernel}", sizes, {"norm": norm == "layer", **options}, count)
    whole = counted["waveform conv"] + counted["feature encoder"]
    yield _Call("feature_encoder", "feature_encoder", (batch, samples, *layers), {"norm": norm, **options}, whole, 0.0)


def _head(config: WavLMConfig, batch: int, T: int) -> Iterator[_Call]:
    """Of the x-vector head the first two time-delay layers, of which one is dilated, and the pooling."""
    width, frames = config.tdnn_dim[0], T
    for outer, kernel, dilation in [*zip(config.tdnn_dim, config.tdnn_kernel, config.tdnn_dilation, strict=True)][:2]:
        after = frames - (kernel - 1) * dilation
        if after < 1:
            return
        count = 2.0 * batch * after * width * outer * kernel
        yield _Call("tdnn", f"tdnn k{kernel} d{dilation}", (batch, frames, width, outer, kernel, dilation), {}, count)
        width, frames = outer, after
    pooled = (batch, T, config.tdnn_dim[-1])
    yield _Call("stats_pool", "stats_pool", pooled, {})
    if batch > 1:
        yield _Call("stats_pool", "stats_pool ragged", pooled, {"lengths": _ragged(batch, T)})


class BoundOp:
    """A provider's op on the inputs of a case; calling it is what is timed.

    Raises:
        Refusal: the provider cannot run the op.
    """

    def __init__(self, case: OpCase, provider: OpProvider, values: dict[str, Any]) -> None:
        self._case, self._way = case, provider.make(case.op, case.training)
        tracked = {n: v for n, v in values.items() if _floating(v) and n not in _INPUTS} if case.training else {}
        self._leaves = {name: value.detach().requires_grad_() for name, value in tracked.items()}
        args = case.inputs.arrange({**values, **self._leaves})
        self.note = self._way.note(args)
        self._prepared = self._way.prepare(*args)
        tracks = [_floating(p) and p.requires_grad for p in self._prepared]
        pairs = list(zip(self._prepared, tracks, strict=True))
        self._inputs = [p.detach().requires_grad_() if tracked else p for p, tracked in pairs]
        self._wanted = [x for x, tracked in zip(self._inputs, tracks, strict=True) if tracked]
        self._sources = [p for p, tracked in pairs if tracked]
        # As after an optimizer's step: the weights count as new, and whoever packs them must pack them again.
        self._changed = [x for x, source in zip(self._wanted, self._sources, strict=True) if source.is_leaf]
        self._upstream: list[Tensor] = []

    def __call__(self) -> Any:
        """The outputs; in training the gradients of what tracks them."""
        with backends.resumed(self._way.wish):
            if self._case.training:
                return self._gradients(self._outputs())
            with torch.inference_mode():
                return self._way.function(*self._inputs)

    def result(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The outputs, and in training the gradients with respect to the values of the case, both by name."""
        if not self._case.training:
            return self._named(self()), {}
        with backends.resumed(self._way.wish):
            outputs = self._outputs()
            found = self._gradients(outputs)
        pairs = [(s, g) for s, g in zip(self._sources, found, strict=True) if g is not None]
        leaves = list(self._leaves.values())
        through = torch.autograd.grad([s for s, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
        filled = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, through, strict=True))
        return self._named(outputs), {f"d{name}": g for name, g in zip(self._leaves, filled, strict=True)}

    def _outputs(self) -> Any:
        torch.autograd.graph.increment_version(self._changed)
        return self._way.function(*self._inputs)

    def _gradients(self, outputs: Any) -> tuple[Tensor | None, ...]:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        flowing = [outputs[i] for i in self._case.inputs.upstream]
        if not self._upstream:
            made = run_ops.upstream_of(self._case.inputs, self._named(outputs), flowing[0].dtype)
            self._upstream = [g.to(o) for g, o in zip(made, flowing, strict=True)]
        return torch.autograd.grad(flowing, self._wanted, self._upstream, allow_unused=True)

    def _named(self, outputs: Any) -> dict[str, Tensor]:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(run_ops.OUTPUTS.get(self._case.op, ("out",)), outputs, strict=False))


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class Verdict:
    """The tensor that comes closest to what is allowed, or exceeds it most; errors relative to its largest value."""

    error: float
    allowed: float
    problem: str | None


class Truth:
    """What a case's results are in float64, of inputs as a dtype holds them, and how far from it they may be: twice as
    far as what transformers runs in that dtype, plus the parity rule's few roundings."""

    def __init__(self, case: OpCase, dtype: torch.dtype, device: torch.device) -> None:
        self._expected = run_ops.expect(case.inputs, dtype, device, plain.TABLE[case.op], device)

    def verdict(self, outputs: dict[str, Tensor], gradients: dict[str, Tensor]) -> Verdict:
        """Judge what a provider computed."""
        want = self._expected
        judged = [(f"the output {k}", x, want.outputs[k], want.allowed_outputs[k]) for k, x in outputs.items()]
        judged += [
            (f"the gradient of {k[1:]}", x, want.gradients[k], want.allowed_gradients[k]) for k, x in gradients.items()
        ]
        measured = [(what, rule.error_of(x, t), most, rule.magnitude(t) or 1.0) for what, x, t, most in judged]
        what, error, most, size = max(measured, key=lambda m: rule.ratio(m[1], m[2]))
        problem = None if error <= most else f"wrong: {what} is off by {error:.2e}, {most:.2e} is allowed"
        return Verdict(error / size, most / size, problem)


def run_op(
    case: OpCase,
    providers: Mapping[str, OpProvider],
    rounds: int,
    peaks: Callable[[], Peaks] | None = None,
    budget: float = math.inf,
    doing: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """Verify and time the providers of an op.

    Args:
        case: what is run.
        providers: by name, all of one device; those of other ops are passed over.
        rounds: timed runs of each.
        peaks: measures the machine's, before and after.
        budget: seconds after which no further round starts.
        doing: told of every step.

    Returns:
        A row for each provider, in their order. Whoever is wrong or refuses has the reason in `problem`, and no time.
    """
    providers = {n: p for n, p in providers.items() if p.ops is None or case.op in p.ops}
    rows = {name: _row(case, name, p) for name, p in providers.items()}
    calls: dict[str, BoundOp] = {}
    for dtype in dict.fromkeys(p.dtype for p in providers.values()):
        there = {n: p for n, p in providers.items() if p.dtype == dtype}
        doing(f"{case.name}: float64")
        device = next(iter(there.values())).device
        truth, values = Truth(case, dtype, device), case.build(dtype, device)
        for name, provider in there.items():
            doing(f"{case.name}: {name}")
            call = _verified(case, rows[name], provider, values, truth)
            if call is not None:
                calls[name] = call
    calls = {name: calls[name] for name in providers if name in calls}
    doing(f"{case.name}: timing {len(calls)} providers in turn")
    before = peaks() if peaks else None
    seconds = measure.interleave(calls, rounds, device, budget) if calls else {}
    peak = before.best(peaks()) if before else None
    for name, times in seconds.items():
        rows[name].timed(times, peak.of(providers[name].dtype) if peak else None)
    _compare(rows, providers, seconds)
    calls.clear()
    memory.give_back_freed()
    return [row.as_dict() for row in rows.values()]


def _row(case: OpCase, name: str, provider: OpProvider) -> Row:
    return Row(
        case.name, "op", case.model, case.op, case.batch, case.length,
        name, provider.family, SHORT[provider.dtype], provider.ours, None, case.operations / 1e9,
    )  # fmt: skip


def _verified(
    case: OpCase, row: Row, provider: OpProvider, values: dict[str, Any], truth: Truth
) -> BoundOp | None:
    """The provider's call, and in `row` how right it is; None, and in `row` why, if it is not to be timed."""
    try:
        call = BoundOp(case, provider, values)
        verdict = truth.verdict(*call.result())
    except (Refusal, backends.BackendUnavailable) as refusal:
        row.failed(str(refusal), wrong=False)
        return None
    except Exception as error:  # whatever a library raises at what it cannot do
        row.failed(first_line(error), wrong=provider.ours or provider.family == "torch")
        return None
    row.error, row.allowed = (size if math.isfinite(size) else None for size in (verdict.error, verdict.allowed))
    row.problem, row.wrong, row.note = verdict.problem, verdict.problem is not None, call.note
    return None if verdict.problem else call


def _compare(rows: dict[str, Row], providers: Mapping[str, OpProvider], seconds: Mapping[str, list[float]]) -> None:
    """The fastest backend of ours over the others, in the same dtype."""
    for name, times in seconds.items():
        same = [n for n in seconds if providers[n].ours and providers[n].dtype == providers[name].dtype]
        if same and not providers[name].ours:
            rows[name].ours_faster = measure.ratio(times, seconds[same[0]])
