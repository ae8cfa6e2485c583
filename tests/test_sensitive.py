"""Sensitive weights are what they promise: the same everywhere, finite, and blind to nothing."""

import copy

import pytest
import torch
import transformers
from transformers import WavLMConfig, WavLMModel

from wavlm_fast import audio
from wavlm_fast.sensitive import OUTLIER, canonical_name, make_sensitive

CLASSES = (
    "WavLMModel",
    "WavLMForCTC",
    "WavLMForSequenceClassification",
    "WavLMForAudioFrameClassification",
    "WavLMForXVector",
)
FORMS = {"group": {}, "layer": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}}


def config(form, **options):
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "conv_dim": (24,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "tdnn_dim": (16,) * 5,
        "xvector_output_dim": 16,
        "classifier_proj_size": 16,
        "num_labels": 4,
        "vocab_size": 12,
        "use_weighted_layer_sum": True,
    }
    return WavLMConfig(**{**sizes, **FORMS[form], **options})


def build(form, name="WavLMModel", seed=0, **options):
    return make_sensitive(getattr(transformers, name)(config(form, **options)).eval(), seed)


def speech(seconds=2.0):
    waveform, _ = audio.load(audio.clip())
    return waveform[None, 8000 : 8000 + int(seconds * audio.RATE)]


@pytest.mark.parametrize("form", FORMS)
def test_seeds_decide_and_nothing_else(form):
    torch.manual_seed(1)
    first = build(form).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    model = WavLMModel(config(form))
    torch.set_rng_state(before)
    second = make_sensitive(model).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = build(form, seed=1).state_dict()
    assert first.keys() == second.keys() == other.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert not torch.equal(value, other[name]) or "projection.bias" in name, name


def test_every_class_holds_the_same_base_model():
    base = {canonical_name(name): value for name, value in build("group").named_parameters()}
    for name in CLASSES[1:]:
        model = build("group", name)
        inside = {canonical_name(key): value for key, value in model.wavlm.named_parameters(prefix="wavlm")}
        assert inside.keys() == base.keys()
        assert all(torch.equal(inside[key], base[key]) for key in base), name


def test_both_spellings_of_weight_norm_mean_one_name():
    old, new = "encoder.pos_conv_embed.conv.weight_", "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    assert canonical_name("wavlm." + new + "0") == canonical_name(old + "g") == old + "g"
    assert canonical_name("base_model.wavlm." + new + "1") == old + "v"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("adapter", [False, True])
def test_outputs_are_finite_in_every_dtype_and_depend_on_the_input(form, name, adapter):
    model = build(form, name, add_adapter=adapter and name in ("WavLMModel", "WavLMForCTC"))
    waveform = speech()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.inference_mode():
            out, other = (model.to(dtype)(w.to(dtype))[0].float() for w in (waveform, waveform.flip(1)))
        assert out.isfinite().all()
        assert 0.05 < out.std() < 60
        assert (out - other).abs().max() > 0.05


@pytest.mark.parametrize("form", FORMS)
def test_gates_are_spread_rows_are_peaked_and_outliers_are_there(form):
    model = build(form)
    seen = []

    def watch(attention, args, kwargs, out):
        hidden = args[0] if args else kwargs["hidden_states"]
        heads = hidden.view(*hidden.shape[:2], attention.num_heads, -1).transpose(1, 2)  # [B, H, T, D]
        logits = attention.gru_rel_pos_linear(heads).unflatten(-1, (2, 4)).sum(-1)
        a, b = logits.sigmoid().unbind(-1)
        gate = a * (b * attention.gru_rel_pos_const.squeeze(-1) - 1) + 2
        seen.append((a, b, gate))

    for layer in model.encoder.layers:
        layer.attention.register_forward_hook(watch, with_kwargs=True)
    with torch.inference_mode():
        out = model(speech(), output_hidden_states=True, output_attentions=True)
    for sigmoids in zip(*[(a, b) for a, b, _ in seen], strict=True):
        sigmoid = torch.stack(sigmoids)
        assert sigmoid.quantile(0.05) < 0.25
        assert sigmoid.quantile(0.95) > 0.75
    for (_, _, gate), weights in zip(seen, out.attentions, strict=True):
        assert gate.amax() - gate.amin() > 0.8
        assert weights.amax(-1).mean() > 5 / weights.shape[-1]  # averaged over heads; uniform rows would give 1
    assert model.encoder.layers[0].attention.rel_attn_embed.weight.std().item() == pytest.approx(1, abs=0.1)
    for hidden in out.hidden_states:
        channels = hidden.abs().mean((0, 1)).sort().values
        assert 0.5 * OUTLIER < channels[-1] < 2 * OUTLIER
        assert 0.2 < channels[:-4].median() < 4


@pytest.mark.parametrize("form", FORMS)
def test_no_parameter_is_without_effect(form):
    """Flip the sign of one parameter at a time; masked_spec_embed counts only in training."""
    model = build(form)
    waveform = speech(1.0)
    with torch.inference_mode():
        before = model(waveform)[0]
        for name, parameter in model.named_parameters():
            if name == "masked_spec_embed" or name.endswith("k_proj.bias"):  # softmax does not see a key bias
                continue
            kept = parameter.detach().clone()
            parameter.neg_()
            change = (model(waveform)[0] - before).abs().max()
            parameter.copy_(kept)
            assert change > 1e-2, name


def test_only_wavlm_is_taken():
    with pytest.raises(TypeError, match="wants a WavLM model with its config, got Linear"):
        make_sensitive(torch.nn.Linear(2, 2))


def test_dtype_and_identity_are_kept():
    model = copy.deepcopy(build("group")).double()
    parameters = dict(model.named_parameters())
    assert make_sensitive(model) is model
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.dtype == torch.float64
