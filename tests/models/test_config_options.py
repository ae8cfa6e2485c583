"""Every WavLMConfig argument that changes the computation, against transformers."""

from __future__ import annotations

import pytest
import torch
from test_losses import check_gradients, loss_of
from wavlm_cases import (
    FORMS,
    MODELS,
    SAMPLES,
    TRANSFORMERS_5,
    assert_close_to_truth,
    check_forward,
    fast_like,
    main_output,
    ours_only,
    plain_model,
    ragged_mask,
    small_config,
    subject,
    truth_of,
    waveforms,
    with_labels,
)

both_forms = pytest.mark.parametrize("form", ["base", "large"])
all_forms = pytest.mark.parametrize("form", list(FORMS))

ACTIVATIONS = ["gelu", "relu", "silu", "gelu_new", "tanh", "quick_gelu", "mish", "gelu_pytorch_tanh", "leaky_relu",
               "sigmoid", "linear", "gelu_10", "laplace", "relu2"]


def check(form="base", name="WavLMModel", gradients=True, x=None, **changes):
    """Outputs, hidden states and gradients under a changed configuration."""
    plain = plain_model(name, small_config(form, **changes))
    x = waveforms() if x is None else x
    out = check_forward(plain, x, attention_mask=ragged_mask(x.shape[1], x.shape[1] - 170, samples=x.shape[1]),
                        output_hidden_states=True)
    check_forward(plain, x)
    if gradients:
        check_gradients(plain.train(), loss_of(name))
    return out


@both_forms
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_act(form, activation):
    check(form, hidden_act=activation, gradients=activation in ("relu", "gelu_new", "quick_gelu"))


@both_forms
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feat_extract_activation(form, activation):
    # The same activation serves the convolutions of the front end and the positional one.
    check(form, feat_extract_activation=activation, gradients=activation in ("relu", "gelu_new", "quick_gelu"))


@pytest.mark.skipif(TRANSFORMERS_5, reason="version 5 takes only a name for hidden_act")
@pytest.mark.parametrize("act", [torch.nn.functional.gelu, torch.sin, torch.nn.ELU()], ids=["gelu", "sin", "module"])
def test_a_callable_hidden_act(act):
    check(hidden_act=act)


@both_forms
@pytest.mark.parametrize("act", [torch.sin, torch.nn.ELU(), torch.nn.GELU(approximate="tanh")],
                         ids=["sin", "elu", "tanh gelu"])
def test_an_activation_put_in_by_hand(form, act):
    plain = plain_model("WavLMModel", small_config(form))
    ours = fast_like(plain)
    for model in (plain, ours):
        feed_forward = model.encoder.layers[1].feed_forward
        del feed_forward.intermediate_act_fn
        feed_forward.intermediate_act_fn = act
    check_forward(plain, waveforms(), ours)


@all_forms
@pytest.mark.parametrize("bias", [False, True])
def test_conv_bias(form, bias):
    check(form, conv_bias=bias)


@both_forms
@pytest.mark.parametrize(
    ("dims", "kernels", "strides"),
    [
        ([16], [10], [5]),
        ([16, 16], [7, 5], [3, 1]),
        ([8, 12, 16, 24], [10, 8, 4, 4], [5, 4, 2, 2]),
        ([16, 24, 16], [3, 1, 2], [3, 2, 2]),
        ([16, 16, 16, 16, 16, 16, 16], [10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2]),
        ([1, 3], [10, 3], [5, 2]),
    ],
    ids=["one", "stride one", "wav2vec", "holes", "published", "narrow"],
)
def test_convolution_shapes(form, dims, kernels, strides):
    samples = 2400 if len(dims) == 7 else 500
    check(form, conv_dim=dims, conv_kernel=kernels, conv_stride=strides, x=waveforms(2, samples))


@both_forms
@pytest.mark.parametrize(("hidden", "heads", "groups"), [(24, 8, 4), (30, 2, 3), (33, 3, 11), (40, 1, 8), (52, 4, 1)])
def test_head_sizes(form, hidden, heads, groups):
    # Head dimensions 3, 15, 11, 40 and 13.
    check(form, hidden_size=hidden, num_attention_heads=heads, num_conv_pos_embedding_groups=groups)


@both_forms
@pytest.mark.parametrize(("kernel", "groups"), [(2, 2), (3, 2), (15, 4), (16, 32), (31, 1), (128, 16)])
def test_positional_convolution(form, kernel, groups):
    check(form, num_conv_pos_embeddings=kernel, num_conv_pos_embedding_groups=groups)


@both_forms
@pytest.mark.parametrize(("buckets", "distance"), [(8, 10), (32, 800), (33, 20), (320, 800), (16, 5)])
def test_relative_position_buckets(form, buckets, distance):
    check(form, num_buckets=buckets, max_bucket_distance=distance, x=waveforms(2, 3000), gradients=buckets == 33)


@both_forms
@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_layer_norm_eps(form, eps):
    check(form, layer_norm_eps=eps)


@both_forms
def test_one_layer_and_many(form):
    check(form, num_hidden_layers=1)
    check(form, num_hidden_layers=6, gradients=False)


@pytest.mark.parametrize("name", MODELS[2:])
@both_forms
def test_weighted_layer_sum(name, form):
    plain = plain_model(name, small_config(form, use_weighted_layer_sum=True))
    labels = with_labels(name, plain.config)
    mask = ragged_mask(SAMPLES, 400)
    got = check_forward(plain, waveforms(), attention_mask=mask, **labels)
    unweighted = check_forward(plain_model(name, small_config(form)), waveforms(), attention_mask=mask, **labels)
    assert not torch.allclose(got.logits, unweighted.logits)
    check_forward(plain, waveforms(), output_hidden_states=True, **labels)
    check_forward(plain, waveforms(), output_hidden_states=False, **labels)
    assert "layer_weights" in check_gradients(plain.train(), loss_of(name))


@both_forms
@pytest.mark.parametrize("changes", [
    {},
    {"output_hidden_size": 24},
    {"num_adapter_layers": 1, "adapter_stride": 1},
    {"adapter_kernel_size": 4, "adapter_stride": 3, "num_adapter_layers": 2},
], ids=["default", "projected", "one layer", "wide"])
def test_adapter(form, changes):
    for name in ("WavLMModel", "WavLMForCTC"):
        plain = plain_model(name, small_config(form, add_adapter=True, **changes))
        out = check_forward(plain, waveforms(2, 1200), **with_labels_of_length_one(name))
        assert main_output(out).shape[1] < 59 or changes.get("adapter_stride") == 1
    check_gradients(plain_model("WavLMModel", plain.config).train(), loss_of("WavLMModel"))


def with_labels_of_length_one(name):
    return {} if name == "WavLMModel" else {"labels": torch.tensor([[1], [2]])}


@pytest.mark.parametrize("name", ["WavLMForSequenceClassification", "WavLMForAudioFrameClassification"])
def test_heads_that_take_no_adapter_say_so(name):
    with pytest.raises(ValueError, match="adapter"):
        getattr(subject, name)(small_config(add_adapter=True))


@pytest.mark.parametrize(
    ("dims", "kernels", "dilations"),
    [
        ([16], [1], [1]),
        ([16, 24], [5, 5], [1, 4]),
        ([8, 8, 8, 8, 20], [5, 3, 3, 1, 1], [1, 2, 3, 1, 1]),
        ([16, 16], [2, 4], [3, 1]),
    ],
)
def test_tdnn_shapes(dims, kernels, dilations):
    config = small_config(tdnn_dim=dims, tdnn_kernel=kernels, tdnn_dilation=dilations, xvector_output_dim=9)
    plain = plain_model("WavLMForXVector", config)
    labels = with_labels("WavLMForXVector", config, batch=3)
    check_forward(plain, waveforms(3), attention_mask=ragged_mask(SAMPLES, 500, 300), **labels)
    check_gradients(plain.train(), loss_of("WavLMForXVector"))


def test_x_vector_of_one_valid_frame_is_nan_as_in_transformers():
    config = small_config(tdnn_dim=[16], tdnn_kernel=[1], tdnn_dilation=[1])
    out = check_forward(plain_model("WavLMForXVector", config), waveforms(), attention_mask=ragged_mask(SAMPLES, 35))
    assert out.embeddings[1].isnan().all() and out.embeddings[0].isfinite().all()


@pytest.mark.parametrize("lengths", [(SAMPLES, 260, 200), (SAMPLES, 140, 31)])
def test_x_vector_lengths_at_and_below_the_kernel(lengths):
    # Lengths at which transformers' arithmetic gives one frame, none, or a negative number of them.
    plain = plain_model("WavLMForXVector", small_config(tdnn_kernel=[5, 3, 1], tdnn_dilation=[1, 1, 1]))
    check_forward(plain, waveforms(3), attention_mask=ragged_mask(*lengths))


def test_classifier_sizes_and_vocabulary():
    check(name="WavLMForSequenceClassification", classifier_proj_size=7, num_labels=3)
    check(name="WavLMForCTC", vocab_size=40)
    check(name="WavLMForXVector", xvector_output_dim=30, num_labels=11)
    check(name="WavLMForAudioFrameClassification", num_labels=2)


def test_arguments_of_pretraining_are_kept():
    values = {"num_codevectors_per_group": 8, "num_codevector_groups": 4, "contrastive_logits_temperature": 0.3,
              "num_negatives": 5, "codevector_dim": 16, "proj_codevector_dim": 12, "diversity_loss_weight": 0.2,
              "num_ctc_classes": 9}
    config = subject.WavLMConfig(**values)
    assert {k: getattr(config, k) for k in values} == values
    assert subject.WavLMModel(small_config(**values)).config.to_dict().items() >= values.items()


def test_intermediate_sizes():
    check(intermediate_size=7)
    check("large", intermediate_size=130, gradients=False)


@ours_only
def test_the_config_class_is_transformers_own():
    import transformers

    assert subject.WavLMConfig is transformers.WavLMConfig


def test_a_config_changed_after_construction_is_read_at_the_next_forward():
    plain = plain_model("WavLMForXVector", small_config(use_weighted_layer_sum=True))
    ours = fast_like(plain)
    for model in (plain, ours):
        model.config.use_weighted_layer_sum = False
    with torch.no_grad():
        assert_close_to_truth(ours(waveforms()), plain(waveforms()), truth_of(plain)(waveforms().double()))
