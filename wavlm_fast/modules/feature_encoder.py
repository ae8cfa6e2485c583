"""Waveform to frames: the convolutional front end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..inputs import check_waveform
from ..ops._define import accumulation_dtype, needs_grad
from ._packing import Packing, resized, stages_of, valid_samples
from ._plain import fused_activation, why_mixed, why_not_plain
from ._steps import Signal, Step, named, parts_of, steps_of, why_not_norm


def _why_not_conv(conv: nn.Module) -> str | None:
    reason = why_not_plain(conv, nn.Conv1d)
    if reason is None and (conv.padding, conv.dilation, conv.groups) != ((0,), (1,), 1):
        return "it has padding, dilation or groups"
    return reason


class ConvLayer:
    """Convolution, norm, activation. Channel-major `[B, C, T]` outside, time-major memory inside.

    Made of `conv`, `activation` and, unless `norm` is "none", `layer_norm`: with "layer" a layer norm over channels,
    with "group" a norm of every channel over time.
    """

    norm = "none"
    conv: Any
    layer_norm: Any
    activation: Any

    @property
    def in_channels(self) -> int:
        return self.conv.in_channels

    def own_forward(self, hidden_states: Tensor) -> Tensor:
        """What the family's own module does."""
        raise NotImplementedError

    def _why_not_norm(self) -> str | None:
        if self.norm == "none":
            return None
        if self.norm == "layer":
            return why_not_norm(self.layer_norm)
        norm = self.layer_norm
        reason = why_not_plain(norm, nn.GroupNorm)
        if reason is None and not norm.affine:
            return "it has no weight or no bias"
        if reason is None and norm.num_groups != norm.num_channels:
            return f"it has {norm.num_groups} groups for {norm.num_channels} channels"
        return reason

    def _apply_norm(self, frames: Tensor) -> Tensor:
        """The norm's module, called on time-major frames."""
        return self.layer_norm(frames) if self.norm == "layer" else self.layer_norm(frames.mT).mT

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

    def steps(self, signal: Signal) -> Iterator[Step]:
        frames = signal.frames(self.conv, self.in_channels, count=signal.samples).transpose(1, 2)
        step, epilogue = self._convolve(frames, {}), self._why_not_epilogue()
        yield step
        if step.refusal is None and epilogue is not None:
            yield Step(f"{step.op} epilogue", epilogue)
        if isinstance(self.conv, nn.Conv1d):
            signal.samples = (signal.samples - self.conv.kernel_size[0]) // self.conv.stride[0] + 1

    def convolve(
        self, hidden_states: Tensor, packing: Packing | None = None, after: Packing | None = None
    ) -> Tensor:
        """Convolution, norm and activation, `[B, C, T]` to `[B, C', T']`; packed frames `[1, C, N]` with their packing
        before and after.
        """
        step = self._convolve(hidden_states, {} if packing is None else resized(packing, after))
        if step.refusal is not None:
            if packing is None:
                return self.own_forward(hidden_states)
            return torch.cat([self.own_forward(own) for own in packing.utterances(hidden_states, 2)], 2)
        frames, epilogue = step.fused(), self._why_not_epilogue()
        if epilogue is not None and self._why_not_norm() is not None:
            frames = self._apply_norm(frames) if after is None else after.each(self._apply_norm, frames)
        frames = frames.transpose(1, 2)
        return frames if epilogue is None else self.activation(frames)

    def _convolve(self, hidden_states: Tensor, packed: dict[str, Any]) -> Step:
        """The convolution with what can be fused of norm and activation, to time-major `[B, T', C']`."""
        conv = self.conv
        refusal = _why_not_conv(conv) or why_mixed(hidden_states, conv.weight, conv.bias)

        def fused() -> Tensor:
            fuse_norm = self._why_not_norm() is None
            activation = fused_activation(self.activation) if fuse_norm else None
            options = {"stride": conv.stride[0], "activation": activation or "none", **packed}
            if fuse_norm and self.norm != "none":
                norm = self.layer_norm
                options |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
            if self.in_channels > 1:
                return ops.strided_conv(hidden_states.transpose(1, 2), conv.weight, conv.bias, **options)
            norm = self.norm if fuse_norm else "none"
            return ops.waveform_conv(hidden_states[:, 0], conv.weight, conv.bias, norm=norm, **options)

        op = "waveform_conv" if self.in_channels == 1 else "strided_conv"
        return Step(op, named("conv", refusal), fused)

    def counts_valid(self) -> bool:
        """Whether statistics over time are of valid samples only: in a graph of padded rows, to be as if alone."""
        return self.norm == "group" and valid_samples() is not None and self._why_not_norm() is None

    def convolve_valid(self, hidden_states: Tensor) -> Tensor:
        """The layer in plain torch on padded rows `[B, 1, S]`, where `counts_valid`."""
        samples = valid_samples()
        frames = self.conv(hidden_states)
        lengths = torch.div(samples - self.conv.kernel_size[0], self.conv.stride[0], rounding_mode="floor") + 1
        valid = (torch.arange(frames.shape[2], device=frames.device) < lengths[:, None])[:, None]
        wide = torch.where(valid, frames.to(accumulation_dtype(frames.dtype)), 0)
        count = lengths[:, None, None].to(wide.dtype)
        centred = torch.where(valid, wide - wide.sum(2, keepdim=True) / count, 0)
        deviation = (centred.square().sum(2, keepdim=True) / count + self.layer_norm.eps).sqrt()
        normed = centred / deviation * self.layer_norm.weight[:, None] + self.layer_norm.bias[:, None]
        return self.activation(normed.to(frames.dtype))


class FeatureEncoder:
    """The convolution layers, `layers`: as one op while no gradient is wanted, else in turn."""

    waveform_name = "input_values"  # as callers know it

    @property
    def layers(self) -> Sequence[nn.Module | ConvLayer]:
        return self.conv_layers

    def _why_not_whole(self) -> str | None:
        layers = self.layers
        for index, layer in enumerate(layers):
            reason = f"it is a {type(layer).__name__}"
            if isinstance(layer, ConvLayer):
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
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, ConvLayer):
                return f"feature_extractor layer {index} is called: it is a {type(layer).__name__}"
        return None

    def _options(self) -> dict[str, Any]:
        """What `ops.feature_encoder` takes besides the waveform."""
        layers = self.layers
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

    def steps(self, signal: Signal) -> Iterator[Step]:
        whole = self._whole(signal.frames(self, count=signal.samples), None)
        if whole.refusal is None:
            yield whole
        else:
            parts = (step for layer in self.layers for step in steps_of(layer, signal))
            yield from parts_of(whole, self._why_not_whole(), parts)

    def _whole(self, waveform: Tensor, stages: list[Packing] | None) -> Step:
        """All layers as one op, to time-major `[B, T, C]`."""
        refusal, packed = None, {} if stages is None else resized(stages[0], stages[-1])
        parameters = [p for layer in self.layers for p in layer.parameters()]
        if needs_grad(waveform, *parameters):
            refusal = "a gradient is wanted"
        elif valid_samples() is not None:
            refusal = "norms over time count valid samples only"
        elif stages is not None and waveform.device.type != "cpu":
            # Off the CPU the op runs as its layers, and would have to look at the offsets to make theirs.
            refusal = "packed samples run layer by layer off the CPU"

        def fused() -> Tensor:
            return ops.feature_encoder(waveform, **self._options(), **packed)

        return Step("feature_encoder", refusal or self._why_not_whole() or why_mixed(waveform, *parameters), fused)

    def encode(self, waveform: Tensor) -> Tensor:
        """Waveform `[B, S]`, or packed ones `[1, S]`, to channel-major frames `[B, C, T]`, whose memory is time-major.

        Raises:
            ValueError, TypeError: the waveform's shape, length or dtype does not fit.
        """
        layers = self.layers
        check_waveform(waveform, [layer.conv for layer in layers], self.waveform_name)
        stages = stages_of(waveform)
        whole = self._whole(waveform, stages)
        if whole.refusal is None:
            return whole.fused().transpose(1, 2)
        hidden_states = self.entering(waveform)
        for index, layer in enumerate(layers):
            packed = () if stages is None else stages[index : index + 2]
            hidden_states = self.call_layer(layer, hidden_states, packed)
        return hidden_states

    def call_layer(
        self, layer: nn.Module | ConvLayer, hidden_states: Tensor, packed: Sequence[Packing]
    ) -> Tensor:
        """What a layer makes of frames `[B, C, T]`; of packed ones come their packing before and after."""
        return layer(hidden_states, *packed)

    def entering(self, waveform: Tensor) -> Tensor:
        """What the first layer gets, `[B, 1, S]`."""
        return waveform[:, None]
