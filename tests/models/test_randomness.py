"""What a model draws while it trains: SpecAugment on both axes, layer drop, and every dropout."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from wavlm_cases import (
    FRAMES,
    MODELS,
    SAMPLES,
    TRANSFORMERS_5,
    assert_close_to_truth,
    assert_gradients_close,
    check_forward,
    fast_like,
    gradients,
    main_output,
    ours_only,
    plain_model,
    ragged_mask,
    small_config,
    subject,
    tensors,
    truth_of,
    waveforms,
    with_labels,
)

both_forms = pytest.mark.parametrize("form", ["base", "large"])
MASKING = {"mask_time_prob": 0.4, "mask_time_length": 3, "mask_time_min_masks": 2}
FEATURES = {"mask_feature_prob": 0.3, "mask_feature_length": 4}


# Frames of which SpecAugment leaves little are normed up a thousandfold, and with them whatever rounding left there:
# how far that goes is luck, for transformers (1e-5 to 1e-2) as for ours. Several draws are judged together.
DRAWS = range(6)


def check_training(plain, seeds=(0,), **kwargs):
    """The same draws in both: training outputs as in transformers, and gradients with the first seed, whose outputs are
    returned.
    """
    runs = []
    for seed in seeds:
        results = []
        for model in (plain, truth_of(plain), fast_like(plain)):
            x = waveforms().to(next(model.parameters()).dtype)
            np.random.seed(seed)
            torch.manual_seed(seed)
            out = model.train()(x, output_hidden_states=True, **kwargs)
            grads = gradients(model, lambda m, out=out: out.last_hidden_state.square().mean())
            results.append((out, grads))
        (expected, expected_grads), (truth, truth_grads), (got, got_grads) = results
        if not runs:
            assert_gradients_close(got_grads, expected_grads, truth_grads, plain)
        runs.append((got, expected, truth))
    assert_close_together(runs)
    return runs[0][0]


def assert_close_together(runs):
    """`assert_close_to_truth` of the outputs of several runs as one."""
    assert_close_to_truth(*(pooled([dict(tensors(out)) for out in outs]) for outs in zip(*runs, strict=True)))


def pooled(outs):
    return {name: torch.stack([out[name] for out in outs]) for name in outs[0]}


@both_forms
@pytest.mark.parametrize("masked", [False, True])
def test_spec_augment_over_time(form, masked):
    plain = plain_model("WavLMModel", small_config(form, **MASKING))
    kwargs = {"attention_mask": ragged_mask(SAMPLES, 400)} if masked else {}
    got = check_training(plain, **kwargs)
    other = check_training(plain, seeds=(1,), **kwargs)
    assert not torch.allclose(got.last_hidden_state, other.last_hidden_state)


@both_forms
@pytest.mark.parametrize("time", [{}, MASKING])
@pytest.mark.parametrize("masked", [False, True])
def test_spec_augment_over_features(form, time, masked):
    # transformers reads `mask_feature_min_masks`, which its own config class lacks: there only if the user sets it.
    plain = plain_model("WavLMModel", small_config(form, mask_feature_min_masks=2, **FEATURES, **time))
    kwargs = {"attention_mask": ragged_mask(SAMPLES, 400)} if masked else {}
    got, other = (check_training(plain, seeds=seeds, **kwargs) for seeds in (DRAWS, (*DRAWS[1:], 0)))
    assert not torch.allclose(got.last_hidden_state, other.last_hidden_state)


@ours_only
@both_forms
@pytest.mark.parametrize("time", [{}, MASKING])
def test_spec_augment_over_features_without_a_minimum(form, time):
    plain = plain_model("WavLMModel", small_config(form, **FEATURES, **time))
    assert not hasattr(plain.config, "mask_feature_min_masks")
    ours = fast_like(plain).train()
    plain.config.mask_feature_min_masks = 0
    mask = ragged_mask(SAMPLES, 400)
    runs = []
    for seed in DRAWS:
        results = []
        for model in (ours, plain.train(), truth_of(plain).train()):
            np.random.seed(seed)
            results.append(model(waveforms().to(next(model.parameters()).dtype), attention_mask=mask))
        runs.append(results)
    assert_close_together(runs)
    runs[0][0].last_hidden_state.sum().backward()


@both_forms
def test_masked_frames_carry_the_learned_vector(form):
    config = small_config(form, **MASKING)
    plain = plain_model("WavLMModel", config)
    spans = torch.zeros(2, FRAMES, dtype=torch.bool)
    spans[0, 3:9] = spans[1, 20:] = True
    kwargs = {"mask_time_indices": spans}
    check_forward(plain, waveforms(), output_hidden_states=True, **kwargs)
    check_forward(plain, waveforms(), attention_mask=ragged_mask(SAMPLES, 400), **kwargs)
    check_training(plain, **kwargs)
    seen = []
    ours = fast_like(plain).eval()  # in training without given spans it would draw some
    ours.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        ours(waveforms(), mask_time_indices=spans)
        ours(waveforms())
    assert torch.equal(seen[0][spans], ours.masked_spec_embed.expand(int(spans.sum()), -1))
    torch.testing.assert_close(seen[0][~spans], seen[1][~spans], rtol=1e-4, atol=1e-4)


@ours_only
def test_given_spans_and_drawn_features_together():
    plain = plain_model("WavLMModel", small_config(**MASKING, **FEATURES))
    spans = torch.zeros(2, FRAMES, dtype=torch.bool)
    spans[:, 5:12] = True
    ours = fast_like(plain).train()
    plain.config.mask_feature_min_masks = 0
    results = []
    for model in (ours, plain.train(), truth_of(plain).train()):
        np.random.seed(3)
        results.append(model(waveforms().to(next(model.parameters()).dtype), mask_time_indices=spans))
    assert_close_to_truth(*results)


@both_forms
def test_apply_spec_augment_false_draws_nothing(form):
    plain = plain_model("WavLMModel", small_config(form, apply_spec_augment=False, **MASKING, **FEATURES))
    ours = fast_like(plain).train()
    out = [ours(waveforms()).last_hidden_state for _ in range(2)]
    assert torch.equal(out[0], out[1])
    spans = torch.ones(2, FRAMES, dtype=torch.bool)
    check_forward(plain, waveforms(), mask_time_indices=spans)


def test_nothing_is_masked_in_evaluation():
    plain = plain_model("WavLMModel", small_config(**MASKING, **FEATURES))
    ours = fast_like(plain)
    with torch.no_grad():
        assert torch.equal(ours(waveforms()).last_hidden_state, ours(waveforms()).last_hidden_state)
    check_forward(plain, waveforms(), ours)


def test_the_embedding_exists_only_when_something_is_masked():
    for changes, expected in (({}, False), (MASKING, True), (FEATURES, True)):
        plain = plain_model("WavLMModel", small_config(**changes))
        assert hasattr(plain, "masked_spec_embed") == hasattr(fast_like(plain), "masked_spec_embed") == expected


@both_forms
def test_the_same_layers_are_dropped(form):
    plain = plain_model("WavLMModel", small_config(form, layerdrop=0.5, num_hidden_layers=5))
    outputs = []
    for seed in range(4):
        results = []
        for model in (fast_like(plain), copy.deepcopy(plain), truth_of(plain)):
            torch.manual_seed(seed)
            x = waveforms().to(next(model.parameters()).dtype)
            results.append(model.train()(x, output_hidden_states=True, output_attentions=True))
        assert_close_to_truth(*results)
        outputs.append(results[0].last_hidden_state)
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])


def test_layer_drop_never_takes_the_first_layer_and_rests_in_evaluation():
    plain = plain_model("WavLMModel", small_config(layerdrop=1.0))
    ours = fast_like(plain)
    calls = []
    for i, layer in enumerate(ours.encoder.layers):
        layer.register_forward_hook(lambda *a, i=i: calls.append(i))
    ours.train()(waveforms())
    assert calls == [0]
    calls.clear()
    check_forward(plain, waveforms(), ours.eval())
    assert calls == [0, 1, 2]


DROPOUTS = ["hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout"]


@both_forms
@pytest.mark.parametrize("which", DROPOUTS)
def test_a_dropout_draws_anew_in_training_and_rests_in_evaluation(form, which):
    plain = plain_model("WavLMModel", small_config(form, **{which: 0.4}))
    ours = fast_like(plain).train()
    first, second = (ours(waveforms()).last_hidden_state for _ in range(2))
    assert first.isfinite().all() and second.isfinite().all()
    assert not torch.allclose(first, second)
    torch.manual_seed(5)
    third = ours(waveforms()).last_hidden_state
    torch.manual_seed(5)
    assert torch.equal(third, ours(waveforms()).last_hidden_state), "the generator of torch decides"
    third.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    check_forward(plain, waveforms(), ours.eval())


@both_forms
def test_final_dropout_of_ctc(form):
    ours = fast_like(plain_model("WavLMForCTC", small_config(form, final_dropout=0.5))).train()
    a, b = ours(waveforms()).logits, ours(waveforms()).logits
    assert not torch.allclose(a, b)
    ours.eval()
    assert torch.equal(ours(waveforms()).logits, ours(waveforms()).logits)


@pytest.mark.parametrize("which", DROPOUTS)
def test_a_dropout_of_one_and_of_zero(which):
    plain = plain_model("WavLMModel", small_config(**{which: 1.0}))
    models = (fast_like(plain), plain, truth_of(plain))
    results = [m.train()(waveforms().to(next(m.parameters()).dtype)) for m in models]
    if which == "attention_dropout":
        # Dropping every weight divides nothing by nothing; what is left is the projections' bias, or NaN.
        assert main_output(results[0]).shape == main_output(results[1]).shape
    else:
        assert_close_to_truth(*results)
    plain = plain_model("WavLMModel", small_config())
    ours = fast_like(plain).train()
    assert torch.equal(ours(waveforms()).last_hidden_state, ours(waveforms()).last_hidden_state)


@pytest.mark.parametrize("backend", ["auto", pytest.param("reference", marks=ours_only)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_mean_over_attention_dropout_is_the_evaluation(backend, masked):
    # Attention is linear in its dropped weights, so the mean over masks is what no mask gives.
    p, draws = 0.3, 600
    plain = plain_model("WavLMModel", small_config(attention_dropout=p))
    attention = fast_like(plain).encoder.layers[0].attention
    kwargs = {"attention_mask": ragged_mask(FRAMES, 15, samples=FRAMES).bool()} if masked else {}
    hidden = torch.randn(2, FRAMES, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = attention.eval()(hidden, **kwargs)[0]
        attention.train()
        torch.manual_seed(0)
        with nullcontext() if backend == "auto" else subject.use_backend(backend):
            drawn = torch.stack([attention(hidden, **kwargs)[0] for _ in range(draws)])
        plain_attention = plain.encoder.layers[0].attention.train()
        reference = torch.stack([plain_attention(hidden, **kwargs)[0] for _ in range(draws)])
    error = drawn.std(0) / draws**0.5
    assert ((drawn.mean(0) - expected).abs() < 6 * error + 1e-4).all()
    # And it spreads as dropout of transformers does: the same p, not another one.
    assert 0.9 < (drawn.std(0).mean() / reference.std(0).mean()).item() < 1.1


def test_attention_dropout_differs_between_heads_rows_and_utterances():
    plain = plain_model("WavLMModel", small_config(attention_dropout=0.5))
    attention = fast_like(plain).encoder.layers[0].attention.train()
    same = torch.randn(1, 1, 32).expand(2, FRAMES, 32).contiguous()
    with torch.no_grad():
        out = attention(same)[0]
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[:, 0], out[:, 1])


def test_the_backward_uses_the_mask_of_its_forward():
    # By finite differences under a fixed seed, in float64.
    plain = plain_model("WavLMModel", small_config(attention_dropout=0.4)).double()
    attention = fast_like(plain).encoder.layers[0].attention.train()
    hidden = torch.randn(1, 9, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 9, 32, dtype=torch.float64)

    def loss(x):
        torch.manual_seed(2)
        return (attention(x)[0] * weight).sum()

    (grad,) = torch.autograd.grad(loss(hidden), hidden)
    direction = torch.randn_like(hidden)
    step = 1e-6
    with torch.no_grad():
        slope = (loss(hidden + step * direction) - loss(hidden - step * direction)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_two_models_in_one_process_draw_from_one_generator(name):
    config = small_config(hidden_dropout=0.2, attention_dropout=0.2, **MASKING)
    ours = fast_like(plain_model(name, config)).train()
    kwargs = with_labels(name, config)

    def run():
        torch.manual_seed(1)
        np.random.seed(1)
        return dict(tensors(ours(waveforms(), **kwargs)))

    a, b = run(), run()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="version 4 draws a number for every layer, always")
def test_evaluation_draws_nothing():
    ours = fast_like(plain_model("WavLMModel", small_config(layerdrop=0.5, attention_dropout=0.2, hidden_dropout=0.2)))
    before = torch.get_rng_state()
    ours(waveforms())
    assert torch.equal(torch.get_rng_state(), before)
