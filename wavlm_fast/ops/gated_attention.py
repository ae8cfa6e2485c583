"""Attention with a gated, Toeplitz relative position bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._define import accumulation_dtype, autocast, define, differentiate, only, or_none
from ._dropout import keep_mask
from ._packed import bounds, check_either, check_packed
from ._registry import Arguments, Operand, Place, Sizes, describe

NAME = "gated_attention"
BACKWARD = f"{NAME}_backward"
# Scores that the reference holds at a time: 64 MB in float32.
_CHUNK_SCORES = 2**24


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention whose scores carry a relative position bias, gated per query frame.

    Equivalent to, per head, `softmax(q @ k.mT * scale + gate[:, None] * bias) @ v` with
    `bias[i, j] = rel_bias[j - i + T - 1]`, frames past a length masked out as keys, and dropout on the weights.
    Source: transformers' `WavLMAttention`. Memory is linear in T, forward and backward.

    Args:
        q, k, v: `[B, T, H, D]`, any strides with D contiguous.
        gate: `[B, H, T]` float32 (float64 for float64 q).
        rel_bias: `[H, 2T - 1]`, the dtype of `gate`.
        key_lengths: `[B]` integers in 0..T, the number of valid frames, or None for all. Length 0 gives zeros. Keys
            and values past a length are not read, whatever they are.
        dropout_p: probability of dropping an attention weight, 0 <= p <= 1.
        scale: of the scores; D ** -0.5 when None.
        offsets: of packed frames (`_packed.py`), instead of lengths: q, k and v are `[1, N, H, D]`, gate `[1, H, N]`,
            and rel_bias `[H, 2L - 1]` of the longest utterance or more, entry `j - i + L - 1`. A frame's keys are those
            of its utterance.

    Returns:
        `[B, T, H, D]`, contiguous, the dtype of `q`.

    Raises:
        ValueError, TypeError: shapes, strides, devices or dtypes do not fit, or dropout_p is out of range.
    """
    if dropout_p == 1:
        return 0 * gated_attention(q, k, v, gate, rel_bias, key_lengths, 0.0, scale, offsets)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**31 - 1, (1,), device=q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _op(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, scale, offsets)[0]


def reference(*args: Any) -> Tensor:
    return _kernel(*args)[0]


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if offsets is None:
        return _attend(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, scale)
    outs, sums, frames = [], [], q.shape[1]
    for first, end in bounds(NAME, offsets, frames):
        own = (x[:, first:end] for x in (q, k, v))
        bias = rel_bias[:, _entries(rel_bias, end - first)]
        out, lse = _attend(*own, gate[..., first:end], bias, None, dropout_p, seed, scale, (first, frames))
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 1), torch.cat(sums, 2)


def _entries(rel_bias: Tensor, frames: int) -> slice:
    """Which entries of the bias `[H, 2L - 1]` an utterance of so many frames has."""
    longest = (rel_bias.shape[1] + 1) // 2
    if frames > longest:
        raise ValueError(f"{NAME} wants rel_bias for {frames} frames, that of its longest utterance, got {longest}")
    return slice(longest - frames, longest + frames - 1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    packed: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    queries, keys, values = (x.to(gate.dtype).transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    keys, values = _without_padding(key_lengths, keys, values)
    outs, sums = [], []
    for start, stop in _chunks(queries):
        scores = _scores(queries, keys, gate, rel_bias, key_lengths, scale, start, stop)
        # A row without keys has maximum -inf: its weights are to be 0, not NaN. NaN scores stay NaN.
        highest = scores.detach().amax(-1, keepdim=True)
        weights = scores.sub_(highest.masked_fill(highest == float("-inf"), 0)).exp_()
        total = weights.sum(-1, keepdim=True)  # [B, H, stop - start, 1]
        sums.append((highest + total.log()).squeeze(-1))
        if dropout_p > 0:
            keep = keep_mask(seed, queries.shape[:3], start, stop, dropout_p, packed)
            weights = weights.masked_fill(~keep, 0) / (1 - dropout_p)
        outs.append(weights @ values / total.masked_fill(total == 0, 1))
    return torch.cat(outs, 2).to(q.dtype).transpose(1, 2).contiguous(), torch.cat(sums, 2)


def _past_end(key_lengths: Tensor, frames: int) -> Tensor:
    """Which keys are past the length, `[B, T]`."""
    return torch.arange(frames, device=key_lengths.device) >= key_lengths[:, None]


def _without_padding(key_lengths: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, H, T, D]` with zeros past the lengths: times a weight of 0 what is not finite there would be NaN."""
    if key_lengths is None:
        return tensors
    past_end = _past_end(key_lengths, tensors[0].shape[2])[:, None, :, None]
    return tuple(x.masked_fill(past_end, 0) for x in tensors)


def _chunks(queries: Tensor) -> list[tuple[int, int]]:
    batch, heads, frames, _ = queries.shape
    # A graph for any size cannot depend on how many chunks there are.
    if isinstance(frames * batch, torch.SymInt) or frames * frames * heads * batch <= _CHUNK_SCORES:
        return [(0, frames)]
    size = max(1, _CHUNK_SCORES // (batch * heads * frames))
    return [(i, min(i + size, frames)) for i in range(0, frames, size)]


def bias_rows(rel_bias: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of the dense bias, `[H, stop - start, T]`, as a view of `rel_bias` `[H, 2T - 1]`."""
    frames = (rel_bias.shape[1] + 1) // 2
    if isinstance(frames, torch.SymInt):  # of which unfold makes the number that it is just now
        keys, queries = (torch.arange(*ends, device=rel_bias.device) for ends in ((0, frames), (start, stop)))
        return rel_bias[:, keys - queries[:, None] + frames - 1]
    # Row i is the window of length T that begins at T - 1 - i.
    return rel_bias[:, frames - stop : 2 * frames - 1 - start].unfold(1, frames, 1).flip(1)


def _scores(
    queries: Tensor,
    keys: Tensor,
    gate: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    start: int,
    stop: int,
) -> Tensor:
    """Masked scores of the queries `start` to `stop`, `[B, H, stop - start, T]`."""
    scores = (queries[:, :, start:stop] * scale) @ keys.mT
    scores = torch.addcmul(scores, gate[:, :, start:stop, None], bias_rows(rel_bias, start, stop))
    if key_lengths is None:
        return scores
    return scores.masked_fill_(_past_end(key_lengths, keys.shape[2])[:, None, None], float("-inf"))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    offsets: Tensor | None = None,
) -> None:
    check.floating(NAME, "q", q)
    check.shape(NAME, "q", q, ("B", "T", "H", "D"))
    batch, frames, heads, _ = q.shape
    check.shape(NAME, "k", k, tuple(q.shape))
    check.shape(NAME, "v", v, tuple(q.shape))
    check.same(NAME, "q", q, k=k, v=v)
    check.shape(NAME, "gate", gate, (batch, heads, frames))
    check_packed(NAME, "q", q, offsets)
    check_rel_bias(NAME, rel_bias, heads, frames, offsets)
    check_either(NAME, offsets, key_lengths=key_lengths)
    if gate.dtype != accumulation_dtype(q.dtype):
        raise TypeError(f"{NAME} wants a gate of {accumulation_dtype(q.dtype)} for q of {q.dtype}, got {gate.dtype}")
    check.same(NAME, "gate", gate, rel_bias=rel_bias)
    check.same_device(NAME, "q", q, gate=gate, key_lengths=key_lengths, seed=seed)
    if key_lengths is not None:
        check.integers(NAME, "key_lengths", key_lengths, (batch,))
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{NAME} wants 0 <= dropout_p < 1, got {dropout_p}")
    if dropout_p > 0:
        if seed is None:
            raise ValueError(f"{NAME} wants a seed for dropout_p {dropout_p}, got None")
        check.integers(NAME, "seed", seed, (1,))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{NAME} wants {name} with its last dimension contiguous, got strides {x.stride()}")


def check_rel_bias(op: str, rel_bias: Tensor, heads: int, frames: int, offsets: Tensor | None) -> None:
    """Refuse a bias that is not for so many frames, or beside offsets for some number of them."""
    check.shape(op, "rel_bias", rel_bias, (heads, 2 * frames - 1 if offsets is None else "2L - 1"))
    if offsets is not None and rel_bias.shape[1] % 2 == 0:
        raise ValueError(f"{op} wants an odd number of rel_bias entries, 2L - 1, got {rel_bias.shape[1]}")


def _fake(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), gate.new_empty(gate.shape)


def _backward_kernel(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    wanted: list[bool],
    offsets: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if offsets is None:
        found = _gradients(grad, q, k, v, gate, rel_bias, key_lengths, lse, dropout_p, seed, scale)
        return only(wanted, *found, like=q)
    found, drel_bias, frames = [], torch.zeros_like(rel_bias), q.shape[1]
    for first, end in bounds(NAME, offsets, frames):
        own = (x[:, first:end] for x in (grad, q, k, v))
        within, entries = (..., slice(first, end)), _entries(rel_bias, end - first)
        tail = (None, lse[within], dropout_p, seed, scale, (first, frames))
        *gradients, dbias = _gradients(*own, gate[within], rel_bias[:, entries], *tail)
        found.append(gradients)
        drel_bias[:, entries] += dbias
    dq, dk, dv, dgate = zip(*found, strict=True)
    return only(wanted, *(torch.cat(parts, 1) for parts in (dq, dk, dv)), torch.cat(dgate, 2), drel_bias, like=q)


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    rel_bias: Tensor,
    key_lengths: Tensor | None,
    lse: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    packed: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = gate.dtype
    queries, keys, values, dout = (x.to(dtype).transpose(1, 2) for x in (q, k, v, grad))  # [B, H, T, D]
    keys, values = _without_padding(key_lengths, keys, values)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (queries, keys, values))
    dgate, drel_bias = torch.zeros_like(gate), torch.zeros_like(rel_bias)
    sums = lse.masked_fill(lse == float("-inf"), 0)[..., None]  # rows without keys: weights 0, not NaN
    frames = q.shape[1]

    def valid(x: Tensor) -> Tensor:  # zeros past the lengths, whatever is not finite in a row
        return x if key_lengths is None else x.masked_fill_(_past_end(key_lengths, frames)[:, None, None], 0)

    for start, stop in _chunks(queries):
        rows = slice(start, stop)
        scores = _scores(queries, keys, gate, rel_bias, key_lengths, scale, start, stop)
        weights = scores.sub_(sums[:, :, rows]).exp_()
        # The rounding of a log-sum-exp of 30 is an error of 1e-6 in every weight of its row, and more when another
        # backend computed it; gradients in which a row cancels show it unless the weights sum to one.
        total = weights.sum(-1, keepdim=True)
        weights.div_(total.masked_fill_(total == 0, 1))
        dweights = dout[:, :, rows] @ values.mT
        if dropout_p > 0:
            keep = keep_mask(seed, queries.shape[:3], start, stop, dropout_p, packed).to(dtype) / (1 - dropout_p)
            dv += (weights * keep).mT @ dout[:, :, rows]
            dweights = dweights * keep
        else:
            dv += weights.mT @ dout[:, :, rows]
        # The row sums could come from `out`, but only like this do the rows of dscores sum to zero beyond rounding.
        dscores = valid(weights * (dweights - (weights * dweights).sum(-1, keepdim=True)))  # [B, H, stop - start, T]
        dq[:, :, rows] = dscores @ keys * scale
        dk += dscores.mT @ queries[:, :, rows] * scale
        dgate[:, :, rows] = valid(dscores * bias_rows(rel_bias, start, stop)).sum(-1)
        dbias = valid(dscores * gate[:, :, rows, None]).sum(0)
        drel_bias[:, frames - stop : 2 * frames - 1 - start] += _diagonal_sums(dbias)
    dk, dv = _without_padding(key_lengths, dk, dv)
    dq, dk, dv = (g.transpose(1, 2).to(q.dtype).contiguous() for g in (dq, dk, dv))
    return dq, dk, dv, dgate, drel_bias


def _diagonal_sums(x: Tensor) -> Tensor:
    """Sums over the diagonals of `[H, R, T]`, lower left to upper right corner: `[H, R + T - 1]`."""
    heads, rows, frames = x.shape
    # Rows one longer than the view's shear each row by one place; bottom row first puts the diagonals in columns.
    sheared = torch.nn.functional.pad(x.flip(1), (0, rows)).flatten(1)
    return sheared[:, : rows * (frames + rows - 1)].view(heads, rows, -1).sum(1)


def _check_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rel_bias: Tensor, key_lengths: Tensor | None,
    out: Tensor, lse: Tensor, dropout_p: float, seed: Tensor | None, scale: float, wanted: list[bool],
    offsets: Tensor | None = None,
) -> None:  # fmt: skip
    _check(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, scale, offsets)
    check.alike(BACKWARD, tuple(q.shape), "q", q, grad=grad, out=out)
    check.alike(BACKWARD, tuple(gate.shape), "gate", gate, lse=lse)
    check.wanted(BACKWARD, wanted, q=q, k=k, v=v, gate=gate, rel_bias=rel_bias)


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rel_bias: Tensor, key_lengths: Tensor | None,
    out: Tensor, lse: Tensor, dropout_p: float, seed: Tensor | None, scale: float, wanted: list[bool], *rest: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    return only(wanted, *(x.new_empty(x.shape) for x in (q, k, v, gate, rel_bias)), like=q)


_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor gate, Tensor rel_bias, Tensor? key_lengths"
_TAIL, _PACKED = "float dropout_p, Tensor? seed, float scale", "Tensor? offsets=None"
_op = define(NAME, f"({_OPERANDS}, {_TAIL}, {_PACKED}) -> (Tensor, Tensor)", check=_check, fake=_fake, kernel=_kernel)
_backward_op = define(
    BACKWARD,
    f"(Tensor grad, {_OPERANDS}, Tensor out, Tensor lse, {_TAIL}, bool[] wanted, {_PACKED}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_backward_fake,
    kernel=_backward_kernel,
)


def _backward(grads: tuple, inputs: list, saved: tuple, wanted: tuple) -> tuple:
    operands, numbers, packed = inputs[:6], inputs[6:9], inputs[9:]
    wanted = wanted[:5]
    return or_none(wanted, _backward_op(grads[0].contiguous(), *operands, *saved, *numbers, wanted, *packed))


differentiate(NAME, reference, _backward, save=lambda outputs: outputs)
autocast(NAME, _op, lower=(0, 1, 2))


def _example(
    batch: int, frames: int, heads: int, width: int, *,
    lengths: bool = False, dropout: float = 0.0, scale: float | None = None,
) -> Arguments:  # fmt: skip
    each = Operand((batch, frames, heads, width))
    return {
        "q": each,
        "k": each,
        "v": each,
        "gate": Operand((batch, heads, frames), wide=True),
        "rel_bias": Operand((heads, 2 * frames - 1), wide=True),
        "key_lengths": Operand((batch,), dtype=torch.int64) if lengths else None,
        "dropout_p": dropout,
        "seed": Operand((1,), dtype=torch.int64) if dropout else None,
        "scale": width**-0.5 if scale is None else scale,
    }


def _flops(q: Operand, **rest: object) -> int:
    batch, frames, heads, width = q.shape
    return 2 * 2 * batch * heads * frames * frames * width


def _in_model(s: Sizes) -> list[Place]:
    return [Place("attention", (s.batch, s.frames, s.heads, s.width), times=s.layers)]


_OUTPUTS = ("out", "lse")
describe(NAME, gated_attention, example=_example, flops=_flops, places=_in_model, outputs=_OUTPUTS)
