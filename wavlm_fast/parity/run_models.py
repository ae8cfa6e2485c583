"""Runs whole models against transformers' own classes: every output, every hidden state, every parameter's gradient."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WavLMConfig
from transformers.models.wavlm import modeling_wavlm as hf

from .. import backends, swap
from ..derived import forget
from ..inputs import receptive_field
from ..sensitive import make_sensitive
from .rule import FAIL, PASS, Result, allowed_error, dtype_name, error_of, magnitude, ratio, rms, tiny

CLASSES = (
    "WavLMModel",
    "WavLMForCTC",
    "WavLMForSequenceClassification",
    "WavLMForAudioFrameClassification",
    "WavLMForXVector",
)
# The two published forms, small: base (group norm, norms after) and large (layer norm, convolution bias, norms before).
FORMS: dict[str, dict[str, Any]] = {
    "group norm": {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False},
    "layer norm, stable": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}
INPUTS = ("no mask", "ragged mask", "one sample", "shortest", "changed weights", "exact batch")
# Samples of the utterances of an exact batch: not sorted, two equal, the longest as wide as the batch.
_LENGTHS = (337, 600, 363, 337, 471)
# How many times `rule.tiny` the gradients of parameters may be off. A low dtype rounds the stream a dozen times on
# the way, and one gradient's rounding noise is one draw. In float32 the log-sum-exp of an attention row counts: padded
# frames lack the large channels, their norm blows up the rest, and scores of a few hundred round to as many units.
_GRADIENT_UNITS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 16, torch.float64: 16}


@dataclass(frozen=True)
class ModelCase:
    """One model class, norm form and kind of input."""

    model: str
    form: str
    input: str

    @property
    def name(self) -> str:
        return f"{self.form}: {self.input}"

    @property
    def differentiate(self) -> bool:
        return self.input != "changed weights"

    @property
    def exact(self) -> bool:
        """Whether the truth is each utterance alone."""
        return self.input == "exact batch"


@dataclass(frozen=True)
class Outcome:
    """What a model computed: named outputs, and gradients by parameter."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def cases(quick: bool = False) -> tuple[ModelCase, ...]:
    """All combinations; the quick ones see every class, form and input at least once."""
    found = [ModelCase(m, f, i) for m in CLASSES for f in FORMS for i in INPUTS]
    if not quick:
        return tuple(found)
    return tuple(c for n, c in enumerate(found) if n % 11 == 1)


def config(form: str) -> WavLMConfig:
    """A WavLM of a few thousand weights in which nothing is degenerate: more frames than `max_bucket_distance`, heads
    that differ, an even positional kernel, and nothing random.
    """
    return WavLMConfig(
        vocab_size=12, num_labels=5, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        conv_dim=[16, 16, 24], conv_stride=[5, 2, 2], conv_kernel=[10, 3, 2], num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, num_buckets=32, max_bucket_distance=20, hidden_dropout=0.0,
        activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
        mask_time_prob=0.0, classifier_proj_size=20, tdnn_dim=[16, 16, 24], tdnn_kernel=[5, 3, 1],
        tdnn_dilation=[1, 2, 1], xvector_output_dim=14, ctc_loss_reduction="mean", ctc_zero_infinity=False,
        **FORMS[form],
    )  # fmt: skip


def _samples(case: ModelCase, conf: WavLMConfig) -> int:
    if case.input == "one sample":
        return 601
    if case.input != "shortest":
        return 600
    if case.model != "WavLMForXVector":
        return receptive_field(conf.conv_kernel, conf.conv_stride)
    # Eight frames after the time-delay layers: of one there is no deviation, of few its slope is mostly rounding.
    frames = sum((k - 1) * d for k, d in zip(conf.tdnn_kernel, conf.tdnn_dilation, strict=True)) + 8
    return receptive_field(conf.conv_kernel, conf.conv_stride) + (frames - 1) * math.prod(conf.conv_stride)


def _inputs(case: ModelCase, conf: WavLMConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    samples = _samples(case, conf)
    batch = 1 if case.input == "one sample" else len(_LENGTHS) if case.exact else 2
    inputs = {"input_values": torch.randn(batch, samples, generator=generator, dtype=torch.float64)}
    if case.input == "ragged mask":
        inputs["attention_mask"] = (torch.arange(samples) < torch.tensor([[samples], [337]])).long()
    if case.exact:
        inputs["attention_mask"] = (torch.arange(samples) < torch.tensor(_LENGTHS)[:, None]).long()
    frames = _frames(conf, samples)
    if case.model == "WavLMForCTC":
        inputs["labels"] = torch.randint(1, conf.vocab_size, (batch, min(5, frames)), generator=generator)
        if frames > 1:
            inputs["labels"][-1, -2:] = -100
    elif case.model == "WavLMForAudioFrameClassification":
        classes = torch.randint(0, conf.num_labels, (batch, frames), generator=generator)
        inputs["labels"] = nn.functional.one_hot(classes, conf.num_labels)
    elif case.model != "WavLMModel":
        inputs["labels"] = torch.randint(0, conf.num_labels, (batch,), generator=generator)
    return inputs


@cache
def _model(name: str, form: str, dtype: torch.dtype, device: torch.device, held: torch.dtype, fast: bool) -> nn.Module:
    """A model with sensitive weights, rounded to `held` and computing in `dtype`: transformers' own, or ours."""
    with torch.random.fork_rng(devices=[]):
        model = getattr(hf, name)(config(form))
    # While `install` is in force the name leads to our class.
    model = make_sensitive(swap.restore(model)).to(held).to(device, dtype).eval()
    return swap.accelerate(model) if fast else model


def _call(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    first = next(model.parameters())
    inputs = {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    return dict(_flat(model(**inputs, output_hidden_states=True)))


def _flat(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield prefix, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from _flat(value, key)
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from _flat(value, f"{prefix}[{i}]")


def _alone(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs for each utterance of a padded batch alone, as those of the batch: zeros past their ends, and the
    mean of their losses, or where frames have labels of those of all frames.
    """
    frames = [_frames(model.config, n) for n in _LENGTHS]
    found = []
    for row, (samples, count) in enumerate(zip(_LENGTHS, frames, strict=True)):
        own = {"input_values": inputs["input_values"][row : row + 1, :samples]}
        if "labels" in inputs:
            labels = inputs["labels"][row : row + 1]
            own["labels"] = labels[:, :count] if labels.dim() == 3 else labels
        found.append(_call(model, own))
    joined = {}
    for name, first in found[0].items():
        parts = [out[name] for out in found]
        if name == "loss":
            shares = frames if inputs["labels"].dim() == 3 else [1] * len(frames)
            joined[name] = sum(n * part for n, part in zip(shares, parts, strict=True)) / sum(shares)
        elif first.dim() == 3:
            joined[name] = nn.utils.rnn.pad_sequence([part[0] for part in parts], batch_first=True)
        else:
            joined[name] = torch.cat(parts)
    return joined


def _frames(conf: WavLMConfig, samples: int) -> int:
    """Frames that the front end of a model makes of so many samples."""
    for kernel, stride in zip(conf.conv_kernel, conf.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def _run(model: nn.Module, case: ModelCase, inputs: dict[str, Tensor], alone: bool = False) -> Outcome:
    """Outputs, and gradients of the loss."""
    with torch.set_grad_enabled(case.differentiate):
        outputs = _alone(model, inputs) if alone else _call(model, inputs)
    if not case.differentiate:
        return Outcome(outputs, {})
    model.zero_grad(set_to_none=True)
    loss = outputs.get("loss")
    if loss is None:
        hidden = outputs["last_hidden_state"]
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        loss = (hidden * weights.to(hidden.device, hidden.dtype)).mean()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Outcome({k: v.detach() for k, v in outputs.items()}, gradients)


def _rounded_inputs(case: ModelCase, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = _inputs(case, config(case.form))
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@cache
def expected(case: ModelCase, dtype: torch.dtype, device: torch.device) -> tuple[Outcome, dict[str, float]]:
    """transformers in float64 on the CPU, and the allowance from transformers in `dtype` on the device."""
    inputs = _rounded_inputs(case, dtype)
    usual = _run(_model(case.model, case.form, dtype, device, dtype, False), case, inputs, case.exact)
    exact = _model(case.model, case.form, torch.float64, torch.device("cpu"), dtype, False)
    truth = _run(exact, case, inputs, case.exact)
    allowed = {k: allowed_error(usual.outputs[k], t, dtype) for k, t in truth.outputs.items()}
    return truth, allowed | allowed_gradients(usual.gradients, truth.gradients, dict(exact.named_parameters()), dtype)


def allowed_gradients(
    usual: dict[str, Tensor], truth: dict[str, Tensor], parameters: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """2 · err(plain) + tiny for every parameter, where parameters of a kind share what is known of plain's error.

    The gradient of a vector of two values has two values' worth of rounding noise: one draw says little about the next.
    And some gradients vanish because terms cancel (the key bias moves all scores of a row alike; with one frame every
    gradient of a score does): their errors are those of the terms. So errors are taken relative to a natural size, and
    the plain path's relative error is the largest over the parameters of the same block in all layers.
    """
    natural = _natural(truth, parameters)
    relative: dict[str, float] = {}
    for name, size in natural.items():
        found = error_of(usual[name], truth[name]) / size if size else 0.0
        relative[_block(name)] = max(found, relative.get(_block(name), 0.0))
    factor = _GRADIENT_UNITS[dtype]
    return {f"d {n}": 2 * relative[_block(n)] * size + factor * tiny(size, dtype) for n, size in natural.items()}


def _natural(gradients: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, float]:
    """The largest value of each gradient, or what its parameter's share in the loss warrants if that is more.

    |dp| · |p| is alike for the parameters of one block; so is the largest |dp| times the level of p for those of one
    shape, which read the same large channels.
    """
    shares: dict[tuple, float] = {}
    mine: dict[str, list[tuple[tuple, float, float]]] = {}
    for name, exact in gradients.items():
        p = parameters[name].detach()
        level, size = rms(p), p.numel()
        # Key, share in the loss, and what turns a share into the size of one value.
        mine[name] = [
            ((_block(name),), rms(exact) * level * size, level * size),
            ((_block(name), p.shape), magnitude(exact) * level, level),
        ]
        for key, share, _ in mine[name]:
            shares[key] = max(share, shares.get(key, 0.0))
    return {
        name: max(magnitude(gradients[name]), *(shares[key] / unit if unit else 0.0 for key, _, unit in entries))
        for name, entries in mine.items()
    }


def _block(name: str) -> str:
    """What a parameter belongs to, layers taken together: "encoder.layers.*.attention", "tdnn.*"."""
    name = re.sub(r"\.\d+(?=\.)", ".*", name)
    name = name.replace("masked_spec_embed", "feature_projection.masked")  # both make the encoder's input
    found = re.match(r".*?(attention|feed_forward|conv_layers\.\*|tdnn\.\*|pos_conv_embed|feature_projection)", name)
    return found.group(0) if found else name.rpartition(".")[0]


def run_case(case: ModelCase, backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Result]:
    """The forward and the gradients of a model on one backend."""
    base = {"level": "model", "name": case.model, "backend": backend, "dtype": dtype_name(dtype), "case": case.name}
    quantities = ("forward", "gradient") if case.differentiate else ("forward",)
    reason = absence(backend, device)
    if reason is None:
        try:
            truth, allowed = expected(case, dtype, device)
        except RuntimeError as error:
            reason = f"transformers does not run in {dtype}: {error}"
    if reason is not None:
        yield from (Result(quantity=q, reason=reason, **base) for q in quantities)
        return
    try:
        with backends.use_backend(backend):
            found = _fast(case, dtype, device)
    except backends.BackendUnavailable as refusal:
        yield from (Result(quantity=q, reason=str(refusal), **base) for q in quantities)
        return
    except Exception as error:
        # A harness reports what goes wrong, whatever it is, and goes on.
        reason = f"{type(error).__name__}: {error}"
        yield from (Result(quantity=q, verdict=FAIL, reason=reason, **base) for q in quantities)
        return
    pairs = {"forward": (found.outputs, truth.outputs, ""), "gradient": (found.gradients, truth.gradients, "d ")}
    for quantity in quantities:
        yield _judge(*pairs[quantity], allowed, {**base, "quantity": quantity})


def _judge(found: dict, truth: dict, prefix: str, allowed: dict[str, float], base: dict) -> Result:
    if found.keys() != truth.keys():
        missing = ", ".join(sorted(found.keys() ^ truth.keys()))
        return Result(verdict=FAIL, reason=f"present on one side only: {missing}", **base)
    errors = ((prefix + k, error_of(found[k], t), allowed[prefix + k]) for k, t in truth.items())
    tensor, error, most = max(errors, key=lambda e: ratio(e[1], e[2]))
    return Result(tensor=tensor, error=error, allowed=most, verdict=PASS if error <= most else FAIL, **base)


def absence(backend: str, device: torch.device) -> str | None:
    """Why a backend has nothing to run of a model; None when it has. "auto" always has."""
    if backend == "auto":
        return None
    module = backends.load(backend)
    return module.why_not(device) or (None if module.TABLE else f"the {backend} backend has no kernels")


def _fast(case: ModelCase, dtype: torch.dtype, device: torch.device) -> Outcome:
    model = _model(case.model, case.form, dtype, device, dtype, True)
    swap.accelerate(model, padding="exact" if case.exact else "transformers")
    inputs = _rounded_inputs(case, dtype)
    if case.exact:  # whatever padding holds
        inputs["input_values"] = inputs["input_values"].masked_fill(inputs["attention_mask"] == 0, float("nan"))
    if case.differentiate:
        with torch.no_grad():
            outputs = _call(model, inputs)  # derived weights are in use only when no gradient is recorded
        return Outcome(outputs, _run(model, case, inputs).gradients)
    # A forward with other weights first: what is derived from weights must follow when they change, half of them as
    # an optimizer changes them, half through `.data`, which leaves no version behind.
    right = [p.detach().clone() for p in model.parameters()]
    wrong = [torch.roll(p, 1).mul(1.25) for p in right]
    forget(model.parameters())
    try:
        _write(model, wrong)
        _run(model, case, inputs)
    finally:
        _write(model, right)
    found = _run(model, case, inputs)
    forget(model.parameters())
    return found


@torch.no_grad()
def _write(model: nn.Module, values: list[Tensor]) -> None:
    for i, (value, p) in enumerate(zip(values, model.parameters(), strict=True)):
        (p.data if i % 2 else p).copy_(value)
