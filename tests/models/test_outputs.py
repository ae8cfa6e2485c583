"""The classes against transformers on the same state dict: outputs, hidden states, attentions, tuples."""

from __future__ import annotations

import copy

import pytest
import torch
from wavlm_cases import (
    FORMS,
    FRAMES,
    MODELS,
    SAMPLES,
    TRANSFORMERS_5,
    assert_close_to_truth,
    check_forward,
    fast_like,
    main_output,
    plain_model,
    ragged_mask,
    small_config,
    structure,
    tensors,
    to_double,
    truth_of,
    waveforms,
    with_labels,
)

both_forms = pytest.mark.parametrize("form", ["base", "large"])
all_forms = pytest.mark.parametrize("form", list(FORMS))
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
@all_forms
def test_everything_a_forward_returns(name, form):
    plain = plain_model(name, small_config(form))
    labels = with_labels(name, plain.config)
    check_forward(plain, waveforms(), output_hidden_states=True, output_attentions=True, **labels)


@every_model
@both_forms
def test_ragged_mask(name, form):
    plain = plain_model(name, small_config(form))
    labels = with_labels(name, plain.config, batch=3)
    mask = ragged_mask(SAMPLES, 417, 233)
    check_forward(
        plain, waveforms(3), attention_mask=mask, output_hidden_states=True, output_attentions=True, **labels
    )
    # Attention weights come from a path of their own: once more without.
    check_forward(plain, waveforms(3), attention_mask=mask, output_hidden_states=True)


@every_model
@both_forms
def test_output_without_hidden_states_or_attentions(name, form):
    # Nothing is asked for, so nothing forces the slower paths: this is the call that users time.
    plain = plain_model(name, small_config(form))
    check_forward(plain, waveforms(3), attention_mask=ragged_mask(SAMPLES, 599, 100))
    check_forward(plain, waveforms(1))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_mask_dtypes(mask_dtype):
    plain = plain_model("WavLMModel")
    check_forward(plain, waveforms(), attention_mask=ragged_mask(SAMPLES, 400).to(mask_dtype))


@both_forms
def test_a_mask_of_ones_and_no_mask_agree_with_transformers(form):
    plain = plain_model("WavLMModel", small_config(form))
    check_forward(plain, waveforms(), attention_mask=ragged_mask(SAMPLES, SAMPLES))


def test_a_mask_that_is_no_prefix_counts_its_ones():
    mask = ragged_mask(SAMPLES, 450)
    mask[1, :40] = 0
    check_forward(plain_model("WavLMModel"), waveforms(), attention_mask=mask)


@both_forms
def test_padding_that_is_not_silence(form):
    # Padded samples reach the group norm of the front end, and padded frames the outputs.
    x = waveforms()
    x[1, 400:] = 7.0
    check_forward(
        plain_model("WavLMModel", small_config(form)), x, attention_mask=ragged_mask(SAMPLES, 400),
        output_hidden_states=True,
    )


@both_forms
@pytest.mark.parametrize("samples", [30, 31, 49, 50, 69, 333, 1501])
def test_lengths(form, samples):
    # 30 samples are the receptive field of the small configuration: one frame.
    check_forward(plain_model("WavLMModel", small_config(form)), waveforms(2, samples), output_hidden_states=True)


@both_forms
def test_longer_than_the_farthest_bucket(form):
    check_forward(plain_model("WavLMModel", small_config(form)), waveforms(1, 6000))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_sizes(batch):
    check_forward(plain_model("WavLMForCTC"), waveforms(batch))


def test_a_strided_waveform():
    stereo = torch.stack([waveforms(), waveforms(seed=1)], dim=-1)  # [B, S, 2]
    plain = plain_model("WavLMModel")
    ours = fast_like(plain)
    with torch.no_grad():
        torch.testing.assert_close(ours(stereo[..., 0])[0], ours(stereo[..., 0].contiguous())[0], rtol=0, atol=0)
    check_forward(plain, stereo[..., 1], ours)


def test_the_input_is_left_alone():
    x, mask = waveforms(), ragged_mask(SAMPLES, 400)
    before = x.clone(), mask.clone()
    model = fast_like(plain_model("WavLMModel")).train()
    model(x, attention_mask=mask).last_hidden_state.sum().backward()
    assert torch.equal(x, before[0]) and torch.equal(mask, before[1])


def test_outputs_do_not_share_memory_with_later_calls():
    ours = fast_like(plain_model("WavLMModel", small_config("large")))
    with torch.no_grad():
        first = ours(waveforms(), output_hidden_states=True)
        kept = copy.deepcopy(first)
        ours(waveforms(seed=1), output_hidden_states=True)
    for a, b in zip(first.hidden_states, kept.hidden_states):
        assert torch.equal(a, b)
    assert torch.equal(first.last_hidden_state, kept.last_hidden_state)


def test_hidden_states_of_one_call_are_separate_tensors():
    with torch.no_grad():
        out = fast_like(plain_model("WavLMModel"))(waveforms(), output_hidden_states=True)
    storages = {h.untyped_storage().data_ptr() for h in out.hidden_states}
    assert len(storages) == len(out.hidden_states)


@every_model
@both_forms
@pytest.mark.parametrize("labelled", [False, True])
def test_return_dict_false(name, form, labelled):
    plain = plain_model(name, small_config(form))
    ours = fast_like(plain)
    kwargs = {"return_dict": False, **(with_labels(name, plain.config) if labelled else {})}
    for extra in ({}, {"output_hidden_states": True}, {"output_attentions": True, "output_hidden_states": True}):
        with torch.no_grad():
            got = ours(waveforms(), **kwargs, **extra)
            expected = plain(waveforms(), **kwargs, **extra)
            truth = truth_of(plain)(waveforms().double(), **kwargs, **extra)
        assert isinstance(got, tuple)
        assert_close_to_truth(got, expected, truth)


@every_model
def test_config_asks_for_hidden_states_attentions_and_tuples(name):
    plain = plain_model(name)
    wishes = {"output_hidden_states": True, "output_attentions": True}
    if name == "WavLMModel" or not TRANSFORMERS_5:
        # The heads of 5.x read attributes of what the base model returns, and fail on its tuples.
        wishes["return_dict"] = False
    for field, value in wishes.items():
        asked = copy.deepcopy(plain)
        setattr(asked.config, field, value)
        got = check_forward(asked, waveforms())
        assert structure(got) != structure(check_forward(plain, waveforms())), f"config.{field} changed nothing"


@both_forms
def test_a_keyword_overrules_the_config(form):
    plain = plain_model("WavLMModel", small_config(form, output_hidden_states=True))
    assert check_forward(plain, waveforms()).hidden_states is not None
    assert check_forward(plain, waveforms(), output_hidden_states=False).hidden_states is None


@both_forms
def test_the_number_of_hidden_states_and_the_attentions_of_transformers(form):
    config = small_config(form)
    out = check_forward(
        plain_model("WavLMModel", config), waveforms(), output_hidden_states=True, output_attentions=True
    )
    assert len(out.hidden_states) == config.num_hidden_layers + 1
    assert len(out.attentions) == config.num_hidden_layers
    for weights in out.attentions:
        assert weights.shape == (2, config.num_attention_heads, FRAMES, FRAMES)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert torch.equal(weights[:, 0], weights[:, 1])  # averaged over heads and repeated, as in transformers


def test_asking_for_attentions_does_not_change_the_output():
    plain = plain_model("WavLMModel")
    plainly = check_forward(plain, waveforms(), attention_mask=ragged_mask(SAMPLES, 300))
    asked = check_forward(plain, waveforms(), attention_mask=ragged_mask(SAMPLES, 300), output_attentions=True)
    torch.testing.assert_close(plainly.last_hidden_state, asked.last_hidden_state, rtol=1e-4, atol=1e-3)


@both_forms
def test_a_batch_row_is_what_it_is_alone(form):
    plain = plain_model("WavLMForCTC", small_config(form))
    ours, exact = fast_like(plain), truth_of(plain)
    x = waveforms(4)
    with torch.no_grad():
        together = main_output(ours(x))
        alone = torch.cat([main_output(ours(row[None])) for row in x])
        expected = main_output(exact(x.double()))
    assert_close_to_truth(together, alone, expected)
    assert_close_to_truth(alone, together, expected)


@every_model
def test_a_padded_utterance_is_what_it_is_alone_in_the_layer_norm_form(name):
    # With group norm, padding reaches the statistics of the front end: there, and only there, they differ.
    # The x-vector pooling counts its valid frames without the dilations, so it is exact only without any.
    plain = plain_model(name, small_config("large", tdnn_dilation=[1, 1, 1]))
    ours, exact = fast_like(plain), truth_of(plain)
    lengths = (SAMPLES, 420, 500)
    x, mask = waveforms(3), ragged_mask(*lengths)
    with torch.no_grad():
        batched = main_output(ours(x * mask, attention_mask=mask))
        for row, length in enumerate(lengths):
            alone_kwargs = {"attention_mask": mask[row : row + 1, :length]}
            alone = main_output(ours(x[row : row + 1, :length], **alone_kwargs))
            expected = main_output(exact(x[row : row + 1, :length].double(), **alone_kwargs))
            got = batched[row : row + 1]
            if alone.dim() == 3:
                got = got[:, : alone.shape[1]]
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
            torch.testing.assert_close(alone.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@every_model
@both_forms
def test_float64(name, form):
    plain = plain_model(name, small_config(form)).double()
    ours = fast_like(plain)
    kwargs = with_labels(name, plain.config)
    with torch.no_grad():
        got = ours(waveforms().double(), attention_mask=ragged_mask(SAMPLES, 400), **to_double(kwargs))
        expected = plain(waveforms().double(), attention_mask=ragged_mask(SAMPLES, 400), **to_double(kwargs))
    assert structure(got) == structure(expected)
    reference = dict(tensors(expected))
    for key, value in tensors(got):
        scale = reference[key].abs().max()
        torch.testing.assert_close(value / scale, reference[key] / scale, rtol=0, atol=1e-11)


@every_model
@both_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, form, dtype):
    plain = plain_model(name, small_config(form)).to(dtype)
    ours = fast_like(plain)
    x, mask = waveforms(dtype=dtype), ragged_mask(SAMPLES, 400)
    with torch.no_grad():
        got = main_output(ours(x, attention_mask=mask))
        expected = main_output(plain(x, attention_mask=mask))
        truth = main_output(truth_of(plain)(x.double(), attention_mask=mask))
    assert_close_to_truth(got, expected, truth)


def test_positional_arguments_in_the_order_of_transformers():
    plain = plain_model("WavLMModel", small_config(mask_time_prob=0.1))
    ours = fast_like(plain)
    spans = torch.zeros(2, FRAMES, dtype=torch.bool)
    spans[:, 4:9] = True
    extra = () if TRANSFORMERS_5 else (True, True, False)
    with torch.no_grad():
        got = ours(waveforms(), ragged_mask(SAMPLES, 400), spans, *extra)
        expected = plain(waveforms(), ragged_mask(SAMPLES, 400), spans, *extra)
    assert structure(got) == structure(expected)

