"""What the model tests share: small configurations, sensitive weights, inputs, and the rule that compares.

Set WAVLM_FAST_TEST_SUBJECT=transformers to run the same tests on transformers' own classes: whatever fails then is
wrong in the test, not in `wavlm_fast`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import WavLMConfig
from transformers.models.wavlm import modeling_wavlm

from wavlm_fast.parity.rule import error_of
from wavlm_fast.parity.run_models import allowed_gradients
from wavlm_fast.sensitive import make_sensitive

PLAIN = os.environ.get("WAVLM_FAST_TEST_SUBJECT") == "transformers"
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

MODELS = (
    "WavLMModel",
    "WavLMForCTC",
    "WavLMForSequenceClassification",
    "WavLMForAudioFrameClassification",
    "WavLMForXVector",
)
HEADS = MODELS[1:]

if PLAIN:
    subject = SimpleNamespace(
        **{name: getattr(transformers, name) for name in MODELS},
        WavLMConfig=WavLMConfig,
        accelerate=lambda model: model,
        restore=lambda model: model,
    )
else:
    import wavlm_fast as subject

ours_only = pytest.mark.skipif(PLAIN, reason="transformers' own models are not expected to do this")

# The two published forms (base: group norm, post-norm; large: layer norm, pre-norm) and the two unpublished mixtures.
FORMS = {
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
    "group-stable": {"feat_extract_norm": "group", "do_stable_layer_norm": True},
    "layer-post": {"feat_extract_norm": "layer", "do_stable_layer_norm": False},
}
SAMPLES = 600  # 29 frames with the small configuration
FRAMES = 29


def small_config(form: str = "base", **changes: Any) -> WavLMConfig:
    """A WavLM of a few thousand weights that does nothing at random: no dropout, no masking, no layer drop."""
    values = {
        "vocab_size": 12,
        "num_labels": 5,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_dim": [16, 16, 24],
        "conv_stride": [5, 2, 2],
        "conv_kernel": [10, 3, 2],
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "num_buckets": 32,
        "max_bucket_distance": 20,
        "hidden_dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
        "layerdrop": 0.0,
        "mask_time_prob": 0.0,
        "classifier_proj_size": 20,
        "tdnn_dim": [16, 16, 24],
        "tdnn_kernel": [5, 3, 1],
        "tdnn_dilation": [1, 2, 1],
        "xvector_output_dim": 14,
        **FORMS[form],
    }
    return WavLMConfig(**{**values, **changes})


def plain_model(name: str, config: WavLMConfig | None = None, seed: int = 0) -> torch.nn.Module:
    """A transformers model with sensitive weights, in eval mode."""
    model = getattr(transformers, name)(config if config is not None else small_config())
    return make_sensitive(model, seed).eval()


def fast_like(model: torch.nn.Module) -> torch.nn.Module:
    """Ours, from a transformers model: the class of the same name, config, weights and mode."""
    ours = getattr(subject, type(model).__name__)(copy.deepcopy(model.config))
    ours.load_state_dict(model.state_dict())
    ours.to(next(model.parameters()).dtype)
    return ours.train(model.training)


def fast_model(name: str, config: WavLMConfig | None = None, seed: int = 0) -> torch.nn.Module:
    """Ours, with sensitive weights, in eval mode."""
    return fast_like(plain_model(name, config, seed))


def is_one_of(model: torch.nn.Module, name: str) -> bool:
    """Whether a model is of our class `name`, and neither of a subclass nor transformers' own."""
    known_as = (type(model).__module__, type(model).__qualname__)
    return isinstance(model, getattr(subject, name)) and known_as == (modeling_wavlm.__name__, name)


def truth_of(model: torch.nn.Module) -> torch.nn.Module:
    """The same transformers model in float64."""
    return copy.deepcopy(model).double()


def waveforms(
    batch: int = 2, samples: int = SAMPLES, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(batch, samples, generator=generator).to(dtype)  # [B, S]


def ragged_mask(*lengths: int, samples: int = SAMPLES) -> torch.Tensor:
    return (torch.arange(samples)[None] < torch.tensor(lengths)[:, None]).long()  # [B, S]


def labels_for(name: str, config: WavLMConfig, batch: int = 2, frames: int = FRAMES, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2000 + seed)
    if name == "WavLMForCTC":
        labels = torch.randint(1, config.vocab_size, (batch, 5), generator=generator)
        labels[-1, -2:] = -100
        return labels
    if name == "WavLMForAudioFrameClassification":
        classes = torch.randint(0, config.num_labels, (batch, frames), generator=generator)
        return torch.nn.functional.one_hot(classes, config.num_labels)
    return torch.randint(0, config.num_labels, (batch,), generator=generator)


def with_labels(name: str, config: WavLMConfig, **kwargs: Any) -> dict[str, torch.Tensor]:
    """`labels=` for the classes that take them."""
    return {} if name == "WavLMModel" else {"labels": labels_for(name, config, **kwargs)}


def main_output(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def tensors(output: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model output, named."""
    if isinstance(output, torch.Tensor):
        yield prefix, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from tensors(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from tensors(value, f"{prefix}[{i}]")


def structure(output: Any) -> Any:
    """Types, shapes and dtypes of a model output."""
    if isinstance(output, torch.Tensor):
        return (tuple(output.shape), output.dtype)
    if isinstance(output, dict):
        return type(output).__name__, {key: structure(value) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return type(output).__name__, [structure(value) for value in output]
    return output


def to_double(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


def assert_close_to_truth(got: Any, plain: Any, truth: Any) -> None:
    """Ours may err at most twice as much as transformers in the same dtype, both measured against float64."""
    assert structure(got) == structure(plain)
    exact = dict(tensors(truth))
    baseline = dict(tensors(plain))
    for name, value in tensors(got):
        assert_tensor_close(name, value, baseline[name], exact[name])


def assert_tensor_close(name: str, got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    if not got.is_floating_point():
        assert torch.equal(got, plain), name
        return
    got, base, exact = got.detach().double(), plain.detach().double(), truth.detach().double()
    # Where transformers gives NaN (one valid frame has no spread), so do we.
    assert torch.equal(got.isnan(), base.isnan()), f"{name}: NaN in other places than transformers has them"
    err, err_plain = (
        (x - exact).nan_to_num(0.0, 0.0, 0.0).abs().max().item() if x.numel() else 0.0 for x in (got, base)
    )
    scale = exact.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if exact.numel() else 0.0
    tiny = 32 * torch.finfo(plain.dtype).eps * scale
    assert err <= 2 * err_plain + tiny, f"{name}: error {err:.3g}, transformers' {err_plain:.3g}, tiny {tiny:.3g}"


def assert_gradients_close(
    got: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
    model: torch.nn.Module,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The rule for gradients, where parameters of a kind share what is known of transformers' error.

    The harness holds its own cases to the factor two. Here, over any weights and inputs, twice that: all gradients of a
    model share one draw of rounding noise, and half of all draws are better than transformers' own.
    """
    assert set(got) == set(plain)
    allowed = allowed_gradients(plain, truth, dict(model.named_parameters()), dtype)
    for name, value in got.items():
        error, most = error_of(value, truth[name]), 2 * allowed[f"d {name}"]
        assert error <= most, f"{name}: error {error:.3g}, allowed {most:.3g}"


def check_forward(plain: torch.nn.Module, x: torch.Tensor, ours: torch.nn.Module | None = None, **kwargs: Any) -> Any:
    """Ours on the same state dict gives what transformers gives, by the rule; returns our output."""
    ours = fast_like(plain) if ours is None else ours
    with torch.no_grad():
        got = ours(x.clone(), **kwargs)
        expected = plain(x.clone(), **kwargs)
        truth = truth_of(plain)(x.double(), **to_double(kwargs))
    assert_close_to_truth(got, expected, truth)
    return got


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit, NaN included."""
    assert structure(a) == structure(b)
    expected = dict(tensors(b))
    for name, value in tensors(a):
        assert torch.equal(value.isnan(), expected[name].isnan()), name
        assert torch.equal(value.nan_to_num(), expected[name].nan_to_num()), name


def gradients(model: torch.nn.Module, loss: Callable[[torch.nn.Module], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
