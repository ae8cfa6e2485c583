"""Whether a provider is right: nothing is timed that is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wavlm_fast import accelerate, measure, use_backend
from wavlm_fast.parity import rule
from wavlm_fast.parity.run_models import allowed_gradients

from .cases import Case, Inputs, Output, bound, bound_step

_DENSE_LIMIT = 4e9  # bytes that transformers' attention weights in float64 may take
_SAME = 1e-10  # as far as our reference may be from transformers, both in float64
_CHECKED_SAMPLES = 32_000


@dataclass(frozen=True)
class Verdict:
    """Errors relative to the largest value of the truth, the sentence of a provider that is wrong, and a remark."""

    error: float
    allowed: float
    problem: str | None = None
    remark: str = ""


class Judge:
    """Knows a case's truth, and how far transformers is from it in each dtype: twice that is allowed.

    The result of a forward is its output; of a training step, the gradients by parameter.
    """

    def __init__(self, case: Case, module: Output, inputs: Inputs) -> None:
        self._case, self._module, self._inputs = case, module, inputs
        self._truth = _gradients(module, torch.float64, inputs) if case.train else _output(module, inputs)
        self._usual: dict[torch.dtype, Any] = {}

    def note(self, dtype: torch.dtype, result: Any) -> None:
        """What transformers computes in `dtype`; a judge who is not told runs it."""
        self._usual[dtype] = _kept(result)

    def verdict(self, dtype: torch.dtype, result: Any) -> Verdict:
        """Judge a provider that claims to compute in `dtype`."""
        if dtype not in self._usual:
            if self._case.train:
                self._usual[dtype] = _gradients(self._module, dtype, self._inputs)
            else:
                self._usual[dtype] = bound(self._module.copy(dtype), self._inputs)()
        usual, found = self._usual[dtype], _kept(result)
        return _of_gradients(self._module, usual, found, self._truth) if self._case.train else self._of(usual, found)

    def _of(self, usual: Tensor, found: Tensor) -> Verdict:
        named = ({"output": x} for x in (usual, found, self._truth))
        (errors,) = measure.compare(*named)
        size, problem, remark = errors.largest, None, ""
        if not errors.all.ok:
            problem = f"wrong: off by {errors.all.ours:.2e}, {errors.all.allowed:.2e} is allowed"
        elif not errors.ok:
            off, allowed = errors.ordinary.ours, errors.ordinary.allowed
            remark = (
                f"off by {off:.2e} where channels are ordinary, twice transformers' own error is {allowed:.2e} there"
            )
        return Verdict(errors.all.ours / size, errors.all.allowed / size, problem, remark)


def _kept(result: Any) -> Any:
    """A runtime may use its buffers again, and so does torch for gradients."""
    return {k: v.clone() for k, v in result.items()} if isinstance(result, dict) else torch.as_tensor(result).clone()


def _gradients(module: Output, dtype: torch.dtype, inputs: Inputs) -> dict[str, Tensor]:
    return _kept(bound_step(module.copy(dtype), inputs)())


def _output(module: Output, inputs: Inputs) -> Tensor:
    """transformers in float64; where its attention weights would not fit, our reference, once seen to be equal."""
    waveforms = inputs["input_values"]
    exact = module.copy(torch.float64)
    config = module.model.config
    frames = waveforms.shape[1] / 320
    if len(waveforms) * config.num_attention_heads * frames**2 * 4 * 8 <= _DENSE_LIMIT:
        return bound(exact, inputs)()
    short = {name: value[:1, :_CHECKED_SAMPLES] for name, value in inputs.items()}
    expected = bound(exact, short)()
    accelerate(exact)
    with use_backend("reference"):
        off = rule.error_of(bound(exact, short)(), expected) / rule.magnitude(expected)
        if not off <= _SAME:
            raise AssertionError(f"our reference in float64 is {off:.1e} from transformers: there is no truth to trust")
        return bound(exact, inputs)()


def _of_gradients(
    module: Output, usual: dict[str, Tensor], found: dict[str, Tensor], truth: dict[str, Tensor]
) -> Verdict:
    """Every parameter's gradient by the rule of the parity harness; the figures are of all of them as one vector."""
    size = max(rule.magnitude(t) for t in truth.values())
    theirs = max(rule.error_of(usual[name], t) for name, t in truth.items()) / size
    if found.keys() != truth.keys():
        return Verdict(float("inf"), 2 * theirs, "wrong: other parameters have gradients than in transformers")
    parameters = dict(module.named_parameters())
    allowed = allowed_gradients(usual, truth, parameters, next(iter(usual.values())).dtype)
    errors = {name: rule.error_of(found[name], t) for name, t in truth.items()}
    worst = max(errors, key=lambda name: rule.ratio(errors[name], allowed[f"d {name}"]))
    problem, most = None, allowed[f"d {worst}"]
    if not errors[worst] <= most:
        problem = f"wrong: the gradient of {worst} is off by {errors[worst]:.2e}, {most:.2e} is allowed"
    return Verdict(max(errors.values()) / size, 2 * theirs, problem)
