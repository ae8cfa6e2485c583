"""Bytes that torch ops read and write, and with them transformers' own way through every op.

Each op reads its inputs once and writes its outputs once; views and memory that is only reserved are free. That favours
the ops: what a convolution of cuDNN reads twice or copies into another layout is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import WavLMConfig
from transformers.models.wavlm import modeling_wavlm as hf

from .cases import BATCH, FRAMES, MODELS, TO_WAVEFORM, Case

_RESERVED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_FILLED = ("copy_", "fill_", "zero_")  # written without being read


def size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; what it repeats by a stride of zero counts once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride or not length else 1
    return elements * tensor.element_size()


def sizes(*given: Any) -> int:
    """Bytes of all tensors in what is given."""
    return sum(size(t) for t in tree_leaves(given) if isinstance(t, torch.Tensor))


class TorchBytes(TorchDispatchMode):
    """Adds up the bytes of the ops run inside, `total`, but for those that touch a tensor of `ignored`."""

    def __init__(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.total = 0
        self._ignored = {_storage(t) for t in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.total += self._bytes(func, args, kwargs or {}, found)
        return found

    def _bytes(self, func: Any, args: tuple, kwargs: dict, found: Any) -> int:
        name = func._schema.name.split("::")[1]
        if name in _RESERVED or func.is_view or name == "_unsafe_view":
            return 0
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(_storage(t) in self._ignored for t in inputs):
            return 0
        if name in _FILLED:
            inputs = inputs[1:]
        outputs = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        return sum(map(size, inputs)) + sum(map(size, outputs))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def forward_and_backward(
    function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], ignored: Iterable[torch.Tensor] = ()
) -> tuple[int, int]:
    """Bytes of `function(*inputs)` and of its gradients, of the inputs and of all parameters that it uses."""
    forward, backward = TorchBytes(ignored), TorchBytes(ignored)
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    with forward:
        out = function(*inputs)
    grad = torch.empty_like(out)
    with backward:
        out.backward(grad)
    return forward.total, backward.total


def transformers_bytes(model: str, dtype: torch.dtype) -> Iterator[tuple[str, str, int, int]]:
    """Op, what it is applied to as in cases.py, and the bytes of its forward and backward in transformers."""
    sizes = MODELS[model]
    large = sizes.norm == "layer"
    config = WavLMConfig(
        hidden_size=sizes.channels, num_attention_heads=sizes.heads, intermediate_size=sizes.feed_forward,
        num_hidden_layers=1, feat_extract_norm=sizes.norm, do_stable_layer_norm=large, conv_bias=sizes.conv_bias,
        activation_dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    with torch.device("meta"):
        for build in (_attention, _front_end, _encoder, _head):
            yield from build(config, dtype)


def _frames(channels: int, dtype: torch.dtype, frames: int = FRAMES) -> torch.Tensor:
    return torch.empty(BATCH, frames, channels, dtype=dtype)


def _attention(config: WavLMConfig, dtype: torch.dtype) -> Iterator[tuple[str, str, int, int]]:
    module = hf.WavLMAttention(config.hidden_size, config.num_attention_heads).to(dtype)
    x = _frames(config.hidden_size, dtype)
    bias = torch.empty(BATCH * config.num_attention_heads, FRAMES, FRAMES, dtype=dtype)
    projections = [p for name, p in module.named_parameters() if "_proj" in name]
    whole = forward_and_backward(lambda x, bias: module(x, position_bias=bias)[0], (x, bias), projections)
    gate = _gate(module, x)
    yield "gated_attention", "", whole[0] - gate[0], whole[1] - gate[1]
    yield "position_gate", "", *gate


class _Multiplied:
    """Stands for the position bias, to get hold of the gate that it is multiplied by."""

    def __rmul__(self, gate: torch.Tensor) -> _Multiplied:
        self.gate = gate
        return self

    def view(self, *shape: Any) -> _Multiplied:
        return self


def _gate(module: hf.WavLMAttention, x: torch.Tensor) -> tuple[int, int]:
    """The module's way up to its gate."""
    module.torch_multi_head_self_attention = lambda hidden, mask, bias: (bias.gate, None)
    try:
        return forward_and_backward(lambda x: module(x, position_bias=_Multiplied())[0], (x,))
    finally:
        del module.torch_multi_head_self_attention


def _front_end(config: WavLMConfig, dtype: torch.dtype) -> Iterator[tuple[str, str, int, int]]:
    first, rest = (
        (hf.WavLMLayerNormConvLayer, hf.WavLMLayerNormConvLayer)
        if config.feat_extract_norm == "layer"
        else (hf.WavLMGroupNormConvLayer, hf.WavLMNoLayerNormConvLayer)
    )
    x = torch.empty(BATCH, 1, 160_000, dtype=dtype)
    for index, kernel in enumerate(config.conv_kernel):
        layer = (rest if index else first)(config, index).to(dtype)
        op, what = ("strided_conv", f"k{kernel} {x.shape[2]}") if index else ("waveform_conv", "")
        yield op, what, *forward_and_backward(layer, (x,))
        x = torch.empty(BATCH, config.conv_dim[index], (x.shape[2] - kernel) // config.conv_stride[index] + 1,
                        dtype=dtype)  # fmt: skip


def _encoder(config: WavLMConfig, dtype: torch.dtype) -> Iterator[tuple[str, str, int, int]]:
    x = _frames(config.hidden_size, dtype)
    positional = hf.WavLMPositionalConvEmbedding(config).to(dtype)
    # Ours is given the weight with its norm applied; so is this one.
    norm = list(positional.conv.parametrizations.parameters())
    yield "positional_conv", "", *forward_and_backward(lambda x: x + positional(x), (x,), norm)
    feed_forward = hf.WavLMFeedForward(config).to(dtype)
    first = nn.Sequential(feed_forward.intermediate_dense, feed_forward.intermediate_act_fn)
    yield "linear_act", "", *forward_and_backward(first, (x,))
    layer = hf.WavLMEncoderLayer(config).to(dtype)
    yield "add_layer_norm", "", *_add_layer_norm(layer.layer_norm, x)


def _add_layer_norm(norm: nn.LayerNorm, x: torch.Tensor) -> tuple[int, int]:
    """Sum and norm, and the gradients of both: the sum is also what the next residual adds to."""
    forward, backward = TorchBytes(), TorchBytes()
    x, residual = (t.detach().requires_grad_() for t in (x, x.clone()))
    with forward:
        total = residual + x
        normed = norm(total)
    grads = [torch.empty_like(total) for _ in range(2)]
    with backward:
        torch.autograd.backward((total, normed), grads)
    return forward.total, backward.total


def _head(config: WavLMConfig, dtype: torch.dtype) -> Iterator[tuple[str, str, int, int]]:
    x = _frames(config.tdnn_dim[0], dtype)
    for index, (width, kernel, dilation) in enumerate(
        zip(config.tdnn_dim, config.tdnn_kernel, config.tdnn_dilation, strict=True)
    ):
        layer = hf.TDNNLayer(config, index).to(dtype)
        yield "tdnn", f"k{kernel} d{dilation} {width}", *forward_and_backward(layer, (x,))
        x = _frames(width, dtype, x.shape[1] - (kernel - 1) * dilation)
    # Without a mask, as transformers writes it; with one it takes a loop over the utterances.
    yield "stats_pool", "", *forward_and_backward(lambda x: torch.cat([x.mean(dim=1), x.std(dim=1)], dim=-1), (x,))


def matching(case: Case, found: dict[tuple[str, str], tuple[int, int]]) -> int:
    """The figure of transformers for a case of cases.py, forward or backward."""
    op = case.op.removesuffix("_backward")
    return found[op, "" if case.what == TO_WAVEFORM else case.what][case.op != op]
