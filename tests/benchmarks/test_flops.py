"""The count by formula against torch's own count of what transformers runs."""

import pytest
import torch
from tiny_models import SIZES
from torch.utils.flop_counter import FlopCounterMode

from wavlm_fast.benchmarks.run import cases, flops

LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


@pytest.mark.parametrize(
    "cls",
    [
        "WavLMModel",
        "WavLMForCTC",
        "WavLMForSequenceClassification",
        "WavLMForAudioFrameClassification",
        "WavLMForXVector",
    ],
)
@pytest.mark.parametrize("form", [{}, LARGE], ids=["base", "large"])
def test_the_formula_counts_what_torch_counts(cls, form):
    spec = cases.Spec(cls, {**SIZES, **form})
    batch, samples = 3, 9000
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        spec.build()(torch.randn(batch, samples))
    found = flops.forward(spec.config, batch, samples, cls)
    assert sum(found.values()) == counter.get_total_flops()
    assert list(found) == list(flops.STAGES)
    if cls == "WavLMModel":
        by_module = {name.rpartition(".")[2]: sum(by.values()) for name, by in counter.flop_counts.items()}
        assert by_module["feature_extractor"] == found["waveform conv"] + found["feature encoder"]
        assert by_module["feature_projection"] == found["projection"]
        assert by_module["pos_conv_embed"] == found["positional conv"]


def test_the_published_sizes():
    base = flops.forward(cases.MODELS["base"].config, 1, 160_000)
    assert sum(base.values()) / 1e9 == pytest.approx(148.2, abs=0.05)
    large = flops.forward(cases.MODELS["large"].config, 1, 160_000)
    assert sum(large.values()) / 1e9 == pytest.approx(384, abs=1)


def test_a_training_step_is_three_forwards():
    forward = cases.Case("train", (1.0,)).operations()
    step = cases.Case("train", (1.0,), train=True).operations()
    assert sum(step.values()) == 3 * sum(forward.values())


def test_a_step_of_adapters_is_two_forwards_of_the_layers():
    forward = cases.Case("train", (1.0,)).operations()
    step = cases.Case("lora", (1.0,), train=True).operations()
    once = ("waveform conv", "feature encoder", "projection", "positional conv")
    assert step == {name: {"attention": 3}.get(name, 1 if name in once else 2) * n for name, n in forward.items()}
