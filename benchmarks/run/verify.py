"""Whether a provider is right: nothing is timed that is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import WavLMConfig

from wavlm_fast import accelerate, measure, use_backend
from wavlm_fast.parity import rule
from wavlm_fast.parity.run_models import allowed_gradients

from . import flops
from .cases import MODELS, Case, Inputs, Output, Spec, bound, bound_step, trained_in
from .providers import Subject
from .regimes import REGIMES

_DENSE_LIMIT = 8e9  # bytes that transformers' attention weights may take
_EXACT_LIMIT = 2e12  # operations that a truth in float64 may take
_SAME = 1e-10  # as far as our reference may be from transformers, both in float64
_CHECKED_SAMPLES = 32_000
_NARROW = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256,
           "conv_dim": (64,) * 7}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Errors relative to the largest value of the truth, the sentence of a provider that is wrong, and a remark."""

    error: float
    allowed: float
    problem: str | None = None
    remark: str = ""


def affordable(case: Case, truths: int = 1) -> bool:
    """Whether float64 gets through a case, so many times, in a minute or so."""
    return truths * sum(case.operations().values()) <= _EXACT_LIMIT


def narrow(case: Case, subject: Subject) -> tuple[Case, Subject]:
    """The same utterances through a model of few channels and layers, for which float64 is affordable.

    What a length can break is broken there too: an index, a tile at the end, a bias far from the diagonal.
    """
    name = f"{case.model}, narrow"
    spec = MODELS[case.model]
    MODELS[name] = Spec(spec.cls, {**spec.config.to_diff_dict(), **_NARROW}, spec.output)
    return replace(case, model=name), replace(subject, module=Output.of(name), folder=subject.folder / "narrow")


class Judge:
    """Knows a case's truth, and how far transformers is from it in each dtype: twice that is allowed.

    The result of a forward is its output; of a training step, the gradients by parameter; of a regime, what it gives.
    """

    def __init__(self, case: Case, subject: Subject) -> None:
        self._case, self._module, self._inputs = case, subject.module, subject.inputs
        self._truth = self._plain(torch.float64)
        self._usual: dict[torch.dtype, Any] = {}

    def note(self, dtype: torch.dtype, result: Any) -> None:
        """What transformers computes in `dtype`; a judge who is not told runs it."""
        self._usual[dtype] = _kept(result)

    def verdict(self, dtype: torch.dtype, result: Any) -> Verdict:
        """Judge a provider that claims to compute in `dtype`."""
        if dtype not in self._usual:
            self._usual[dtype] = self._plain(dtype)
        usual, found = self._usual[dtype], _kept(result)
        if self._case.train:
            return _of_gradients(self._module, dtype, usual, found, self._truth)
        return verdict_on(usual, found, self._truth)

    def _plain(self, dtype: torch.dtype) -> Any:
        if self._case.train:
            return _gradients(self._module, dtype, self._inputs)
        if self._case.regime:
            # float64 stays what it is under autocast too.
            return _kept(REGIMES[self._case.regime](self._module.copy(dtype), self._inputs)())
        return _output(self._module, dtype, self._inputs)


def verdict_on(usual: Tensor, found: Tensor, truth: Tensor) -> Verdict:
    """Judge an output by the truth and what transformers computes in the same dtype."""
    named = ({"output": x} for x in (usual, found, truth))
    (errors,) = measure.compare(*named)
    size, problem, remark = errors.largest, None, ""
    if not errors.all.ok:
        problem = f"wrong: off by {errors.all.ours:.2e}, {errors.all.allowed:.2e} is allowed"
    elif not errors.ok:
        off, allowed = errors.ordinary.ours, errors.ordinary.allowed
        remark = f"off by {off:.2e} where channels are ordinary, twice transformers' own error is {allowed:.2e} there"
    return Verdict(errors.all.ours / size, errors.all.allowed / size, problem, remark)


def _kept(result: Any) -> Any:
    """On the CPU; a runtime may use its buffers again, and so does torch for gradients."""
    if isinstance(result, dict):
        return {name: value.detach().cpu().clone() for name, value in result.items()}
    return torch.as_tensor(result).cpu().clone()


def _gradients(module: Output, dtype: torch.dtype, inputs: Inputs) -> dict[str, Tensor]:
    return _kept(bound_step(module.copy(trained_in(dtype)), inputs, dtype)())


def _output(module: Output, dtype: torch.dtype, inputs: Inputs) -> Tensor:
    """transformers in `dtype`; where its attention weights would not fit, our reference, once seen to be equal."""
    plain = module.copy(dtype)
    if dense_bytes(module.model.config, inputs["input_values"], dtype) <= _DENSE_LIMIT:
        return bound(plain, inputs)()
    short = {name: value[:1, :_CHECKED_SAMPLES] for name, value in inputs.items()}
    exact = module.copy(torch.float64)
    expected = bound(exact, short)()
    with use_backend("reference"):
        off = rule.error_of(bound(accelerate(exact), short)(), expected) / rule.magnitude(expected)
        if not off <= _SAME:
            raise AssertionError(f"our reference in float64 is {off:.1e} from transformers: there is no truth to trust")
        return bound(accelerate(plain), inputs)()


def dense_bytes(config: WavLMConfig, waveforms: Tensor, dtype: torch.dtype) -> float:
    """About what attention takes where its weights exist as a whole: scores, bias, weights and a copy."""
    frames = flops.frames(config, waveforms.shape[1])[-1]
    return 4.0 * len(waveforms) * config.num_attention_heads * frames**2 * dtype.itemsize


def _of_gradients(
    module: Output,
    dtype: torch.dtype,
    usual: dict[str, Tensor],
    found: dict[str, Tensor],
    truth: dict[str, Tensor],
) -> Verdict:
    """Every parameter's gradient by the rule of the parity harness; the figures are of all of them as one vector."""
    size = max(rule.magnitude(t) for t in truth.values())
    theirs = max(rule.error_of(usual[name], t) for name, t in truth.items()) / size
    if found.keys() != truth.keys():
        return Verdict(float("inf"), 2 * theirs, "wrong: other parameters have gradients than in transformers")
    parameters = dict(module.named_parameters())
    allowed = allowed_gradients(usual, truth, parameters, dtype)
    errors = {name: rule.error_of(found[name], t) for name, t in truth.items()}
    worst = max(errors, key=lambda name: rule.ratio(errors[name], allowed[f"d {name}"]))
    problem, most = None, allowed[f"d {worst}"]
    if not errors[worst] <= most:
        problem = f"wrong: the gradient of {worst} is off by {errors[worst]:.2e}, {most:.2e} is allowed"
    return Verdict(max(errors.values()) / size, 2 * theirs, problem)
