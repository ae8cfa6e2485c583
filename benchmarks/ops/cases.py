"""Single ops at the shapes of a model: each provider verified against float64, then timed in turn with all others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wavlm_fast import audio, backends, measure, memory
from wavlm_fast.errors import first_line
from wavlm_fast.ops import OPS, Op, Place, Sizes
from wavlm_fast.parity import cases as parity_cases
from wavlm_fast.parity import plain, rule, run_ops

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


# What a model runs and nobody measures: smaller linear layers, and time-delay layers like others.
_UNMEASURED = frozenset({"linear_act projection", "linear_act out proj", "tdnn k3 d3", "tdnn k1 d1"})
# Options of cases that no place has: queries, keys and values are views of one product.
_OPTIONS: dict[str, dict[str, Any]] = {"gated_attention": {"layout": "packed"}}
_RAGGED = frozenset({"gated_attention", "stats_pool"})  # measured with lengths too
_HEAD = "x-vector head"


def op_cases(model: str, batch: int, length: float) -> list[OpCase]:
    """Every op of a model, forward, and where it has a gradient forward and backward.

    Args:
        model: one of MODELS.
        batch: utterances.
        length: seconds of each.

    Raises:
        ValueError: the audio is shorter than one frame.
    """
    sizes = Sizes.of(MODELS[model].config, batch, int(length * audio.RATE))
    if sizes.frames < 1:
        raise ValueError(f"{length} s of audio are shorter than one frame")
    made = []
    for op, what, place, options in _calls(sizes):
        inputs = parity_cases.case_of(op.name, what, *place.sizes, **options)
        if op.name == "add_layer_norm":  # of a sum that is not kept comes no gradient
            inputs = dataclasses.replace(inputs, upstream=(0, 1) if options["keep_sum"] else (1,))
        # As much for the weights' gradient as for the forward, and again for that of what comes in.
        gradients = 1 + _INPUTS.isdisjoint(op.arguments)
        for training in (False, True) if op.has_gradient else (False,):
            operations = float(op.flops(**op.at(place)) * (1 + gradients * training))
            bound = dataclasses.replace(inputs, differentiate=training)
            made.append(OpCase(op.name, what, model, batch, length, bound, operations, training))
    return made


def _calls(sizes: Sizes) -> Iterator[tuple[Op, str, Place, dict[str, Any]]]:
    """Every op where the model runs it, what it is called there, and the options of its case.

    Of places that differ only in frames the first.
    """
    seen = set(_UNMEASURED)
    for op in OPS.values():
        for place in op.places(sizes):
            what = f"{op.name} {place.what}".rstrip()
            if what in seen or (place.stage == _HEAD and not _has_head(sizes)):
                continue
            seen.add(what)
            if op.name == "stats_pool":  # of short audio time-delay layers leave little to pool: over all frames
                place = dataclasses.replace(place, sizes=(sizes.batch, sizes.frames, *place.sizes[2:]))
            options = {**place.options, **_OPTIONS.get(op.name, {})}
            yield op, what, place, options
            if sizes.batch > 1 and op.name in _RAGGED:
                yield op, f"{what} ragged", place, {**options, "lengths": _ragged(sizes.batch, sizes.frames)}


def _has_head(sizes: Sizes) -> bool:
    """Whether the time-delay layers that are measured have frames."""
    op = OPS["tdnn"]
    return all(op.flops(**op.at(p)) > 0 for p in op.places(sizes) if f"tdnn {p.what}" not in _UNMEASURED)


def _ragged(batch: int, frames: int) -> tuple[int, ...]:
    """Lengths from a fifth of the frames to all of them."""
    return tuple(max(1, round(frames * (0.2 + 0.8 * i / (batch - 1)))) for i in range(batch))


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
        self._run = self._way.bound(self._inputs)
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
                return self._run()

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

    def backward(self) -> Callable[[], Any]:
        """The gradients alone, again and again, of one forward."""
        with backends.resumed(self._way.wish):
            outputs = self._outputs()

        def call() -> Any:
            with backends.resumed(self._way.wish):
                return self._gradients(outputs, again=True)

        return call

    def _outputs(self) -> Any:
        torch.autograd.graph.increment_version(self._changed)
        return self._run()

    def _gradients(self, outputs: Any, again: bool = False) -> tuple[Tensor | None, ...]:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        flowing = [outputs[i] for i in self._case.inputs.upstream]
        if not self._upstream:
            made = run_ops.upstream_of(self._case.inputs, self._named(outputs), flowing[0].dtype)
            self._upstream = [g.to(o) for g, o in zip(made, flowing, strict=True)]
        return torch.autograd.grad(flowing, self._wanted, self._upstream, retain_graph=again, allow_unused=True)

    def _named(self, outputs: Any) -> dict[str, Tensor]:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(OPS[self._case.op].outputs, outputs, strict=False))


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
