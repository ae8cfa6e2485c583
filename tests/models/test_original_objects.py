"""`wavlm_fast.original` as objects: names, copies, traces, the configuration and what of it is refused."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from original_cases import assert_equal_but_rounding, both_forms, double, every_form, original_config, pair
from wavlm_cases import FORMS, small_config

from wavlm_fast import restore
from wavlm_fast.original import MultiheadAttention, WavLM, WavLMConfig, compute_mask_indices


@pytest.mark.parametrize("graph", [False, True], ids=["no grad", "grad"])
def test_copies_after_a_forward(graph):
    _, ours = pair(encoder_layerdrop=0.1)
    with torch.set_grad_enabled(graph):
        expected = ours.extract_features(double())[0]
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
            assert list(twin.state_dict()) == list(ours.state_dict())
            assert torch.equal(twin.encoder.pos_conv[0].weight, ours.encoder.pos_conv[0].weight)
            assert torch.equal(twin.extract_features(double())[0], expected)
            twin.encoder.pos_conv[0].weight_g.data.mul_(2)
            assert not torch.equal(twin.extract_features(double())[0], expected)
        assert torch.equal(ours.extract_features(double())[0], expected)


@every_form
def test_parameters_have_the_originals_names(form):
    _, ours = pair(form)
    names = set(ours.state_dict())
    norms = ["0.2.1", "1.2.1", "2.2.1"] if FORMS[form]["feat_extract_norm"] == "layer" else ["0.2"]
    front = [f"feature_extractor.conv_layers.{name}" for name in ("0.0", "1.0", "2.0")]
    expected = {f"{name}.weight" for name in front} | {
        "mask_emb",
        "encoder.layers.0.self_attn.relative_attention_bias.weight",
    }
    expected |= {f"encoder.pos_conv.0.{name}" for name in ("bias", "weight_g", "weight_v")}
    modules = [f"feature_extractor.conv_layers.{name}" for name in norms]
    modules += ["layer_norm", "post_extract_proj", "encoder.layer_norm"]
    inner = ("fc1", "fc2", "final_layer_norm", "self_attn_layer_norm")
    inner += tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj", "grep_linear"))
    for i in range(3):
        modules += [f"encoder.layers.{i}.{name}" for name in inner]
        expected.add(f"encoder.layers.{i}.self_attn.grep_a")
    assert names == expected | {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert ours.encoder.pos_conv[0].weight_g.shape == (1, 1, 16)


def test_weight_norm_in_its_newer_spelling_loads():
    _, ours = pair()
    _, twin = pair()
    state = ours.state_dict()
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        state[f"encoder.pos_conv.0.parametrizations.weight.{new}"] = 2 * state.pop(f"encoder.pos_conv.0.{old}")
    twin.load_state_dict(state)
    assert torch.equal(twin.encoder.pos_conv[0].weight_g, 2 * ours.encoder.pos_conv[0].weight_g)
    assert torch.equal(twin.encoder.pos_conv[0].weight_v, 2 * ours.encoder.pos_conv[0].weight_v)


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, ours = pair()
        ours.extract_features(double())


def test_weight_norm_can_be_removed():
    _, ours = pair()
    expected, _ = ours.extract_features(double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.remove_weight_norm(ours.encoder.pos_conv[0])
    for model in (ours, copy.deepcopy(ours)):
        assert_equal_but_rounding(model.extract_features(double())[0].detach(), expected.detach())


class Frames(torch.nn.Module):
    """As users wrap the model, which has no forward, for tracing."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, source):
        return self.model.extract_features(source)[0]


@both_forms
def test_compiles_whole_in_eval_mode(form):
    _, ours = pair(form)
    compiled = torch.compile(Frames(ours).eval(), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_equal_but_rounding(compiled(double()), ours.extract_features(double())[0])


@both_forms
def test_a_trace_is_the_model(form):
    _, ours = pair(form)
    with torch.no_grad():
        traced = torch.jit.trace(Frames(ours), double())
        assert torch.equal(traced(double(1)), ours.extract_features(double(1))[0])


def test_the_config_has_the_published_defaults_and_keeps_what_it_is_given():
    cfg = WavLMConfig({"encoder_layers": 24, "label_rate": 50})
    assert (cfg.encoder_layers, cfg.label_rate) == (24, 50)
    assert (cfg.encoder_embed_dim, cfg.num_buckets, cfg.max_distance, cfg.mask_prob) == (768, 320, 1280, 0.65)
    assert not cfg.relative_position_embedding and not cfg.gru_rel_pos and cfg.conv_pos_groups == 16
    cfg.update({"encoder_layers": 6})
    assert cfg.encoder_layers == 6 and WavLMConfig().encoder_layers == 12
    assert len(vars(WavLMConfig())) == 35


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        ("[(16,10,5)] + [(16, 3, 2)] * 2 + 2 * [(24,2,2)]", [16, 16, 16, 24, 24]),
        ("((16, 10, 5), [8 + 8, 3, 1 * 2])", [16, 16]),
    ],
)
def test_conv_feature_layers(text, dims):
    cfg = original_config(small_config(), conv_feature_layers=text)
    model = restore(WavLM(cfg))
    assert [conv[0].out_channels for conv in model.feature_extractor.conv_layers] == dims
    assert model.embed == dims[-1]
    assert model.feature_extractor.conv_layers[1][0].stride == (2,)


REFUSED = {
    "a HuBERT": ({"gru_rel_pos": False, "relative_position_embedding": False}, "this is a HuBERT's config"),
    "no gate": ({"gru_rel_pos": False}, r"relative_position_embedding=True, gru_rel_pos=False"),
    "no bias": ({"relative_position_embedding": False}, "no gated relative position bias"),
    "heads": ({"encoder_attention_heads": 5}, "32 channels do not divide into 5 attention heads"),
    "activation": ({"activation_fn": "mish"}, "activation_fn is one of relu, gelu, .* not 'mish'"),
    "mode": ({"extractor_mode": "batch_norm"}, "extractor_mode is default or layer_norm, not 'batch_norm'"),
}
NO_LAYERS = (
    "__import__('os').getcwd()",
    "[(16, 10, 5)] * (lambda: 3)()",
    "[x for x in ((16, 10, 5),)]",
    "[(16, 10, 5)",
    "[]",
    "3",
    "[3]",
    "[(16, 10)]",
    "[(16, 10, 0)]",
    "[(16, 10, 2.5)]",
    "[(16, 10, '5')]",
    "[(16, 10, 5)] * 1001",
    "[(16, 10, 5)] * 10000000000",
    "[(1, 1, 1)] * 900 * 900 * 900 * 900",
    "(" * 5000,
    None,
    [(16, 10, 5)],
)


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_is_refused(name):
    changes, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        pair(**changes)


@pytest.mark.parametrize("text", NO_LAYERS, ids=lambda text: repr(text)[:24])
def test_conv_feature_layers_that_are_refused(text):
    cfg = original_config(small_config(), conv_feature_layers=text)
    with pytest.raises(ValueError, match=r"conv_feature_layers is a list of \(channels, kernel, stride\)"):
        WavLM(cfg)


def test_masks_of_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="static, uniform, normal or poisson, not 'zipf'"):
        compute_mask_indices((1, 20), None, 0.5, 3, "zipf")


def test_an_attention_mask_is_refused():
    with pytest.raises(ValueError, match="takes no attn_mask"):
        MultiheadAttention(8, 2)(*[torch.randn(3, 1, 8)] * 3, attn_mask=torch.zeros(3, 3))
