"""An op by one provider: verified, timed, and set against what the device can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from wavlm_fast import memory

from ...ops.cases import BoundOp, OpCase, Truth
from ...ops.providers import OpProvider, op_providers
from ..torch_bytes import sizes
from .roof import Roof
from .steps import Row, Scale

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"


@dataclass(frozen=True)
class Timed:
    """What one step measures.

    Attributes:
        case: the op, at what sizes; `training` where gradients are wanted.
        checked: the same at sizes at which float64 is affordable.
        what: FORWARD, BACKWARD (gradients alone, of a forward that has been) or BOTH.
        who: runs it.
        provider: how.
        right: whether its results are those of the op; the limit that none can pass computes something else.
    """

    case: OpCase
    checked: OpCase
    what: str
    who: str
    provider: OpProvider
    right: bool = True

    def call(self) -> Callable[[], Any]:
        """What is timed."""
        bound = BoundOp(self.case, self.provider, _values(self.case, self.provider.dtype, self.provider.device))
        return bound.backward() if self.what == BACKWARD else bound

    def measured(self, scale: Scale, roof: Callable[[], Roof]) -> list[Row]:
        """One row: how right, how fast, and how near to what the device can do."""
        row: Row = {
            "op": self.case.op, "case": self.case.name, "what": self.what, "provider": self.who,
            "ours": self.provider.ours, "limit": not self.right,
        }  # fmt: skip
        try:
            row |= self._verified() if self.right else {}
            if row.get("problem") is None:
                timing = scale.time(self.call())
                shares = roof().shares(timing.median, self._bytes(), self.case.operations, self.provider.dtype)
                row |= {"seconds": timing.as_dict(), **shares}
        finally:
            memory.give_back_freed()
        return [row]

    def _verified(self) -> Row:
        dtype, device = self.provider.dtype, self.provider.device
        bound = BoundOp(self.checked, self.provider, _values(self.checked, dtype, device))
        verdict = _truth(self.checked, dtype, device).verdict(*bound.result())
        return {"error": verdict.error, "allowed": verdict.allowed, "problem": verdict.problem, "note": bound.note}

    def _bytes(self) -> int:
        """What cannot be done without: every input and output of the pass once, of both passes twice."""
        dtype, device = self.provider.dtype, self.provider.device
        values = _values(self.case, dtype, device)
        given = sizes(values)
        with torch.no_grad():
            inputs = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in values.items()}
            returned = sizes(_returned(self.case, inputs))
        passes = {FORWARD: given + returned, BACKWARD: 2 * given + 2 * returned, BOTH: 3 * given + 3 * returned}
        return passes[self.what]


def _returned(case: OpCase, inputs: dict[str, Any]) -> Any:
    from wavlm_fast.parity.run_ops import FRONTS

    return FRONTS[case.op](*case.inputs.arrange(inputs))


@lru_cache(maxsize=2)
def _values(case: OpCase, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return case.build(dtype, device)


@lru_cache(maxsize=2)
def _truth(case: OpCase, dtype: torch.dtype, device: torch.device) -> Truth:
    return Truth(case, dtype, device)


@lru_cache(maxsize=1)
def providers(scale: Scale) -> dict[str, OpProvider]:
    """By name, without dtype: those that measure speed in the scale's dtype."""
    found, absent = op_providers(scale.device)
    ending = f" {scale.short}"
    reason = absent.get(f"wavlm_fast triton{ending}")
    if reason is not None:
        raise RuntimeError(f"our kernels cannot run: {reason}")
    return {name.removesuffix(ending): provider for name, provider in found.items() if name.endswith(ending)}
