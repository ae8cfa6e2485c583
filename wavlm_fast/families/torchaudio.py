"""torchaudio's WavLM, a `Wav2Vec2Model`, and forks of it that were pruned, as DiariZen's.

Frames are `[B, T, C]`. Attention keeps queries, keys and values in one weight; in a pruned fork it has projections of
its own for the heads that remain, of a gate and a bias of all. Blocks of the front end hand on lengths beside frames.
The model's own `extract_features`, `forward` and loop over the layers run as they are, but for `lengths`, at which
torchaudio's attention fails: here every row is then as if alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..inputs import check_lengths_of_rows
from ..leaving import in_graph
from ..modules import ConvLayer, FeatureEncoder, FeatureProjection, FeedForward, PositionalConv
from ..modules._originals import or_original
from ..modules._packing import Packing, frames_of, padded_rows
from ..modules._plain import why_mixed, why_not_ordinary
from ..modules._position_bias import taken
from ..modules._steps import Signal, Step, named, steps_of_children
from ._copies import MODE, Call, Copy, own_has
from ._factories import Factories
from ._layers import CopiedAttention, CopiedLayer
from .models import Model, with_bias_of_graphs

_GELU = nn.GELU()  # what they compute between their modules


class _Prunable(Copy):
    """Mixed into what a fork prunes."""

    def why_own_code(self) -> str | None:
        """While it is being pruned, it learns what to leave out: masks that ours know nothing of."""
        masks = (name for name, child in self.named_children() if name.startswith("hard_concrete"))
        return next((f"its {name} is called" for name in masks), None)


class Block(ConvLayer, _Prunable):
    """torchaudio's `ConvLayerBlock`."""

    activation = _GELU

    @property
    def norm(self) -> str:
        if self.layer_norm is None:
            return "none"
        return "group" if isinstance(self.layer_norm, nn.GroupNorm) else "layer"

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return own_has(module, "conv", "layer_norm") and isinstance(module.conv, nn.Conv1d)

    @classmethod
    def alike(cls, module: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
        return {type(module.layer_norm): nn.LayerNorm} if isinstance(module.layer_norm, nn.LayerNorm) else {}

    @staticmethod
    def trials(module: nn.Module) -> Iterator[Call]:
        frames, lengths = torch.randn(2, module.conv.in_channels, 60, dtype=torch.float64), torch.tensor([60, 31])
        yield lambda own: own(frames, lengths)

    def _apply_norm(self, frames: Tensor) -> Tensor:
        return self.layer_norm(frames.mT).mT

    def own_forward(self, hidden_states: Tensor) -> Tensor:
        return self.run_original(hidden_states, None)[0]

    @or_original
    def forward(
        self, x: Tensor, length: Tensor | Sequence[Packing] | None
    ) -> tuple[Tensor, Tensor | Sequence[Packing] | None]:
        """`[B, C, T]` to `[B, C', T']`, and how many of its frames are valid; or packings of packed frames."""
        if isinstance(length, Tensor) or length is None:
            return self.convolve(x), _frames_left(length, [self.conv])
        return self.convolve(x, *length), length


def _frames_left(length: Tensor | None, convs: Sequence[nn.Conv1d]) -> Tensor | None:
    """Valid frames `[B]` after convolutions of so many samples or frames."""
    if length is None:
        return None
    for conv in convs:
        length = ((length - conv.kernel_size[0]) // conv.stride[0] + 1).clamp(min=0)
    return length


class FrontEnd(FeatureEncoder, Copy):
    """torchaudio's `FeatureExtractor`."""

    waveform_name = "waveforms"

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return all(Block.recognises(block) for block in getattr(module, "conv_layers", (None,)))

    @staticmethod
    def trials(module: nn.Module) -> Iterator[Call]:
        waveforms, lengths = torch.randn(2, 1200, dtype=torch.float64), torch.tensor([1200, 901])
        yield lambda own: own(waveforms, lengths)

    def call_layer(self, layer: nn.Module, hidden_states: Tensor, packed: Sequence[Packing]) -> Tensor:
        return layer(hidden_states, packed or None)[0]

    @or_original
    def forward(self, x: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Waveforms `[B, S]` to frames `[B, T, C]`, and how many of them are valid."""
        frames = self.encode(x).transpose(1, 2)
        if hasattr(self, "dummy_weight"):  # pruning's mask of the last channels
            frames = frames * self.dummy_weight
        return frames, _frames_left(length, [block.conv for block in self.conv_layers])


class Projection(FeatureProjection, Copy):
    """torchaudio's `FeatureProjection`."""

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return own_has(module, "layer_norm", "projection", "dropout")

    @staticmethod
    def trials(module: nn.Module) -> Iterator[Call]:
        frames = torch.randn(2, 9, *module.layer_norm.normalized_shape, dtype=torch.float64)
        yield lambda own: own(frames)

    @or_original
    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, T, C']`."""
        return self.project(x)[0]


class Positions(PositionalConv, Copy):
    """torchaudio's `ConvolutionalPositionalEmbedding`."""

    activation = _GELU

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return own_has(module, "num_remove", "conv") and isinstance(module.conv, nn.Conv1d)

    @staticmethod
    def trials(module: nn.Module) -> Iterator[Call]:
        frames = torch.randn(2, 40, module.conv.in_channels, dtype=torch.float64)
        yield lambda own: own(frames)

    def why_not_same(self) -> str | None:
        surplus = 1 - self.conv.kernel_size[0] % 2
        return None if self.num_remove == surplus else f"it cuts {self.num_remove} frames, not {surplus}"

    def own_forward(self, hidden_states: Tensor) -> Tensor:
        return self.run_original(hidden_states)

    @or_original
    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, C]` frames to their positional embedding, the same shape."""
        return self.embed(x, frames_of(x))


class _AnyAttention(CopiedAttention, _Prunable):
    """What both kinds of attention share."""

    @classmethod
    def trials(cls, module: nn.Module) -> Iterator[Call]:
        x, bias = _frames(module.embed_dim), cls._bias(module)
        yield lambda own: own(x, position_bias=bias if own.rel_attn_embed is None else None)
        yield lambda own: own(x, position_bias=bias)

    @classmethod
    def _bias(cls, module: nn.Module) -> Tensor:
        return torch.randn(cls.shape_of_bias(2, module.gru_rel_pos_const.numel(), 23), dtype=torch.float64)

    @or_original
    def forward(
        self,
        query: Tensor,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention over frames `[B, T, C]`, and the position bias for the next layer."""
        without_bias = position_bias is None and self.rel_attn_embed is None
        if attention_mask is not None or key_padding_mask is not None or without_bias:
            masks = {"key_padding_mask": key_padding_mask, "attention_mask": attention_mask}
            return self.run_original(query, **masks, position_bias=position_bias)
        out, _, bias = self.attend(query, frames_of(query), taken(position_bias))
        return out, self.handed_on(bias, position_bias, query)

    def dense_position_bias(self, batch: int, frames: int) -> Tensor:
        dense = self.compute_bias(frames, frames)
        return dense.repeat(batch, 1, 1).view(self.shape_of_bias(batch, len(dense), frames))


class SelfAttention(_AnyAttention):
    """torchaudio's `WavLMSelfAttention`: it calls the output projection, and reads the weight of the others."""

    @property
    def out_proj(self) -> nn.Module:
        return self.attention.out_proj

    @property
    def scaling(self) -> float:
        return self.head_dim**-0.5

    @staticmethod
    def shape_of_bias(batch: int, heads: int, frames: int) -> tuple[int, ...]:
        return (batch, heads, frames, frames)

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        names = ("gru_rel_pos_linear", "gru_rel_pos_const", "rel_attn_embed", "num_heads", "head_dim")
        return own_has(module, "attention", *names) and isinstance(module.attention, nn.MultiheadAttention)

    @classmethod
    def alike(cls, module: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
        out = module.attention.out_proj
        return {type(out): nn.Linear} if isinstance(out, nn.Linear) else {}

    def _why_not_qkv(self) -> str | None:
        inner = self.attention
        if inner.in_proj_weight is None or inner.in_proj_bias is None:
            return "attention is read: it has no in_proj_weight or no in_proj_bias"
        reason = why_not_ordinary("in_proj_weight", inner.in_proj_weight)
        return named("attention", reason or why_not_ordinary("in_proj_bias", inner.in_proj_bias))

    def _projections(self, x: Tensor) -> list[Step]:
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        refusal = self._why_not_qkv() or why_mixed(x, weight, bias)
        return [
            Step("linear_act", refusal, lambda: ops.linear_act(x, weight, bias), lambda: F.linear(x, weight, bias))
        ]

    def parameters_of_op(self) -> tuple[list[Tensor], list[Tensor]]:
        inner = self.attention
        return [inner.in_proj_weight, inner.out_proj.weight], [inner.in_proj_bias, inner.out_proj.bias]


class PrunedAttention(_AnyAttention):
    """A pruned fork's: projections of the heads that remain, gates and position bias of all."""

    @property
    def attention_dropout(self) -> float:
        return self.dropout.p

    @property
    def gate_heads(self) -> int:
        return self.total_num_heads

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        names = ("gru_rel_pos_linear", "gru_rel_pos_const", "rel_attn_embed", "remaining_heads", "total_num_heads")
        return own_has(module, "q_proj", "k_proj", "v_proj", "out_proj", "scaling", "head_dim", *names)

    def why_not_fused(self) -> str | None:
        if self._is_pruned():
            return f"{self.num_heads} of {self.total_num_heads} heads remain"
        return super().why_not_fused()

    def _is_pruned(self) -> bool:
        return list(self.remaining_heads) != list(range(self.total_num_heads))

    def _gate(self, x: Tensor) -> Step:
        step = super()._gate(x)
        if not self._is_pruned():
            return step
        heads, fused, called = list(self.remaining_heads), step.fused, step.called
        return Step(step.op, step.refusal, lambda: fused()[:, heads], lambda: called()[:, heads])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, position_bias: Tensor, *rest: Any) -> Step:
        if self._is_pruned():
            heads = list(self.remaining_heads)
            if position_bias.dim() == 2:
                position_bias = position_bias[heads]
            else:
                position_bias = position_bias.unflatten(0, (-1, self.total_num_heads))[:, heads].flatten(0, 1)
        return super()._attend(q, k, v, gate, position_bias, *rest)


class Feed(FeedForward, _Prunable):
    """torchaudio's `FeedForward`."""

    intermediate_act_fn = _GELU

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return own_has(module, "intermediate_dense", "intermediate_dropout", "output_dense", "output_dropout")

    @staticmethod
    def trials(module: nn.Module) -> Iterator[Call]:
        frames = _frames(module.intermediate_dense.in_features)
        yield lambda own: own(frames)

    @or_original
    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        return self.feed(x)


class Layer(CopiedLayer):
    """torchaudio's `EncoderLayer`; of a pruned fork its attention or its feed-forward may be gone."""

    @property
    def owns_bias(self) -> bool:
        return getattr(self.attention, "rel_attn_embed", None) is not None

    def why_own_code(self) -> str | None:
        for name in ("attention", "feed_forward"):
            if getattr(self, name) is None:
                return f"its {name} was pruned"
        return None

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        names = ("attention", "feed_forward", "dropout", "layer_norm", "final_layer_norm", "layer_norm_first")
        if not own_has(module, *names):
            return False
        return module.attention is None or _is_attention(module.attention)

    @staticmethod
    def trials(module: nn.Module) -> Iterator[Call]:
        x = _frames(*module.layer_norm.normalized_shape)
        if module.attention is None:
            yield lambda own: own(x)
            return
        base = SelfAttention if SelfAttention.recognises(module.attention) else PrunedAttention
        bias = base._bias(module.attention)
        yield lambda own: own(x, position_bias=bias if own.attention.rel_attn_embed is None else None)
        yield lambda own: own(x, None, bias)

    def call_attention(
        self, hidden_states: Tensor, mask: Tensor | Packing | None, position_bias: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        out, bias = self.attention(hidden_states, attention_mask=None, position_bias=position_bias)
        return out, None, taken(bias)

    @or_original
    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Frames `[B, T, C]`, and the position bias for the next layer."""
        masked = attention_mask is not None or key_padding_mask is not None
        without_bias = position_bias is None and not self.owns_bias
        if masked or without_bias:
            return self.run_original(x, attention_mask, position_bias, key_padding_mask)
        out, bias, _ = self.run(x, frames_of(x), taken(position_bias))
        return out, self.handed_on(bias, position_bias, x)


def _frames(channels: int) -> Tensor:
    return torch.randn(2, 23, channels, dtype=torch.float64)


def _is_attention(module: nn.Module) -> bool:
    return SelfAttention.recognises(module) or PrunedAttention.recognises(module)


class Whole(Model):
    """torchaudio's `Wav2Vec2Model`, where it is a WavLM."""

    boundary = ("extract_features",)

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        if not own_has(module, "feature_extractor", "encoder", "extract_features"):
            return False
        return own_has(module.encoder, "transformer") and _is_transformer(module.encoder.transformer)

    @staticmethod
    def run(model: nn.Module, waveforms: Tensor, **options: Any) -> Any:
        return model.extract_features(waveforms, **options)[0]

    @staticmethod
    def map_frames(function: Callable[..., Tensor], *outputs: Any) -> Any:
        if isinstance(outputs[0], Tensor):
            return function(*outputs)
        return [function(*own) for own in zip(*outputs, strict=True)]

    def layers_of_model(self) -> nn.ModuleList:
        return self.encoder.transformer.layers

    def extract_features(
        self, waveforms: Tensor, lengths: Tensor | None = None, num_layers: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """As torchaudio's: what each of the first layers, or all, made `[B, T, C]`, and the valid frames `[B]`."""
        return self._with_lengths(self.original.extract_features, waveforms, lengths, num_layers)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As torchaudio's: what the model makes `[B, T, C]`, and the valid frames `[B]`."""
        return self._with_lengths(self.original.forward, waveforms, lengths)

    @with_bias_of_graphs
    def _with_lengths(
        self, original: Callable[..., Any], waveforms: Tensor, lengths: Tensor | None, *options: Any
    ) -> tuple[Any, Tensor | None]:
        if lengths is None or frames_of(waveforms) is not None or not self._is_exact():
            return original(self, waveforms, lengths, *options)
        if in_graph(waveforms):
            warnings.warn("in a graph padding is the model's own, where it can take lengths", stacklevel=3)
            return original(self, waveforms, lengths, *options)
        if lengths.shape != waveforms.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"lengths must be {waveforms.shape[0]} integers, one for each waveform, got {list(lengths.shape)} of "
                f"{lengths.dtype}"
            )
        samples, width = lengths.tolist(), waveforms.shape[1]
        if max(samples, default=0) > width:
            raise ValueError(f"lengths must be at most {width}, the samples of a row, got {samples}")
        check_lengths_of_rows(samples, self.samples_needed())
        found, counts = self.run_exact(waveforms, samples, lambda rows: original(self, rows, None, *options)[0])
        return found, lengths.new_tensor(counts)

    def _is_exact(self) -> bool:
        """Whether lengths make batches exact: torchaudio's own attention fails where they come."""
        return MODE in self.__dict__ or any(isinstance(m, SelfAttention) for m in self.modules())


class Wrapper(Copy):
    """What torchaudio's bundles put around a model whose waveforms are to be normalised."""

    boundary = ("extract_features",)
    tried_first = False

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return own_has(module, "model", "normalize_waveform") and Whole.recognises(module.model)

    def _normalises_rows(self, lengths: Tensor | None) -> bool:
        plain = not (getattr(self, "apply_log_softmax", False) or getattr(self, "append_star", False))
        return lengths is not None and self.normalize_waveform and plain

    def steps(self, signal: Signal) -> Iterator[Step]:
        return steps_of_children(self, signal)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As torchaudio's; with lengths each row is normalised alone, as it would be."""
        if not self._normalises_rows(lengths):
            return self.run_original(waveforms, lengths)
        return self.model(_normalised(waveforms, lengths), lengths)

    def extract_features(
        self, waveforms: Tensor, lengths: Tensor | None = None, num_layers: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """As `forward`."""
        if not self._normalises_rows(lengths):
            return self.original.extract_features(self, waveforms, lengths, num_layers)
        return self.model.extract_features(_normalised(waveforms, lengths), lengths, num_layers)


def _normalised(waveforms: Tensor, lengths: Tensor) -> Tensor:
    """Rows with the mean of so many samples 0 and their variance 1."""
    rows = [F.layer_norm(row[:n], (n,)) for row, n in zip(waveforms, lengths.tolist(), strict=True)]
    return padded_rows(waveforms.shape[1], *(row[None] for row in rows))


def recognised(model: nn.Module) -> Iterator[tuple[nn.Module, type[Copy]]]:
    """Every module of a torchaudio WavLM in a module, the inner ones first, and the base of what stands in for it."""
    for module in reversed(list(model.modules())):
        if SelfAttention.recognises(module):
            yield module, SelfAttention
        elif PrunedAttention.recognises(module):
            yield module, PrunedAttention
        elif _is_transformer(module):
            yield from _parts_of_transformer(module)
        elif _is_transformer(getattr(module, "transformer", None)):
            if Projection.recognises(getattr(module, "feature_projection", None)):
                yield module.feature_projection, Projection
        elif Whole.recognises(module):
            if FrontEnd.recognises(module.feature_extractor):
                yield from ((block, Block) for block in module.feature_extractor.conv_layers)
                yield module.feature_extractor, FrontEnd
            yield module, Whole
        elif Wrapper.recognises(module):
            yield module, Wrapper
        elif Layer.recognises(module) and module.attention is not None:
            yield from _parts_of_layer(module)


def _parts_of_layer(layer: nn.Module) -> Iterator[tuple[nn.Module, type[Copy]]]:
    if layer.feed_forward is not None and Feed.recognises(layer.feed_forward):
        yield layer.feed_forward, Feed
    yield layer, Layer


def _parts_of_transformer(module: nn.Module) -> Iterator[tuple[nn.Module, type[Copy]]]:
    for layer in module.layers:
        if Layer.recognises(layer) and layer.attention is None:  # by itself it could be any transformer's
            yield from _parts_of_layer(layer)
    if Positions.recognises(module.pos_conv_embed):
        yield module.pos_conv_embed, Positions


def _is_transformer(module: nn.Module | None) -> bool:
    if not own_has(module, "layers", "pos_conv_embed") or not isinstance(module.layers, nn.ModuleList):
        return False
    return any(Layer.recognises(layer) and layer.attention is not None for layer in module.layers)


def transformer_of(model: nn.Module) -> nn.Module | None:
    return model.encoder.transformer if Whole.recognises(model) else None


def has_norm_behind(transformer: nn.Module) -> bool:
    return _is_transformer(transformer) and not transformer.layer_norm_first  # here it tells of this norm


def relative(model: nn.Module) -> str | None:
    """What a model is whose layers are torchaudio's, and whose attention is no WavLM's."""
    for module in model.modules():
        attention = getattr(module, "attention", None)
        if hasattr(module, "layer_norm_first") and hasattr(attention, "k_proj") and not _is_attention(attention):
            return "a HuBERT or wav2vec 2.0 of torchaudio's code"
    return None


_factories = Factories(
    "torchaudio",
    ("models", "models.wav2vec2", "models.wav2vec2.model", "pipelines._wav2vec2.utils"),
    ("wavlm_model", "wavlm_base", "wavlm_large", "_extend_model"),
    lambda model: any(True for _ in recognised(model)),  # the last is for models of all kinds
)
install, uninstall = _factories.install, _factories.uninstall
