"""Is what runs on this device right? Every op, then tiny models, then models of the published sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from wavlm_fast import use_backend
from wavlm_fast.backends import load
from wavlm_fast.ops import OPS
from wavlm_fast.parity import run_models, run_ops
from wavlm_fast.parity.cases import Case, cases_of
from wavlm_fast.parity.rule import FAIL, PASS, Result, dtype_name

from ...run import cases
from ...run.cases import bound, bound_step
from ...run.providers import Subject
from ...run.verify import Judge
from .steps import PARITY, Row, Scale, Step

BACKEND = "triton"
_CHECKED_SECONDS = 2.0


def steps(scale: Scale) -> Iterator[Step]:
    """A case of each op, then models, real ones first, then the other cases: who is cut short has seen everything."""
    first, *others = _rounds(scale)
    quick, models = run_models.cases(quick=True), run_models.cases()
    yield from _of_ops(scale, first)
    shortest = [case for case in models if case.input == "shortest"]
    yield from _real_models(scale)
    yield from _tiny_models(scale, shortest[:1] if scale.tiny else quick)
    if scale.tiny:
        return
    for chosen in others:
        yield from _of_ops(scale, chosen)
    yield from _tiny_models(scale, [case for case in models if case not in quick])


def _rounds(scale: Scale) -> list[list[Case]]:
    """The cases of all ops that have kernels: first one of each, then another of each, quick ones before others."""
    kernels = [op for op in OPS if op in load(BACKEND).TABLE]
    each = [sorted(cases_of(op), key=lambda case: not case.quick) for op in kernels]
    return [[case for case in chosen if case is not None] for chosen in zip_longest(*each)]


def _of_ops(scale: Scale, chosen: list[Case]) -> Iterator[Step]:
    for case in chosen:
        for dtype in scale.dtypes:
            name = f"parity of {case.op}, {case.name}, {dtype_name(dtype)}"
            yield Step(PARITY, name, 6, lambda case=case, dtype=dtype: _judged(run_ops, case, dtype, scale))


def _tiny_models(scale: Scale, chosen: Any) -> Iterator[Step]:
    for case in chosen:
        for dtype in scale.dtypes_of_models:
            name = f"parity of a tiny {case.model}, {case.name}, {dtype_name(dtype)}"
            yield Step(PARITY, name, 15, lambda case=case, dtype=dtype: _judged(run_models, case, dtype, scale))


def _judged(harness: Any, case: Any, dtype: torch.dtype, scale: Scale) -> list[Row]:
    with exactly():
        return [result.as_dict() for result in harness.run_case(case, BACKEND, dtype, scale.device)]


def _real_models(scale: Scale) -> Iterator[Step]:
    for model in ("base", "large"):
        for dtype in scale.dtypes_of_models:
            name = f"parity of {model}, forward and gradients, {dtype_name(dtype)}"
            yield Step(PARITY, name, 30, lambda model=model, dtype=dtype: _real(scale, model, dtype))


def _real(scale: Scale, model: str, dtype: torch.dtype) -> list[Row]:
    """Forward and gradients of a model of a published size, against transformers in float64 on the same device."""
    rows = []
    there = subject(scale, model, 2, min(_CHECKED_SECONDS, scale.seconds))
    with exactly():
        for quantity, train in (("forward", False), ("gradient", True)):
            with use_backend(BACKEND):
                fast = there.copy(dtype, fast=True)
                call = bound_step(fast, there.inputs, dtype) if train else bound(fast, there.inputs)
                found = call()
            verdict = judge(scale, model, train).verdict(dtype, found)
            case = f"2 x {min(_CHECKED_SECONDS, scale.seconds):g} s"
            problem = verdict.problem or verdict.remark or ""
            rows.append(Result(
                "model", model, quantity, BACKEND, dtype_name(dtype), case, "", verdict.error, verdict.allowed,
                FAIL if problem else PASS, problem,
            ).as_dict())  # fmt: skip
    return rows


@lru_cache(maxsize=2)
def judge(scale: Scale, model: str, train: bool) -> Judge:
    """Who knows the truth of a model on the inputs of its parity."""
    seconds = min(_CHECKED_SECONDS, scale.seconds)
    case = replace(cases.of(model, 2, seconds, "parity"), train=train)
    return Judge(case, subject(scale, model, 2, seconds))


def subject(scale: Scale, model: str, batch: int, seconds: float) -> Subject:
    """The model on the device, in float32, and noise of seeded loudness for it to hear: nobody need read audio."""
    generator = torch.Generator().manual_seed(batch)
    waveform = torch.randn(batch, int(seconds * 16_000), generator=generator)
    waveform *= torch.linspace(0.3, 1.5, batch)[:, None]
    return Subject(built(scale, model), {"input_values": waveform.to(scale.device)}, Path(), 1, str(scale.device))


@lru_cache(maxsize=1)
def built(scale: Scale, model: str) -> cases.Output:
    """transformers' own, with sensitive weights."""
    return cases.Output.of(model).to(scale.device)


@contextmanager
def exactly() -> Iterator[None]:
    """Errors of float32 are those of float32, whatever the convolutions of a release do by themselves."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    try:
        yield
    finally:
        for setting, allowed in zip(settings, before, strict=True):
            setting.allow_tf32 = allowed
