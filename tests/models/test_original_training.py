"""`wavlm_fast.original` in training: dropouts, layer drop, masks, gradients, drawn as the original draws."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from original_cases import PADDED, assert_equal_but_rounding, both_forms, double, gradients, pair
from wavlm_cases import FRAMES, waveforms

from wavlm_fast.original import compute_mask_indices

TRAINING = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "dropout_input": 0.1}


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


def zero(*tensors):
    for tensor in tensors:
        torch.nn.init.zeros_(tensor)


# A dropout that drops all, and the parameters whose zeros do the same.
DROPOUTS = {
    "dropout_input": lambda model: (model.dropout_input, model.post_extract_proj.parameters()),
    "attention": lambda model: (
        model.encoder.layers[1].self_attn.dropout_module,
        [weight(model, "self_attn.out_proj")],
    ),
    "dropout1": lambda model: (
        model.encoder.layers[1].dropout1,
        model.encoder.layers[1].self_attn.out_proj.parameters(),
    ),
    "dropout2": lambda model: (model.encoder.layers[1].dropout2, [weight(model, "fc2")]),
    "dropout3": lambda model: (model.encoder.layers[1].dropout3, model.encoder.layers[1].fc2.parameters()),
}


def weight(model, name):
    return model.encoder.layers[1].get_submodule(name).weight


@pytest.mark.parametrize("place", DROPOUTS)
@both_forms
def test_each_dropout_is_where_it_belongs(form, place):
    _, ours = pair(form)
    twin = copy.deepcopy(ours)
    zero(*DROPOUTS[place](twin)[1])
    DROPOUTS[place](ours)[0].p = 1.0
    ours.train()
    with torch.no_grad():
        assert_equal_but_rounding(ours.extract_features(double())[0], twin.extract_features(double())[0])


def test_the_encoders_dropout_drops_the_first_layers_input():
    _, ours = pair()
    ours.encoder.dropout = 1.0
    ours.train()
    (_, results), _ = ours.extract_features(double(), output_layer=1, ret_layer_results=True)
    assert not results[0][0].any()


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


def test_without_gradients_the_front_end_keeps_none():
    _, ours = pair()
    seen = []
    ours.feature_extractor.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    with torch.no_grad():
        ours.extract_features(double())
    ours.extract_features(double())
    assert seen == [False, True]


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
    _, ours = pair(mask_prob=0.05, mask_length=3, mask_channel_prob=0.3, mask_channel_length=4)
    plain_features, _ = ours.extract_features(double(), PADDED, ret_conv=True)
    np.random.seed(5)
    features, padded = ours.extract_features(double(), PADDED, mask=True, ret_conv=True)
    np.random.seed(5)
    frames = torch.from_numpy(compute_mask_indices((2, FRAMES), padded, 0.05, 3, min_masks=2))
    channels = torch.from_numpy(compute_mask_indices((2, 32), None, 0.3, 4))[:, None]
    assert frames.any() and channels.any()
    expected = torch.where(frames[..., None], ours.mask_emb, plain_features).masked_fill(channels, 0)
    assert torch.equal(features, expected)
    assert gradients(ours, double(), mask=True)["mask_emb"].any()
    assert "mask_emb" not in gradients(ours, double())
