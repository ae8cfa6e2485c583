"""Attention, forward and backward, against torch's: with the same bias, with it as a dense mask, and without any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wavlm_fast.parity.cases import case_of

from ...ops.cases import OpCase
from ...ops.providers import OpProvider, Way
from ...run import peers
from .roof import Roof
from .steps import ATTENTION, Scale, Step
from .timed import BACKWARD, FORWARD, Timed, providers

OP = "gated_attention"
OURS, DENSE, FLEX, LIMIT = "wavlm_fast triton", "SDPA, dense bias", "FlexAttention", "SDPA, no bias"
_PRODUCTS = {FORWARD: 2, BACKWARD: 5}  # of T by T, without which it cannot be done
_CHECKED_HEADS = 2  # float64 has scores and their gradients in memory as a whole
_COMPILED = 25.0  # seconds


def steps(scale: Scale, roof: Callable[[], Roof]) -> Iterator[Step]:
    """Ours and the limit first, then what has to be compiled."""
    for frames, batch in scale.frames.items():
        for what in (FORWARD, BACKWARD):
            for who in (OURS, LIMIT, DENSE, FLEX):
                timed = _timed(scale, frames, batch, what, who)
                name = f"{timed.case.name}, {what}, {scale.short}: {who}"
                seconds = 10.0 + (_COMPILED if who == FLEX else 0)
                run = _run(timed, scale, roof)
                yield Step(ATTENTION, name, seconds, run, timed.call if who == OURS else None)


def _run(timed: Timed, scale: Scale, roof: Callable[[], Roof]) -> Callable[[], list[dict[str, Any]]]:
    return lambda: timed.measured(scale, roof)


def _timed(scale: Scale, frames: int, batch: int, what: str, who: str) -> Timed:
    case = _case(scale, frames, batch, scale.heads[0], what)
    checked = _case(scale, frames, 1, _CHECKED_HEADS, what)
    provider = _limit(scale) if who == LIMIT else providers(scale)[who]
    return Timed(case, checked, what, who, provider, right=who != LIMIT)


@cache
def _case(scale: Scale, frames: int, batch: int, heads: int, what: str) -> OpCase:
    width, training = scale.heads[1], what == BACKWARD
    name = f"{OP} T={frames} B={batch} H={heads} D={width}"
    inputs = case_of(OP, name, batch, frames, heads, width, layout="packed")
    operations = 2.0 * _PRODUCTS[what] * batch * heads * frames**2 * width
    return _Named(OP, name, "base", batch, 0.0, replace(inputs, differentiate=training), operations, training)


class _Named(OpCase):
    """Told by its sizes, not by a model and seconds of audio."""

    @property
    def name(self) -> str:
        return self.what


def _limit(scale: Scale) -> OpProvider:
    return OpProvider(LIMIT, scale.half, scale.device, _without_bias)


def _without_bias(op: str, training: bool) -> Way:
    def prepare(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rel_bias: Tensor, *rest: Any) -> tuple:
        return q, k, v, rest[-1]

    return Way(_plain, prepare)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).contiguous()


peers.never_uncompiled()
