"""Who runs an op: torch as transformers calls it, torch's compiler, other libraries' attention, and ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wavlm_fast import backends
from wavlm_fast.modules._versions import RETURNS_WEIGHTS_UNASKED
from wavlm_fast.ops import OPS
from wavlm_fast.parity import plain
from wavlm_fast.parity.composed import encoder_layer_of
from wavlm_fast.parity.definitions import toeplitz
from wavlm_fast.parity.run_ops import FRONTS

from ..run import peers
from ..run.providers import SHORT

DTYPES = {short: dtype for dtype, short in SHORT.items()}
# Ops that stand for several others, and run as those where there is no kernel for the whole.
WHOLE = frozenset(name for name, op in OPS.items() if op.parts)
_FASTEST = {"cpu": "cpu", "cuda": "triton"}


class Refusal(Exception):
    """A provider cannot run an op; the message says why."""


@dataclass(frozen=True)
class Way:
    """How a provider runs an op.

    Attributes:
        function: takes what `prepare` gives; returns the op's outputs, or the first of them.
        prepare: from the arguments of the op's schema to those of `function`: what a model does once per forward, or
            leaves in that form anyway. It is not timed, and gradients flow through it.
        note: what is worth saying about it, from the arguments of the op's schema.
        wish: the backend that is wished for meanwhile.
        names: those of the arguments, where the function takes them by name.
    """

    function: Callable[..., Any]
    prepare: Callable[..., tuple] = lambda *args: args
    note: Callable[[tuple], str] = lambda args: ""
    wish: str = "auto"
    names: tuple[str, ...] = ()

    def bound(self, inputs: Sequence[Any]) -> Callable[[], Any]:
        """The function on what `prepare` gave: nobody's arguments are looked up while they are timed."""
        if not self.names:
            return partial(self.function, *inputs)
        return partial(self.function, **dict(zip(self.names, inputs, strict=False)))


@dataclass(frozen=True)
class OpProvider:
    """One way to run ops in one dtype.

    Attributes:
        family, dtype, device: what runs, in what, where.
        make: from an op, and whether its gradient is wanted, to the way it is run; raises `Refusal`.
        ops: what it is for; None for every op.
        backend: which of ours it is, or None.
        everywhere: False for what runs only where it is asked for: it compiles for every case, or tells little.
    """

    family: str
    dtype: torch.dtype
    device: torch.device
    make: Callable[[str, bool], Way]
    ops: frozenset[str] | None = None
    backend: str | None = None
    everywhere: bool = True

    @property
    def ours(self) -> bool:
        return self.backend is not None


def op_providers(device: torch.device | str) -> tuple[dict[str, OpProvider], dict[str, str]]:
    """What a device can run, ours last and the fastest of ours first, and the reasons why it cannot run the rest."""
    device = torch.device(device)
    found: dict[str, OpProvider] = {}
    absent: dict[str, str] = {}
    attention = frozenset({"gated_attention"})
    families = (
        ("torch", _torch, None, True),
        ("torch + compile", _compiled, None, False),
        ("SDPA, dense bias", _sdpa, attention, True),
        ("FlexAttention", partial(_flex, device), attention, False),
    )
    # float16 is for GPUs: CPUs have hardly an instruction for it.
    dtypes = {name: dtype for name, dtype in DTYPES.items() if name != "fp16" or device.type != "cpu"}
    for family, make, ops, everywhere in families:
        for name, dtype in dtypes.items():
            found[f"{family} {name}"] = OpProvider(family, dtype, device, make, ops, everywhere=everywhere)
    fastest = _FASTEST.get(device.type)
    for backend in sorted(backends.names(), key=lambda name: (name == "reference", name != fastest)):
        module = backends.load(backend)
        reason = module.why_not(device) or module.why_not()
        for name, dtype in dtypes.items():
            label = f"wavlm_fast {backend} {name}"
            if reason is None:
                make = partial(_ours, backend, backend == fastest)
                everywhere = backend != "reference"  # it is what torch makes of it, once more
                found[label] = OpProvider("wavlm_fast", dtype, device, make, backend=backend, everywhere=everywhere)
            else:
                absent[label] = reason
    return found, absent


def _torch(op: str, training: bool) -> Way:
    """As transformers runs it; between the convolutions of a front end with group norm frames are channels-first."""
    if op == "gated_attention":
        return Way(_attention, _dense)
    if op == "encoder_layer":
        return Way(_layer, lambda x, rel_bias, *rest: (x, _repeated(rel_bias.to(x.dtype), len(x)), *rest))
    return Way(plain.TABLE[op], _channels_first if op == "strided_conv" else Way.prepare)


def _compiled(op: str, training: bool) -> Way:
    peers.never_uncompiled()
    way = _torch(op, training)
    return Way(torch.compile(way.function, dynamic=False), way.prepare)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, key_lengths: Tensor | None, scale: float
) -> Tensor:
    """What the installed transformers makes of an attention between its projections: transformers 5 always asks torch
    for the mean weights too, for which torch leaves its fused attention aside."""
    if not RETURNS_WEIGHTS_UNASKED:
        return peers.sdpa(q, k, v, gate[..., None] * bias, _valid(key_lengths, q.shape[1]), scale)
    out, _, weights = plain.attend(q, k, v, gate, bias, key_lengths, scale)
    weights.unflatten(0, (q.shape[0], q.shape[2])).mean(1)
    return out.contiguous()


def _layer_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, key_lengths: Tensor | None, *rest: Any
) -> tuple[Tensor]:
    return (_attention(q, k, v, gate, bias, key_lengths, rest[-1]),)


_layer = encoder_layer_of({**plain.TABLE, "gated_attention": _layer_attention})


def _repeated(rel_bias: Tensor, batch: int) -> Tensor:
    """The dense bias `[B, H, T, T]`, which transformers builds once per forward."""
    return toeplitz(rel_bias).repeat(batch, 1, 1, 1)


def _dense(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rel_bias: Tensor, *rest: Any) -> tuple:
    """Operands as transformers' projections leave them, frames first, and a model of one dtype."""
    key_lengths, *_, scale = rest
    heads = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    return *heads, gate.to(q.dtype), _repeated(rel_bias.to(q.dtype), len(q)), key_lengths, scale


def _channels_first(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, norm: Tensor | None, *rest: Any
) -> tuple:
    if norm is None:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x, weight, bias, stride, norm, *rest


def _valid(key_lengths: Tensor | None, frames: int) -> Tensor | None:
    return None if key_lengths is None else torch.arange(frames, device=key_lengths.device) < key_lengths[:, None]


def _sdpa(op: str, training: bool) -> Way:
    def prepare(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rel_bias: Tensor, *rest: Any) -> tuple:
        valid = _valid(rest[0], q.shape[1])
        return q, k, v, gate.to(q.dtype), toeplitz(rel_bias.to(q.dtype)), valid, rest[-1]

    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        return peers.sdpa(q, k, v, gate[..., None] * bias, valid, scale)

    return Way(run, prepare)


def _flex(device: torch.device, op: str, training: bool) -> Way:
    if training and device.type == "cpu":
        raise Refusal(peers.NO_FLEX_GRADIENT)

    def prepare(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rel_bias: Tensor, *rest: Any) -> tuple:
        blocks = None if rest[0] is None else peers.block_mask(rest[0], q.shape[1])
        return q, k, v, gate.to(q.dtype), rel_bias.to(q.dtype), blocks, rest[-1]

    return Way(peers.flex, prepare)


def _ours(backend: str, fastest: bool, op: str, training: bool) -> Way:
    """The fastest backend is what "auto" makes of it: calls that it leaves to torch or to the parts of a whole too."""
    wish = "auto" if fastest else backend
    table = backends.load(backend).TABLE
    if op in WHOLE:
        return replace(_front(op), note=partial(_in_parts, backend, op), wish=wish)
    if op not in table:
        raise Refusal(f"the {backend} backend has no kernel for {op}")
    return replace(_front(op), note=partial(_note, backend, op, training), wish=wish)


def _front(op: str) -> Way:
    """The public function, as modules call it; of attention the op, as its seed matters here."""
    return Way(FRONTS[op]) if op == "gated_attention" else Way(OPS[op].function, names=tuple(OPS[op].arguments))


def _note(backend: str, op: str, training: bool, args: tuple) -> str:
    by_torch = _left_to_torch(op, args) if training and backend == _FASTEST.get(args[0].device.type) else None
    mixed = training and f"{op}_backward" not in backends.load(backend).TABLE
    return by_torch or ("its gradient runs on the reference backend" if mixed else "")


def _left_to_torch(op: str, args: tuple) -> str | None:
    arguments = dict(zip(OPS[op].arguments, args, strict=False))
    choice = backends.trained_by_torch(op, args[0], arguments.get("weight", args[0]))
    return None if choice is None else choice.refused[0][1]


def _in_parts(backend: str, op: str, args: tuple) -> str:
    implementation = backends.load(backend).TABLE.get(op)
    if backend == "reference" or (implementation is not None and implementation.why_not(*args) is None):
        return ""
    return "it runs as the ops that it is made of"
