"""What is measured: models, and the utterances that they hear."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WavLMConfig
from transformers.models.wavlm import modeling_wavlm as hf

from wavlm_fast import accelerate, audio, checkpoint, restore
from wavlm_fast.sensitive import make_sensitive

from . import flops

Inputs = dict[str, Tensor]
CORPUS = "corpus"  # the group of cases from files to files
_FRESH = 100.0  # seconds of one utterance from which on every run has a process of its own


@dataclass(frozen=True)
class Spec:
    """A model: transformers' class, what its config says beyond the defaults, and the output that counts."""

    cls: str = "WavLMModel"
    options: Mapping[str, Any] = field(default_factory=dict)
    output: str = "last_hidden_state"
    path: str | None = None  # a checkpoint in place of seeded weights

    @property
    def config(self) -> WavLMConfig:
        return checkpoint.config(self.path) if self.path else WavLMConfig(**self.options)

    def build(self) -> nn.Module:
        """transformers' own model in float32, for inference; without a checkpoint with sensitive weights."""
        if self.path:
            return checkpoint.load(self.path)[0]
        with torch.random.fork_rng(devices=[]):
            model = restore(getattr(hf, self.cls)(self.config))
        return make_sensitive(model).eval()


_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": False,
}
# Training draws no random numbers, so that two steps do the same work and gradients can be compared.
NOTHING_RANDOM = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
MODELS = {
    "base": Spec(),
    "large": Spec(options=_LARGE),
    "ctc": Spec("WavLMForCTC", output="logits"),
    "classification": Spec("WavLMForSequenceClassification", output="logits"),
    "frames": Spec("WavLMForAudioFrameClassification", output="logits"),
    "xvector": Spec("WavLMForXVector", output="embeddings"),
    "train": Spec(options=NOTHING_RANDOM),
    "train-ctc": Spec("WavLMForCTC", options={**NOTHING_RANDOM, "final_dropout": 0.0}, output="logits"),
}


@dataclass(frozen=True)
class Case:
    """Some utterances through one of MODELS."""

    model: str
    lengths: tuple[float, ...]  # seconds of each utterance; padded to the longest
    group: str = "latency"  # what the case tells of
    ragged: str = ""  # what to call lengths that differ
    train: bool = False  # forward, backward and optimizer
    house: str = ""  # whose class runs it, of houses.py; empty: transformers'
    regime: str = ""  # how the model is run, of regimes.py; empty: as the provider does
    layer: int = 0  # of a corpus of files: whose output is extracted
    stages: bool = False  # where the time of ours goes is measured too
    layers: bool = False  # the error at every layer too
    memory: bool = False  # the peak of a process that runs it too
    everybody: bool = False  # with the providers that take minutes to set up
    families: tuple[str, ...] = ()  # only providers of these; empty: all
    dtypes: tuple[torch.dtype, ...] = ()  # only providers of these; empty: all

    @property
    def name(self) -> str:
        size = self.ragged or f"{len(self.lengths)}x{self.lengths[0]:g}"
        return " ".join(filter(None, (self.house or self.model, self.regime, size)))

    @property
    def uniform(self) -> Case:
        """As many utterances of one length, of as much audio."""
        return replace(self, ragged="", lengths=(self.audio / len(self.lengths),) * len(self.lengths))

    @property
    def fresh(self) -> bool:
        """Whether every run has a process of its own: side by side they would take more memory than machines have."""
        return max(self.lengths) > _FRESH

    @property
    def rounds(self) -> int:
        """Timed runs of each provider, unless the user says otherwise."""
        if self.group == CORPUS:
            return 2
        return 1 if self.fresh else 7 if self.audio <= 5 else 5 if self.audio <= 10 else 3

    @property
    def samples(self) -> int:
        """Of the longest utterance."""
        return int(max(self.lengths) * audio.RATE)

    @property
    def audio(self) -> float:
        """Seconds of audio, padding left out."""
        return sum(self.lengths)

    def inputs(self, heard: str | Path | None = None, allow_truncated: bool = False) -> Inputs:
        """The arguments of a forward: speech from a file of the user's, or from the clip of the package."""
        normalise = checkpoint.source(MODELS[self.model].path).normalise
        utterances = audio.utterances(len(self.lengths), self.samples, heard, allow_truncated=allow_truncated)
        waveforms = torch.cat([checkpoint.prepare(waveform, normalise) for waveform in utterances])
        if not self.ragged:
            return {"input_values": waveforms}
        lengths = torch.tensor([int(s * audio.RATE) for s in self.lengths])
        mask = torch.arange(self.samples) < lengths[:, None]
        return {"input_values": waveforms * mask, "attention_mask": mask.long()}

    def operations(self, padded: bool = True) -> dict[str, float]:
        """Of each stage, by the direct algorithm, with or without those on padding; a training step counts as three
        forwards, a gradient with respect to the input alone as one more."""
        spec = MODELS[self.model]
        samples = [self.samples if padded else int(s * audio.RATE) for s in self.lengths]
        each = [flops.forward(spec.config, count, n, spec.cls) for n, count in Counter(samples).items()]
        found = {stage: sum(own[stage] for own in each) for stage in flops.STAGES}
        forwards = 3 if self.train else 2 if self.regime == "to-waveform" else 1
        return {stage: forwards * count for stage, count in found.items()}


def of(model: str, batch: int, length: float, group: str, **options: Any) -> Case:
    """`batch` utterances of `length` seconds each."""
    return Case(model, (float(length),) * batch, group, **options)


def _ragged(model: str, batch: int, shortest: float, longest: float, group: str = "ragged", **options: Any) -> Case:
    """Utterances of different lengths, evenly spread, not sorted."""
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(batch))
    lengths = torch.linspace(shortest, longest, batch)[order].tolist()
    name = f"ragged {batch}x{shortest:g}-{longest:g}"
    return Case(model, tuple(lengths), group, ragged=name, **options)


def corpus(model: str, count: int, shortest: float, longest: float, layer: int) -> Case:
    """Utterances as a corpus has them: many of a few seconds, some long ones; lengths are log-normal."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(count)) * _SPREAD + math.log(_USUAL)
    lengths = drawn.exp().clamp(shortest, longest).tolist()
    return Case(model, tuple(lengths), CORPUS, ragged=f"corpus {count}x{shortest:g}-{longest:g}", layer=layer)


_USUAL, _SPREAD = 5.5, 0.65  # seconds of the median, and the deviation of logarithms: 6.5 s on average
_ONE_FRAME = 0.025
_PLAIN = ("transformers", "wavlm_fast")
_IN_ALL_WAYS = (*_PLAIN, "wavlm_fast, exact", "wavlm_fast, one at a time", "wavlm_fast, uniform")
_AND_FREED = (*_PLAIN, "wavlm_fast, originals freed")
_NO_ONNX = (*_AND_FREED, "OpenVINO")  # it never was far from OpenVINO


def _all() -> Iterator[Case]:
    """Chosen such that two cores get through all of them in less than half an hour."""
    yield of("base", 1, 2, "latency", memory=True)
    yield of("base", 1, 10, "latency", stages=True, layers=True, memory=True, everybody=True)
    yield of("base", 1, 30, "latency", families=_NO_ONNX)
    yield of("base", 8, 10, "throughput", families=_NO_ONNX)
    yield _ragged("base", 4, 2, 10, "padded", families=_PLAIN)
    for batch in (1, 8, 64):
        yield of("base", batch, 1, "batch", families=() if batch == 1 else _PLAIN)
    # OpenVINO in f32 is wrong for so long an utterance, and transformers has not the memory for ten minutes.
    yield of("base", 1, 120, "length", memory=True, families=_AND_FREED, dtypes=(torch.float32,))
    yield of("base", 1, 600, "length", memory=True, families=_PLAIN, dtypes=(torch.bfloat16,))
    yield of("large", 1, 10, "latency", families=(*_PLAIN, "OpenVINO"))
    for model in ("ctc", "classification", "frames", "xvector"):
        yield of(model, 1, 10, "classes", families=_PLAIN)
    yield of("train", 2, 5, "training", train=True)
    for regime in ("no_grad", "grad", "inference-built", "autocast", "to-waveform"):
        yield of("base", 1, 3, "regimes", regime=regime, families=_PLAIN, dtypes=(torch.float32,))
    yield of("base", 1, _ONE_FRAME, "regimes", regime="no_grad", families=_PLAIN, dtypes=(torch.float32,))
    for batch, shortest, longest in ((8, 2, 15), (32, 1, 8), (16, 1, 3)):
        yield _ragged("base", batch, shortest, longest, families=_IN_ALL_WAYS)
    for model in ("ctc", "classification", "frames", "xvector"):
        yield _ragged(model, 8, 1, 6, families=_IN_ALL_WAYS, dtypes=(torch.float32,))
    yield _ragged("train-ctc", 4, 2, 12, families=_IN_ALL_WAYS, train=True)
    for batch, shortest, longest in ((8, 2, 15), (32, 1, 8)):
        yield _ragged("large", batch, shortest, longest, families=_IN_ALL_WAYS, dtypes=(torch.float32,))
    for house in ("transformers", "original", "torchaudio"):
        yield of("base", 1, 10, "houses", house=house)
    yield corpus("base", 300, 1, 20, layer=6)


CASES = {case.name: case for case in _all()}
QUICK = ("base 1x2",)


def grid(model: str, batches: list[int], lengths: list[float]) -> dict[str, Case]:
    """The cases of a user's own batch sizes and seconds."""
    found = (of(model, b, s, "latency" if b == 1 else "throughput", memory=True) for b in batches for s in lengths)
    return {case.name: case for case in found}


class Output(nn.Module):
    """A model as a function from its inputs to the one output that counts: what other runtimes take."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output
        self.train(model.training)

    @classmethod
    def of(cls, model: str) -> Output:
        """One of MODELS."""
        return cls(MODELS[model].build(), MODELS[model].output)

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return getattr(self.model(input_values, attention_mask=attention_mask), self.output)

    def copy(self, dtype: torch.dtype = torch.float32, fast: bool = False, **options: Any) -> Output:
        """The same model in another dtype or on our modules (`options`: of `accelerate`).

        Parameters that need not differ are shared.
        """
        shared = {id(p): p for p in self.parameters()} if dtype == torch.float32 else {}
        made = copy.deepcopy(self, shared).to(dtype)
        return accelerate(made, **options) if fast else made


def bound(module: Output, inputs: Inputs) -> Callable[[], Tensor]:
    """The call that is timed: inference on inputs of the module's dtype and device."""
    inputs = placed(module, inputs)

    def call() -> Tensor:
        with torch.inference_mode():
            return module(**inputs)

    return call


def placed(module: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs on the module's device, waveforms in its dtype."""
    parameter = next(module.parameters())
    found = {name: value.to(parameter.device) for name, value in inputs.items()}
    return {name: value.to(parameter.dtype) if value.is_floating_point() else value for name, value in found.items()}


def bound_step(
    module: Output, inputs: Inputs, around: Callable[[], AbstractContextManager] = nullcontext
) -> Callable[[], dict[str, Tensor]]:
    """A training step: forward, backward from a sum with fixed random weights, and an optimizer that sets the weights
    to what they are, so that every step is the same and yet counts as a change of all of them. `around` is what the
    forward runs in, such as autocast."""
    inputs = placed(module, inputs)
    weights: list[Tensor] = []
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0)

    def call() -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with around():
            out = module(**inputs)
        if not weights:
            weights.append(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
        (out * weights[0]).mean().backward()
        optimizer.step()
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    return call
