"""The front end's convolutions and the positional one, against torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...ops.cases import op_cases
from .roof import Roof
from .steps import STAGES, Scale, Step
from .timed import BOTH, FORWARD, Timed, providers

OPS = ("waveform_conv", "strided_conv", "positional_conv")
OURS, THEIRS, COMPILED = "wavlm_fast triton", "torch", "torch + compile"


def steps(scale: Scale, roof: Callable[[], Roof]) -> Iterator[Step]:
    """Both models' at their batch, ours beside torch's; compiled ones after all others."""
    for who in ((OURS, THEIRS), (COMPILED,)):
        for model in ("base", "large"):
            for timed in _of_model(scale, model, who):
                name = f"{timed.case.name}, {timed.what}, {scale.short}: {timed.who}"
                seconds = 40.0 if timed.who == COMPILED else 15.0
                run = lambda timed=timed: timed.measured(scale, roof)  # noqa: E731
                yield Step(STAGES, name, seconds, run, timed.call if timed.who == OURS else None)


def _of_model(scale: Scale, model: str, who: tuple[str, ...]) -> Iterator[Timed]:
    large = {case.name: case for case in op_cases(model, scale.batch, scale.seconds) if case.op in OPS}
    small = [case for case in op_cases(model, 1, scale.seconds) if case.op in OPS]
    for case, checked in zip(large.values(), small, strict=True):
        for name in who:
            yield Timed(case, checked, BOTH if case.training else FORWARD, name, providers(scale)[name])
