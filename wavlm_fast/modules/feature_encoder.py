"""Waveform to frames: the convolutional front end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.wavlm import modeling_wavlm as hf

from .. import ops
from .._private import is_frozen
from ..inputs import SAMPLE_RATE, check_waveform
from ..ops._define import accumulation_dtype, needs_grad
from ._originals import or_original, stands_in_for
from ._packing import Packing, resized, stages_of, valid_samples
from ._plain import fused_activation, same_dtype, why_not_plain
from ._steps import FastModule, Plan, frames_like, has_kernel, named, why_not_norm


def _why_not_conv(conv: nn.Module) -> str | None:
    reason = why_not_plain(conv, nn.Conv1d)
    if reason is None and (conv.padding, conv.dilation, conv.groups) != ((0,), (1,), 1):
        return "it has padding, dilation or groups"
    return reason


class _FastConvLayer(FastModule):
    """What the three kinds of convolution layer share. Channel-major `[B, C, T]` outside, time-major memory inside."""

    norm = "none"

    def _why_not_norm(self) -> str | None:
        return None

    def _apply_norm(self, frames: Tensor) -> Tensor:
        return frames

    def _why_not_epilogue(self) -> str | None:
        reason = named("layer_norm", self._why_not_norm())
        if reason is None and fused_activation(self.activation) is None:
            return f"activation is called: {type(self.activation).__name__} is not fused"
        return reason

    def why_not_fused(self) -> str | None:
        """Why the layer is not one op; None when it is."""
        return named("conv", _why_not_conv(self.conv)) or self._why_not_epilogue()

    def norm_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the norm."""
        return (None, None) if self.norm == "none" else (self.layer_norm.weight, self.layer_norm.bias)

    def plan(self) -> Iterator[Plan]:
        op = "waveform_conv" if self.in_conv_dim == 1 else "strided_conv"
        refusal, reason = named("conv", _why_not_conv(self.conv)), self._why_not_epilogue()
        yield Plan(op, refusal, self._example)
        if refusal is None and reason is not None:
            yield Plan(f"{op} epilogue", reason)

    def _example(self) -> tuple:
        conv, norm = self.conv, self.norm if self._why_not_norm() is None else "none"
        affine = (None, None) if norm == "none" else self.norm_parameters()
        activation = fused_activation(self.activation) or "none"
        if self.in_conv_dim == 1:
            waveform = torch.empty((1, SAMPLE_RATE), device=conv.weight.device, dtype=conv.weight.dtype)
            return waveform, conv.weight, conv.bias, conv.stride[0], norm, *affine, 1e-5, activation
        x = frames_like(conv.weight, self.in_conv_dim)
        return x, conv.weight, conv.bias, conv.stride[0], *affine, 1e-5, activation, False

    @or_original
    def forward(
        self, hidden_states: Tensor, packing: Packing | None = None, after: Packing | None = None
    ) -> Tensor:
        """Convolution, norm and activation, `[B, C, T]` to `[B, C', T']`; packed frames `[1, C, N]` with their packing
        before and after.
        """
        conv = self.conv
        if _why_not_conv(conv) is not None or not same_dtype(hidden_states, conv.weight, conv.bias):
            if packing is None:
                return super().forward(hidden_states)
            return torch.cat([super().forward(own) for own in packing.utterances(hidden_states, 2)], 2)
        fuse_norm = self._why_not_norm() is None
        activation = fused_activation(self.activation) if fuse_norm else None
        packed = {} if packing is None else resized(packing, after)
        frames = self._convolve(hidden_states, self.norm if fuse_norm else "none", activation or "none", packed)
        if not fuse_norm:
            frames = self._apply_norm(frames) if after is None else after.each(self._apply_norm, frames)
        frames = frames.transpose(1, 2)
        return self.activation(frames) if activation is None else frames

    def _convolve(self, hidden_states: Tensor, norm: str, activation: str, packed: dict[str, Any]) -> Tensor:
        """Time-major `[B, T', C']`."""
        conv, options = self.conv, {"stride": self.conv.stride[0], "activation": activation, **packed}
        if norm != "none":
            layer_norm = self.layer_norm
            options |= {"norm_weight": layer_norm.weight, "norm_bias": layer_norm.bias, "eps": layer_norm.eps}
        if self.in_conv_dim == 1:
            return ops.waveform_conv(hidden_states[:, 0], conv.weight, conv.bias, norm=norm, **options)
        return ops.strided_conv(hidden_states.transpose(1, 2), conv.weight, conv.bias, **options)


@stands_in_for(hf.WavLMNoLayerNormConvLayer)
class FastWavLMNoLayerNormConvLayer(_FastConvLayer, hf.WavLMNoLayerNormConvLayer):
    """Convolution and activation."""


@stands_in_for(hf.WavLMLayerNormConvLayer)
class FastWavLMLayerNormConvLayer(_FastConvLayer, hf.WavLMLayerNormConvLayer):
    """Convolution, layer norm over channels, activation."""

    norm = "layer"

    def _why_not_norm(self) -> str | None:
        return why_not_norm(self.layer_norm)

    def _apply_norm(self, frames: Tensor) -> Tensor:
        return self.layer_norm(frames)


@stands_in_for(hf.WavLMGroupNormConvLayer)
class FastWavLMGroupNormConvLayer(_FastConvLayer, hf.WavLMGroupNormConvLayer):
    """Convolution, norm of every channel over time, activation."""

    norm = "group"

    def forward(self, hidden_states: Tensor, *packed: Packing) -> Tensor:
        """As its base class's; in a graph of padded rows that are to be as if alone, statistics are of valid frames."""
        valid = valid_samples()
        if valid is None or self._why_not_norm() is not None:
            return super().forward(hidden_states, *packed)
        return self._forward_over(hidden_states, valid)

    def _forward_over(self, hidden_states: Tensor, samples: Tensor) -> Tensor:
        """The layer in plain torch on padded rows `[B, 1, S]` with so many valid samples each, `[B]`."""
        frames = self.conv(hidden_states)
        lengths = torch.div(samples - self.conv.kernel_size[0], self.conv.stride[0], rounding_mode="floor") + 1
        valid = (torch.arange(frames.shape[2], device=frames.device) < lengths[:, None])[:, None]
        wide = torch.where(valid, frames.to(accumulation_dtype(frames.dtype)), 0)
        count = lengths[:, None, None].to(wide.dtype)
        centred = torch.where(valid, wide - wide.sum(2, keepdim=True) / count, 0)
        deviation = (centred.square().sum(2, keepdim=True) / count + self.layer_norm.eps).sqrt()
        normed = centred / deviation * self.layer_norm.weight[:, None] + self.layer_norm.bias[:, None]
        return self.activation(normed.to(frames.dtype))

    def _why_not_norm(self) -> str | None:
        norm = self.layer_norm
        reason = why_not_plain(norm, nn.GroupNorm)
        if reason is None and not norm.affine:
            return "it has no weight or no bias"
        if reason is None and norm.num_groups != norm.num_channels:
            return f"it has {norm.num_groups} groups for {norm.num_channels} channels"
        return reason

    def _apply_norm(self, frames: Tensor) -> Tensor:
        return self.layer_norm(frames.transpose(1, 2)).transpose(1, 2)


@stands_in_for(hf.WavLMFeatureEncoder)
class FastWavLMFeatureEncoder(FastModule, hf.WavLMFeatureEncoder):
    """The convolution layers: as one op while no gradient is wanted, else in turn."""

    def _why_not_whole(self) -> str | None:
        layers = self.conv_layers
        for index, layer in enumerate(layers):
            reason = f"it is a {type(layer).__name__}"
            if isinstance(layer, _FastConvLayer):
                reason = layer.why_called() or layer.why_not_fused()
            if reason is not None:
                return f"layer {index} is called: {reason}"
        norms = [layer.layer_norm for layer in layers if layer.norm != "none"]
        if len({norm.eps for norm in norms}) > 1 or len({fused_activation(layer.activation) for layer in layers}) > 1:
            return "the layers differ in eps or activation"
        if len({layer.conv.bias is None for layer in layers}) > 1:
            return "some layers have a bias and some have none"
        return None

    def why_not_packed(self) -> str | None:
        """Why packed samples cannot come in; None when they can."""
        for index, layer in enumerate(self.conv_layers):
            if not isinstance(layer, _FastConvLayer):
                return f"feature_extractor layer {index} is called: it is a {type(layer).__name__}"
        return None

    def _options(self) -> dict[str, Any]:
        """What `ops.feature_encoder` takes besides the waveform."""
        layers = self.conv_layers
        norms = [layer.layer_norm for layer in layers if layer.norm != "none"]
        return {
            "weights": [layer.conv.weight for layer in layers],
            "biases": [layer.conv.bias for layer in layers if layer.conv.bias is not None],
            "strides": [layer.conv.stride[0] for layer in layers],
            "norm": layers[0].norm,
            "norm_weights": [norm.weight for norm in norms],
            "norm_biases": [norm.bias for norm in norms],
            "eps": norms[0].eps if norms else 1e-5,
            "activation": fused_activation(layers[0].activation),
        }

    def plan(self) -> Iterator[Plan]:
        if self._runs_whole():
            yield Plan("feature_encoder", None, self._example)

    def planned(self) -> Iterator[nn.Module]:
        return iter(self.conv_layers if self._runs_whole() else ())

    def _runs_whole(self) -> bool:
        wants_gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if wants_gradient or self._why_not_whole() is not None:
            return False
        return has_kernel("feature_encoder", self._example())

    def _example(self) -> tuple:
        weight = self.conv_layers[0].conv.weight
        waveform = torch.empty((1, SAMPLE_RATE), device=weight.device, dtype=weight.dtype)
        return waveform, *self._options().values()

    @or_original
    def forward(self, input_values: Tensor) -> Tensor:
        """Waveform `[B, S]`, or packed ones `[1, S]`, to channel-major frames `[B, C, T]`, whose memory is time-major.

        Raises:
            ValueError, TypeError: the waveform's shape, length or dtype does not fit.
        """
        convs = [layer.conv for layer in self.conv_layers]
        check_waveform(input_values, convs)
        parameters = [p for layer in self.conv_layers for p in layer.parameters()]
        wants_gradient = needs_grad(input_values, *parameters)
        stages = stages_of(input_values)
        # Off the CPU the op runs as its layers, and would have to look at the offsets to make theirs.
        whole = valid_samples() is None and (stages is None or input_values.device.type == "cpu")
        if whole and not wants_gradient and self._why_not_whole() is None and same_dtype(input_values, *parameters):
            packed = {} if stages is None else resized(stages[0], stages[-1])
            return ops.feature_encoder(input_values, **self._options(), **packed).transpose(1, 2)
        hidden_states = input_values[:, None]
        checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in self.conv_layers)
        if not is_frozen(self) and self.training and checkpointed and torch.is_grad_enabled():
            # Reentrant checkpointing records nothing unless an input needs a gradient.
            hidden_states = hidden_states.detach().requires_grad_() if not input_values.requires_grad else hidden_states
        for index, conv_layer in enumerate(self.conv_layers):
            packed = () if stages is None else stages[index : index + 2]
            hidden_states = conv_layer(hidden_states, *packed)
        return hidden_states
