"""How an exported program takes an op apart.

`ExportedProgram.run_decompositions`, and so each exporter that starts from a program (ONNX, OpenVINO, ExecuTorch), asks
for what torch calls composite implicit kernels. Each of our ops has one, its reference, and so stands in
`torch.export.default_decompositions()`; whoever wants to keep an op deletes it there. Everybody else (torch.compile,
torch.export itself, AOTInductor) would take such an op apart as well, unasked: to them it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import _private


def decomposes(op: Any, names: Sequence[str], into: Callable[..., Any]) -> None:
    """Let an op with arguments of these names become `into(*args)` where a program is decomposed, and only there."""

    def decomposition(*args: Any, **kwargs: Any) -> Any:
        if _private.is_decomposed(op):
            return into(*args, *(kwargs.get(n) for n in names[len(args) :]))
        # Inductor's tables begin as a copy of the default decompositions. It fails on an op that stands there and yet
        # reaches it whole; on the way there, every op is asked to come apart.
        for table in _private.inductor_tables():
            table.pop(op, None)
        return NotImplemented

    _private.decompose_by(op, decomposition)
