"""What is measured: models with seeded weights, and the utterances that they hear."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WavLMConfig
from transformers.models.wavlm import modeling_wavlm as hf

from wavlm_fast import accelerate, audio, restore
from wavlm_fast.sensitive import make_sensitive

from . import flops

Inputs = dict[str, Tensor]
_SHORT = 30.0  # seconds of audio


@dataclass(frozen=True)
class Spec:
    """A model: transformers' class, what its config says beyond the defaults, and the output that counts."""

    cls: str = "WavLMModel"
    options: Mapping[str, Any] = field(default_factory=dict)
    output: str = "last_hidden_state"

    @property
    def config(self) -> WavLMConfig:
        return WavLMConfig(**self.options)

    def build(self) -> nn.Module:
        """transformers' own model in float32, with sensitive weights, for inference."""
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
_NOTHING_RANDOM = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
MODELS = {
    "base": Spec(),
    "xvector": Spec("WavLMForXVector", output="embeddings"),
    "large": Spec(options=_LARGE),
    "train": Spec(options=_NOTHING_RANDOM),
}


@dataclass(frozen=True)
class Case:
    """Some utterances through one of MODELS."""

    model: str
    seconds: tuple[float, ...]  # of each utterance; padded to the longest
    ragged: str = ""  # what to call lengths that differ
    train: bool = False  # forward and backward
    stages: bool = False  # where the time of ours goes is measured too
    alone: bool = False  # a provider at a time, with ours: together they would need too much memory

    @property
    def name(self) -> str:
        return f"{self.model} {self.ragged or f'{len(self.seconds)}x{self.seconds[0]:g}'}"

    @property
    def rounds(self) -> int:
        """Timed runs of each provider, unless the user says otherwise."""
        return 11 if self.audio <= 10 else 7 if self.audio <= _SHORT else 5

    @property
    def warms_up(self) -> bool:
        """Whether everybody runs once more between being verified, which takes longer than timing, and being timed."""
        return self.audio <= _SHORT

    @property
    def samples(self) -> int:
        """Of the longest utterance."""
        return int(max(self.seconds) * audio.RATE)

    @property
    def audio(self) -> float:
        """Seconds of audio, padding left out."""
        return sum(self.seconds)

    def inputs(self) -> Inputs:
        """The arguments of a forward."""
        waveforms = audio.utterances(len(self.seconds), self.samples)
        if not self.ragged:
            return {"input_values": waveforms}
        lengths = torch.tensor([int(s * audio.RATE) for s in self.seconds])
        mask = torch.arange(self.samples) < lengths[:, None]
        return {"input_values": waveforms * mask, "attention_mask": mask.long()}

    def operations(self) -> dict[str, float]:
        """Of each stage, by the direct algorithm; a training step counts as three forwards."""
        spec = MODELS[self.model]
        found = flops.forward(spec.config, len(self.seconds), self.samples, spec.cls == "WavLMForXVector")
        return {stage: (3 if self.train else 1) * count for stage, count in found.items()}


def _of(model: str, batch: int, seconds: float, **options: Any) -> Case:
    return Case(model, (float(seconds),) * batch, **options)


_RAGGED = tuple(float(s) for s in torch.linspace(2, 15, 8).tolist())
_ALL = (
    _of("base", 1, 2),
    _of("base", 1, 10, stages=True),
    _of("base", 8, 10, stages=True),
    _of("base", 1, 30),
    Case("base", _RAGGED, ragged="ragged 8x2-15"),
    _of("xvector", 1, 10),
    _of("xvector", 8, 10),
    _of("train", 4, 5, train=True),
    _of("large", 1, 10),
    _of("large", 8, 10),
    _of("base", 1, 120, alone=True),
)
CASES = {case.name: case for case in _ALL}
QUICK = ("base 1x2", "base 1x10")


class Output(nn.Module):
    """A model as a function from its inputs to the one output that counts: what other runtimes take."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return getattr(self.model(input_values, attention_mask=attention_mask), self.output)

    def copy(self, dtype: torch.dtype = torch.float32, fast: bool = False) -> Output:
        """The same model in another dtype or on our modules; parameters that need not differ are shared."""
        shared = {id(p): p for p in self.parameters()} if dtype == torch.float32 else {}
        made = copy.deepcopy(self, shared).to(dtype)
        return accelerate(made) if fast else made


def bound(module: Output, inputs: Inputs) -> Callable[[], Tensor]:
    """The call that is timed: inference on inputs in the module's dtype."""
    dtype = next(module.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def call() -> Tensor:
        with torch.inference_mode():
            return module(**inputs)

    return call


def bound_step(module: Output, inputs: Inputs) -> Callable[[], Tensor]:
    """A training step without its optimizer: forward, and backward from a sum with fixed random weights."""
    dtype, weights = next(module.parameters()).dtype, []
    module.train()

    def call() -> dict[str, Tensor]:
        module.zero_grad(set_to_none=True)
        out = module(inputs["input_values"].to(dtype))
        if not weights:
            weights.append(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
        (out * weights[0]).mean().backward()
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    return call
