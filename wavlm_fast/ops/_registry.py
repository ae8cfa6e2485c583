"""What is known of an op beside its contract: how a call of it looks, where a model makes it, and what it costs.

Said once, with `describe` at the end of the op's file. Doctor, parity and benchmarks make their calls of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._define import accumulation_dtype, arguments_of, schemas
from ._packed import windows

# The arguments of a call by their names in the schema; tensors, or operands in the place of tensors.
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Operand:
    """A tensor that a call takes.

    Attributes:
        shape: its sizes.
        wide: whether it has the dtype of sums when the call's is narrower (`accumulation_dtype`).
        dtype: of lengths and seeds, whatever the call's.
    """

    shape: tuple[int, ...]
    wide: bool = False
    dtype: torch.dtype | None = None

    def empty(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """One without values, in a call of this dtype."""
        own = self.dtype or (accumulation_dtype(dtype) if self.wide else dtype)
        return torch.empty(self.shape, dtype=own, device=device)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a WavLM that decide its ops' arguments, and those of a batch; one second of the base model.

    Attributes:
        batch, samples: utterances, and samples of each.
        convs: channels, kernel and stride of each convolution of the feature encoder.
        norm: of the feature encoder: "group" or "layer".
        conv_bias, conv_activation: of the same.
        channels, heads, inner, activation, layers: of the encoder's layers.
        norm_first: whether their norms stand before attention and feed-forward.
        taps, groups: of the positional convolution.
        tdnn: channels, kernel and dilation of each time-delay layer of an x-vector head.
    """

    batch: int = 1
    samples: int = 16_000
    convs: tuple[tuple[int, int, int], ...] = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)
    norm: str = "group"
    conv_bias: bool = False
    conv_activation: str = "gelu"
    channels: int = 768
    heads: int = 12
    inner: int = 3072
    activation: str = "gelu"
    layers: int = 12
    norm_first: bool = False
    taps: int = 128
    groups: int = 16
    tdnn: tuple[tuple[int, int, int], ...] = ((512, 5, 1), (512, 3, 2), (512, 3, 3), (512, 1, 1), (1500, 1, 1))

    @classmethod
    def of(cls, config: Any, batch: int, samples: int) -> Sizes:
        """Those of a WavLMConfig."""
        return cls(
            batch=batch,
            samples=samples,
            convs=tuple(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)),
            norm=config.feat_extract_norm,
            conv_bias=config.conv_bias,
            conv_activation=config.feat_extract_activation,
            channels=config.hidden_size,
            heads=config.num_attention_heads,
            inner=config.intermediate_size,
            activation=config.hidden_act,
            layers=config.num_hidden_layers,
            norm_first=config.do_stable_layer_norm,
            taps=config.num_conv_pos_embeddings,
            groups=config.num_conv_pos_embedding_groups,
            tdnn=tuple(zip(config.tdnn_dim, config.tdnn_kernel, config.tdnn_dilation, strict=True)),
        )

    @property
    def frames_of_convs(self) -> list[int]:
        """Frames after each convolution of the feature encoder."""
        found, frames = [], self.samples
        for _, kernel, stride in self.convs:
            frames = windows(kernel, stride)(frames)
            found.append(frames)
        return found

    @property
    def frames(self) -> int:
        """Frames of the encoder."""
        return self.frames_of_convs[-1]

    @property
    def frames_of_tdnn(self) -> list[int]:
        """Frames after each time-delay layer; fewer than one of audio that is too short."""
        found, frames = [], self.frames
        for _, kernel, dilation in self.tdnn:
            frames = windows((kernel - 1) * dilation + 1)(frames)
            found.append(frames)
        return found

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.channels // self.heads


@dataclass(frozen=True)
class Place:
    """Where a model runs an op.

    Attributes:
        stage: of the model, in the words of benchmarks.
        sizes, options: what the op's `example` takes there.
        what: tells places of one op apart; equal ones differ only in their number of frames.
        times: how often a forward of the model runs it.
    """

    stage: str
    sizes: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    what: str = ""
    times: int = 1


@dataclass(frozen=True)
class Op:
    """An op of this package.

    Attributes:
        name: in the namespace `wavlm_fast`.
        function: what is called.
        example: from sizes and options of the op's own to the arguments of a dense batch.
        flops: from such arguments to floating-point operations of a forward by the direct algorithm: two for every
            multiplication of a convolution, a linear layer or an attention product, nothing for all else.
        places: where a model of some sizes runs it, in the order in which the signal meets them.
        outputs: the names of what the schema returns, less what is only saved for the gradient.
        parts: the ops that it is made of, if any.
    """

    name: str
    function: Callable[..., Any]
    example: Callable[..., Arguments]
    flops: Callable[..., int]
    places: Callable[[Sizes], Iterable[Place]]
    outputs: tuple[str, ...] = ("out",)
    parts: tuple[str, ...] = ()

    @property
    def arguments(self) -> dict[str, str]:
        """The types of its arguments by name, in the order of the schema, less `save`, which is not the caller's."""
        return {name: kind for name, kind in arguments_of(schemas[self.name]).items() if name != "save"}

    @property
    def has_gradient(self) -> bool:
        """Whether it has one of its own; the parts of an op that has none may have theirs."""
        return f"{self.name}_backward" in schemas

    @property
    def is_packable(self) -> bool:
        """Whether it takes packed frames."""
        return "offsets" in self.arguments

    @property
    def is_resizing(self) -> bool:
        """Whether it makes another number of packed frames than it is given."""
        return "out_offsets" in self.arguments

    def at(self, place: Place, **more: Any) -> Arguments:
        """The example of a place."""
        return self.example(*place.sizes, **{**place.options, **more})

    def largest(self, sizes: Sizes) -> Arguments:
        """The example of the place where it has most to do, the first of them."""
        return max(map(self.at, self.places(sizes)), key=lambda example: self.flops(**example))

    def for_schema(self, arguments: Mapping[str, Any], save: bool = False) -> tuple:
        """All arguments in the order of the schema, as the chooser and backends take them."""
        given = {"save": save, **arguments}
        return tuple(given.get(name) for name in arguments_of(schemas[self.name]))

    def run(self, **arguments: Any) -> Any:
        """The public function on arguments by the schema's names; the seed of a dropout it draws itself."""
        return self.function(**{name: value for name, value in arguments.items() if name != "seed"})


# Op name -> what is known of it, in the order of imports; `wavlm_fast.ops.OPS` has them in the signal's.
described: dict[str, Op] = {}


def describe(name: str, function: Callable[..., Any], **known: Any) -> None:
    """Say what is known of an op; `known` as the attributes of `Op`."""
    described[name] = Op(name, function, **known)


def empty(arguments: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str) -> Arguments:
    """The arguments with tensors without values in the place of operands."""

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(v) for v in value]
        return value.empty(dtype, device) if isinstance(value, Operand) else value

    return {name: made(value) for name, value in arguments.items()}


def multiplied(rows: int, weight: Operand | Tensor) -> int:
    """Operations of a weight that is multiplied, all of it, with each of so many rows."""
    return 2 * rows * math.prod(weight.shape)


def vector(size: int, present: bool = True) -> Operand | None:
    """A bias, or what scales a norm, if there is one."""
    return Operand((size,)) if present else None
