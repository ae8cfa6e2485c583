"""`python -m benchmarks.gpu_step`: bytes and launches of a training step, ours and transformers', without a GPU.

The models themselves run, on tensors without memory, forward and backward; not the optimizer, and nothing random. Ours
launches the Triton kernels, whose bytes are those of gpu_bytes: what comes from memory. Torch's own ops read each input
once and write each output once, and are a launch each; that favours whoever has more of them.

Three ways to train: everything, all but the feature encoder, and LoRA on queries and values. "all gradients" is ours as
it would be if every op computed all of its gradients and autograd threw away what nobody asked for; "ours" computes
what is asked for.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wavlm_fast import accelerate
from wavlm_fast.backends.reference import TABLE as REFERENCE
from wavlm_fast.backends.triton import TABLE
from wavlm_fast.kernels._target import pretend
from wavlm_fast.ops import OPS
from wavlm_fast.ops._define import arguments_of, schemas

from ..run.cases import MODELS as SPECS
from ..run.cases import Spec
from . import bytes as gpu_bytes
from .cases import BATCH, DTYPES, SAMPLES, tensors
from .compile import Launch, recording
from .launch_bytes import of_launch
from .launch_formulas import FORMULAS
from .torch_bytes import TorchBytes

ALL, OURS, THEIRS = "all gradients", "ours", "transformers"
_COPIES = "toeplitz_kernel"
Attention = dict[str, gpu_bytes.Bytes]


def _frozen_encoder(model: nn.Module) -> nn.Module:
    model.freeze_feature_encoder()
    return model


WAYS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "everything": ("train", lambda model: model),
    "feature encoder frozen": ("train", _frozen_encoder),
    "LoRA": ("lora", lambda model: model),
}


@dataclass(frozen=True)
class Step:
    """One training step: bytes to and from memory, launches of Triton kernels, and of torch's ops.

    `copies` of the bytes are those of _toeplitz.py, which every layer makes anew of the bias that all layers share.
    """

    way: str
    who: str
    bytes: int
    copies: int
    kernels: int
    torch: int

    @property
    def launches(self) -> int:
        return self.kernels + self.torch


class _Counting(TorchBytes):
    """Bytes and number of torch's ops; those of wavlm_fast run as on a GPU, with all gradients if it is asked to."""

    def __init__(self, everything: bool) -> None:
        super().__init__()
        self.everything = everything
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "wavlm_fast":
            name = func.overloadpacket.__name__
            implementation = TABLE.get(name) or REFERENCE[name]  # of other ops, as a GPU runs it too
            with self:
                return implementation.fn(*(_all_wanted(name, args) if self.everything else args))
        with self:  # what is made of other ops is those
            found = func.decompose(*args, **(kwargs or {}))
        if found is not NotImplemented:
            return found
        before = self.total
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if self.total > before:
            self.names[func._schema.name.partition("::")[2]] += 1
        return found


def _all_wanted(name: str, args: tuple) -> tuple:
    """A gradient's arguments, as if every input that is there had asked."""
    names = list(arguments_of(schemas[name]))
    if "wanted" not in names:
        return args
    at, given = names.index("wanted"), dict(zip(names, args, strict=False))
    inputs = tensors(OPS[name.removesuffix("_backward")])[: len(args[at])]
    return (*args[:at], [given.get(name, args) is not None for name in inputs], *args[at + 1 :])


def step(way: str, who: str, spec: Spec, attention: Attention, dtype: torch.dtype, shape: tuple[int, int]) -> Step:
    """One step of a model of `spec` on a batch of `shape`, utterances and samples."""
    change = WAYS[way][1]
    model = change(spec.build()).train().to(dtype).to("meta")
    if who != THEIRS:
        model = accelerate(model)
    waveform = torch.empty(shape, dtype=dtype, device="meta")
    with pretend(gpu_bytes.TARGET), recording() as launches, _Counting(who == ALL) as counted:
        out = model(waveform)[0]
        out.backward(torch.empty_like(out))
    heads = spec.config.num_attention_heads
    moved = Counter()
    for launch in launches:
        moved[launch.name] += _moved(launch, attention, heads)
    total = counted.total + moved.total()
    return Step(way, who, total, moved[_COPIES], len(launches), counted.names.total())


def _moved(launch: Launch, attention: Attention, heads: int) -> int:
    """Bytes of a launch; of attention, by those of one head."""
    if launch.name in FORMULAS:
        return of_launch(launch).memory
    if launch.name == _COPIES:  # the copies are written, and the bias read for each
        copies = launch.arguments["copies_ptr"]
        return copies.numel() * copies.element_size() * 2
    (found,) = (moved.memory for name, moved in attention.items() if name.endswith(f" {launch.name}"))
    return heads * found


def steps(
    model: str, dtype: torch.dtype, shape: tuple[int, int] = (BATCH, SAMPLES), options: dict[str, Any] | None = None
) -> Iterator[Step]:
    """Every way to train, by everybody; `options` change the model's config."""
    change = {**SPECS[model].options, **(options or {})}
    attention: Attention = {}
    for way, (base, _) in WAYS.items():
        spec = replace(SPECS[base], options={**SPECS[base].options, **change})
        config = spec.config
        frames = int(config_frames(config, shape[1]))
        attention = attention or gpu_bytes.attention(
            dtype, config.hidden_size // config.num_attention_heads, shape[0], frames
        )
        for who in (THEIRS, ALL, OURS):
            yield step(way, who, spec, attention, dtype, shape)


def config_frames(config: Any, samples: int) -> int:
    """Frames that the feature encoder makes."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def table(found: list[Step]) -> Iterator[str]:
    """A line each, transformers' first."""
    yield f"{'trained':23} {'by':14} {'MB':>9} {'of theirs':>9} {'launches':>8} {'Triton':>7} {'torch':>6}"
    for row in found:
        theirs = next(other for other in found if (other.way, other.who) == (row.way, THEIRS))
        yield (
            f"{row.way:23} {row.who:14} {row.bytes / 1e6:9.0f} {100 * row.bytes / theirs.bytes:7.0f} % "
            f"{row.launches:8} {row.kernels:7} {row.torch:6}"
        )
    most = max((row for row in found if row.who == OURS), key=lambda row: row.copies / row.bytes)
    yield (
        f"copies of the position bias, made anew in every layer: {most.copies / 1e6:.1f} MB, at most "
        f"{100 * most.copies / most.bytes:.2f} % of ours"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_step", description=__doc__)
    parser.add_argument("--model", choices=("base", "large"), default="base")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--batch", type=int, default=BATCH, help="utterances")
    parser.add_argument("--seconds", type=float, default=SAMPLES / 16_000, help="of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args(arguments)
    shape = args.batch, int(16_000 * args.seconds)
    print(f"One training step of {args.model} on {args.batch} x {args.seconds:g} s, weights in {args.dtype}, counted")
    found = list(steps(args.model, DTYPES[args.dtype], shape))
    print("\n".join(table(found)))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    return 0
