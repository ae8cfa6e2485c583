"""Bad input: one sentence with what was wanted and what came, before any kernel runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from wavlm_cases import (
    HEADS,
    MODELS,
    SAMPLES,
    TRANSFORMERS_5,
    assert_close_to_truth,
    fast_like,
    fast_model,
    ours_only,
    plain_model,
    ragged_mask,
    small_config,
    subject,
    truth_of,
    waveforms,
)

every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def no_kernel_runs(monkeypatch):
    """Any op of ours that computes is a failure."""
    from wavlm_fast import backends

    def refuse(op, args):
        raise AssertionError(f"{op} ran before the input was checked")

    monkeypatch.setattr(backends, "choose", refuse)


def one_sentence(error):
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 400, text
    return text


def refuses(model, kind, *expected, x=None, **kwargs):
    with pytest.raises(kind) as error:
        model(waveforms() if x is None else x, **kwargs)
    text = one_sentence(error)
    for part in expected:
        assert str(part) in text, text


pytestmark = ours_only


@every_model
@pytest.mark.parametrize("form", ["base", "large"])
@pytest.mark.parametrize("samples", [1, 10, 29])
def test_shorter_than_the_receptive_field(name, form, samples, no_kernel_runs):
    # kernels 10, 3, 2 with strides 5, 2, 2: 10 + 5 * (3 - 1) + 10 * (2 - 1) samples make one frame.
    refuses(fast_model(name, small_config(form)), ValueError, 30, samples, "samples", x=waveforms(2, samples))


def test_the_shortest_legal_input():
    model = fast_model("WavLMModel")
    assert model(waveforms(1, 30)).last_hidden_state.shape[1] == 1
    with pytest.raises(ValueError, match="400"):
        subject.WavLMModel(
            small_config(conv_dim=[8] * 7, conv_kernel=[10, 3, 3, 3, 3, 2, 2], conv_stride=[5, 2, 2, 2, 2, 2, 2])
        )(waveforms(1, 399))


@every_model
@pytest.mark.parametrize("shape", [(SAMPLES,), (1, 1, SAMPLES), (), (2, 3, 1, SAMPLES)])
def test_wrong_rank(name, shape, no_kernel_runs):
    refuses(fast_model(name), ValueError, list(shape), x=torch.zeros(shape))


@every_model
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool])
def test_integer_audio(name, dtype, no_kernel_runs):
    refuses(fast_model(name), TypeError, dtype, "float", x=torch.ones(2, SAMPLES).to(dtype))


@every_model
@pytest.mark.parametrize(("weights", "audio"), [
    (torch.float32, torch.float64), (torch.float32, torch.float16), (torch.bfloat16, torch.float32),
    (torch.float64, torch.float32),
])
def test_dtype_of_another_kind_than_the_weights(name, weights, audio, no_kernel_runs):
    refuses(fast_model(name).to(weights), TypeError, weights, audio, x=waveforms(dtype=audio))


def test_complex_audio(no_kernel_runs):
    refuses(fast_model("WavLMModel"), TypeError, torch.complex64, x=torch.zeros(2, SAMPLES, dtype=torch.complex64))


@every_model
def test_an_empty_batch(name, no_kernel_runs):
    refuses(fast_model(name), ValueError, [0, SAMPLES], x=torch.zeros(0, SAMPLES))


def test_an_utterance_of_no_samples(no_kernel_runs):
    refuses(fast_model("WavLMModel"), ValueError, 30, x=torch.zeros(2, 0))


@pytest.mark.parametrize("x", [None, [[0.0] * SAMPLES], "audio.wav"])
def test_no_tensor(x, no_kernel_runs):
    with pytest.raises(TypeError) as error:
        fast_model("WavLMModel")(x)
    assert type(x).__name__ in one_sentence(error)


def test_a_numpy_waveform(no_kernel_runs):
    refuses(fast_model("WavLMForCTC"), TypeError, "ndarray", x=waveforms().numpy())


@every_model
@pytest.mark.parametrize("shape", [(2, SAMPLES - 1), (1, SAMPLES), (3, SAMPLES), (2, 29), (SAMPLES,), (2, 1, SAMPLES)])
def test_a_mask_of_the_wrong_shape(name, shape, no_kernel_runs):
    mask = torch.ones(shape, dtype=torch.long)
    refuses(fast_model(name), ValueError, [2, SAMPLES], list(shape), attention_mask=mask)


@every_model
@pytest.mark.parametrize("lengths", [(SAMPLES, 0), (0, 0)])
def test_a_mask_that_leaves_an_utterance_nothing(name, lengths, no_kernel_runs):
    refuses(fast_model(name), ValueError, "mask", attention_mask=ragged_mask(*lengths))


def test_a_mask_that_is_no_tensor(no_kernel_runs):
    refuses(fast_model("WavLMModel"), TypeError, "list", attention_mask=[[1] * SAMPLES] * 2)


@pytest.mark.parametrize("length", [1, 29])
def test_a_mask_shorter_than_the_receptive_field_is_what_it_is_in_transformers(length):
    # transformers counts zero or fewer frames there and wraps around; with one frame too few it still answers.
    plain = plain_model("WavLMModel")
    mask = ragged_mask(SAMPLES, length)
    try:
        with torch.no_grad():
            expected, truth = plain(waveforms(), attention_mask=mask), truth_of(plain)(waveforms().double(), mask)
    except (IndexError, RuntimeError):
        with pytest.raises(ValueError, match="mask"):
            fast_like(plain)(waveforms(), attention_mask=mask)
        return
    with torch.no_grad():
        assert_close_to_truth(fast_like(plain)(waveforms(), attention_mask=mask), expected, truth)


@pytest.mark.parametrize("wrong", [12, 99, *([-1, -7] if TRANSFORMERS_5 else [])])
def test_ctc_labels_out_of_the_vocabulary(wrong, no_kernel_runs):
    # 12 entries; only -100 is padding in version 5, every negative label in version 4.
    labels = torch.tensor([[1, 2, -100], [3, wrong, 4]])
    refuses(fast_model("WavLMForCTC"), ValueError, wrong, 11, labels=labels)


@pytest.mark.parametrize("name", ["WavLMForSequenceClassification", "WavLMForXVector"])
@pytest.mark.parametrize("wrong", [5, 77, -1])
def test_classification_labels_out_of_range(name, wrong, no_kernel_runs):
    refuses(fast_model(name), ValueError, wrong, labels=torch.tensor([1, wrong]))


@pytest.mark.parametrize("name", [h for h in HEADS if "Frame" not in h])
def test_labels_that_are_no_integers(name, no_kernel_runs):
    refuses(fast_model(name), TypeError, "float32", labels=torch.zeros(2))


@pytest.mark.parametrize("name", ["WavLMForSequenceClassification", "WavLMForXVector"])
def test_more_labels_than_utterances(name, no_kernel_runs):
    refuses(fast_model(name), ValueError, 3, 2, labels=torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["base", "large"])
def test_nan_and_infinity_pass_through_as_in_transformers(value, form):
    plain = plain_model("WavLMModel", small_config(form))
    x = waveforms()
    x[1, 300] = value
    with torch.no_grad():
        got, expected = fast_like(plain)(x), plain(x)
    assert torch.equal(got.last_hidden_state.isnan(), expected.last_hidden_state.isnan())
    assert expected.last_hidden_state[1].isnan().any() and not got.last_hidden_state[0].isnan().any()


@pytest.mark.parametrize("changes", [
    {"conv_dim": [16, 16]}, {"conv_kernel": [10, 3]}, {"conv_stride": [5, 2, 2, 2]},
])
@every_model
def test_convolution_tuples_that_disagree(name, changes):
    # The config class itself refuses; version 5 wraps the ValueError in an error of its own.
    with pytest.raises(Exception, match=r"ValueError|Configuration") as error:
        getattr(subject, name)(small_config(**changes))
    assert all(word in str(error.value) for word in ("conv_dim", "conv_stride", "conv_kernel"))


@every_model
def test_convolution_tuples_made_to_disagree_later(name):
    config = small_config()
    object.__setattr__(config, "conv_kernel", [10, 3])
    with pytest.raises(ValueError, match="conv_kernel"):
        getattr(subject, name)(config)


@pytest.mark.parametrize("changes", [{"tdnn_dim": [16]}, {"tdnn_kernel": [5, 3]}, {"tdnn_dilation": [1, 2, 1, 1]}])
def test_tdnn_tuples_that_disagree(changes):
    with pytest.raises(ValueError, match="tdnn_dim.*tdnn_kernel.*tdnn_dilation") as error:
        subject.WavLMForXVector(small_config(**changes))
    one_sentence(error)
    subject.WavLMModel(small_config(**changes))  # of no concern to the others


@pytest.mark.parametrize(
    "changes",
    [{"tdnn_dim": [16, 0, 24]}, {"tdnn_dim": [0, 16, 24]}, {"tdnn_dim": [16, 16, 0]}, {"tdnn_dilation": [1, 0, 1]}],
)
def test_tdnn_sizes_of_zero(changes):
    """As transformers: its convolution refuses them when it runs."""
    plain = transformers.WavLMForXVector(small_config(**changes)).eval()
    for model in (plain, fast_like(plain)):
        for learns in (False, True):
            with torch.set_grad_enabled(learns), pytest.raises((RuntimeError, ValueError), match="at least 1|dilation"):
                model(waveforms())


def test_layers_without_width():
    """As transformers: a feed-forward of no width adds its bias."""
    plain = transformers.WavLMModel(small_config(intermediate_size=0)).eval()
    with torch.no_grad():
        found, wanted = fast_like(plain)(waveforms()), plain(waveforms())
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state)


def test_a_head_count_that_does_not_divide():
    with pytest.raises(ValueError, match="32.*5|5.*32"):
        subject.WavLMModel(small_config(num_attention_heads=5))


@pytest.mark.parametrize("config", [None, {}, "microsoft/wavlm-base", 3])
def test_something_else_than_a_config(config):
    with pytest.raises((TypeError, ValueError)) as error:
        subject.WavLMModel(config)
    assert type(config).__name__ in one_sentence(error) or "config" in one_sentence(error)


def bert(folder):
    transformers.BertModel(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                                vocab_size=9)
    ).save_pretrained(folder)
    return "bert"


def wav2vec2(folder):
    transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    conv_dim=[8], conv_stride=[5], conv_kernel=[10], num_conv_pos_embeddings=4,
                                    num_conv_pos_embedding_groups=2)
    ).save_pretrained(folder)
    return "wav2vec2"


@every_model
@pytest.mark.parametrize("save", [bert, wav2vec2])
def test_a_checkpoint_of_another_architecture(name, save, tmp_path):
    kind = save(tmp_path)
    with pytest.raises(ValueError, match="wavlm") as error:
        getattr(subject, name).from_pretrained(tmp_path)
    assert kind in one_sentence(error)


@pytest.mark.parametrize("path", ["missing/folder/here", "./nowhere", "/nowhere/at/all"])
@every_model
def test_a_missing_path(name, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="nowhere|missing") as error:
        getattr(subject, name).from_pretrained(path)
    one_sentence(error)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(OSError, match="config.json|model.safetensors"):
        subject.WavLMModel.from_pretrained(tmp_path)


def test_a_folder_with_a_config_alone(tmp_path):
    small_config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="model.safetensors"):
        subject.WavLMModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"model_type": 3})])
def test_a_broken_config(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((OSError, ValueError)) as error:
        subject.WavLMModel.from_pretrained(tmp_path)
    assert str(error.value)


@pytest.mark.parametrize("name", ["cuda", "", "CPU", "Reference", "tpu"])
def test_an_unknown_backend(name):
    with pytest.raises(ValueError, match="reference.*cpu.*triton") as error:  # noqa: SIM117
        with subject.use_backend(name):
            pass
    assert repr(name) in one_sentence(error)


@pytest.mark.parametrize("name", [None, 3])
def test_a_backend_that_is_no_name(name):
    with pytest.raises((TypeError, ValueError), match="reference.*cpu.*triton"):  # noqa: SIM117
        with subject.use_backend(name):
            pass


def test_an_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_BACKEND", "tpu")
    refuses(fast_model("WavLMModel"), ValueError, "WAVLM_FAST_BACKEND", "'tpu'", "triton")


def test_an_unknown_backend_in_the_environment_does_not_break_the_import():
    run = subprocess.run(
        [sys.executable, "-c", "import wavlm_fast; print('imported')"], capture_output=True, text=True, check=False,
        env={**os.environ, "WAVLM_FAST_BACKEND": "tpu"},
    )
    assert run.returncode == 0 and "imported" in run.stdout, run.stderr


@pytest.mark.parametrize("thing", [None, 3, "wavlm"])
def test_restore_and_report_say_what_they_were_given(thing):
    for function in (subject.restore, subject.report):
        with pytest.raises(TypeError, match=type(thing).__name__):
            function(thing)
