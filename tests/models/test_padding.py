"""Exact batches: every row is what the model gives for the utterance alone, and padding is nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from padding_cases import (
    LENGTHS,
    WIDTH,
    assert_rows_are_alone,
    batch_of,
    exact,
    frames_of,
    rows_of,
    utterances,
)
from wavlm_cases import (
    FORMS,
    HEADS,
    MODELS,
    assert_gradients_close,
    assert_tensor_close,
    labels_for,
    ours_only,
    plain_model,
    small_config,
    tensors,
    truth_of,
)

from wavlm_fast import accelerate, forward_ragged

pytestmark = ours_only


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_the_utterance_alone(name, form):
    plain = plain_model(name, small_config(form))
    with torch.no_grad():
        out = exact(plain)(**batch_of(utterances()), output_hidden_states=True)
    assert_rows_are_alone(plain, out, utterances(), output_hidden_states=True)


@pytest.mark.parametrize("form", FORMS)
def test_in_bfloat16(form):
    plain = plain_model("WavLMModel", small_config(form)).bfloat16()
    waveforms = utterances(dtype=torch.bfloat16)
    with torch.no_grad():
        out = exact(plain)(**batch_of(waveforms), output_hidden_states=True)
    assert_rows_are_alone(plain, out, waveforms, output_hidden_states=True)


@pytest.mark.parametrize("name", MODELS)
def test_ragged_lists(name):
    plain = plain_model(name)
    with torch.no_grad():
        outputs = forward_ragged(exact(plain), utterances(), output_hidden_states=True)
        unpadded = forward_ragged(accelerate(copy.deepcopy(plain)), utterances(), output_hidden_states=True)
    assert len(outputs) == len(LENGTHS)
    for row, (out, other) in enumerate(zip(outputs, unpadded, strict=True)):
        assert type(out) is type(other)
        assert_rows_are_alone(plain, out, utterances()[row : row + 1], output_hidden_states=True)
        for (key, mine), (_, theirs) in zip(tensors(out), tensors(other), strict=True):
            assert torch.equal(mine, theirs), key


def test_shapes_are_those_of_the_padded_batch():
    plain = plain_model("WavLMForCTC")
    given = batch_of(utterances()[:3], padding=0.0)  # narrower than the batch: no row is full
    out, usual = exact(plain)(**given), plain(**given)
    assert out.logits.shape == usual.logits.shape
    assert exact(plain)(**given, return_dict=False)[0].shape == usual.logits.shape


def test_padding_is_not_looked_at():
    model = exact(plain_model("WavLMModel"))
    with torch.no_grad():
        quiet, loud = (model(**batch_of(utterances(), padding=p)).last_hidden_state for p in (0.0, float("inf")))
        wider = model(**batch_of(utterances(), width=900)).last_hidden_state
    assert torch.equal(quiet, loud)
    assert torch.equal(quiet, wider[:, : quiet.shape[1]])


@pytest.mark.parametrize("form", ["base", "large"])
@pytest.mark.parametrize("name", HEADS)
def test_losses_and_gradients_of_a_batch(name, form):
    config = small_config(form, use_weighted_layer_sum=name != "WavLMForCTC", ctc_loss_reduction="mean")
    plain = plain_model(name, config)
    waveforms = utterances()
    labels = _labels(name, config, waveforms)

    def loss_alone(model, double=False):
        weights = _weights(name, model, waveforms)
        losses = [
            model((w.double() if double else w)[None], labels=own[None]).loss
            for w, own in zip(waveforms, labels, strict=True)
        ]
        return sum(w * loss for w, loss in zip(weights, losses, strict=True))

    model = exact(plain)
    loss = model(**batch_of(waveforms), labels=_padded_labels(name, labels, model)).loss
    loss.backward()
    reference, truth = copy.deepcopy(plain), truth_of(plain)
    base, exact_loss = loss_alone(reference), loss_alone(truth, double=True)
    base.backward()
    exact_loss.backward()
    assert_tensor_close("loss", loss, base, exact_loss)
    found, theirs, wanted = (
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, reference, truth)
    )
    assert_gradients_close(found, theirs, wanted, plain)
    lists = forward_ragged(model, waveforms, labels=labels)
    for own, w, one in zip(lists, waveforms, labels, strict=True):
        alone = plain(w[None], labels=one[None]).loss
        assert_tensor_close("loss", own.loss, alone, truth_of(plain)(w[None].double(), labels=one[None]).loss)


def _labels(name, config, waveforms):
    """One entry for each utterance."""
    if name != "WavLMForAudioFrameClassification":
        return list(labels_for(name, config, batch=len(waveforms)))
    plain = plain_model(name, config)
    return [labels_for(name, config, batch=1, frames=frames_of(plain, len(w)))[0] for w in waveforms]


def _padded_labels(name, labels, model):
    if name != "WavLMForAudioFrameClassification":
        return torch.stack(labels)
    padded = torch.zeros(len(labels), frames_of(model, WIDTH), labels[0].shape[1], dtype=torch.long)
    padded[..., -1] = 1  # of frames that are padding: not to be seen
    for row, own in enumerate(labels):
        padded[row, : len(own)] = own
    return padded


def _weights(name, model, waveforms):
    """What each utterance alone has in the loss of a batch."""
    if name != "WavLMForAudioFrameClassification":
        return [1 / len(waveforms)] * len(waveforms)
    frames = [frames_of(model, len(w)) for w in waveforms]
    return [n / sum(frames) for n in frames]


def test_gradients_of_the_waveform():
    model = exact(plain_model("WavLMModel"))
    given = batch_of(utterances(), padding=0.0)
    x = given.pop("input_values").requires_grad_()
    model(x, **given).last_hidden_state.square().sum().backward()
    for row, own in enumerate(utterances()):
        alone = own[None].requires_grad_()
        model(alone).last_hidden_state.square().sum().backward()
        torch.testing.assert_close(x.grad[row, : len(own)], alone.grad[0], rtol=1e-3, atol=1e-3)
        assert not x.grad[row, len(own) :].any()


@pytest.mark.parametrize("form", ["base", "large"])
def test_checkpointing_and_dropout(form):
    """A training step is the same with checkpointing; dropout draws."""
    plain = plain_model("WavLMModel", small_config(form, attention_dropout=0.1, hidden_dropout=0.1))
    model, given = exact(plain).train(), batch_of(utterances(), padding=0.0)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model.zero_grad()
        out = model(**given).last_hidden_state
        out.square().mean().backward()
        found.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(once, again)
    with torch.no_grad():
        assert not torch.equal(model(**given).last_hidden_state, out)


def test_layer_drop():
    config = small_config(layerdrop=0.5)
    model, given = exact(plain_model("WavLMModel", config)).train(), batch_of(utterances(), padding=0.0)
    torch.manual_seed(0)
    found = [model(**given).last_hidden_state for _ in range(6)]
    assert len({out.sum().item() for out in found}) > 1


def test_spans_that_are_given_are_masked():
    """SpecAugment with given spans is deterministic: each row is the utterance with its own."""
    plain = plain_model("WavLMModel", small_config(mask_time_prob=0.2))
    model, waveforms = exact(plain), utterances()
    spans = torch.rand(len(waveforms), frames_of(plain, WIDTH), generator=torch.Generator().manual_seed(1)) < 0.3
    with torch.no_grad():
        out = model(**batch_of(waveforms), mask_time_indices=spans).last_hidden_state
        for row, own in enumerate(waveforms):
            frames = frames_of(plain, len(own))
            given = {"mask_time_indices": spans[row : row + 1, :frames]}
            alone = plain(own[None], **given).last_hidden_state
            truth = truth_of(plain)(own[None].double(), **given).last_hidden_state
            assert_tensor_close(f"row {row}", out[row : row + 1, :frames], alone, truth)


def test_spans_are_drawn_within_utterances():
    config = small_config(mask_time_prob=0.4, mask_time_length=2, mask_feature_prob=0.3, mask_feature_length=2)
    model, given = exact(plain_model("WavLMModel", config)), batch_of(utterances(), padding=0.0)
    seen = {}
    hook = model.encoder.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model(**given)
    before = seen["x"]
    model.train()
    model(**given)
    hook.remove()
    masked = ((seen["x"] == model.masked_spec_embed.detach()) | (seen["x"] == 0)).all(-1)
    changed = (seen["x"] != before).any(-1)
    assert int(changed.sum()) > 0 and seen["x"].shape == before.shape
    assert 0 < int(masked.sum()) < masked.numel()
    zeroed = (seen["x"] == 0)[0]
    first = 0
    for own in utterances():  # features are masked for whole utterances
        frames = frames_of(model, len(own))
        assert zeroed[first : first + frames].all(0).any()
        first += frames


@pytest.mark.parametrize("name", ["WavLMModel", "WavLMForXVector"])
def test_under_autocast(name):
    plain = plain_model(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = exact(plain)(**batch_of(utterances()))
        alone = [plain(w[None]) for w in utterances()]
    with torch.no_grad():
        truth = [truth_of(plain)(w[None].double()) for w in utterances()]
    for label, own, row, key in rows_of(name, out, alone):
        base, right = dict(tensors(alone[row]))[key], dict(tensors(truth[row]))[key]
        error, usual = ((x.double() - right).abs().max() for x in (own, base))
        assert error <= 2 * usual + 8 * torch.finfo(torch.bfloat16).eps * right.abs().max(), label


def test_full_rows_run_as_they_are():
    plain = plain_model("WavLMModel")
    model, x = exact(plain), torch.stack(utterances((500, 500)))
    with torch.no_grad():
        wanted = accelerate(copy.deepcopy(plain))(x).last_hidden_state
        assert torch.equal(model(x).last_hidden_state, wanted)
        assert torch.equal(model(x, attention_mask=torch.ones(2, 500)).last_hidden_state, wanted)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_masks_of_any_dtype(dtype):
    model, given = exact(plain_model("WavLMModel")), batch_of(utterances())
    with torch.no_grad():
        wanted = model(**given).last_hidden_state
        given["attention_mask"] = given["attention_mask"].to(dtype)
        assert torch.equal(model(**given).last_hidden_state, wanted)
