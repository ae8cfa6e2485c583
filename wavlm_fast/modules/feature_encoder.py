"""Waveform to frames: the convolutional front end."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.models.wavlm import modeling_wavlm as hf

from .. import ops
from ..inputs import SAMPLE_RATE, check_waveform
from ._plain import fused_activation, same_dtype, why_not_plain
from ._steps import FastModule, Plan, frames_like, named, why_not_norm


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

    def plan(self) -> Iterator[Plan]:
        op = "waveform_conv" if self.in_conv_dim == 1 else "strided_conv"
        refusal = named("conv", _why_not_conv(self.conv))
        yield Plan(op, refusal, self._example)
        reason = named("layer_norm", self._why_not_norm())
        if reason is None and fused_activation(self.activation) is None:
            reason = f"activation is called: {type(self.activation).__name__} is not fused"
        if refusal is None and reason is not None:
            yield Plan(f"{op} epilogue", reason)

    def _example(self) -> tuple:
        conv, norm = self.conv, self.norm if self._why_not_norm() is None else "none"
        affine = (None, None) if norm == "none" else (self.layer_norm.weight, self.layer_norm.bias)
        activation = fused_activation(self.activation) or "none"
        if self.in_conv_dim == 1:
            waveform = torch.empty((1, SAMPLE_RATE), device=conv.weight.device, dtype=conv.weight.dtype)
            return waveform, conv.weight, conv.bias, conv.stride[0], norm, *affine, 1e-5, activation
        x = frames_like(conv.weight, self.in_conv_dim)
        return x, conv.weight, conv.bias, conv.stride[0], *affine, 1e-5, activation, False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Convolution, norm and activation, `[B, C, T]` to `[B, C', T']`."""
        conv = self.conv
        if _why_not_conv(conv) is not None or not same_dtype(hidden_states, conv.weight, conv.bias):
            return super().forward(hidden_states)
        fuse_norm = self._why_not_norm() is None
        activation = fused_activation(self.activation) if fuse_norm else None
        frames = self._convolve(hidden_states, self.norm if fuse_norm else "none", activation or "none")
        if not fuse_norm:
            frames = self._apply_norm(frames)
        frames = frames.transpose(1, 2)
        return self.activation(frames) if activation is None else frames

    def _convolve(self, hidden_states: Tensor, norm: str, activation: str) -> Tensor:
        """Time-major `[B, T', C']`."""
        conv, options = self.conv, {"stride": self.conv.stride[0], "activation": activation}
        if norm != "none":
            layer_norm = self.layer_norm
            options |= {"norm_weight": layer_norm.weight, "norm_bias": layer_norm.bias, "eps": layer_norm.eps}
        if self.in_conv_dim == 1:
            return ops.waveform_conv(hidden_states[:, 0], conv.weight, conv.bias, norm=norm, **options)
        return ops.strided_conv(hidden_states.transpose(1, 2), conv.weight, conv.bias, **options)


class FastWavLMNoLayerNormConvLayer(_FastConvLayer, hf.WavLMNoLayerNormConvLayer):
    """Convolution and activation."""


class FastWavLMLayerNormConvLayer(_FastConvLayer, hf.WavLMLayerNormConvLayer):
    """Convolution, layer norm over channels, activation."""

    norm = "layer"

    def _why_not_norm(self) -> str | None:
        return why_not_norm(self.layer_norm)

    def _apply_norm(self, frames: Tensor) -> Tensor:
        return self.layer_norm(frames)


class FastWavLMGroupNormConvLayer(_FastConvLayer, hf.WavLMGroupNormConvLayer):
    """Convolution, norm of every channel over time, activation."""

    norm = "group"

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


class FastWavLMFeatureEncoder(FastModule, hf.WavLMFeatureEncoder):
    """The convolution layers in turn."""

    def plan(self) -> Iterator[Plan]:
        return iter(())

    def forward(self, input_values: Tensor) -> Tensor:
        """Waveform `[B, S]` to channel-major frames `[B, C, T]`, whose memory is time-major.

        Raises:
            ValueError, TypeError: the waveform's shape, length or dtype does not fit.
        """
        convs = [layer.conv for layer in self.conv_layers]
        check_waveform(input_values, convs)
        hidden_states = input_values[:, None]
        checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in self.conv_layers)
        if self._requires_grad and self.training and checkpointed and torch.is_grad_enabled():
            # Reentrant checkpointing records nothing unless an input needs a gradient.
            hidden_states = hidden_states.detach().requires_grad_() if not input_values.requires_grad else hidden_states
        for conv_layer in self.conv_layers:
            hidden_states = conv_layer(hidden_states)
        return hidden_states
