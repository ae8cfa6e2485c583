"""Losses and the gradients of every parameter, against transformers."""

from __future__ import annotations

import pytest
import torch
from wavlm_cases import (
    FORMS,
    FRAMES,
    HEADS,
    MODELS,
    SAMPLES,
    TRANSFORMERS_5,
    assert_gradients_close,
    assert_tensor_close,
    check_forward,
    fast_like,
    gradients,
    labels_for,
    main_output,
    plain_model,
    ragged_mask,
    small_config,
    truth_of,
    waveforms,
    with_labels,
)

all_forms = pytest.mark.parametrize("form", list(FORMS))
both_forms = pytest.mark.parametrize("form", ["base", "large"])


def check_gradients(plain, loss, ours=None):
    """Gradients of every parameter that transformers gives one, by the rule; returns ours."""
    ours = fast_like(plain) if ours is None else ours
    expected, truth, got = (gradients(m, loss) for m in (plain, truth_of(plain), ours))
    assert_gradients_close(got, expected, truth, plain)
    return got


def loss_of(name, **kwargs):
    def loss(model):
        dtype = next(model.parameters()).dtype
        out = model(waveforms().to(dtype), **kwargs, **with_labels(name, model.config))
        return main_output(out).square().mean() if name == "WavLMModel" else out.loss

    return loss


@pytest.mark.parametrize("name", MODELS)
@all_forms
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_every_parameter(name, form, masked):
    plain = plain_model(name, small_config(form, conv_bias=form == "layer-post"))
    kwargs = {"attention_mask": ragged_mask(SAMPLES, 400)} if masked else {}
    got = check_gradients(plain.train(), loss_of(name, **kwargs))
    assert set(got) == {n for n, _ in plain.named_parameters()}


@pytest.mark.parametrize("name", HEADS)
def test_gradients_through_hidden_states_and_attentions(name):
    def loss(model):
        x = waveforms().to(next(model.parameters()).dtype)
        out = model(x, output_hidden_states=True, output_attentions=True)
        weighted = sum(a[..., :5].square().sum() for a in out.attentions)
        return weighted + sum(h.square().mean() for h in out.hidden_states)

    check_gradients(plain_model(name), loss)


@both_forms
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_the_waveform(form, masked):
    kwargs = {"attention_mask": ragged_mask(SAMPLES, 400)} if masked else {}
    plain = plain_model("WavLMModel", small_config(form))
    results = []
    for model in (plain, truth_of(plain), fast_like(plain)):
        x = waveforms().to(next(model.parameters()).dtype).requires_grad_()
        model(x, **kwargs).last_hidden_state.square().mean().backward()
        results.append(x.grad)
    assert_tensor_close("waveform", results[2], results[0], results[1])


def test_gradients_of_a_frozen_base_reach_the_waveform():
    plain = plain_model("WavLMForXVector")
    results = []
    for model in (plain, truth_of(plain), fast_like(plain)):
        for p in model.parameters():
            p.requires_grad = False
        x = waveforms().to(next(model.parameters()).dtype).requires_grad_()
        model(x).embeddings.square().sum().backward()
        results.append(x.grad)
    assert_tensor_close("waveform", results[2], results[0], results[1])


def test_gradients_add_up_over_two_backwards():
    plain = plain_model("WavLMForCTC")

    def loss(model):
        single = loss_of("WavLMForCTC")
        single(model).backward()
        return single(model)

    check_gradients(plain, loss)


def test_one_backward_through_two_forwards():
    def loss(model):
        dtype = next(model.parameters()).dtype
        a, b = (model(waveforms(seed=s).to(dtype)).last_hidden_state for s in (0, 1))
        return (a * b).mean()

    check_gradients(plain_model("WavLMModel"), loss)


@both_forms
@pytest.mark.parametrize("method", ["freeze_feature_encoder", "freeze_base_model"])
@pytest.mark.parametrize("name", MODELS)
def test_freezing(name, method, form):
    plain = plain_model(name, small_config(form))
    if not hasattr(plain, method):
        pytest.skip(f"{name} has no {method}")
    ours = fast_like(plain)
    for model in (plain, ours):
        getattr(model, method)()
    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in plain.named_parameters() if p.requires_grad}
    before = {n: p.clone() for n, p in ours.named_parameters()}
    got = check_gradients(plain.train(), loss_of(name), ours.train())
    assert set(got) == trainable
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters() if n not in trainable)


@both_forms
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_ctc_reductions(form, reduction, masked):
    plain = plain_model("WavLMForCTC", small_config(form, ctc_loss_reduction=reduction))
    kwargs = {"attention_mask": ragged_mask(SAMPLES, 400)} if masked else {}
    out = check_forward(plain, waveforms(), labels=labels_for("WavLMForCTC", plain.config), **kwargs)
    assert out.loss.isfinite()


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_labels_longer_than_the_frames(zero_infinity):
    # Twice as many labels as frames cannot be aligned: the loss is infinite, or zero if the config says so.
    plain = plain_model("WavLMForCTC", small_config(ctc_zero_infinity=zero_infinity))
    labels = torch.ones(2, 2 * FRAMES, dtype=torch.long)
    for model in (plain, fast_like(plain)):
        out = model(waveforms(), labels=labels)
        assert out.loss.item() == (0.0 if zero_infinity else float("inf"))
        model.zero_grad()
        out.loss.backward()
        if zero_infinity:
            assert all(p.grad.abs().max() == 0 for p in model.parameters() if p.grad is not None)


# Version 5 takes -100 and the blank for padding, version 4 every negative label.
@pytest.mark.parametrize("padding", [-100, 0] if TRANSFORMERS_5 else [-100, -1])
def test_ctc_padding_of_labels(padding):
    plain = plain_model("WavLMForCTC")
    labels = labels_for("WavLMForCTC", plain.config)
    padded = torch.full((2, 9), padding)
    padded[:, :5] = labels
    padded[padded == -100] = padding
    a = check_forward(plain, waveforms(), labels=labels).loss
    b = check_forward(plain, waveforms(), labels=padded).loss
    torch.testing.assert_close(a, b)


def test_ctc_with_another_blank():
    plain = plain_model("WavLMForCTC", small_config(pad_token_id=3))
    check_forward(plain, waveforms(), labels=torch.tensor([[1, 2, 4], [5, 6, -100]]))


def test_ctc_loss_is_computed_in_float32_under_autocast():
    plain = plain_model("WavLMForCTC")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = fast_like(plain)(waveforms(), labels=labels_for("WavLMForCTC", plain.config)).loss
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", HEADS)
def test_loss_of_another_number_of_labels(name):
    plain = plain_model(name, small_config(num_labels=2, vocab_size=7))
    check_forward(plain, waveforms(), **with_labels(name, plain.config))


def test_classification_ignores_minus_100():
    plain = plain_model("WavLMForSequenceClassification")
    check_forward(plain, waveforms(), labels=torch.tensor([-100, 2]))


def test_labels_of_other_integer_types_and_shapes():
    plain = plain_model("WavLMForXVector")
    check_forward(plain, waveforms(), labels=torch.tensor([[1], [4]]))
    plain = plain_model("WavLMForSequenceClassification")
    check_forward(plain, waveforms(), labels=torch.tensor([[1], [4]]))
    plain = plain_model("WavLMForCTC")
    check_forward(plain, waveforms(), labels=labels_for("WavLMForCTC", plain.config).int())


def test_soft_labels_of_the_frames():
    # The frame head takes the largest entry of each row.
    plain = plain_model("WavLMForAudioFrameClassification")
    check_forward(plain, waveforms(), labels=torch.rand(2, FRAMES, 5, generator=torch.Generator().manual_seed(0)))
