"""What a forward or a training step runs on a GPU, stage by stage: launches of ours, and torch's ops around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wavlm_fast.backends.triton import TABLE
from wavlm_fast.ops import OPS, Place

from ..run.flops import STAGES
from .cases import MODELS, TO_WAVEFORM, TORCHS, Case, cases
from .compile import Launch, recording
from .torch_bytes import sizes


@dataclass(frozen=True)
class TorchOp:
    """An op of torch's: it reads its inputs and writes its outputs once."""

    name: str
    operations: float  # of products
    type: str  # of their operands: "half", "tf32" or "fp32"
    bytes: int


@dataclass(frozen=True)
class Call:
    """One call of an op, `times` in all: its launches, torch's ops around them, and its compulsory bytes."""

    stage: str
    op: str
    times: int
    launches: tuple[Launch, ...]
    around: tuple[TorchOp, ...]
    bytes: int


class _Around(TorchDispatchMode):
    """While entered, notes torch's ops that move anything."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[TorchOp] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = op(*args, **(kwargs or {}))
        name = op._schema.name.partition("::")[2]
        if not op.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view", "_reshape_alias")):
            count = flop_registry.get(op.overloadpacket)
            operations = count(*args, **(kwargs or {}), out_val=result) if count else 0
            dtype = next((a.dtype for a in tree_leaves(args) if isinstance(a, Tensor)), torch.float32)
            self.found.append(TorchOp(name, operations, type_of(dtype), sizes(args, result)))
        return result


def type_of(dtype: torch.dtype) -> str:
    """How torch multiplies a dtype unless it is told otherwise."""
    return "fp32" if dtype == torch.float32 else "half"


def _call(stage: str, op: str, times: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Call:
    with recording() as launches, torch.no_grad(), _Around() as around:
        outputs = function(*args)
    return Call(stage, op, times, tuple(launches), tuple(around.found), sizes(args, outputs))


def _saves(case: Case) -> Case:
    """A forward that keeps what its backward needs."""
    return replace(case, args=(*case.args[:-1], True)) if case.args[-1] is False else case


def calls(model: str, dtype: torch.dtype, batch: int, samples: int, train: bool) -> Iterator[Call]:
    """All calls of a forward, or of a training step, in the order of run/flops.py's STAGES."""
    of_model = replace(MODELS[model], batch=batch, samples=samples)
    places = [(op.name, place) for op in OPS.values() for place in op.places(of_model) if place.stage in STAGES]
    stages = {op: place.stage for op, place in places if place.what not in TORCHS}
    times = {place.stage: place.times for _, place in places}
    for case in cases(model, dtype, train, batch, samples):
        stage = stages.get(case.op.removesuffix("_backward"))
        if stage is not None and case.what != TO_WAVEFORM:
            case = _saves(case) if train else case
            yield _call(stage, case.op, times[stage], TABLE[case.op].fn, case.args)
    for _, place in places:
        if place.what in TORCHS:
            yield from _linear(place, dtype, train)


def _linear(place: Place, dtype: torch.dtype, train: bool) -> Iterator[Call]:
    """A linear layer of torch's."""
    stage, (batch, frames, narrow), wide = place.stage, place.sizes, place.options["outer"]
    x, weight, bias, grad = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((batch * frames, narrow), (wide, narrow), (wide,), (batch * frames, wide))
    )
    if stage == "projection":  # after a layer norm
        yield _call(stage, "layer_norm", 1, torch.nn.functional.layer_norm, (x, (narrow,), x[0], x[0]))
    yield _call(stage, "linear", place.times, torch.nn.functional.linear, (x, weight, bias))
    if train:
        yield _call(stage, "linear_backward", place.times, _linear_backward, (grad, x, weight))


def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad @ weight, grad.t() @ x, grad.sum(0)


def trips(launch: Launch) -> float:
    """How often a program goes through its inner loop, on average."""
    a, blocks = launch.arguments, lambda size, name: math.ceil(a[size] / a[name])
    formulas: dict[str, Callable[[], float]] = {
        "frames_product_kernel": lambda: blocks("length", "BLOCK_K"),
        "frames_product_bwd_weight_kernel": lambda: a["blocks_per_split"],
        "finish_bwd_kernel": lambda: blocks("rows_per_program", "BLOCK_T"),
        "gated_attention_fwd_kernel": lambda: blocks("T", "BLOCK_N"),
        "gated_attention_bwd_dq_kernel": lambda: blocks("T", "BLOCK_N"),
        "gated_attention_bwd_dkv_kernel": lambda: blocks("T", "BLOCK_M"),
        "gated_attention_bwd_dbias_kernel": lambda: (
            a["batch"] * blocks("T", "BLOCK_M") * blocks("T", "BLOCK_N") / (launch.grid[0] * launch.grid[1])
        ),
        "add_layer_norm_bwd_kernel": lambda: blocks("rows_per_program", "BLOCK_R"),
        "position_gate_fwd_kernel": lambda: a["heads_per_program"],
        "position_gate_bwd_kernel": lambda: a["heads_per_program"],
        "waveform_gram_kernel": lambda: a["K"],
        "waveform_conv_fwd_kernel": lambda: a["tiles_per_program"],
        "waveform_conv_bwd_sums_kernel": lambda: a["tiles_per_program"],
        "waveform_conv_bwd_kernel": lambda: a["tiles_per_program"],
    }
    return formulas[launch.name]() if launch.name in formulas else 1
