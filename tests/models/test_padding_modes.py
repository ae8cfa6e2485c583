"""Exact batches where they cannot run packed, in graphs, through copies and files, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from padding_cases import (
    WIDTH,
    assert_rows_are_alone,
    batch_of,
    exact,
    frames_of,
    rows_of,
    utterances,
)
from wavlm_cases import (
    ours_only,
    plain_model,
    small_config,
    tensors,
)

import wavlm_fast
from wavlm_fast import accelerate, forward_ragged, report, restore

pytestmark = ours_only


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
def test_one_at_a_time_where_a_module_cannot_take_packedframes_of(what):
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
    frames = sum(frames_of(model, n) for n in lengths)
    first_layer = sum((n - 10) // 5 + 1 for n in lengths)
    assert max(largest) <= max(first_layer * 16, frames * 96) * 2
    assert max(largest) < len(lengths) * frames_of(model, 4000) * 32


class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the number of elements of every tensor that an op makes."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes += [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out
