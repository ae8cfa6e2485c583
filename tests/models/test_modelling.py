"""What transformers demands of every model class of its own, demanded of ours."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
import transformers
from torch import nn
from wavlm_cases import (
    FRAMES,
    MODELS,
    SAMPLES,
    TRANSFORMERS_5,
    assert_same,
    fast_like,
    fast_model,
    is_one_of,
    main_output,
    make_sensitive,
    plain_model,
    ragged_mask,
    small_config,
    subject,
    tensors,
    waveforms,
    with_labels,
)

every_model = pytest.mark.parametrize("name", MODELS)
both_forms = pytest.mark.parametrize("form", ["base", "large"])


def pair(name):
    return getattr(transformers, name), getattr(subject, name)


@every_model
@both_forms
def test_the_same_seed_initialises_the_same_model(name, form):
    states = []
    for cls in pair(name):
        torch.manual_seed(4)
        states.append(cls(small_config(form, mask_time_prob=0.1, conv_bias=True)).state_dict())
    assert_same(states[1], states[0])


@every_model
@both_forms
def test_initial_values_follow_the_configuration(name, form):
    config = small_config(form, initializer_range=1e-10, mask_time_prob=0.1)
    model = getattr(subject, name)(config)
    for path, p in model.named_parameters():
        assert p.requires_grad and p.isfinite().all(), path
        owner = path.rpartition(".")[0]
        module = model.get_submodule(owner) if owner else model
        if isinstance(module, nn.Linear) and "feature_projection" not in path:
            # Everything drawn with the initializer range is next to zero, biases are zero.
            assert p.abs().max() < 1e-8, path
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            assert p.min() == p.max() == (1 if path.endswith("weight") else 0), path
        elif path.endswith("gru_rel_pos_const"):
            assert (p == 1).all()
        elif path.endswith("masked_spec_embed"):
            assert p.min() >= 0 and p.max() <= 1
        elif "feature_projection.projection" in path:
            assert p.abs().max() <= math.sqrt(1 / config.conv_dim[-1])
        elif "conv_layers" in path:
            assert 0 < p.std() < 3 * math.sqrt(2 / p[0].numel()), path


@every_model
def test_forward_has_the_signature_of_transformers(name):
    plain, ours = pair(name)
    assert inspect.signature(ours.forward) == inspect.signature(plain.forward)
    names = list(inspect.signature(ours.forward).parameters)[1:]
    assert names[:2] == ["input_values", "attention_mask"]
    assert inspect.signature(subject.WavLMModel(small_config()).forward) == inspect.signature(
        transformers.WavLMModel(small_config()).forward
    )


@every_model
def test_class_attributes_are_those_of_transformers(name):
    plain, ours = pair(name)
    assert issubclass(ours, plain)
    for attribute in ("config_class", "base_model_prefix", "main_input_name", "supports_gradient_checkpointing",
                      "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "is_parallelizable",
                      "_no_split_modules", "_tied_weights_keys", "_keep_in_fp32_modules", "can_generate"):
        if hasattr(plain, attribute):
            expected, got = getattr(plain, attribute), getattr(ours, attribute)
            assert expected == got or callable(expected), attribute
    assert ours.__name__ == plain.__name__
    model, reference = fast_model(name), plain_model(name)
    assert model.can_generate() == reference.can_generate()
    assert model.base_model_prefix == "wavlm"
    assert model.num_parameters() == reference.num_parameters()
    assert model.num_parameters(only_trainable=True) == reference.num_parameters(only_trainable=True)
    assert model.get_memory_footprint() == reference.get_memory_footprint()
    assert model.framework == "pt" if hasattr(reference, "framework") else True
    assert model.dummy_inputs.keys() == reference.dummy_inputs.keys()


@every_model
def test_the_base_model_is_found(name):
    model = fast_model(name)
    assert is_one_of(model.base_model, "WavLMModel")
    assert (model.base_model is model) == (name == "WavLMModel")


@every_model
@pytest.mark.parametrize("method", ["get_input_embeddings", "get_output_embeddings", "resize_token_embeddings",
                                    "get_position_embeddings", "tie_weights", "get_encoder"])
def test_methods_that_do_not_apply_behave_as_in_transformers(name, method):
    outcomes = []
    for model in (plain_model(name), fast_model(name)):
        try:
            result = getattr(model, method)(*([20] if method == "resize_token_embeddings" else []))
            outcomes.append(type(result).__name__ if not isinstance(result, nn.Module) else "module")
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


@every_model
def test_no_weights_are_tied(name):
    model = fast_model(name)
    pointers = [p.data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert not (model._tied_weights_keys or [])


@every_model
def test_models_of_one_config_share_nothing(name):
    config = small_config()
    a, b = getattr(subject, name)(config).eval(), getattr(subject, name)(config).eval()
    before = output(b)
    make_sensitive(a, seed=2)
    assert torch.equal(output(b), before)


def output(model, **kwargs):
    with torch.no_grad():
        return main_output(model(waveforms(), **kwargs))


@every_model
@both_forms
def test_determinism(name, form):
    model = fast_model(name, small_config(form))
    kwargs = {"attention_mask": ragged_mask(SAMPLES, 400), "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        first, second = (dict(tensors(model(waveforms(), **kwargs))) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@every_model
@both_forms
def test_gradients_are_retained_on_hidden_states_and_attentions(name, form):
    model = fast_model(name, small_config(form))
    out = model(waveforms(), output_hidden_states=True, output_attentions=True)
    kept = [*out.hidden_states, *out.attentions]
    for tensor in kept:
        tensor.retain_grad()
    main_output(out).flatten()[0].backward(retain_graph=True)
    missing = [i for i, tensor in enumerate(out.hidden_states) if tensor.grad is None]
    plain = plain_model(name, small_config(form))
    expected = plain(waveforms(), output_hidden_states=True, output_attentions=True)
    for tensor in expected.hidden_states:
        tensor.retain_grad()
    main_output(expected).flatten()[0].backward()
    assert missing == [i for i, tensor in enumerate(expected.hidden_states) if tensor.grad is None]
    assert len(missing) < len(out.hidden_states)
    # Attentions are outputs of their own, as in transformers: a loss on them has a gradient.
    out.attentions[1].square().sum().backward()
    assert out.attentions[1].grad is not None


@pytest.mark.parametrize("name", MODELS[1:])
@both_forms
def test_training_with_labels_lowers_the_loss(name, form):
    model = fast_model(name, small_config(form)).train()
    labels = with_labels(name, model.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(waveforms(), **labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert min(losses[1:]) < losses[0] and all(math.isfinite(x) for x in losses)


@every_model
@both_forms
def test_a_batch_and_its_parts(name, form):
    model = fast_model(name, small_config(form))
    x = waveforms(4)
    with torch.no_grad():
        together = main_output(model(x))
        halves = torch.cat([main_output(model(x[:1])), main_output(model(x[1:]))])
    torch.testing.assert_close(together, halves, rtol=1e-3, atol=1e-3)


@every_model
def test_the_architecture_is_written_down(name, tmp_path):
    model = fast_model(name)
    model.save_pretrained(tmp_path)
    assert subject.WavLMConfig.from_pretrained(tmp_path).architectures == [name]
    assert model.config.model_type == "wavlm"


def test_a_config_survives_json_and_copies(tmp_path):
    config = small_config("large", tdnn_dim=[8, 9], tdnn_kernel=[3, 1], tdnn_dilation=[2, 1], mask_time_prob=0.2)
    config.save_pretrained(tmp_path)
    assert subject.WavLMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert config.inputs_to_logits_ratio == 20


@every_model
def test_keywords_and_positions(name):
    model = fast_model(name)
    mask = ragged_mask(SAMPLES, 400)
    with torch.no_grad():
        by_keyword = main_output(model(attention_mask=mask, input_values=waveforms()))
        by_position = main_output(model(waveforms(), mask))
    assert torch.equal(by_keyword, by_position)


@every_model
def test_an_unknown_keyword_is_treated_as_in_transformers(name):
    outcomes = []
    for model in (plain_model(name), fast_model(name)):
        try:
            with torch.no_grad():
                model(waveforms(), no_such_option=True)
            outcomes.append("taken")
        except TypeError:
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]


@every_model
def test_a_missing_input_is_an_error(name):
    with pytest.raises((TypeError, ValueError)):
        fast_model(name)()


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_problem_types_change_nothing_as_in_transformers(problem):
    config = small_config(problem_type=problem)
    plain = plain_model("WavLMForSequenceClassification", config)
    labels = with_labels("WavLMForSequenceClassification", config)
    with torch.no_grad():
        expected, got = plain(waveforms(), **labels).loss, fast_like(plain)(waveforms(), **labels).loss
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@every_model
def test_gradient_checkpointing_switches(name):
    model, plain = fast_model(name), plain_model(name)
    assert not model.is_gradient_checkpointing
    for m in (model, plain):
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    flags = [{n for n, m in x.named_modules() if getattr(m, "gradient_checkpointing", False)} for x in (model, plain)]
    assert flags[0] == flags[1] != set()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@every_model
def test_modes_reach_every_module(name):
    model = fast_model(name)
    assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.train().modules())
    model.eval().base_model.encoder.train()
    assert not model.training


@every_model
@pytest.mark.skipif(not TRANSFORMERS_5, reason="the argument is of version 5")
def test_attn_implementation(name):
    model = getattr(subject, name)._from_config(small_config(), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    for wanted in ("sdpa", "flash_attention_2"):
        with pytest.raises((ValueError, ImportError)):
            getattr(transformers, name)._from_config(small_config(), attn_implementation=wanted)
        with pytest.raises((ValueError, ImportError)):
            getattr(subject, name)._from_config(small_config(), attn_implementation=wanted)


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_from_config_in_a_dtype(name, dtype):
    model = getattr(subject, name)._from_config(small_config(), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert output_dtype(model, dtype) == dtype


def output_dtype(model, dtype):
    with torch.no_grad():
        return main_output(model.eval()(waveforms(dtype=dtype))).dtype


def test_frame_counts_are_those_that_transformers_computes():
    model = fast_model("WavLMForCTC")
    for samples in (30, 49, 50, 333, 1000):
        frames = int(model._get_feat_extract_output_lengths(torch.tensor(samples)))
        assert output_frames(model, samples) == frames
    assert output_frames(model, SAMPLES) == FRAMES


def output_frames(model, samples):
    with torch.no_grad():
        return model(waveforms(1, samples)).logits.shape[1]


def test_text_of_a_model_names_its_classes():
    text = repr(fast_model("WavLMForXVector"))
    assert text.startswith("WavLMForXVector(") and "attention" in text
