"""Gradient modes, autocast, and several threads at once."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from wavlm_cases import (
    MODELS,
    SAMPLES,
    assert_close_to_truth,
    assert_gradients_close,
    assert_same,
    fast_like,
    fast_model,
    gradients,
    main_output,
    make_sensitive,
    ours_only,
    plain_model,
    ragged_mask,
    small_config,
    structure,
    tensors,
    truth_of,
    waveforms,
    with_labels,
)

both_forms = pytest.mark.parametrize("form", ["base", "large"])
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
@both_forms
def test_inference_mode_no_grad_and_grad_agree(name, form):
    plain = plain_model(name, small_config(form))
    ours, exact = fast_like(plain), truth_of(plain)
    mask = ragged_mask(SAMPLES, 400)
    with torch.no_grad():
        truth, expected = exact(waveforms().double(), attention_mask=mask), plain(waveforms(), attention_mask=mask)
        no_grad = ours(waveforms(), attention_mask=mask)
    with torch.inference_mode():
        inference = ours(waveforms(), attention_mask=mask)
    grad = ours(waveforms(), attention_mask=mask)
    assert main_output(grad).requires_grad and not main_output(no_grad).requires_grad
    assert main_output(inference).is_inference()
    for got in (no_grad, inference, grad):
        assert_close_to_truth(got, expected, truth)
    assert_same(no_grad, inference)


@both_forms
def test_inference_mode_first_leaves_a_trainable_model(form):
    # Tensors made in inference mode may not be saved for backward: a cache filled there must not reach training.
    ours = fast_model("WavLMModel", small_config(form))
    with torch.inference_mode():
        ours(waveforms())
    ours(waveforms()).last_hidden_state.square().mean().backward()
    assert all(p.grad is not None for n, p in ours.named_parameters())


def test_a_model_built_in_inference_mode():
    with torch.inference_mode():
        ours = fast_model("WavLMModel")
        first = ours(waveforms()).last_hidden_state
        make_sensitive(ours, seed=3)
        assert not torch.equal(ours(waveforms()).last_hidden_state, first)


@both_forms
def test_partly_frozen(form):
    # The feature encoder is frozen, the rest trains: the usual fine-tuning.
    plain = plain_model("WavLMForCTC", small_config(form))
    results = []
    for model in (plain, fast_like(plain), truth_of(plain)):
        model.freeze_feature_encoder()
        x = waveforms().to(next(model.parameters()).dtype)
        labels = with_labels("WavLMForCTC", model.config)
        results.append(gradients(model.train(), lambda m, x=x, labels=labels: m(x, **labels).loss))
    expected, got, truth = results
    assert not any("feature_extractor" in n for n in got)
    assert_gradients_close(got, expected, truth, plain)


@every_model
@both_forms
def test_autocast_bfloat16_forward(name, form):
    plain = plain_model(name, small_config(form))
    ours, exact = fast_like(plain), truth_of(plain)
    labels = with_labels(name, plain.config)
    mask = ragged_mask(SAMPLES, 400)
    with torch.no_grad():
        truth = exact(waveforms().double(), attention_mask=mask, **labels)
        with torch.autocast("cpu", torch.bfloat16):
            got = ours(waveforms(), attention_mask=mask, **labels)
            expected = plain(waveforms(), attention_mask=mask, **labels)
    assert structure(got) == structure(expected)
    for (key, value), (_, base), (_, exact_value) in zip(tensors(got), tensors(expected), tensors(truth)):
        bfloat16 = torch.finfo(torch.bfloat16).eps * exact_value.abs().max()
        err, err_plain = ((x.double() - exact_value).abs().max() for x in (value, base))
        assert err <= 2 * err_plain + bfloat16, key


@every_model
@both_forms
def test_autocast_bfloat16_backward(name, form):
    # In bfloat16 one model's error is a draw that all its gradients share: only over several is a factor of two news.
    ratios = []
    for seed in range(4):
        plain = make_sensitive(plain_model(name, small_config(form)), seed=seed)
        expected, got, truth = (_mixed_gradients(m, name) for m in (plain, fast_like(plain), truth_of(plain)))
        assert set(got) == set(expected)
        for key, value in got.items():
            assert value.dtype == torch.float32 and value.isfinite().all(), key
        keys = [key for key in got if not key.endswith("k_proj.bias")]  # zero but for rounding
        errors = [sum(_relative(g[key], truth[key]) for key in keys) for g in (got, expected)]
        ratios.append(math.log(errors[0] / errors[1]))
    assert sum(ratios) / len(ratios) <= math.log(2), [math.exp(r) for r in ratios]


def _mixed_gradients(model, name):
    x = waveforms().to(next(model.parameters()).dtype)

    def loss(m):
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
            out = m(x, **with_labels(name, m.config))
        return main_output(out).to(x.dtype).square().mean() if name == "WavLMModel" else out.loss

    return gradients(model.train(), loss)


def _relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item() if truth.norm() else 0.0


def test_autocast_of_a_bfloat16_model():
    plain = plain_model("WavLMModel").bfloat16()
    ours, exact = fast_like(plain), truth_of(plain)
    x = waveforms(dtype=torch.bfloat16)
    with torch.no_grad():
        truth = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert_close_to_truth(ours(x), plain(x), truth)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", ["base", "large"])
def test_four_threads_give_the_single_thread_answer(grad, form):
    ours = fast_model("WavLMForXVector", small_config(form))
    inputs = [waveforms(2, SAMPLES + 40 * i, seed=i) for i in range(4)]

    def call(x):
        with torch.set_grad_enabled(grad):
            return ours(x, attention_mask=ragged_mask(x.shape[1], 400, samples=x.shape[1])).logits

    expected = [call(x) for x in inputs]
    for round_ in range(3):
        # New weights every round, so that the threads race to derive theirs.
        make_sensitive(ours, seed=round_)
        results, errors = [[] for _ in inputs], []
        barrier = threading.Barrier(4)

        def work(i, barrier=barrier, results=results, errors=errors):
            try:
                torch.set_num_threads(1)
                barrier.wait()
                for _ in range(3):
                    results[i].append(call(inputs[i]))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        expected = [call(x) for x in inputs]
        for got, single in zip(results, expected):
            assert len(got) == 3
            for value in got:
                assert torch.equal(value, single)


def test_four_threads_training_their_own_copies():
    # Backward passes run on autograd's threads: nothing per thread may be missing there.
    models = [fast_model("WavLMModel", seed=i) for i in range(4)]

    def grads(model):
        return gradients(model, lambda m: m(waveforms()).last_hidden_state.square().mean())

    expected = [{k: v.clone() for k, v in grads(m).items()} for m in models]
    got = [None] * 4
    threads = [threading.Thread(target=lambda i=i: got.__setitem__(i, grads(models[i]))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, expected):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


@ours_only
def test_a_backend_chosen_in_one_thread_stays_there():
    import wavlm_fast
    from wavlm_fast import backends

    seen = {}
    with wavlm_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.update(other=backends.current()))
        thread.start()
        thread.join()
        seen["here"] = backends.current()
    assert seen == {"here": "reference", "other": "auto"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_calls_are_equal_bit_for_bit(dtype):
    ours = fast_model("WavLMForXVector").to(dtype)
    with torch.no_grad():
        outputs = [ours(waveforms(dtype=dtype)).logits for _ in range(3)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])


def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    ours = fast_model("WavLMForCTC")
    results = [gradients(ours, lambda m: m(waveforms()).logits.square().mean()) for _ in range(2)]
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
