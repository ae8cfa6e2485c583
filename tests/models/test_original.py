"""`wavlm_fast.original` gives what transformers' WavLM gives, in the form in which Microsoft's class gives it."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from original_cases import original_config, original_like, original_name, pair
from wavlm_cases import (
    FORMS,
    FRAMES,
    SAMPLES,
    assert_tensor_close,
    plain_model,
    ragged_mask,
    small_config,
    truth_of,
    waveforms,
)

from wavlm_fast import restore
from wavlm_fast.original import (
    Fp32GroupNorm,
    Fp32LayerNorm,
    GLU_Linear,
    MultiheadAttention,
    WavLM,
    WavLMConfig,
    compute_mask_indices,
)

every_form = pytest.mark.parametrize("form", FORMS)
both_forms = pytest.mark.parametrize("form", ["base", "large"])

VALID = 15  # frames of the padded utterance: 300 samples, a T-th each; transformers counts whole receptive fields
PADDED = torch.arange(SAMPLES) >= torch.tensor([[SAMPLES], [20 * VALID]])  # [B, S]
SAME_FRAMES = ragged_mask(SAMPLES, 20 * VALID + 10)
TRAINING = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "dropout_input": 0.1}


def double(seed=0):
    return waveforms(seed=seed, dtype=torch.float64)


def assert_equal_but_rounding(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype == torch.float64
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


def gradients(model, source, **kwargs):
    model.zero_grad()
    model.extract_features(source, **kwargs)[0].square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Values


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@every_form
def test_every_hidden_state_is_that_of_transformers(form, padded):
    plain, ours = pair(form)
    with torch.no_grad():
        expected = plain(double(), attention_mask=SAME_FRAMES if padded else None, output_hidden_states=True)
        mask = PADDED if padded else None
        states = [ours.extract_features(double(), mask, output_layer=n)[0] for n in range(1, len(ours.encoder.layers))]
        last, _ = ours.extract_features(double(), mask)
    for got, state in zip(states, expected.hidden_states[1:-1], strict=True):
        assert_equal_but_rounding(got, state)
    assert_equal_but_rounding(last, expected.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@both_forms
def test_is_as_close_to_the_truth_as_transformers(form, dtype):
    plain, ours = pair(form, dtype)
    x = waveforms(dtype=dtype)
    with torch.no_grad():
        got, _ = ours.extract_features(x)
        expected, truth = plain(x).last_hidden_state, truth_of(plain)(x.double()).last_hidden_state
    assert got.dtype == dtype
    assert_tensor_close("x", got, expected, truth)


@pytest.mark.parametrize("norm", [Fp32LayerNorm(24), Fp32GroupNorm(24, 24)], ids=["layer", "group"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precisions_are_rounded_once(norm, dtype):
    x = (30 * torch.randn(2, 24, 24)).to(dtype)
    expected = norm.float()(x.float()).to(dtype)
    assert torch.equal(norm.to(dtype)(x), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_pytorch_tanh", "tanh", "linear"])
def test_activations(activation):
    plain = plain_model("WavLMModel", small_config(hidden_act=activation)).double()
    with torch.no_grad():
        got, _ = original_like(plain).extract_features(double())
        assert_equal_but_rounding(got, plain(double()).last_hidden_state)


def test_gelu_fast_is_the_old_name_of_gelu_accurate():
    _, accurate = pair(activation_fn="gelu_accurate")
    _, fast = pair(activation_fn="gelu_fast")
    assert torch.equal(accurate.extract_features(double())[0], fast.extract_features(double())[0])


def test_glu_gates_its_first_half_by_its_second():
    layer = restore(WavLM(original_config(small_config(), activation_fn="glu"))).encoder.layers[0].eval()
    assert isinstance(layer.fc1, GLU_Linear) and layer.fc1.linear.weight.shape == (96, 32)
    x = torch.randn(4, 2, 32)
    attended = layer.self_attn_layer_norm(x + layer.self_attn(x, x, x)[0])
    values, gates = layer.fc1.linear(attended).split(48, dim=-1)
    expected = attended + layer.fc2(values * gates * torch.sigmoid(gates))
    torch.testing.assert_close(layer(x)[0], layer.final_layer_norm(expected))


@both_forms
def test_gradients_are_those_of_transformers(form):
    plain, ours = pair(form)
    x = double().requires_grad_()
    got = gradients(ours, x)
    y = double().requires_grad_()
    plain(y).last_hidden_state.square().mean().backward()
    named = {original_name(n, form == "large"): p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert set(got) == set(named)
    for name, gradient in got.items():
        if not name.endswith("k_proj.bias"):  # softmax does not see it: rounding noise around 0
            assert (gradient - named[name]).abs().max() <= 1e-10 * named[name].abs().max(), name
    assert (x.grad - y.grad).abs().max() <= 1e-10 * y.grad.abs().max()


# What comes in which form


@both_forms
def test_output_layer_stops_there_and_leaves_the_final_norm_out(form):
    _, ours = pair(form)
    called = []
    for i, layer in enumerate(ours.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: called.append(i))
    (x, results), _ = ours.extract_features(double(), output_layer=2, ret_layer_results=True)
    assert called == [0, 1]
    assert len(results) == 3 and all(weights is None for _, weights in results)
    assert [tuple(state.shape) for state, _ in results] == [(FRAMES, 2, 32)] * 3  # [T, B, C]
    assert torch.equal(x, results[2][0].transpose(0, 1))
    (x, results), _ = ours.extract_features(double(), output_layer=3, ret_layer_results=True)
    assert len(results) == 4 and torch.equal(x, results[-1][0].transpose(0, 1))
    whole, _ = ours.extract_features(double())
    assert torch.equal(whole, ours.encoder.layer_norm(x) if form == "large" else x)


def test_layer_results_start_with_the_transformers_input():
    plain, ours = pair()
    with torch.no_grad():
        (_, results), _ = ours.extract_features(double(), PADDED, output_layer=1, ret_layer_results=True)
        expected = plain(double(), attention_mask=SAME_FRAMES, output_hidden_states=True).hidden_states
    for (state, _), other in zip(results, expected[:2], strict=True):
        assert_equal_but_rounding(state.transpose(0, 1), other)


def test_without_an_output_layer_there_are_no_layer_results():
    _, ours = pair()
    (x, results), mask = ours.extract_features(double(), ret_layer_results=True)
    assert x.shape == (2, FRAMES, 32) and results == [] and mask is None


def test_an_output_layer_that_there_is_not_runs_them_all_without_the_final_norm():
    _, ours = pair("large")
    expected, _ = ours.extract_features(double(), output_layer=3)
    for layer in (0, 9):
        assert torch.equal(ours.extract_features(double(), output_layer=layer)[0], expected)


def test_ret_conv_gives_the_projected_features_with_zeros_where_padded():
    plain, ours = pair()
    with torch.no_grad():
        features, mask = ours.extract_features(double(), PADDED, ret_conv=True)
        expected, _ = plain.feature_projection(plain.feature_extractor(double()).transpose(1, 2))
    assert torch.equal(mask, torch.arange(FRAMES) >= torch.tensor([[FRAMES], [VALID]]))
    assert_equal_but_rounding(features, expected.masked_fill(mask[..., None], 0))
    assert not features[mask].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_a_padding_mask_of_numbers(dtype):
    _, ours = pair()
    expected, mask = ours.extract_features(double(), PADDED)
    got, frames = ours.extract_features(double(), PADDED.to(dtype))
    assert torch.equal(got, expected) and torch.equal(frames, mask)


@both_forms
def test_a_layer_speaks_as_the_originals(form):
    _, ours = pair(form)
    seen = {}
    ours.encoder.layers[1].register_forward_hook(
        lambda module, args, kwargs, output: seen.update(args=args, kwargs=kwargs, output=output), with_kwargs=True
    )
    _, mask = ours.extract_features(double(), PADDED)
    assert [tuple(x.shape) for x in seen["args"]] == [(FRAMES, 2, 32)]
    assert set(seen["kwargs"]) == {"self_attn_padding_mask", "need_weights", "self_attn_mask", "pos_bias"}
    assert torch.equal(seen["kwargs"]["self_attn_padding_mask"], mask)
    x, weights, pos_bias = seen["output"]
    assert x.shape == (FRAMES, 2, 32) and weights is None
    assert pos_bias.shape == (4, FRAMES, FRAMES) and torch.equal(pos_bias, seen["kwargs"]["pos_bias"])


def test_attention_weights_are_the_mean_over_heads():
    plain, ours = pair()
    with torch.no_grad():
        expected = plain(double(), output_hidden_states=True, output_attentions=True)
        x = expected.hidden_states[0].transpose(0, 1)
        _, weights, _ = ours.encoder.layers[0](x, need_weights=True)
    assert_equal_but_rounding(weights, expected.attentions[0].mean(1))


def test_projections_are_called():
    _, ours = pair()
    before, _ = ours.extract_features(double())
    ours.encoder.layers[1].self_attn.v_proj.register_forward_hook(lambda module, args, output: 2 * output)
    assert not torch.allclose(ours.extract_features(double())[0], before)


# Training


@both_forms
def test_training_draws_anew_and_eval_draws_nothing(form):
    _, ours = pair(form, torch.float32, **TRAINING)
    x = waveforms()
    expected, _ = ours.extract_features(x)
    assert torch.equal(ours.extract_features(x)[0], expected)
    ours.train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(ours.extract_features(x)[0])
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("place", TRAINING)
def test_each_dropout_drops(place):
    _, ours = pair("base", torch.float32, **{place: 0.5})
    expected, _ = ours.extract_features(waveforms())
    ours.train()
    assert not torch.allclose(ours.extract_features(waveforms())[0], expected)


@pytest.mark.parametrize("training", [False, True])
def test_numpys_generator_gives_one_number_a_layer_in_either_mode(training):
    _, ours = pair()
    ours.train(training)
    np.random.seed(4)
    expected = np.random.random(4)
    np.random.seed(4)
    ours.extract_features(double())
    assert np.random.random() == expected[3]
    np.random.seed(4)
    ours.extract_features(double(), output_layer=1)
    assert np.random.random() == expected[1]


def test_layer_drop_skips_the_layers_that_draw_less():
    _, ours = pair("large", encoder_layerdrop=0.5)
    called = []
    for i, layer in enumerate(ours.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: called.append(i))
    ours.extract_features(double())
    assert called == [0, 1, 2]
    ours.train()
    for seed in range(4):
        called.clear()
        np.random.seed(seed)
        expected = [i for i, drawn in enumerate(np.random.random(3)) if drawn > 0.5]
        np.random.seed(seed)
        (_, results), _ = ours.extract_features(double(), output_layer=3, ret_layer_results=True)
        assert called == expected and len(results) == 4
        kept = [not torch.equal(before[0], after[0]) for before, after in itertools.pairwise(results)]
        assert [i for i, changed in enumerate(kept) if changed] == expected


def test_without_the_first_layer_the_others_have_no_position_bias():
    _, ours = pair("large", encoder_layerdrop=0.3)
    twin = copy.deepcopy(ours).eval()
    first = twin.encoder.layers[0]
    for parameter in (*first.self_attn.out_proj.parameters(), *first.fc2.parameters()):
        torch.nn.init.zeros_(parameter)  # the layer adds nothing
    torch.nn.init.zeros_(first.self_attn.relative_attention_bias.weight)
    seed = next(
        s for s in range(99) if [d > 0.3 for d in np.random.RandomState(s).random_sample(3)] == [False, True, True]
    )
    ours.train()
    np.random.seed(seed)
    got, _ = ours.extract_features(double(), PADDED)
    assert_equal_but_rounding(got.detach(), twin.extract_features(double(), PADDED)[0].detach())


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0, 3.0])
def test_feature_grad_mult_scales_gradients_into_the_front_end_and_no_value(factor):
    _, whole = pair()
    _, ours = pair(feature_grad_mult=factor)
    x, y = double().requires_grad_(), double().requires_grad_()
    assert torch.equal(ours.extract_features(x)[0], whole.extract_features(y)[0])
    expected, got = gradients(whole, y), gradients(ours, x)
    for name, gradient in expected.items():
        if not name.startswith("feature_extractor."):
            assert torch.equal(got[name], gradient), name
        elif factor == 0:
            assert name not in got
        else:
            torch.testing.assert_close(got[name], factor * gradient, rtol=1e-9, atol=0)
    assert (x.grad is None) if factor == 0 else torch.allclose(x.grad, factor * y.grad, rtol=1e-9, atol=1e-20)


# Masking

# Drawn by the original with numpy's generator seeded with 3, and the number that it draws next.
DRAWN = {
    ("static", False): ("......#.#.......###...#.##....", "...####.....####..............", 0.713566),
    ("static", True): ("#.##..........##.........###..", "......####.....####...........", 0.402361),
    ("uniform", False): ("....#.............#.....#.....", "...............#...##.........", 0.860534),
    ("uniform", True): ("......#............#..#.......", "..#.....#....#................", 0.415101),
    ("normal", False): (".........####.............####", "......########................", 0.860534),
    ("normal", True): ("#.##........####...........##.", "...#####.####.................", 0.257585),
    ("poisson", False): ("...#........####..........#...", "....##....#.#.##..............", 0.325807),
    ("poisson", True): (".#....................#.####..", "........###...##.#............", 0.424702),
}


def drawn_rows(*args, **kwargs):
    np.random.seed(3)
    return ["".join(".#"[int(masked)] for masked in row) for row in compute_mask_indices(*args, **kwargs)]


@pytest.mark.parametrize(("kind", "apart"), DRAWN)
def test_masks_are_drawn_as_the_original_draws_them(kind, apart):
    padding = torch.arange(30) >= torch.tensor([[30], [21]])
    rows = drawn_rows((2, 30), padding, 0.4, 4, kind, 1, min_masks=2, no_overlap=apart, min_space=1)
    first, second, following = DRAWN[kind, apart]
    assert rows == [first, second]
    assert np.random.rand() == pytest.approx(following, abs=1e-6)


def test_masks_of_whole_rows_and_of_rows_that_are_short():
    assert drawn_rows((2, 20), None, 0.3, 3) == ["..###......###......", "....######.........."]
    assert drawn_rows((2, 6), None, 0.9, 5, min_masks=4) == ["##.###", ".#####"]


def test_where_no_span_is_drawn_nothing_is_masked():
    assert drawn_rows((2, 20), None, 0.0, 3) == ["." * 20] * 2


def test_frames_are_masked_by_the_embedding_and_channels_by_zeros():
    _, ours = pair(mask_prob=0.3, mask_length=3, mask_channel_prob=0.3, mask_channel_length=4)
    plain_features, _ = ours.extract_features(double(), PADDED, ret_conv=True)
    np.random.seed(5)
    features, padded = ours.extract_features(double(), PADDED, mask=True, ret_conv=True)
    np.random.seed(5)
    frames = torch.from_numpy(compute_mask_indices((2, FRAMES), padded, 0.3, 3, min_masks=2))
    channels = torch.from_numpy(compute_mask_indices((2, 32), None, 0.3, 4))[:, None]
    assert frames.any() and channels.any()
    expected = torch.where(frames[..., None], ours.mask_emb, plain_features).masked_fill(channels, 0)
    assert torch.equal(features, expected)
    assert gradients(ours, double(), mask=True)["mask_emb"].any()
    assert "mask_emb" not in gradients(ours, double())


# The model as an object


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
def test_a_trace_is_the_model(form):
    _, ours = pair(form)
    with torch.no_grad():
        traced = torch.jit.trace(Frames(ours), double())
        assert torch.equal(traced(double(1)), ours.extract_features(double(1))[0])


# The configuration


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
