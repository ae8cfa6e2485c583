"""Whether a model is leaving eager torch: exported, traced or transformed.

What comes out goes where our ops are unknown, or is computed by rules that only plain ops have. Meanwhile fast modules
run as transformers' own, and nothing remembered is used, which a graph would hold as a constant. `torch.compile` and
`torch.export` are no such case: their graphs hold fused ops, and decompositions take them apart (`ops/_decompose.py`).
"""

from __future__ import annotations

import torch

from . import _private

_ONNX = "an ONNX export is under way"


def leaving() -> str | None:
    """Why modules have to run as transformers' own just now, a sentence; None when they need not.

    Asked by every fast module in each forward: a fraction of a microsecond.
    """
    return _leaving_compiled() if torch.compiler.is_compiling() else leaving_eager()


def leaving_eager() -> str | None:
    """The same where torch.compile traces nothing, as who asks has seen."""
    if _private.jit_state() is not None:
        return _ONNX if torch.onnx.is_in_onnx_export() else "a graph is traced by torch.jit.trace"
    if _private.in_make_fx():
        return "a graph is traced by make_fx"
    return _transformed()


def in_graph(waveforms: torch.Tensor) -> bool:
    """Whether what is computed now becomes a graph, which cannot depend on the lengths of utterances."""
    if torch.compiler.is_compiling() or leaving() is not None:
        return True
    return waveforms.is_cuda and torch.cuda.is_current_stream_capturing()


def _transformed() -> str | None:
    if _private.transform() is not None:
        return "a torch.func transform is active"
    if _private.in_forward_mode():
        return "forward-mode derivatives are computed"
    return None


def _leaving_compiled() -> str | None:
    if torch.onnx.is_in_onnx_export():
        return _ONNX
    return _transformed()


# torch.compile runs this when it traces, and takes the answer for a constant: it cannot look into torch's state itself,
# and what it has compiled is bound to that state anyway.
_leaving_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]
