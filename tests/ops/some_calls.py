"""Small calls of every op, forward and backward, and of what csrc/ registers: what fuzzers start from.

Calls of dense batches, and of packed frames where an op takes them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate

import torch

import wavlm_fast.ops  # noqa: F401  registers the ops
from wavlm_fast.backends import cpu
from wavlm_fast.backends.reference import TABLE as REFERENCE
from wavlm_fast.ops._define import arguments_of, schemas

cpu.extension.problem()  # loads it

FORWARD = (
    "add_layer_norm", "encoder_layer", "feature_encoder", "gated_attention", "linear_act", "position_gate",
    "positional_conv", "stats_pool", "strided_conv", "tdnn", "waveform_conv",
)  # fmt: skip
BACKWARD = tuple(f"{op}_backward" for op in FORWARD if op not in ("encoder_layer", "feature_encoder"))
OPS = FORWARD + BACKWARD
# Of the same schema as the ops, and others.
_ALIKE = ("add_layer_norm", "gated_attention", "position_gate", "stats_pool")
NATIVE_OPS = (*_ALIKE, *(f"{op}_backward" for op in _ALIKE))
NATIVE = (
    *NATIVE_OPS, "activation_backward", "encoder_layer", "feature_encoder", "fingerprint", "matmul", "norm_act",
    "pack_conv", "packed_conv", "positional_conv", "positional_conv_backward", "positional_spectra", "waveform_conv",
    "waveform_conv_backward",
)  # fmt: skip
# The argument of a forward that keeps what its gradient needs.
SAVING = {"add_layer_norm": "keep_sum", "linear_act": "save", "positional_conv": "save", "strided_conv": "save"}
PACKING = ("offsets", "out_offsets", "out_frames")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")


class Draw:
    """Random sizes and tensors, the same for the same seed.

    Attributes:
        packed: whether frames are those of several utterances, one behind the other.
        packing: then offsets, and of an op that makes other numbers of frames those of its output.
    """

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, packed: bool = False) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.packed = packed
        self.packing: dict[str, torch.Tensor | int] = {}
        self._utterances: list[int] = []

    def one(self, *values):
        return self.random.choice(values)

    def size(self, most: int) -> int:
        return self.random.randint(1, most)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype)

    def maybe(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        return self.tensor(*shape, dtype=dtype) if self.random.random() < 0.7 else None

    def frames(self, batch: int, most: int, beyond: int = 0) -> tuple[int, int]:
        """Utterances and frames: no more than these, and frames `beyond`. Packed, 1 and the frames of all."""
        utterances, frames = self.size(batch), self.size(most) + beyond
        if not self.packed:
            return utterances, frames
        more = utterances - 1 + self.one(0, 0, 0, 20)
        self._utterances = [frames, *(self.size(most) + beyond for _ in range(more))]
        self.random.shuffle(self._utterances)
        self.packing = {"offsets": _offsets_of(self._utterances)}
        return 1, sum(self._utterances)

    def resized(self, *windows: tuple[int, int]) -> list:
        """The last arguments of an op that goes over its frames in windows of some size and stride."""
        if not self.packed:
            return []
        lengths = self._utterances
        for size, stride in windows:
            lengths = [(length - size) // stride + 1 for length in lengths]
        self.packing |= {"out_offsets": _offsets_of(lengths), "out_frames": sum(lengths)}
        return list(self.packing.values())

    def rel_bias(self, heads: int, frames: int) -> torch.Tensor:
        longest = max(self._utterances) + self.one(0, 0, 3) if self.packed else frames
        return self.tensor(heads, 2 * longest - 1, dtype=self.wide)

    def lengths(self, batch: int, frames: int) -> torch.Tensor | None:
        if self.packed:
            return None
        return self.one(None, torch.tensor([self.random.randint(0, frames) for _ in range(batch)]))

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def any_call(name: str, seed: int, dtype: torch.dtype = torch.float32) -> list:
    """A call of the op `name`: every third of packed frames, if it takes them."""
    return call(name, seed, dtype, packed=seed % 3 == 2 and "offsets" in arguments_of(schemas[name]))


def any_native_call(name: str, seed: int, dtype: torch.dtype = torch.float32) -> list:
    return native_call(name, seed, dtype, packed=seed % 3 == 2 and "offsets" in _native_arguments(name))


def call(name: str, seed: int, dtype: torch.dtype = torch.float32, packed: bool = False) -> list:
    """Arguments of the op `name`, positionally as its schema has them; those of packed frames only where they are."""
    return _called(name, Draw(seed, dtype, packed))


def _called(name: str, draw: Draw) -> list:
    if name.endswith("_backward"):
        return _backward(name.removesuffix("_backward"), draw)
    return _FORWARD[name](draw)


def native_call(name: str, seed: int, dtype: torch.dtype = torch.float32, packed: bool = False) -> list:
    """Arguments of `torch.ops.wavlm_fast_cpu.<name>`; packed, its schema must have some for it."""
    draw = Draw(seed, dtype, packed)
    if name in NATIVE_OPS:
        return _called(name, draw)
    args = _NATIVE[name](draw)
    if not packed:
        return args
    rest = iter(args)
    return [draw.packing.get(a) if a in PACKING else next(rest) for a in _native_arguments(name)]


def _native_arguments(name: str) -> list[str]:
    schema = str(getattr(torch.ops.wavlm_fast_cpu, name).default._schema)
    inside, _, _ = schema.partition("(")[2].rpartition(") ->")
    return [a.removesuffix("=None").rpartition(" ")[2] for a in inside.split(", ")]


def completed(name: str, args: list) -> tuple:
    """All arguments of the op `name`, as backends get them."""
    return (*args, *[None] * (len(_ARGUMENTS[name]) - len(args)))


def with_option(name: str, args: list, option: str, value: object) -> list:
    """The call with another value of a named argument."""
    args = list(args)
    args[_ARGUMENTS[name].index(option)] = value
    return args


def _add_layer_norm(d: Draw) -> list:
    shape = d.one((d.size(9), d.size(40)), (d.size(3), d.size(5), d.size(70)))
    return [d.tensor(*shape), d.tensor(*shape), d.tensor(shape[-1]), d.tensor(shape[-1]), 1e-5, d.one(True, False)]


def _encoder_layer(d: Draw) -> list:
    (B, T), H, D, inner = d.frames(3, 20), d.size(3), d.size(9), d.size(20)
    C = H * D
    shapes = [(C, C)] * 4 + [(inner, C), (C, inner)]
    weights, biases = [d.tensor(*s, scale=0.3) for s in shapes], [d.tensor(s[0]) for s in shapes]
    gate = [d.tensor(8, D), d.tensor(8), d.tensor(H)]
    norms = [d.tensor(C) for _ in range(4)]
    rel_bias = d.rel_bias(H, T)
    options = [[1e-5, 1e-5], D**-0.5, d.one(*ACTIVATIONS), d.one(True, False)]
    frames = [d.tensor(B, T, C), rel_bias, d.lengths(B, T)]
    return [*frames, weights, biases, gate, norms, *options, *d.packing.values()]


def _feature_encoder(d: Draw) -> list:
    layers, norm = d.size(4), d.one("none", "group", "layer")
    taps = [d.size(10), *(d.one(2, 3, 3, d.size(5)) for _ in range(layers - 1))]
    strides = [d.size(6), *(d.one(2, 2, d.size(3)) for _ in range(layers - 1))]
    channels = [1, *(d.size(20) for _ in range(layers))]
    weights = [d.tensor(channels[i + 1], channels[i], taps[i], scale=0.5) for i in range(layers)]
    biases = [d.tensor(c) for c in channels[1:]] if d.one(True, False) else []
    normed = {"none": 0, "group": 1, "layer": layers}[norm]
    norms = [[d.tensor(c) for c in channels[1 : normed + 1]] for _ in range(2)]
    samples = d.size(6)
    for i in reversed(range(layers)):
        samples = (samples - 1) * strides[i] + taps[i]
    waveform = d.tensor(*d.frames(2, 5, samples))
    resized = d.resized(*zip(taps, strides, strict=True))
    return [waveform, weights, biases, strides, norm, *norms, 1e-5, d.one(*ACTIVATIONS), *resized]


def _gated_attention(d: Draw) -> list:
    (B, T), H, D = d.frames(3, 40), d.size(3), d.size(20)
    dropout, seed = d.one((0.0, None), (0.3, torch.tensor([7])))
    gate, rel_bias = d.tensor(B, H, T, dtype=d.wide), d.rel_bias(H, T)
    qkv = [d.tensor(B, T, H, D) for _ in range(3)]
    return [*qkv, gate, rel_bias, d.lengths(B, T), dropout, seed, D**-0.5, *d.packing.values()]


def _linear_act(d: Draw) -> list:
    C, inner, shape = d.size(40), d.size(60), d.one((d.size(9),), (d.size(3), d.size(9)))
    return [d.tensor(*shape, C), d.tensor(inner, C, scale=0.3), d.maybe(inner), d.one(*ACTIVATIONS), d.one(True, False)]


def _position_gate(d: Draw) -> list:
    H, D = d.size(4), d.size(20)
    return [d.tensor(d.size(3), d.size(30), H * D), d.tensor(8, D), d.tensor(8), d.tensor(H)]


def _positional_conv(d: Draw) -> list:
    groups, width = d.size(3), d.size(9)
    C = groups * width
    x, weight = d.tensor(*d.frames(3, 40), C), d.tensor(C, width, d.size(20), scale=0.2)
    options = [d.maybe(C), groups, d.one(*ACTIVATIONS), d.one(True, False), d.one(True, False)]
    return [x, weight, *options, *d.packing.values()]


def _stats_pool(d: Draw) -> list:
    B, T = d.frames(3, 20)
    return [d.tensor(B, T, d.size(70)), d.lengths(B, T), *d.packing.values()]


def _strided_conv(d: Draw) -> list:
    C, inner, taps, stride = d.size(20), d.size(60), d.one(2, 3, 3, d.size(6)), d.one(2, 2, d.size(4))
    norm = d.maybe(inner, dtype=d.one(d.dtype, d.wide))
    norm_bias = None if norm is None else d.maybe(inner, dtype=norm.dtype)
    x, weight = d.tensor(*d.frames(3, 40, taps - 1), C), d.tensor(inner, C, taps, scale=0.3)
    options = [d.maybe(inner), stride, norm, norm_bias, 1e-5, d.one(*ACTIVATIONS), d.one(True, False)]
    return [x, weight, *options, *d.resized((taps, stride))]


def _tdnn(d: Draw) -> list:
    C, inner, taps, dilation = d.size(20), d.size(60), d.size(5), d.size(3)
    x = d.tensor(*d.frames(3, 20, (taps - 1) * dilation), C)
    weight = d.tensor(inner, taps * C, scale=0.3)
    resized = d.resized(((taps - 1) * dilation + 1, 1))
    return [x, weight, d.maybe(inner), taps, dilation, d.one("relu", "none"), *resized]


def _waveform_conv(d: Draw) -> list:
    C, taps, norm = d.size(60), d.one(10, d.size(15)), d.one("none", "group", "layer")
    # Of one frame a group norm leaves rounding errors, and short utterances are many.
    beyond = taps + 17 if d.packed and norm == "group" else taps - 1
    waveform, weight = d.tensor(*d.frames(3, 200, beyond)), d.tensor(C, 1, taps, scale=0.5)
    norms = [d.tensor(C), d.tensor(C)]
    args = [waveform, weight, d.maybe(C), d.size(6), norm, *norms, 1e-5, d.one(*ACTIVATIONS)]
    return [*args, *d.resized((taps, args[3]))]


_FORWARD = {op: globals()[f"_{op}"] for op in FORWARD}
_ARGUMENTS = {op: list(arguments_of(schemas[op])) for op in OPS}


def _backward(op: str, d: Draw) -> list:
    """The forward's arguments and what it saves, with a gradient of its output."""
    args = _FORWARD[op](d)
    if op in SAVING:
        args = with_option(op, args, SAVING[op], True)
    outputs = REFERENCE[op].fn(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grad = d.tensor(*outputs[0].shape, dtype=outputs[0].dtype)
    dense, packing = args[: len(args) - len(d.packing)], d.packing.values()
    return [grad, *_backward_operands(op, d, dense, outputs), *packing]


def _backward_operands(op: str, d: Draw, args: list, outputs: tuple) -> list:
    if op == "add_layer_norm":
        x, residual, weight, _, eps, _ = args
        return [d.tensor(*x.shape), x + residual, weight, eps, _wanted(d, [x, weight, weight])]
    if op == "gated_attention":
        return [*args[:6], *outputs, *args[6:], _wanted(d, args[:5])]
    if op == "stats_pool":
        return [*args, outputs[0]]
    if op == "position_gate":
        return [*args, _wanted(d, args)]
    if op == "tdnn":
        return [*args[:3], outputs[0], *args[3:], _wanted(d, args[:3])]
    if op == "waveform_conv":
        norms = args[5:7] if args[4] != "none" else [None, None]
        return [*args, _wanted(d, [*args[:3], *norms])]
    if op == "strided_conv":
        return [*args[:3], outputs[1], *args[3:-1], _wanted(d, [*args[:3], *args[4:6]])]
    return [*args[:3], outputs[1], *args[3:-1], _wanted(d, args[:3])]


def _wanted(d: Draw, inputs: list) -> list[bool]:
    return [i is not None and d.random.random() < 0.8 for i in inputs]


def _pack(weights: list[torch.Tensor], filtered: bool = False) -> torch.Tensor:
    return torch.ops.wavlm_fast_cpu.pack_conv(weights, filtered)


def _dense(d: Draw, call: Callable[[Draw], list]) -> list:
    """Arguments of an op less those of packed frames, which `native_call` adds where the native schema has them."""
    args = call(d)
    return args[: len(args) - len(d.packing)]


def _filtered(taps: int, stride: int) -> bool:
    return (taps, stride) == (3, 2)


def _native_packed_conv(d: Draw) -> list:
    x, weight, bias, stride, *_ = _dense(d, _strided_conv)
    taps = weight.shape[2]
    filtered = _filtered(taps, stride)
    packed = _pack([weight.transpose(1, 2)], filtered)
    return [x, packed, bias, weight.shape[0], taps, stride, 1, filtered, d.one(*ACTIVATIONS)]


def _native_encoder_layer(d: Draw) -> list:
    x, rel_bias, lengths, weights, biases, *rest = _dense(d, _encoder_layer)
    packed = [_pack([w[:, None] for w in weights[:3]]), *(_pack([w[:, None]]) for w in weights[3:])]
    return [x, rel_bias, lengths, packed, [torch.cat(biases[:3]), *biases[3:]], *rest]


def _native_feature_encoder(d: Draw) -> list:
    args = _dense(d, _feature_encoder)
    while len(args[1]) < 2 or any(w.shape[2] < s for w, s in zip(args[1][1:], args[3][1:], strict=True)):
        args = _dense(d, _feature_encoder)
    waveform, weights, biases, strides, norm, norm_weights, norm_biases, eps, activation = args
    layers = len(weights)
    filtered = [False, *(_filtered(w.shape[2], s) for w, s in zip(weights[1:], strides[1:], strict=True))]
    packed = [_pack([weights[0].float()])]
    packed += [_pack([w.transpose(1, 2)], f) for w, f in zip(weights[1:], filtered[1:], strict=True)]
    vectors = [v + [None] * (layers - len(v)) for v in (biases, norm_weights, norm_biases)]
    taps, channels = [w.shape[2] for w in weights], [w.shape[0] for w in weights]
    return [
        waveform.float(), weights[0].float(), packed, *vectors, taps, strides, channels, filtered, norm, eps, activation
    ]  # fmt: skip


def _native_waveform_conv(d: Draw) -> list:
    waveform, weight, bias, stride, norm, *rest = _dense(d, _waveform_conv)
    wide = weight.float()
    return [waveform.float(), wide, _pack([wide]), bias, stride, norm == "group", *rest, d.one(True, False)]


def _native_waveform_conv_backward(d: Draw) -> list:
    waveform, weight, _, stride, _, *norms, eps, activation = _dense(d, _waveform_conv)
    frames = d.packing.get("out_frames", (waveform.shape[1] - weight.shape[2]) // stride + 1)
    grad = d.tensor(waveform.shape[0], frames, weight.shape[0])
    wide = [t.float() for t in (waveform, weight)]
    return [grad, *wide, stride, *(n.float() for n in norms), eps, activation, d.one(True, False)]


def _native_positional_conv(d: Draw) -> list:
    x, weight, bias, _, activation, residual, save = _dense(d, _positional_conv)
    spectra = d.one(None, torch.ops.wavlm_fast_cpu.positional_spectra(weight))
    return [x, weight, spectra, bias, activation, residual, save]


def _native_positional_conv_backward(d: Draw) -> list:
    x, weight, *_ = _dense(d, _positional_conv)
    return [d.tensor(*x.shape), d.maybe(*x.shape), x, weight, [d.one(True, False), d.one(True, False)]]


def _native_matmul(d: Draw) -> list:
    i, k, j = d.size(20), d.size(20), d.size(60)
    a = d.one(d.tensor(i, k), d.tensor(k, i).t()).float()
    return [a, d.tensor(k, j).float(), d.tensor(i, j).float(), d.one(True, False)]


def _native_pack_conv(d: Draw) -> list:
    taps, C = d.size(4), d.size(20)
    return [[d.tensor(d.size(40), taps, C) for _ in range(d.size(3))], taps == 3 and d.one(True, False)]


def _native_activation_backward(d: Draw) -> list:
    shape = (d.size(9), d.size(40))
    return [d.tensor(*shape), d.tensor(*shape), d.one(*ACTIVATIONS)]


def _native_norm_act(d: Draw) -> list:
    C = d.size(40)
    return [d.tensor(d.size(9), C), d.maybe(C), d.maybe(C), 1e-5, d.one(*ACTIVATIONS)]


_NATIVE = {
    "fingerprint": lambda d: [d.tensor(d.size(30), d.size(30)), 64],
    "positional_spectra": lambda d: [_positional_conv(d)[1]],
    **{name: globals()[f"_native_{name}"] for name in NATIVE if f"_native_{name}" in globals()},
}
