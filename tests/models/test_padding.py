"""Exact batches: every row is what the model gives for the utterance alone, and padding is nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
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

import wavlm_fast
from wavlm_fast import accelerate, forward_ragged, report, restore

pytestmark = ours_only

WIDTH = 640
LENGTHS = (600, 337, 250, 640, 600, 431)
HAS_FRAMES = ("last_hidden_state", "extract_features", "hidden_states")


def exact(model):
    return accelerate(copy.deepcopy(model), padding="exact")


def utterances(lengths=LENGTHS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(n, generator=generator) * (1 + i)).to(dtype) for i, n in enumerate(lengths)]


def batch_of(waveforms, width=WIDTH, padding=float("nan")):
    """Padded with what would be seen anywhere."""
    x = waveforms[0].new_full((len(waveforms), width), padding)
    mask = torch.zeros(len(waveforms), width, dtype=torch.long)
    for row, own in enumerate(waveforms):
        x[row, : len(own)], mask[row, : len(own)] = own, 1
    return {"input_values": x, "attention_mask": mask}


def rows_of(name, out, alone):
    """Pairs of named tensors: what the batch gives for each utterance, cut to its frames, and the outputs for it
    alone. What is past an utterance's end has to be zero.
    """
    for row, expected in enumerate(alone):
        found = dict(tensors(out))
        wanted = dict(tensors(expected))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            own = found[key][row : row + 1]
            if own.shape != value.shape:
                assert own.dim() > 2, key
                for dim in range(1, own.dim()):
                    assert not own.narrow(dim, value.shape[dim], own.shape[dim] - value.shape[dim]).any(), key
                    own = own.narrow(dim, 0, value.shape[dim])
            yield f"{key} of row {row}", own, row, key


def assert_rows_are_alone(plain, out, waveforms, **kwargs):
    """The rule of the house: truth is transformers in float64 on each utterance alone."""
    with torch.no_grad():
        alone = [plain(w[None], **kwargs) for w in waveforms]
        truth = [truth_of(plain)(w[None].double(), **kwargs) for w in waveforms]
    for name, own, row, key in rows_of(plain, out, alone):
        assert_tensor_close(name, own, dict(tensors(alone[row]))[key], dict(tensors(truth[row]))[key])


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


def _frames(model, samples):
    return int(model._get_feat_extract_output_lengths(torch.tensor(samples)))


def _labels(name, config, waveforms):
    """One entry for each utterance."""
    if name != "WavLMForAudioFrameClassification":
        return list(labels_for(name, config, batch=len(waveforms)))
    plain = plain_model(name, config)
    return [labels_for(name, config, batch=1, frames=_frames(plain, len(w)))[0] for w in waveforms]


def _padded_labels(name, labels, model):
    if name != "WavLMForAudioFrameClassification":
        return torch.stack(labels)
    padded = torch.zeros(len(labels), _frames(model, WIDTH), labels[0].shape[1], dtype=torch.long)
    padded[..., -1] = 1  # of frames that are padding: not to be seen
    for row, own in enumerate(labels):
        padded[row, : len(own)] = own
    return padded


def _weights(name, model, waveforms):
    """What each utterance alone has in the loss of a batch."""
    if name != "WavLMForAudioFrameClassification":
        return [1 / len(waveforms)] * len(waveforms)
    frames = [_frames(model, len(w)) for w in waveforms]
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
    spans = torch.rand(len(waveforms), _frames(plain, WIDTH), generator=torch.Generator().manual_seed(1)) < 0.3
    with torch.no_grad():
        out = model(**batch_of(waveforms), mask_time_indices=spans).last_hidden_state
        for row, own in enumerate(waveforms):
            frames = _frames(plain, len(own))
            given = {"mask_time_indices": spans[row : row + 1, :frames]}
            alone = plain(own[None], **given).last_hidden_state
            truth = truth_of(plain)(own[None].double(), **given).last_hidden_state
            assert_tensor_close(f"row {row}", out[row : row + 1, :frames], alone, truth)


def test_spans_are_drawn_within_utterances():
    config = small_config(mask_time_prob=0.4, mask_time_length=2, mask_feature_prob=0.3, mask_feature_length=2)
    model, given = exact(plain_model("WavLMModel", config)), batch_of(utterances(), padding=0.0)
    seen = {}
    hook = model.encoder.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    untouched = model(**given)
    before = seen["x"]
    model.train()
    model(**given)
    hook.remove()
    assert untouched is not None
    masked = (seen["x"] == model.masked_spec_embed.detach()).all(-1) | (seen["x"] == 0).all(-1)
    changed = (seen["x"] != before).any(-1)
    assert int(changed.sum()) > 0 and seen["x"].shape == before.shape
    zeroed = (seen["x"] == 0)[0]
    first = 0
    for own in utterances():  # features are masked for whole utterances
        frames = _frames(model, len(own))
        assert zeroed[first : first + frames].all(0).any()
        first += frames
    assert masked is not None


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


def _with_adapter(model):
    return model


def _with_patched_method(model):
    model.encoder.layers[1].attention.compute_bias = model.encoder.layers[1].attention.compute_bias
    return model


def _with_foreign_layer(model):
    class Layer(torch.nn.Module):
        def forward(self, hidden_states, *args, position_bias=None, **kwargs):
            return torch.roll(hidden_states, 1, 1), position_bias

    model.encoder.layers[1] = Layer()
    return model


ALONE = {
    "an adapter": (_with_adapter, {"add_adapter": True, "output_hidden_size": 24}, "adapter is called"),
    "a patched method": (_with_patched_method, {}, "compute_bias was replaced"),
    "a foreign layer": (_with_foreign_layer, {}, "layer 1: it is a Layer"),
}


@pytest.mark.parametrize("what", ALONE)
def test_one_at_a_time_where_a_module_cannot_take_packed_frames(what):
    change, options, reason = ALONE[what]
    plain = plain_model("WavLMModel", small_config(**options))
    model, waveforms = change(exact(plain)), utterances()
    told = report(model)
    assert reason in told.alone
    assert f"run one at a time: {told.alone}" in str(told)
    with torch.no_grad():
        out, alone = model(**batch_of(waveforms)), [model(w[None]) for w in waveforms]
        lists = forward_ragged(model, waveforms)
    for label, own, row, key in rows_of(what, out, alone):
        assert torch.equal(own, dict(tensors(alone[row]))[key]), label
        assert torch.equal(own, dict(tensors(lists[row]))[key]), label
    usual = plain(torch.zeros(1, WIDTH))
    assert out.last_hidden_state.shape[1:] == usual.last_hidden_state.shape[1:]


def test_an_adapter_in_a_graph_says_that_padding_is_transformers():
    plain = plain_model("WavLMModel", small_config(add_adapter=True, output_hidden_size=24, num_hidden_layers=1))
    given = batch_of(utterances(), padding=0.0)
    model = exact(plain).requires_grad_(False)
    with pytest.warns(UserWarning, match="in a graph padding is transformers'"):
        traced = torch.jit.trace(model, example_kwarg_inputs=given, strict=False, check_trace=False)
    found, usual = traced(**given)["last_hidden_state"], plain(**given).last_hidden_state
    torch.testing.assert_close(found, usual, rtol=1e-3, atol=1e-3)


def test_attention_weights():
    plain = plain_model("WavLMForCTC")
    model, waveforms = exact(plain), utterances()
    with torch.no_grad():
        out = model(**batch_of(waveforms), output_attentions=True, output_hidden_states=True)
    assert_rows_are_alone(plain, out, waveforms, output_attentions=True, output_hidden_states=True)


def test_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "projection"], r=4, init_lora_weights=False)
    torch.manual_seed(0)
    plain = accelerate(peft.get_peft_model(plain_model("WavLMForCTC"), config).eval())  # transformers drops LoRA here
    model = exact(plain)
    assert report(model).alone is None
    with torch.no_grad():
        out = model(**batch_of(utterances()))
    assert_rows_are_alone(plain, out, utterances())


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("WavLMModel", "base"),
        ("WavLMForCTC", "large"),
        ("WavLMForXVector", "base"),
        ("WavLMForSequenceClassification", "base"),
    ],
)
def test_compiled(name, form):
    """A graph cannot depend on lengths: rows stay padded, and what padding would reach is masked."""
    torch._dynamo.reset()
    plain = plain_model(name, small_config(form, num_hidden_layers=1))
    model, waveforms = exact(plain), utterances()
    # Of the last one transformers' forward breaks the graph, with padding or without.
    whole = name != "WavLMForSequenceClassification"
    compiled = torch.compile(model, fullgraph=whole, backend="aot_eager")
    with torch.no_grad():
        out = compiled(**batch_of(waveforms, padding=1.0))
    assert_rows_are_alone(plain, out, waveforms)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["WavLMModel", "WavLMForXVector"])
def test_traced_and_exported(name):
    plain = plain_model(name, small_config(num_hidden_layers=1))
    model, waveforms = exact(plain), utterances()
    given = batch_of(waveforms, padding=1.0)
    with torch.no_grad():
        traced = torch.jit.trace(model, example_kwarg_inputs=given, strict=False)
        exported = torch.export.export(model, (), given).module()
        key = "last_hidden_state" if name == "WavLMModel" else "logits"
        for first in (traced(**given)[key], exported(**given)[key]):
            for row, own in enumerate(waveforms):
                alone, found = plain(own[None])[key], first[row : row + 1]
                if name == "WavLMModel":
                    assert not found[:, alone.shape[1] :].any()
                    found = found[:, : alone.shape[1]]
                torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_the_mode_stays_with_the_model(tmp_path):
    plain = plain_model("WavLMForCTC")
    model, given = exact(plain), batch_of(utterances())
    pickled = accelerate(plain_model("WavLMForCTC"), padding="exact")
    conv = pickled.wavlm.encoder.pos_conv_embed.conv  # torch pickles no parametrization, nor what is left of it
    torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")
    conv._load_state_dict_pre_hooks.clear()
    with torch.no_grad():
        wanted = model(**given).logits
        assert "padding is 'exact': utterances of different lengths run packed" in str(report(model))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(pickled)), model.to("cpu")):
            assert report(other).padding == "exact"
            torch.testing.assert_close(other(**given).logits, wanted)
        assert report(model.to("meta")).padding == "exact"
        model = exact(plain)
        accelerate(model)  # says nothing of padding
        assert torch.equal(model(**given).logits, wanted)
        model.save_pretrained(tmp_path)
        assert "padding" not in tmp_path.joinpath("config.json").read_text()
        loaded = wavlm_fast.WavLMForCTC.from_pretrained(tmp_path, padding="exact")
        assert torch.equal(loaded(**given).logits, wanted)
        assert report(wavlm_fast.WavLMForCTC.from_pretrained(tmp_path)).padding == "transformers"
        given["input_values"] = given["input_values"].nan_to_num()
        usual = accelerate(model, padding="transformers")(**given).logits
        assert not torch.allclose(usual, wanted)
        restored = restore(accelerate(model, padding="exact"))
        assert not any("wavlm_fast" in key for m in restored.modules() for key in vars(m))
        torch.testing.assert_close(restored(**given).logits, usual, rtol=1e-3, atol=1e-3)


def test_installed():
    import transformers

    wavlm_fast.install(padding="exact")
    try:
        assert report(transformers.WavLMForCTC(small_config())).padding == "exact"
        assert report(transformers.AutoModel.from_config(small_config())).padding == "exact"
        wavlm_fast.install()
        assert report(transformers.WavLMModel(small_config())).padding == "transformers"
    finally:
        wavlm_fast.uninstall()
    assert report(wavlm_fast.WavLMModel(small_config())).padding == "transformers"


def test_unknown_modes(tmp_path):
    sentence = "padding must be one of 'transformers', 'exact', got 'longest'"
    for call in (
        lambda: accelerate(plain_model("WavLMModel"), padding="longest"),
        lambda: wavlm_fast.install(padding="longest"),
        lambda: wavlm_fast.WavLMModel.from_pretrained(tmp_path, padding="longest"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize(
    ("lengths", "holes", "sentence"),
    [
        ((600, 29), (), "at least 30 samples in every row, what the model needs, row 1 has 29"),
        ((600, 500), ((1, 7),), "an attention_mask of ones followed by zeros, row 1 is none"),
        ((500, 600), ((0, 0),), "an attention_mask of ones followed by zeros, row 0 is none"),
        ((600, 0), (), "at least one sample of every utterance, got all zeros in rows [1]"),
    ],
)
def test_masks_that_say_no_lengths(lengths, holes, sentence):
    given = batch_of([torch.zeros(n) for n in lengths], padding=0.0)
    for at in holes:
        given["attention_mask"][at] = 0
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
        exact(plain_model("WavLMModel"))(**given)
    assert sentence in str(caught.value)


def test_an_utterance_too_short_for_the_time_delay_layers():
    model = exact(plain_model("WavLMForXVector"))
    with pytest.raises(ValueError, match="at least 190 samples in every row, what the model needs, row 1 has 189"):
        model(**batch_of([torch.zeros(600), torch.zeros(189)]))


def test_lists_that_are_refused():
    model = exact(plain_model("WavLMForCTC"))
    right, empty, wide = torch.zeros(600), torch.zeros(0), torch.zeros(600, dtype=torch.float64)

    def refused(error, sentence, waveforms, **kwargs):
        with pytest.raises(error) as caught:
            forward_ragged(model, waveforms, **kwargs)
        assert sentence in str(caught.value) and "\n" not in str(caught.value)

    refused(ValueError, "at least one waveform, got an empty list", [])
    refused(TypeError, "wants a list of waveforms, got a Tensor", torch.zeros(2, 600))
    refused(TypeError, "waveform 1 is a list", [right, [0.0] * 600])
    refused(ValueError, "waveforms of shape [samples], waveform 1 has [1, 600]", [right, right[None]])
    refused(ValueError, "at least 30 samples in every waveform, what the model needs, waveform 1 has 0", [right, empty])
    refused(ValueError, "waveform 0 has 29", [right[:29], right])
    refused(TypeError, "one dtype on one device, torch.float32 on cpu, waveform 1 is torch.float64", [right, wide])
    refused(TypeError, "waveform 1 is torch.float32 on meta", [right, right.to("meta")])
    refused(TypeError, "floating-point samples in -1..1, got torch.int16", [right.short()])
    refused(ValueError, "wants no attention_mask", [right], attention_mask=torch.ones(1, 600))
    refused(ValueError, "labels for each of 1 waveforms, got 2", [right], labels=[torch.ones(3), torch.ones(3)])
    refused(ValueError, "labels must lie in 0..11", [right], labels=[torch.tensor([12])])
    with pytest.raises(TypeError, match="wants a WavLM that accelerate has made fast, got a .*WavLMModel"):
        forward_ragged(plain_model("WavLMModel"), [right])
    with pytest.raises(TypeError, match="made fast, got a torch.nn.modules.linear.Linear"):
        forward_ragged(torch.nn.Linear(2, 2), [right])


def test_no_buffer_of_all_rows(monkeypatch):
    """A list of one long and many short waveforms never becomes a batch of long ones."""
    model, largest = exact(plain_model("WavLMModel")), []
    lengths = (4000, *[60] * 30)
    mode = _Sizes(largest)
    with torch.no_grad(), mode:
        forward_ragged(model, utterances(lengths))
    frames = sum(_frames(model, n) for n in lengths)
    first_layer = sum((n - 10) // 5 + 1 for n in lengths)
    assert max(largest) <= max(first_layer * 16, frames * 96) * 2
    assert max(largest) < len(lengths) * _frames(model, 4000) * 32


class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the number of elements of every tensor that an op makes."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes += [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out
