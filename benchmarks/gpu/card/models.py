"""Whole models, ours and transformers' own, eager, compiled and as a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch

from wavlm_fast import graphed, memory
from wavlm_fast.parity import rule
from wavlm_fast.parity.run_models import allowed_gradients

from ...run import cases, peers
from ...run.cases import Output, bound, bound_step, placed
from ...run.providers import BASELINE, Subject
from ...run.verify import Judge
from .parity import subject
from .steps import MODELS, Row, Scale, Step

OURS, GRAPH, THEIRS, COMPILED = "wavlm_fast", "wavlm_fast, graph", BASELINE, f"{BASELINE} + compile"
INFERENCE, TRAINING = "inference", "training step"
_CHECKED_SECONDS = 2.0
_SECONDS = {"base": 10.0, "large": 20.0}  # of one measurement
_COMPILED = {"base": 50.0, "large": 100.0}  # seconds more, twice that in training


def steps(scale: Scale) -> Iterator[Step]:
    """What need not be compiled first; of each model inference at every batch, and training at one."""
    for compiled in (False, True):
        for model in ("base", "large"):
            for what, batches in ((INFERENCE, scale.batches), (TRAINING, (scale.batch,))):
                for batch in batches:
                    yield from _steps(scale, model, what, batch, compiled)


def _steps(scale: Scale, model: str, what: str, batch: int, compiled: bool) -> Iterator[Step]:
    ways = (COMPILED,) if compiled else (OURS, GRAPH, THEIRS) if what == INFERENCE else (OURS, THEIRS)
    for who in ways:
        if who == GRAPH and scale.device.type == "cpu":
            continue
        seconds = _SECONDS[model] * (1 + batch / 16)
        seconds += _COMPILED[model] * (1 + (what == TRAINING)) if compiled else 0
        name = f"{model} {batch}x{scale.seconds:g} {what}, {_precision(scale, what)}: {who}"
        measure = _inference if what == INFERENCE else _training
        run = lambda batch=batch, who=who, measure=measure: measure(scale, model, batch, who)  # noqa: E731
        yield Step(MODELS, name, seconds, run)


def _precision(scale: Scale, what: str) -> str:
    return f"{scale.short} autocast" if what == TRAINING and scale.half != torch.float32 else scale.short


def _inference(scale: Scale, model: str, batch: int, who: str) -> list[Row]:
    there = subject(scale, model, batch, scale.seconds)
    call = _forward(there, scale, who)
    row = _row(scale, model, batch, INFERENCE, who)
    verdict = _judge(scale, model, batch).verdict(scale.half, call()[:1])
    row |= {"error": verdict.error, "allowed": verdict.allowed}
    row["problem"] = verdict.problem or (verdict.remark if row["ours"] else "") or None
    return _timed(row, scale, call)


def _forward(there: Subject, scale: Scale, who: str) -> Callable[[], Any]:
    module = there.copy(scale.half, fast=who in (OURS, GRAPH))
    if who == COMPILED:
        module = peers.compiled(module)
    if who != GRAPH:
        return bound(module, there.inputs)
    inputs = placed(module, there.inputs)
    model = graphed(module.model, inputs, clone=False)

    def call() -> Any:
        with torch.inference_mode():
            found = getattr(model(**inputs), module.output)
        if model.fallbacks:
            raise RuntimeError(f"it ran without a graph: {next(iter(model.fallbacks))}")
        return found

    return call


@lru_cache(maxsize=1)
def _judge(scale: Scale, model: str, batch: int) -> Judge:
    """Of the first utterance of a batch: none depends on the others."""
    there = subject(scale, model, batch, scale.seconds)
    alone = {name: value[:1] for name, value in there.inputs.items()}
    return Judge(
        cases.of(model, 1, scale.seconds, "latency"), Subject(there.module, alone, there.folder, 1, there.device)
    )


def _training(scale: Scale, model: str, batch: int, who: str) -> list[Row]:
    row = _row(scale, model, batch, TRAINING, who)
    if who == OURS:
        row |= _judged_gradients(scale, model)
        if row["problem"]:
            return [row]
    there = subject(scale, model, batch, scale.seconds)
    module = there.copy(torch.float32, fast=who == OURS)
    if who == COMPILED:
        module = peers.compiled(module, training=True)
    return _timed(row, scale, bound_step(module, there.inputs, scale.half))


def _judged_gradients(scale: Scale, model: str) -> Row:
    """Ours against transformers in float64 on a shorter batch; transformers under the same autocast says how near."""
    there = subject(scale, model, 1, min(_CHECKED_SECONDS, scale.seconds))
    truth = _step(there.copy(torch.float64), there, torch.float64)
    usual, found = (_step(there.copy(torch.float32, fast), there, scale.half) for fast in (False, True))
    if found.keys() != truth.keys():
        return {"problem": "wrong: other parameters have gradients than in transformers"}
    allowed = allowed_gradients(usual, truth, dict(there.module.named_parameters()), scale.half)
    errors = {name: rule.error_of(found[name], t) for name, t in truth.items()}
    worst = max(errors, key=lambda name: rule.ratio(errors[name], allowed[f"d {name}"]))
    error, most, size = errors[worst], allowed[f"d {worst}"], rule.magnitude(truth[worst]) or 1.0
    wrong = f"wrong: the gradient of {worst} is off by {error:.2e}, {most:.2e} is allowed"
    return {"error": error / size, "allowed": most / size, "problem": None if error <= most else wrong}


def _step(module: Output, there: Subject, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    found = bound_step(module, there.inputs, dtype)()
    return {name: gradient.cpu() for name, gradient in found.items()}


def _row(scale: Scale, model: str, batch: int, what: str, who: str) -> Row:
    return {
        "model": model, "batch": batch, "length": scale.seconds, "what": what, "provider": who,
        "dtype": _precision(scale, what), "ours": who in (OURS, GRAPH), "problem": None,
    }  # fmt: skip


def _timed(row: Row, scale: Scale, call: Callable[[], Any]) -> list[Row]:
    """The row with its time and the memory that it took at most; whoever is wrong has none."""
    on_gpu = scale.device.type == "cuda"
    try:
        if row["problem"] is None:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(scale.device)
            timing = scale.time(call)
            peak = torch.cuda.max_memory_allocated(scale.device) if on_gpu else None
            audio = row["batch"] * row["length"]
            row |= {"seconds": timing.as_dict(), "factor": audio / timing.median, "peak bytes": peak}
    finally:
        memory.give_back_freed()
    return [row]
