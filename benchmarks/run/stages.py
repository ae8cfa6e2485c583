"""Where the time of ours goes: the ops of a forward, timed one by one and gathered by stage of the model.

In inference a layer is one op, and so is the front end: nobody sees from outside what is spent on what. They are timed
in the smaller ops that they run as where something hangs on a part of theirs, which takes a little longer.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wavlm_fast import measure
from wavlm_fast.modules import FeatureEncoder, FeedForward

from .flops import STAGES

Call = Callable[[], Any]
OTHER_OPS, REST, WHOLE = "other torch ops", "rest", "in one piece"
# What an op works for shows in the parameters that it gets; the first pattern that fits a parameter's name.
_BY_PARAMETER = (
    ("waveform conv", r"conv_layers\.0\."),
    ("feature encoder", r"conv_layers\."),
    ("projection", r"feature_projection\."),
    ("positional conv", r"pos_conv_embed\."),
    ("qkv", r"\.[qkv]_proj\."),
    ("gate", r"\.gru_rel_pos_"),
    ("attention", r"\.rel_attn_embed\."),
    ("out proj", r"\.out_proj\."),
    ("feed-forward in", r"\.intermediate_dense\."),
    ("feed-forward out", r"\.output_dense\."),
    ("norms", r"layer_norm\."),
    ("head", r"(projector|tdnn\.\d+\.kernel|feature_extractor|classifier)\."),
)
# Some get none, or only what was merged from several.
_BY_OP = {
    "gated_attention": "attention",
    "position_gate": "gate",
    "positional_conv": "positional conv",
    "waveform_conv": "waveform conv",
    "strided_conv": "feature encoder",
    "tdnn": "head",
    "stats_pool": "head",
}


@dataclass(frozen=True)
class Stage:
    """One stage, or several that an op fuses. `seconds` and the counts are of one forward."""

    name: str
    ops: str  # what ran, with counts
    seconds: float
    operations: float | None  # None where there is no telling

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        gflop = None if self.operations is None else self.operations / 1e9
        return {"stage": self.name, "ops": self.ops, "seconds": self.seconds, "gflop": gflop}


class Clock(TorchDispatchMode):
    """While entered, times every op that torch dispatches; the ops that run inside of an op are part of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # By address, because a view of a weight is as good as the weight.
        self._stages = {p.data_ptr(): _stage_of(name) for name, p in module.named_parameters() if p.numel()}
        hidden = module.model.config.hidden_size
        self._merged = (3 * hidden, hidden)
        self._on_gpu = any(p.is_cuda for p in module.parameters())
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.ops: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def now(self) -> float:
        """Seconds, once the device has nothing left to do."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        start = self.now()
        result = op(*args, **(kwargs or {}))
        took = self.now() - start
        stage = self.stage(op, args)
        self.seconds[stage] += took
        # What the backend calls from outside of an op looks for changed weights.
        if stage != OTHER_OPS and not op.is_view and op.namespace != "wavlm_fast_cpu":
            self.ops[stage][op._schema.name.partition("::")[2]] += 1
        return result

    def stage(self, op: Any, args: tuple) -> str:
        """The stage that a call belongs to; for an op of ours that tells nothing of it, the op's name."""
        namespace, _, name = op._schema.name.partition("::")
        found = {_BY_OP.get(name)}
        for tensor in (x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                found.add("qkv" if tensor.shape == self._merged else self._stages.get(tensor.data_ptr()))
        found.discard(None)
        if len(found) == 1:
            return found.pop()
        if found:
            return " + ".join(stage for stage in STAGES if stage in found)
        return name if namespace == "wavlm_fast" else OTHER_OPS


def _stage_of(parameter: str) -> str | None:
    return next((stage for stage, pattern in _BY_PARAMETER if re.search(pattern, parameter)), None)


def breakdown(module: nn.Module, call: Call, brief: Call, operations: Mapping[str, float], rounds: int) -> list[Stage]:
    """Time the stages of a forward.

    Args:
        module: the fast model that `call` runs, wrapped in `cases.Output`.
        call: the forward.
        brief: the same on little audio, which shows what the clock itself takes.
        operations: of each of `flops.STAGES`.
        rounds: forwards; every stage's time is its median.

    Returns:
        The stages in the order the signal meets them, ops of no stage, torch's other ops, and the rest of a forward:
        Python, dispatch, freeing of memory. What the clock itself takes is left out. Last the forward as it is, in
        ops that are several stages in one piece.
    """
    whole = statistics.median(measure.interleave({WHOLE: call}, rounds, next(module.parameters()).device)[WHOLE])
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    with in_steps(module):
        call()  # packs weights
        own = _cost_of_clock(module, brief, rounds)
        for _ in range(rounds):
            with Clock(module) as clock:
                start = clock.now()
                call()
                total = clock.now() - start - own
            clock.seconds[REST] = total - sum(clock.seconds.values())
            for stage, took in clock.seconds.items():
                seconds[stage].append(took)
    medians = {stage: statistics.median(found) for stage, found in seconds.items()}
    shared = Counter(part for stage in medians for part in stage.split(" + "))
    rows = []
    for stage in sorted(medians, key=_order):
        parts = [part for part in stage.split(" + ") if part in operations]
        told = all(shared[part] == 1 or not operations[part] for part in parts)
        ops = ", ".join(f"{count} {name}" for name, count in clock.ops[stage].most_common())
        count = sum(operations[part] for part in parts) if told and parts else None
        rows.append(Stage(stage, ops, medians[stage], count))
    return [*rows, Stage(WHOLE, "", whole, sum(operations.values()))]


@contextmanager
def in_steps(module: nn.Module) -> Iterator[None]:
    """Have every layer run as ops of its own: a hook on a part wants to see the part."""
    # One part of each is enough; on an attention module a hook would cost the fused attention as well.
    feed_forward = [m for m in module.modules() if isinstance(m, FeedForward)]
    last_conv = [m.conv_layers[-1] for m in module.modules() if isinstance(m, FeatureEncoder)]
    parts = feed_forward + last_conv
    hooks = [part.register_forward_hook(lambda *args: None) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cost_of_clock(module: nn.Module, call: Call, rounds: int) -> float:
    """Seconds that the clock adds to a forward, whatever the length: it dispatches as many ops."""

    def clocked() -> None:
        with Clock(module):
            call()

    found = measure.interleave({"plain": call, "clocked": clocked}, 3 * rounds)
    return statistics.median(c - p for c, p in zip(found["clocked"], found["plain"], strict=True))


def _order(stage: str) -> tuple[int, str]:
    first = stage.split(" + ")[0]
    if first in STAGES:
        return STAGES.index(first), stage
    return len(STAGES) + (stage == OTHER_OPS) + 2 * (stage == REST), stage
