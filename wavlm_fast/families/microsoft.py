"""Microsoft's own WavLM and its copies, s3prl's among them.

Layers take and give `[T, B, C]`, padding masks are True where padded, feed-forward and convolution blocks are no
modules of their own, and attention reads its projections' weights instead of calling them. The model's own
`extract_features` and the encoder's loop over the layers run as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..inputs import valid_lengths
from ..leaving import in_graph
from ..modules import (
    ConvLayer,
    FeatureEncoder,
    FeedForward,
    Inline,
    PositionalConv,
    Step,
)
from ..modules._masks import looked_at_once, valid_of
from ..modules._originals import or_original
from ..modules._packing import Packing, frames_of, valid_samples, with_valid_samples
from ..modules._plain import has_hooks, learn_activation, why_not_ordinary
from ..modules._position_bias import taken
from ..modules._steps import named, why_not_dropout
from ._copies import MODE, Call, Copy, calls, own_has
from ._layers import CopiedAttention, CopiedLayer
from .models import Model, with_bias_of_graphs

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_FRAMES = 11  # of trials


class _Block(ConvLayer, Inline):
    """One of the front end's layers: convolution, dropout, perhaps a norm, activation."""

    def __init__(self, block: nn.Sequential) -> None:
        super().__init__(block)
        self.block = block
        self.conv, self.dropout, *norms, self.activation = block
        if norms:
            self.norm = "layer" if isinstance(norms[0], nn.Sequential) else "group"
            self.layer_norm = norms[0][1] if self.norm == "layer" else norms[0]

    def why_called(self, but_captures: bool = False) -> str | None:
        parts = (self.conv, self.dropout, self.activation, *(() if self.norm == "none" else (self.layer_norm,)))
        if any(has_hooks(m) for m in self.block.modules() if m not in parts):
            return "it has hooks"
        return named("dropout", why_not_dropout(self.dropout))

    def own_forward(self, hidden_states: Tensor) -> Tensor:
        return self.block(hidden_states)

    def __call__(self, hidden_states: Tensor, *packed: Packing) -> Tensor:
        return self.convolve_valid(hidden_states) if self.counts_valid() else self.convolve(hidden_states, *packed)

    def _convolve(self, hidden_states: Tensor, packed: dict[str, Any]) -> Step:
        step = super()._convolve(hidden_states, packed)
        step.refusal = step.refusal or self.why_called()
        return step


class FrontEnd(FeatureEncoder, Copy):
    """Microsoft's `ConvFeatureExtractionModel`."""

    waveform_name = "source"

    @property
    def layers(self) -> list[_Block]:
        return [_Block(block) for block in self.conv_layers]

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        blocks = getattr(module, "conv_layers", None) or (None,)
        return all(isinstance(b, nn.Sequential) and len(b) in (3, 4) and isinstance(b[0], nn.Conv1d) for b in blocks)

    @classmethod
    def alike(cls, module: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
        norms = (nn.LayerNorm, nn.GroupNorm)
        return {type(m): known for m in module.modules() for known in norms if isinstance(m, known)}

    @staticmethod
    def trials(module: nn.Module) -> Iterator[Call]:
        waveform = torch.randn(2, 800, dtype=torch.float64)
        yield lambda own: own(waveform)

    @or_original
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Waveform `[B, S]` to channel-major frames `[B, C, T]`."""
        return self.encode(x)


class Positions(PositionalConv, Copy):
    """The positional convolution: an `nn.Sequential` of convolution, cut, activation."""

    @property
    def conv(self) -> nn.Module:
        return self[0]

    @property
    def activation(self) -> nn.Module:
        return self[2]

    def why_not_same(self) -> str | None:
        cut, surplus = self[1], 1 - self.conv.kernel_size[0] % 2
        if has_hooks(cut) or getattr(cut, "remove", None) != surplus:
            return f"{type(cut).__name__} is called: it has hooks, or does not cut {surplus} frames"
        return None

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return isinstance(module, nn.Sequential) and len(module) == 3 and isinstance(module[0], nn.Conv1d)

    @classmethod
    def alike(cls, module: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
        return {type(module[0]): nn.Conv1d}

    @staticmethod
    def trials(module: nn.Module) -> Iterator[Call]:
        frames = torch.randn(1, module[0].in_channels, _FRAMES, dtype=torch.float64)
        yield lambda own: own(frames)

    def own_forward(self, hidden_states: Tensor) -> Tensor:
        return self.run_original(hidden_states.mT).mT

    @or_original
    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, T]` frames to their positional embedding, the same shape."""
        frames = input.mT
        return self.embed(frames, frames_of(frames)).mT


class SelfAttention(CopiedAttention):
    """Microsoft's `MultiheadAttention`."""

    @property
    def gru_rel_pos_linear(self) -> nn.Module:
        return self.grep_linear

    @property
    def gru_rel_pos_const(self) -> Tensor:
        return self.grep_a

    @property
    def rel_attn_embed(self) -> nn.Module | None:
        return getattr(self, "relative_attention_bias", None)

    @property
    def attention_dropout(self) -> float:
        return self.dropout_module.p

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        names = (*_PROJECTIONS, "grep_linear", "grep_a", "dropout_module", "num_heads", "head_dim", "scaling")
        return own_has(module, *names)

    @staticmethod
    def trials(module: nn.Module) -> Iterator[Call]:
        x, bias = _frames(module.embed_dim), torch.randn(2 * module.num_heads, _FRAMES, _FRAMES, dtype=torch.float64)
        own_bias = None if hasattr(module, "relative_attention_bias") else bias
        padded = _padding()
        yield lambda own: own(x, x, x, position_bias=own_bias, need_weights=False)
        yield lambda own: own(x, x, x, key_padding_mask=padded, position_bias=bias, need_weights=False)

    def _projections(self, x: Tensor) -> list[Step]:
        steps = super()._projections(x)
        if len(steps) == 1:
            return steps
        linears = (self.q_proj, self.k_proj, self.v_proj)
        return [_called_as_theirs(step, linear, x) for step, linear in zip(steps, linears, strict=True)]

    def _leave(self, x: Tensor) -> Step:
        return _called_as_theirs(super()._leave(x), self.out_proj, x)

    @or_original
    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        *args: Any,
        need_weights: bool = True,
        position_bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Self-attention over frames `[T, B, C]`: the output, None, the position bias `[B·H, T, T]` for the next layer.

        Whatever else the original can do, it does.
        """
        asked = need_weights or args or any(value is not None and value is not False for value in options.values())
        without_bias = position_bias is None and self.rel_attn_embed is None
        if key is not query or value is not query or asked or without_bias:
            options |= {"need_weights": need_weights, "position_bias": position_bias}
            return self.run_original(query, key, value, key_padding_mask, *args, **options)
        frames = query.transpose(0, 1)
        out, _, bias = self.attend(frames, _mask(frames, key_padding_mask), taken(position_bias))
        return out.transpose(0, 1), None, self.handed_on(bias, position_bias, frames)


class ReadingAttention(SelfAttention):
    """One that reads its projections' weights: hooks and adapters on them never run, so they do not here."""

    def _why_not_read(self, *names: str) -> str | None:
        """Why the weights of these submodules cannot be read; None when they can, whatever hangs on the modules."""
        for name in names:
            for parameter in ("weight", "bias"):
                value = getattr(getattr(self, name), parameter, None)
                reason = f"it has no {parameter}" if value is None else why_not_ordinary(parameter, value)
                if reason is not None:
                    return named(name, reason)
        return None

    def _why_not_qkv(self) -> str | None:
        return self._why_not_read(*_PROJECTIONS[:3])

    def _why_not_out(self) -> str | None:
        return self._why_not_read("out_proj")

    def why_own_code(self) -> str | None:
        return self._why_not_read(*_PROJECTIONS)

    def _leave(self, x: Tensor) -> Step:
        weight, bias = self.out_proj.weight, self.out_proj.bias
        return Step("linear_act", None, lambda: ops.linear_act(x, weight, bias))


def _called_as_theirs(step: Step, module: nn.Module, x: Tensor) -> Step:
    """A step of which the module, if it is called, gets frames as `[T, B, C]`: whoever hooks it sees those."""
    step.called = lambda: module(x.transpose(0, 1)).transpose(0, 1)
    return step


def _mask(frames: Tensor, padding: Tensor | None) -> Tensor | Packing | None:
    """What stages take as their mask."""
    packing = frames_of(frames)
    return packing if packing is not None or padding is None else valid_of(padding)


class _FeedForward(FeedForward, Inline):
    """Feed-forward of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer.fc1, layer.fc2)
        self.intermediate_dense, self.output_dense = layer.fc1, layer.fc2
        self.intermediate_dropout, self.output_dropout = layer.dropout2, layer.dropout3
        self.intermediate_act_fn = layer.activation_fn

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return self.feed(hidden_states)


class Layer(CopiedLayer):
    """Microsoft's `TransformerSentenceEncoderLayer`."""

    @property
    def owns_bias(self) -> bool:
        return getattr(self.self_attn, "relative_attention_bias", None) is not None

    @property
    def attention(self) -> nn.Module:
        return self.self_attn

    @property
    def attention_half_dropout(self) -> nn.Module:
        return self.dropout1

    @property
    def layer_norm(self) -> nn.Module:
        return self.self_attn_layer_norm

    @property
    def feed_forward(self) -> _FeedForward:
        return _FeedForward(self)

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        names = ("fc1", "fc2", "dropout1", "dropout2", "dropout3", "activation_fn", "layer_norm_first")
        names += ("self_attn_layer_norm", "final_layer_norm")
        return own_has(module, "self_attn", *names) and SelfAttention.recognises(module.self_attn)

    @staticmethod
    def trials(module: nn.Module) -> Iterator[Call]:
        attention = module.self_attn
        x = _frames(attention.embed_dim)
        bias = torch.randn(2 * attention.num_heads, _FRAMES, _FRAMES, dtype=torch.float64)
        own_bias = None if hasattr(attention, "relative_attention_bias") else bias
        padded = _padding()
        yield lambda own: own(x, pos_bias=own_bias)
        yield lambda own: own(x, self_attn_padding_mask=padded, need_weights=False, pos_bias=bias)

    def call_attention(
        self, hidden_states: Tensor, mask: Tensor | Packing | None, position_bias: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = hidden_states
        return self.self_attn(
            query=x, key=x, value=x, key_padding_mask=mask, need_weights=False, attn_mask=None,
            position_bias=position_bias,
        )  # fmt: skip

    @or_original
    def forward(
        self,
        x: Tensor,
        self_attn_mask: Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        pos_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Frames `[T, B, C]`, None, and the position bias `[B·H, T, T]` for the next layer."""
        without_bias = pos_bias is None and not self.owns_bias
        if self_attn_mask is not None or need_weights or without_bias:
            return self.run_original(x, self_attn_mask, self_attn_padding_mask, need_weights, pos_bias)
        frames = x.transpose(0, 1)
        whole = self._whole(frames, _mask(frames, self_attn_padding_mask), taken(pos_bias), False)
        if whole.refusal is None:
            out, bias = whole.fused()
            return out.transpose(0, 1), None, self.handed_on(bias, pos_bias, frames)
        out, bias, weights = self.run_parts(x, self_attn_padding_mask, pos_bias)  # who hooks a part sees `[T, B, C]`
        return out, weights, bias


def _frames(channels: int) -> Tensor:
    return torch.randn(_FRAMES, 2, channels, dtype=torch.float64)


def _padding() -> Tensor:
    return torch.arange(_FRAMES) >= torch.tensor([[_FRAMES], [_FRAMES - 4]])


class Whole(Model):
    """Microsoft's `WavLM`."""

    boundary = ("extract_features", "forward_padding_mask")

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        if not own_has(module, "encoder", "feature_extractor") or not _is_encoder(module.encoder):
            return False
        return _signature(getattr(module, "original", type(module))) is not None

    @staticmethod
    def run(model: nn.Module, waveforms: Tensor, **options: Any) -> Any:
        return model.extract_features(waveforms, **options)[0]

    @staticmethod
    def map_frames(function: Callable[..., Tensor], *outputs: Any) -> Any:
        if isinstance(outputs[0], Tensor):
            return function(*outputs)

        def time_major(*frames: Tensor) -> Tensor:
            return function(*(x.transpose(0, 1) for x in frames)).transpose(0, 1)

        features, layers = zip(*outputs, strict=True)
        results = [(time_major(*(x for x, _ in own)), own[0][1]) for own in zip(*layers, strict=True)]
        return function(*features), results

    def layers_of_model(self) -> nn.ModuleList:
        return self.encoder.layers

    @with_bias_of_graphs
    def extract_features(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
        """As the original's: features `[B, T, C]`, or with `ret_layer_results` those and a list of every layer's output
        `[T, B, C]`; and the padding mask `[B, T]`.

        In exact batches every row is as if alone, and zero past its end.
        """
        original = self.original.extract_features
        if MODE not in self.__dict__:
            if torch.compiler.is_compiling():
                return original(self, *args, **kwargs)
            with looked_at_once():
                return original(self, *args, **kwargs)
        given = dict(_signature(self.original).bind(self, *args, **kwargs).arguments)
        padding, source = given.pop("padding_mask", None), given.pop("source")
        if padding is None or frames_of(source) is not None:
            return original(self, *args, **kwargs)
        del given[next(iter(given))]  # self
        valid = ~padding.bool()
        if in_graph(source):
            return self._masked(source, valid, given)
        if valid.shape != source.shape:
            shapes = f"{list(source.shape)}, got {list(valid.shape)}"
            raise ValueError(f"padding 'exact' wants a padding_mask of the shape of source, {shapes}")
        lengths = valid_lengths(valid, self.samples_needed(), "a padding_mask that is False, then True")

        def run(waveforms: Tensor) -> Any:
            return original(self, waveforms, **given)[0]

        outputs, counts = self.run_exact(source, lengths, run, alone=bool(given.get("mask")))
        frames = torch.arange(self.frames_of(outputs), device=source.device)
        return outputs, frames >= torch.tensor(counts, device=source.device)[:, None]

    def _masked(self, source: Tensor, valid: Tensor, given: dict[str, Any]) -> tuple[Any, Tensor]:
        """The outputs of a padded batch whose lengths cannot be looked at."""
        with with_valid_samples(valid.sum(-1)):
            outputs, padded = self.original.extract_features(self, source, ~valid, **given)
        return self.map_frames(lambda x: x.masked_fill(padded[..., None], 0), outputs), padded

    def forward_padding_mask(self, features: Tensor, padding_mask: Tensor) -> Tensor:
        """As the original's; in such a batch True at frames that no valid samples alone make."""
        samples = valid_samples()
        if samples is None:
            return self.original.forward_padding_mask(self, features, padding_mask)
        for width, stride in self.convolutions():
            samples = (samples - width) // stride + 1
        return torch.arange(features.shape[1], device=samples.device) >= samples[:, None]


def _signature(cls: type) -> inspect.Signature | None:
    """Of `extract_features`: of the first class that names what it takes; None where that is not as Microsoft's."""
    for own in cls.__mro__:
        if not inspect.isfunction(vars(own).get("extract_features")):
            continue
        signature = inspect.signature(vars(own)["extract_features"])
        if {"source", "padding_mask"} <= set(signature.parameters):
            return signature
        kinds = {parameter.kind for name, parameter in signature.parameters.items() if name not in ("self", "source")}
        if kinds != {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            return None
    return None


def recognised(model: nn.Module) -> Iterator[tuple[nn.Module, type[Copy]]]:
    """Every module of a Microsoft WavLM in a module, the inner ones first, and the base of what stands in for it."""
    for module in reversed(list(model.modules())):
        if SelfAttention.recognises(module):
            ours = isinstance(module, SelfAttention)
            yield module, SelfAttention if ours or _calls_projections(module) else ReadingAttention
        elif Layer.recognises(module):
            learn_activation(module.activation_fn)
            yield module, Layer
        elif _is_encoder(module) and Positions.recognises(module.pos_conv):
            yield module.pos_conv, Positions
        elif own_has(module, "encoder", "feature_extractor") and _is_encoder(module.encoder):
            if FrontEnd.recognises(module.feature_extractor):
                yield module.feature_extractor, FrontEnd
            if Whole.recognises(module):
                yield module, Whole


def _calls_projections(attention: nn.Module) -> bool:
    return calls(attention, "q_proj", lambda: next(SelfAttention.trials(attention)))


def _is_encoder(module: nn.Module | None) -> bool:
    if not own_has(module, "layers", "pos_conv"):
        return False
    return isinstance(module.layers, nn.ModuleList) and any(map(Layer.recognises, module.layers))


def transformer_of(model: nn.Module) -> nn.Module | None:
    return model.encoder if Whole.recognises(model) else None


def has_norm_behind(transformer: nn.Module) -> bool:
    return _is_encoder(transformer) and transformer.layer_norm_first


def relative(model: nn.Module) -> str | None:
    """What a model is whose layers are Microsoft's or fairseq's, and whose attention is no WavLM's."""
    for module in model.modules():
        attention = getattr(module, "self_attn", None)
        if hasattr(module, "fc1") and hasattr(attention, "k_proj") and not SelfAttention.recognises(attention):
            return "a HuBERT or wav2vec 2.0 of Microsoft's or fairseq's code"
    return None
