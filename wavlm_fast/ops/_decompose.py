"""How an exported program takes an op apart.

`ExportedProgram.run_decompositions`, and so each exporter that starts from a program (ONNX, OpenVINO, ExecuTorch), asks
for what torch calls composite implicit kernels. Each of our ops has one, its reference, and so stands in
`torch.export.default_decompositions()`; whoever wants to keep an op deletes it there. Everybody else (torch.compile,
torch.export itself, AOTInductor) would take such an op apart as well, unasked: to them it has none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .. import _private


def decomposes(op: Any, into: Callable[..., Any], names: list[str]) -> None:
    """Let `op`, with arguments of these names, become `into(*args)`, plain torch, where a program is decomposed, and
    nowhere else.
    """
    if _private.COMPOSITE is None or _private.LAID_OVER is None or not hasattr(op, "py_impl"):
        return

    def asked() -> bool:
        return _private.LAID_OVER in op.py_kernels  # torch's own, which it lays over the op for that time

    def decomposition(*args: Any, **kwargs: Any) -> Any:
        if asked():
            return into(*args, *(kwargs[n] for n in names[len(args) :]))
        _withdraw(op)
        return NotImplemented

    op.py_impl(_private.COMPOSITE)(decomposition)
    op._can_decompose = asked  # else torch.export warns that it keeps an op which it could take apart


def _withdraw(op: Callable[..., Any]) -> None:
    """Take `op` out of inductor's tables, which begin as a copy of the default decompositions.

    Inductor fails on an op that stands there and yet reaches it whole. On the way there, every op is asked to come
    apart.
    """
    inductor = sys.modules.get("torch._inductor.decomposition")
    if inductor is not None:
        for table in (inductor.decompositions, inductor.fast_random_decomps()):
            table.pop(op, None)
