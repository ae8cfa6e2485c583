"""Statistics pooling of the x-vector head."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._define import accumulation_dtype, autocast, define, differentiate
from ._packed import check_either, check_packed, joined, utterances
from ._registry import Arguments, Operand, Place, Sizes, describe

NAME = "stats_pool"
BACKWARD = f"{NAME}_backward"


def stats_pool(x: Tensor, lengths: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """Mean and unbiased standard deviation over the valid frames of each utterance.

    Equivalent to `torch.cat([x[b, :lengths[b]].mean(0), x[b, :lengths[b]].std(0)])` for each utterance b, as
    transformers' `WavLMForXVector` computes it, without a loop over the batch.

    Args:
        x: `[B, T, C]` frames.
        lengths: `[B]` integers in 0..T, valid frames, or None for all. One frame has no deviation: NaN.
        offsets: of packed frames `[1, N, C]` (`_packed.py`), instead of lengths.

    Returns:
        `[B, 2C]`: means, then deviations, the dtype of `x`.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
    """
    return _op(x.contiguous(), lengths, offsets)


def _moments(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Valid frames centred (zero elsewhere) [B, T, C], their mean [B, 1, C] and their number [B, 1, 1]."""
    frames = x.shape[1]
    x = x.to(accumulation_dtype(x.dtype))
    if lengths is None:
        lengths = torch.full(x.shape[:1], frames, device=x.device)
    valid = (torch.arange(frames, device=x.device) < lengths[:, None])[..., None]
    count = lengths[:, None, None].to(x.dtype)
    mean = torch.where(valid, x, 0).sum(1, keepdim=True) / count
    return torch.where(valid, x - mean, 0), mean, count


def reference(x: Tensor, lengths: Tensor | None, offsets: Tensor | None = None) -> Tensor:
    if offsets is not None:
        return torch.cat([reference(own, None) for (own,) in utterances(NAME, offsets, x)])
    centred, mean, count = _moments(x, lengths)
    variance = centred.square().sum(1, keepdim=True) / (count - 1)
    std = torch.where(count > 1, variance, float("nan")).sqrt()
    return torch.cat((mean, std), -1).squeeze(1).to(x.dtype)


def _check(x: Tensor, lengths: Tensor | None, offsets: Tensor | None = None) -> None:
    check.floating(NAME, "x", x)
    check.shape(NAME, "x", x, ("B", "T", "C"))
    check_packed(NAME, "x", x, offsets)
    check_either(NAME, offsets, lengths=lengths)
    if lengths is None:
        return
    check.integers(NAME, "lengths", lengths, (x.shape[0],))
    check.same_device(NAME, "x", x, lengths=lengths)


def _check_backward(
    grad: Tensor, x: Tensor, lengths: Tensor | None, out: Tensor, offsets: Tensor | None = None
) -> None:
    _check(x, lengths, offsets)
    check.alike(BACKWARD, (_batch(x, offsets), 2 * x.shape[2]), "x", x, grad=grad, out=out)


def _batch(x: Tensor, offsets: Tensor | None) -> int:
    return x.shape[0] if offsets is None else offsets.shape[0] - 1


def _fake(x: Tensor, lengths: Tensor | None, offsets: Tensor | None = None) -> Tensor:
    return x.new_empty((_batch(x, offsets), 2 * x.shape[2]))


def _backward_kernel(
    grad: Tensor, x: Tensor, lengths: Tensor | None, out: Tensor, offsets: Tensor | None = None
) -> Tensor:
    if offsets is not None:
        own = utterances(NAME, offsets, x)
        parts = zip(grad.split(1), (frames for (frames,) in own), out.split(1), strict=True)
        return joined([_backward_kernel(g, frames, None, o) for g, frames, o in parts])
    centred, _, count = _moments(x, lengths)
    dmean, dstd = grad.to(centred.dtype)[:, None].chunk(2, -1)  # [B, 1, C] each
    std = out.to(centred.dtype)[:, None, x.shape[2] :]
    # d std / d x is centred / ((n - 1) std), and 0 where all frames are equal, as torch.std has it.
    slope = torch.where(std == 0, 0, dstd / ((count - 1) * std))
    dx = torch.where(centred == 0, 0, slope * centred)
    frames = torch.arange(x.shape[1], device=x.device)[None, :, None]
    return (dx + torch.where(frames < count, dmean / count, 0)).to(x.dtype)


_op = define(
    NAME, "(Tensor x, Tensor? lengths, Tensor? offsets=None) -> Tensor", check=_check, fake=_fake, kernel=reference
)
_backward_op = define(
    BACKWARD,
    "(Tensor grad, Tensor x, Tensor? lengths, Tensor out, Tensor? offsets=None) -> Tensor",
    check=_check_backward,
    fake=lambda grad, x, *rest: torch.empty_like(x),
    kernel=_backward_kernel,
)


def _backward(grads: tuple, inputs: list, saved: tuple, wanted: tuple) -> tuple:
    x, lengths, offsets = inputs
    return (_backward_op(grads[0].contiguous(), x, lengths, *saved, offsets),)


differentiate(NAME, reference, _backward, save=lambda outputs: outputs)
autocast(NAME, _op)


def _example(batch: int, frames: int, channels: int, *, lengths: bool = False) -> Arguments:
    return {
        "x": Operand((batch, frames, channels)),
        "lengths": Operand((batch,), dtype=torch.int64) if lengths else None,
    }


def _in_model(s: Sizes) -> list[Place]:
    return [Place("x-vector head", (s.batch, s.frames_of_tdnn[-1], s.tdnn[-1][0]))]


describe(NAME, stats_pool, example=_example, flops=lambda **rest: 0, places=_in_model)
