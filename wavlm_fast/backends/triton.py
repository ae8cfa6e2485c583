"""Triton kernels for CUDA and ROCm devices; on CPU tensors under TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ..ops._define import arguments_of, only, schemas
from . import Implementation

NAME = "triton"


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device | None = None) -> str | None:
    """Why no Triton kernel can run, on `device` or anywhere here; None when one can."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation raises more than ImportError
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    if interpreted():
        return None
    if device is not None and device.type != "cuda":
        return f"Triton kernels need a CUDA or ROCm device, the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is available"
    return None


def _kernel(op: str, file: str, why_not: Callable[..., str | None]) -> Implementation:
    """The host function `op` of kernels/`file`.py, imported at the first call: Triton may not be there."""

    def run(*args: Any) -> Any:
        device = args[0].device
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return getattr(importlib.import_module(f"wavlm_fast.kernels.{file}"), op)(*args)

    def refuse(*args: Any) -> str | None:
        if interpreted() and any(isinstance(a, torch.Tensor) and a.dtype is torch.bfloat16 for a in args):
            return "Triton's interpreter computes bfloat16 wrongly: it truncates and multiplies the bits"
        return why_not(*args)

    return Implementation(run, refuse)


def _all_gradients(
    op: str, file: str, why_not: Callable[..., str | None], tells_first: bool = False
) -> Implementation:
    """A backward whose argument `wanted` says which gradients are wanted; the kernels compute them all, but for the
    first where they are told whether it is wanted.
    """
    kernel = _kernel(op, file, why_not)
    at = list(arguments_of(schemas[op])).index("wanted")

    def split(args: tuple) -> tuple[tuple, list[bool], tuple]:
        return args[:at], args[at], args[at + 1 :]

    def run(*args: Any) -> Any:
        operands, wanted, offsets = split(args)
        told = (wanted[0],) if tells_first else ()
        return only(wanted, *kernel.fn(*operands, *told, *offsets), like=args[1])

    def refuse(*args: Any) -> str | None:
        operands, _, offsets = split(args)
        return kernel.why_not(*operands, *offsets)

    return Implementation(run, refuse)


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_NORM_CHANNELS = 1024  # a row of them and its tile of the weight fit in one program of strided_conv
_MAX_TAPS = 15  # with a column of ones, the side of waveform_conv's Gram matrix
_MAX_CHANNELS = 16384  # MAX_CHANNELS of kernels/add_layer_norm.py, known without importing it


def _why_not_add_layer_norm(x: torch.Tensor, *rest: Any) -> str | None:
    if x.dtype not in _DTYPES:
        return f"the Triton add_layer_norm takes float32, float16 or bfloat16, x is {x.dtype}"
    if not 0 < x.shape[-1] <= _MAX_CHANNELS:
        return f"the Triton add_layer_norm takes 1 to {_MAX_CHANNELS} channels, x has {x.shape[-1]}"
    return None


def _why_not_add_layer_norm_backward(
    grad_sum: torch.Tensor, grad_normed: torch.Tensor, sum: torch.Tensor, *rest: Any
) -> str | None:
    return _why_not_add_layer_norm(sum)


def _why_not_gated_attention(
    q: torch.Tensor, k: Any, v: Any, gate: Any, rel_bias: Any, key_lengths: Any, dropout_p: float, seed: Any,
    scale: float, offsets: torch.Tensor | None = None,
) -> str | None:  # fmt: skip
    if q.dtype not in _DTYPES:
        return f"the Triton gated_attention takes float32, float16 or bfloat16, q is {q.dtype}"
    head_dim = q.shape[-1]
    if head_dim % 16 or not 0 < head_dim <= 128:
        return f"the Triton gated_attention takes a head_dim that is a multiple of 16 up to 128, q has {head_dim}"
    if not scale > 0:
        return f"the Triton gated_attention takes a positive scale, got {scale}"
    return None


def _why_not_gated_attention_backward(grad: torch.Tensor, *rest: Any) -> str | None:
    return _why_not_gated_attention(*rest[:6], *rest[8:])  # without out and lse


def _why_not_dtype(op: str, x: torch.Tensor) -> str | None:
    return None if x.dtype in _DTYPES else f"the Triton {op} takes float32, float16 or bfloat16, x is {x.dtype}"


def _why_not_strided_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, norm_weight: Any, *rest: Any
) -> str | None:
    if norm_weight is not None and weight.shape[0] > _MAX_NORM_CHANNELS:
        return f"the Triton strided_conv norms up to {_MAX_NORM_CHANNELS} channels, weight has {weight.shape[0]}"
    return _why_not_dtype("strided_conv", x)


def _why_not_strided_conv_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any, pre: Any, stride: int, norm: Any, *rest: Any
) -> str | None:
    return _why_not_strided_conv(x, weight, bias, stride, norm)


def _of_frames(op: str, backward: Callable[..., Implementation] = _all_gradients) -> dict[str, Implementation]:
    """An op of which x alone decides, and its backward."""

    def refuse_backward(grad: torch.Tensor, x: torch.Tensor, *rest: Any) -> str | None:
        return _why_not_dtype(op, x)

    return {
        op: _kernel(op, op, lambda x, *rest: _why_not_dtype(op, x)),
        f"{op}_backward": backward(f"{op}_backward", op, refuse_backward),
    }


def _why_not_waveform_conv(waveform: torch.Tensor, weight: torch.Tensor, *rest: Any) -> str | None:
    channels, _, taps = weight.shape
    if taps > _MAX_TAPS or channels > _MAX_NORM_CHANNELS:
        return (
            f"the Triton waveform_conv takes up to {_MAX_TAPS} taps and {_MAX_NORM_CHANNELS} channels, "
            f"weight has {taps} and {channels}"
        )
    return _why_not_dtype("waveform_conv", waveform)


def _why_not_waveform_conv_backward(grad: torch.Tensor, *rest: Any) -> str | None:
    return _why_not_waveform_conv(*rest)


TABLE: dict[str, Implementation] = {
    "add_layer_norm": _kernel("add_layer_norm", "add_layer_norm", _why_not_add_layer_norm),
    "add_layer_norm_backward": _kernel("add_layer_norm_backward", "add_layer_norm", _why_not_add_layer_norm_backward),
    "gated_attention": _kernel("gated_attention", "gated_attention", _why_not_gated_attention),
    "gated_attention_backward": _kernel(
        "gated_attention_backward", "gated_attention_backward", _why_not_gated_attention_backward
    ),
    "strided_conv": _kernel("strided_conv", "strided_conv", _why_not_strided_conv),
    "strided_conv_backward": _all_gradients("strided_conv_backward", "strided_conv", _why_not_strided_conv_backward),
    **_of_frames("tdnn"),
    **_of_frames("positional_conv"),
    **_of_frames("linear_act"),
    **_of_frames("stats_pool", _kernel),
    **_of_frames("position_gate", _kernel),
    "waveform_conv": _kernel("waveform_conv", "waveform_conv", _why_not_waveform_conv),
    "waveform_conv_backward": _all_gradients(
        "waveform_conv_backward", "waveform_conv_backward", _why_not_waveform_conv_backward, tells_first=True
    ),
}
