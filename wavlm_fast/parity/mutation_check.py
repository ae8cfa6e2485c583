"""Does the harness see? Every mutation must make a case fail."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import mutations, ragged_mutations, run_models, run_ops
from .cases import cases_of
from .mutations import Mutation
from .rule import FAIL

MUTATIONS = (*mutations.MUTATIONS, *ragged_mutations.MUTATIONS)
_CPU = torch.device("cpu")
# Where the mistakes in models show: the first that catches it ends the search.
_MODEL_CASES = tuple(
    run_models.ModelCase(model, form, kind)
    for model, kind in (
        ("WavLMModel", "ragged mask"),
        ("WavLMModel", "changed weights"),
        ("WavLMForXVector", "ragged mask"),
        ("WavLMForXVector", "exact batch"),
    )
    for form in run_models.FORMS
)


@dataclass(frozen=True)
class Verdict:
    """Whether a mutation was caught, and by which case."""

    mutation: str
    op: str
    caught: bool
    by: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(mutation: Mutation) -> Verdict:
    """Make the mistake and look for a failure, in float32."""
    with mutation.apply(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for result in _results(mutation):
            # A mutant that cannot even run shows nothing about the harness.
            if result.verdict == FAIL and result.error is not None:
                where = f"{result.name}, {result.case}, {result.quantity}"
                return Verdict(mutation.name, mutation.op or "model", True, where)
    return Verdict(mutation.name, mutation.op or "model", False, "")


def _results(mutation: Mutation) -> Iterator[Any]:
    if mutation.op is None:
        for case in _MODEL_CASES:
            yield from run_models.run_case(case, "reference", torch.float32, _CPU)
        return
    # Quick cases first: most mistakes show there.
    cases = (c for c in cases_of(mutation.op) if c.ragged or not mutation.ragged)
    for case in sorted(cases, key=lambda c: not c.quick):
        yield from run_ops.run_case(case, "reference", torch.float32, _CPU)


def self_test(chosen: str = "") -> Iterator[Verdict]:
    """Check the mutations with `chosen` in "op mistake" in turn.

    Raises:
        RuntimeError: the harness fails without a mutation, and so could not tell.
    """
    wanted = [m for m in MUTATIONS if chosen in f"{m.op or 'model'} {m.name}"]
    for touched in dict.fromkeys(m.op for m in wanted):
        untouched = Mutation("nothing", touched, contextlib.nullcontext)
        verdict = check(untouched)
        if verdict.caught:
            raise RuntimeError(f"without any mistake this fails: {verdict.by}")
    yield from map(check, wanted)
