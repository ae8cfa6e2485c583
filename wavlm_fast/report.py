"""What runs where in a model, and why not faster."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.wavlm import modeling_wavlm as hf

from . import _private, backends, derived
from .modules import TWINS, FastModule, Plan
from .modules._originals import StandIn, why_original
from .packed_batch import why_alone
from .padding import asks_for_attentions, mode_of


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
    and of `forward_ragged` run one at a time, None when they need not.
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
        lines += [f"{count} × {name} is not a class we stand in for" for name, count in self.slow_modules.items()]
        return "\n".join([*lines, *self.missing])


def report(model: nn.Module) -> Report:
    """Say for every op of a model which backend runs it now, and why not a faster one.

    Nothing is run; the answer is for the model's present device, dtype and mode (gradients while it trains), the
    backend wished for in this thread, and ten seconds of audio.

    Args:
        model: an accelerated WavLM, or any module that contains one. Modules that are not fast are counted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report wants a torch module, got a {type(model).__name__}")
    counts: Counter[tuple] = Counter()
    slow: Counter[str] = Counter()
    with _private.without_memory(), torch.set_grad_enabled(model.training):
        planned: set[nn.Module] = set()
        for module in model.modules():  # parents first
            if module in planned:
                continue
            reason = why_original(module) if isinstance(module, StandIn) else None
            if reason is not None:
                counts.update([_decide(Plan(module.original.__name__, f"transformers' forward runs: {reason}"))])
            elif isinstance(module, FastModule):
                counts.update(_decide(plan) for plan in module.plan())
                planned.update(module.planned())
            elif isinstance(module, tuple(TWINS)) and not isinstance(module, tuple(TWINS.values())):
                slow[type(module).__name__] += 1
    first = next(model.parameters(), torch.empty(0))
    wavlm = next((m for m in model.modules() if isinstance(m, hf.WavLMPreTrainedModel)), None)
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
        alone=why_alone(wavlm, asks_for_attentions(wavlm, {})) if isinstance(wavlm, StandIn) else None,
    )


def _decide(plan: Plan) -> tuple[str, str, tuple[str, ...]]:
    if plan.refusal is not None:
        return plan.op, "modules", (plan.refusal,)
    try:
        choice = backends.choose(plan.op, plan.example())
    except backends.BackendUnavailable as error:
        return plan.op, "none", (str(error),)
    return plan.op, choice.backend, tuple(reason for _, reason in choice.refused)
