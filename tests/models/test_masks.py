"""Masks over samples and over frames: what is known of them is what they hold now."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from wavlm_cases import (
    FORMS,
    FRAMES,
    MODELS,
    SAMPLES,
    check_forward,
    ours_only,
    plain_model,
    ragged_mask,
    small_config,
    subject,
    truth_of,
    waveforms,
    with_labels,
)

from wavlm_fast.modules._masks import forget_made, made, prefix_lengths

pytestmark = ours_only

both_forms = pytest.mark.parametrize("form", ["base", "large"])
modes = pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])


def encoders(form):
    """Ours, and transformers' in float64."""
    plain = plain_model("WavLMModel", small_config(form))
    return subject.accelerate(copy.deepcopy(plain)).encoder, truth_of(plain).encoder


def frames():
    return torch.randn(2, FRAMES, 32, generator=torch.Generator().manual_seed(3))


def frame_mask(*lengths):
    return torch.arange(FRAMES) < torch.tensor(lengths)[:, None]


def assert_encodes(ours, truth, mask):
    """With a wrong mask half of the output is another one; how close a right one comes is tested elsewhere."""
    with torch.no_grad():
        exact = truth(frames().double(), attention_mask=mask.clone())[0]
    error = (ours(frames(), attention_mask=mask)[0] - exact).abs().max()
    assert error <= 0.01 * exact.abs().max()


CHANGES = {
    "shorter": lambda mask: mask[:, 12:].fill_(False),
    "holes": lambda mask: mask[:, 3:7].fill_(False),
    "longer": lambda mask: mask.fill_(True),
    "through .data": lambda mask: mask.data[:, 12:].fill_(False),
    "through numpy": lambda mask: mask.numpy()[:, 12:].fill(False),
    "other storage": lambda mask: mask.set_(frame_mask(9, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
@modes
@both_forms
def test_a_mask_that_changes_in_place(form, mode, change):
    ours, truth = encoders(form)
    with mode():
        mask = frame_mask(FRAMES, 20)
        assert_encodes(ours, truth, mask)
        CHANGES[change](mask)
        assert_encodes(ours, truth, mask)


@pytest.mark.parametrize("change", ["shorter", "holes"])
def test_a_mask_of_the_models_own_making_that_changes(change):
    ours, truth = encoders("base")
    model = subject.accelerate(plain_model("WavLMModel"))
    mask = model._get_feature_vector_attention_mask(FRAMES, ragged_mask(SAMPLES, 400))
    CHANGES[change](mask)
    assert_encodes(ours, truth, mask)


@pytest.mark.parametrize("change", ["shorter", "holes"])
def test_a_hook_that_writes_to_the_mask(change):
    """Between the layers of one forward."""
    ours, truth = encoders("base")

    def rewrite(layer, args, kwargs):
        CHANGES[change](kwargs["attention_mask"])

    for encoder in (ours, truth):
        encoder.layers[1].register_forward_pre_hook(rewrite, with_kwargs=True)
    with torch.no_grad():
        assert_encodes(ours, truth, frame_mask(FRAMES, 20))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_on_tensors_of_the_user(name):
    config = small_config()
    model = subject.accelerate(plain_model(name, config))
    inputs = {"input_values": waveforms(), "attention_mask": ragged_mask(SAMPLES, 400)}
    inputs |= with_labels(name, config)
    for _ in range(2):
        model(**inputs)
    mask = model._get_feature_vector_attention_mask(FRAMES, inputs["attention_mask"])
    model.base_model.encoder(frames(), attention_mask=mask)
    for tensor in (*inputs.values(), mask, *model.parameters()):
        assert not {k: v for k, v in vars(tensor).items() if not k.startswith("_is_hf")}


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device = torch.device("cuda")


@modes
def test_off_the_cpu_the_models_own_mask_is_taken_at_its_word_until_it_is_written_to(mode):
    with mode():
        mask = made(frame_mask(FRAMES, 20).as_subclass(Elsewhere))
        assert prefix_lengths(mask).tolist() == [FRAMES, 20]
        mask[:, 3:7] = False
        assert prefix_lengths(mask) is None
        forget_made()
        mask[:, 3:] = False
        assert prefix_lengths(mask).tolist() == [3, 3]


# Under torch.compile and torch.export


PREFIX, HOLES = frame_mask(FRAMES, 20), frame_mask(FRAMES, FRAMES).index_fill(1, torch.tensor([4, 9]), False)


@pytest.mark.parametrize("mask", [PREFIX, HOLES], ids=["prefix", "holes"])
@both_forms
def test_a_compiled_encoder_sees_what_the_mask_holds(form, mask):
    ours, truth = encoders(form)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_encodes(compiled, truth, mask)
        assert_encodes(compiled, truth, PREFIX | HOLES)


@both_forms
def test_an_exported_encoder_sees_what_the_mask_holds(form):
    ours, truth = encoders(form)
    with torch.no_grad():
        program = torch.export.export(ours, (frames(),), {"attention_mask": PREFIX})
        assert_encodes(program.module(), truth, HOLES)


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_model_keeps_its_fused_attention_with_a_mask(form):
    plain = plain_model("WavLMModel", small_config(form))
    ours = subject.accelerate(copy.deepcopy(plain))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(ours, fullgraph=True, backend=keep)
    check_forward(plain, waveforms(), ours=compiled, attention_mask=ragged_mask(SAMPLES, 400))
    ops = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("wavlm_fast.encoder_layer" in op or "wavlm_fast.gated_attention" in op for op in ops)


# Front ends of the user's own


class Mel(nn.Module):
    """Frames `[B, T, 40]` to the channel-major `[B, 24, T]` that the projection takes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(24, 40, generator=generator) / 6)

    def forward(self, mel):
        return (mel @ self.weight.t()).transpose(1, 2)


@pytest.mark.parametrize("name", MODELS)
def test_mel_features_and_a_mask_over_their_frames(name):
    plain = plain_model(name)
    plain.base_model.feature_extractor = Mel()
    # Frames in, frames out.
    for model in (plain, plain.base_model):
        model.config.conv_kernel, model.config.conv_stride = [1], [1]
    ours = subject.accelerate(copy.deepcopy(plain))
    mel = torch.randn(2, 120, 40, generator=torch.Generator().manual_seed(8))
    mask = ragged_mask(120, 70, samples=120)
    check_forward(plain, mel, ours=ours, attention_mask=mask)
    labels = with_labels(name, plain.config, frames=120)
    if labels:
        losses = [model(mel, attention_mask=mask, **labels).loss for model in (ours, plain)]
        assert torch.allclose(*losses, rtol=1e-3)


def test_a_mask_of_the_wrong_shape_is_still_refused_over_samples():
    model = subject.accelerate(plain_model("WavLMModel"))
    with pytest.raises(ValueError, match="attention_mask must have the shape of input_values"):
        model(waveforms(), attention_mask=frame_mask(FRAMES, 20))
