"""What runs where in a model, and why not faster."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.wavlm import modeling_wavlm as hf

from . import _private, backends, derived, families
from .families.models import Model
from .modules import Signal, Step, steps_of
from .modules._originals import StandIn
from .packed_batch import why_alone
from .padding import asks_for_attentions, mode_of
from .swap import FAST_CLASSES


@dataclass(frozen=True)
class Row:
    """One op as `count` places of the model run it: on a backend, or by calling torch's own modules ("modules")."""

    op: str
    backend: str
    count: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What runs where; `str()` of it is a table.

    `derived_bytes` is the memory of packed and merged weights at this moment, `slow_modules` counts WavLM modules by
    class that `accelerate` has not or could not make fast. `missing` says what is lost because torch or transformers
    are not quite as expected. `padding` is what padding means to the model, and `alone` why utterances of exact batches
    and of `forward_ragged` run one at a time, None when they need not. `arithmetic` says so where the CPU multiplies
    bfloat16 as float32 or has units for it, and which products those do.
    """

    rows: tuple[Row, ...]
    backend: str
    device: str
    dtype: str
    derived_bytes: int
    slow_modules: dict[str, int]
    missing: tuple[str, ...] = ()
    padding: str = "transformers"
    alone: str | None = None
    arithmetic: str | None = None

    def __str__(self) -> str:
        width = max((len(r.op) for r in self.rows), default=2)
        lines = [
            f"backend {self.backend!r} on {self.device} in {self.dtype}; "
            f"derived weights take {self.derived_bytes / 2**20:.1f} MiB",
            f"{'op':<{width}}  times  runs on    why not faster",
        ]
        lines += [
            f"{r.op:<{width}}  {r.count:>5}  {r.backend:<9}  {'; '.join(r.reasons) or 'nothing is'}" for r in self.rows
        ]
        if self.padding == "exact":
            how = "packed" if self.alone is None else f"one at a time: {self.alone}"
            lines.append(f"padding is 'exact': utterances of different lengths run {how}")
        lines += [self.arithmetic] if self.arithmetic else []
        lines += [f"{count} × {name} is not a class we stand in for" for name, count in self.slow_modules.items()]
        return "\n".join([*lines, *self.missing])


def report(model: nn.Module) -> Report:
    """Say for every op of a model which backend runs it now, and why not a faster one.

    Nothing is run; the answer is for the model's present device, dtype and mode (gradients while it trains), the
    backend wished for in this thread, and ten seconds of audio.

    Args:
        model: an accelerated WavLM, or any module that contains one. Modules that are not fast are counted.

    Returns:
        A `Report`; `print` shows it as a table.

    Raises:
        TypeError: `model` is no torch module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report wants a torch module, got a {type(model).__name__}")
    counts: Counter[tuple] = Counter()
    with _private.without_memory(), derived.remembering_nothing(), torch.set_grad_enabled(model.training):
        for step in steps_of(model, Signal()):
            counts.update(_rows(step))
    slow = Counter(type(m).__name__ for m in model.modules() if isinstance(m, tuple(FAST_CLASSES)) and not _is_fast(m))
    for module, _, reason in families.stand_ins(model):
        slow[type(module).__name__] += 1
        if reason is not None:
            counts[type(module).__name__, "modules", (reason,)] += 1
    first = next(model.parameters(), torch.empty(0))
    wavlm = next((m for m in model.modules() if isinstance(m, (hf.WavLMPreTrainedModel, Model))), None)
    on_cpu = first.device.type == "cpu" and first.dtype == torch.bfloat16
    padding = "transformers" if wavlm is None else mode_of(wavlm)
    return Report(
        rows=tuple(Row(op, backend, count, reasons) for (op, backend, reasons), count in counts.items()),
        backend=backends.current(),
        device=str(first.device),
        dtype=str(first.dtype).removeprefix("torch."),
        derived_bytes=derived.nbytes(model.parameters()),
        slow_modules=dict(slow),
        missing=_private.missing(),
        padding=padding,
        alone=_why_alone(wavlm) if isinstance(wavlm, StandIn) else None,
        arithmetic=backends.load("cpu").arithmetic() if on_cpu else None,
    )


def _why_alone(wavlm: nn.Module) -> str | None:
    return wavlm.why_alone() if isinstance(wavlm, Model) else why_alone(wavlm, asks_for_attentions(wavlm, {}))


def _is_fast(module: nn.Module) -> bool:
    return isinstance(module, tuple(FAST_CLASSES.values()))


def _rows(step: Step) -> list[tuple[str, str, tuple[str, ...]]]:
    """What runs in a step, with the reasons why nothing faster does: one op, or those that it is made of here."""
    if step.refusal is not None:
        return [(step.op, "modules", (step.refusal,))]
    with backends.noting() as noted:
        try:
            step.fused()
        except Exception as error:  # so would the forward
            return [(step.op, "none", (str(error).partition("\n")[0],))]
    return [(op, choice.backend, tuple(reason for _, reason in choice.refused)) for op, choice in noted]
