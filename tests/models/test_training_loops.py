"""A Trainer run, pipelines, and gradient checkpointing: the loops that users put around a model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from wavlm_cases import (
    PLAIN,
    SAMPLES,
    assert_gradients_close,
    check_forward,
    fast_like,
    fast_model,
    gradients,
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


class Utterances(torch.utils.data.Dataset):
    def __init__(self, name, config):
        self.labels = with_labels(name, config, batch=8)["labels"]

    def __len__(self):
        return 8

    def __getitem__(self, i):
        length = 480 + 10 * i
        return {"input_values": waveforms(1, length, seed=i)[0].numpy(), "labels": self.labels[i]}


def collate(items):
    length = max(len(i["input_values"]) for i in items)
    return {
        "input_values": torch.stack([torch.from_numpy(np.pad(i["input_values"], (0, length - len(i["input_values"]))))
                                     for i in items]),
        "attention_mask": ragged_mask(*(len(i["input_values"]) for i in items), samples=length),
        "labels": torch.stack([i["labels"] for i in items]),
    }


def trained(model, folder, name, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        learning_rate=1e-2, save_strategy="no", logging_steps=1, disable_tqdm=True, seed=7,
        lr_scheduler_type="constant", **options,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Utterances(name, model.config), data_collator=collate
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses


# Under the reentrant form, which 4.57 takes by default, transformers' own model never ends: see below.
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize("name", ["WavLMForCTC", "WavLMForSequenceClassification"])
@pytest.mark.parametrize("options", [{}, CHECKPOINTING, {"bf16": True}], ids=["fp32", "ckpt", "bf16"])
def test_two_trainer_steps(name, options, tmp_path):
    plain = plain_model(name)
    ours = fast_like(plain)
    start = {n: p.detach().clone() for n, p in ours.named_parameters()}
    _, expected = trained(plain, tmp_path / "plain", name, **options)
    trainer, losses = trained(ours, tmp_path / "ours", name, **options)
    assert len(losses) == 2
    # The second loss is the first that depends on our gradients.
    np.testing.assert_allclose(losses, expected, rtol=5e-2 if "bf16" in options else 2e-3)
    moved_in_transformers = {n for n, p in plain.named_parameters() if not torch.equal(p, start[n])}
    moved = {n for n, p in ours.named_parameters() if not torch.equal(p, start[n])}
    # The keys' bias shifts every score of a row alike: its gradient is rounding noise.
    assert {n for n in moved ^ moved_in_transformers if not n.endswith("k_proj.bias")} == set()
    assert len(moved) > 0.9 * len(start)
    trainer.save_model(tmp_path / "saved")
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "saved").eval()
    check_forward(loaded, waveforms(), getattr(subject, name).from_pretrained(tmp_path / "saved"))
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), ours.parameters()))


def test_trainer_resumes_from_its_checkpoint(tmp_path):
    name = "WavLMForSequenceClassification"
    ours = fast_model(name)
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(tmp_path), save_strategy="steps", save_steps=1, **options)
    trainer = transformers.Trainer(
        model=ours, args=arguments, train_dataset=Utterances(name, ours.config), data_collator=collate
    )
    trainer.train()
    again = transformers.Trainer(
        model=fast_model(name, seed=9), args=arguments, train_dataset=Utterances(name, ours.config),
        data_collator=collate,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (n, p), q in zip(ours.named_parameters(), again.model.parameters()):
        torch.testing.assert_close(p, q, msg=n)


def extractor():
    return transformers.Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=16000, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )


def audio(seconds=0.1, seed=0):
    return waveforms(1, int(16000 * seconds), seed)[0].numpy()


@both_forms
def test_audio_classification_pipeline(form):
    config = small_config(form, id2label={i: f"word{i}" for i in range(5)}, label2id={f"word{i}": i for i in range(5)})
    plain = plain_model("WavLMForSequenceClassification", config)
    results = []
    for model in (plain, fast_like(plain)):
        classify = transformers.pipeline(
            "audio-classification", model=model, feature_extractor=extractor(), device="cpu"
        )
        results.append(classify([audio(0.1), audio(0.07, seed=1)], top_k=5, batch_size=2))
    for expected, got in zip(*results):
        assert [g["label"] for g in got] == [e["label"] for e in expected]
        np.testing.assert_allclose([g["score"] for g in got], [e["score"] for e in expected], rtol=1e-3)


def processor(folder):
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefg"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    return transformers.Wav2Vec2Processor(feature_extractor=extractor(), tokenizer=tokenizer)


@both_forms
def test_speech_recognition_pipeline(form, tmp_path):
    plain = plain_model("WavLMForCTC", small_config(form))
    with torch.no_grad():
        plain.lm_head.bias[:5] = -1e4  # letters only: what is compared is text
    parts = processor(tmp_path)
    results = []
    for model in (plain, fast_like(plain)):
        recognise = transformers.pipeline(
            "automatic-speech-recognition", model=model, tokenizer=parts.tokenizer,
            feature_extractor=parts.feature_extractor, device="cpu",
        )
        results.append([
            recognise(audio(0.2))["text"],
            recognise([audio(0.1), audio(0.15, seed=2)], batch_size=2),
            recognise(audio(0.3), chunk_length_s=0.1, stride_length_s=0.02)["text"],
            recognise(audio(0.2), return_timestamps="char"),
        ])
    assert results[0] == results[1]
    assert len(results[0][0]) > 5


@ours_only
def test_a_pipeline_built_from_a_folder_after_install(tmp_path):
    model = plain_model("WavLMForCTC")
    model.save_pretrained(tmp_path)
    processor(tmp_path).save_pretrained(tmp_path)
    expected = transformers.pipeline("automatic-speech-recognition", model=str(tmp_path), device="cpu")(audio(0.2))
    subject.install()
    try:
        recognise = transformers.pipeline("automatic-speech-recognition", model=str(tmp_path), device="cpu")
        assert isinstance(recognise.model, subject.WavLMForCTC)
        assert recognise(audio(0.2)) == expected
    finally:
        subject.uninstall()


@pytest.mark.parametrize("name", ["WavLMForCTC", "WavLMForSequenceClassification"])
@both_forms
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name, form, use_reentrant, masked):
    plain = plain_model(name, small_config(form))
    ours, exact = fast_like(plain), truth_of(plain)
    mask = {"attention_mask": ragged_mask(SAMPLES, 400)} if masked else {}
    results = []
    # transformers' own model never ends under the reentrant form: the position bias reaches each layer as a keyword,
    # attached to the graph of the first layer, which every layer's backward then runs again.
    checkpointed = (ours,) if use_reentrant else (ours, plain)
    for model in (plain, exact, ours, fast_like(plain)):
        if model in checkpointed and not (PLAIN and use_reentrant):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            assert model.is_gradient_checkpointing
        x = waveforms().to(next(model.parameters()).dtype)
        labels = with_labels(name, model.config)
        for layer in model.wavlm.encoder.layers:
            bound_calls(layer)
        results.append(gradients(model.train(), lambda m, x=x, labels=labels: m(x, **mask, **labels).loss))
    expected, truth, got, unchecked = results
    assert_gradients_close(got, expected, truth, plain)
    assert_gradients_close(unchecked, expected, truth, plain)


def bound_calls(layer, most=2):
    """A layer runs once forward and once again for the backward: a failure instead of a test without end."""
    calls = []

    def count(*_):
        calls.append(1)
        assert len(calls) <= most, f"the layer runs more than {most} times"

    layer.attention.register_forward_pre_hook(count)


def test_gradient_checkpointing_recomputes_layers():
    ours = fast_model("WavLMModel").train()
    calls = []
    handle = ours.encoder.layers[1].attention.register_forward_hook(lambda *a: calls.append(1))
    ours(waveforms()).last_hidden_state.sum().backward()
    assert len(calls) == 1
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours(waveforms()).last_hidden_state.sum().backward()
    assert len(calls) == 3
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing
    ours(waveforms()).last_hidden_state.sum().backward()
    assert len(calls) == 4
    handle.remove()


def test_gradient_checkpointing_draws_the_same_dropout_twice():
    # The recomputed forward must see the masks of the first, or the gradients belong to no loss at all.
    config = small_config(attention_dropout=0.3, hidden_dropout=0.2, activation_dropout=0.2)
    ours = fast_model("WavLMForSequenceClassification", config).train()
    labels = with_labels("WavLMForSequenceClassification", config)

    def loss(model):
        torch.manual_seed(11)
        return model(waveforms(), **labels).loss

    expected = {k: v.clone() for k, v in gradients(ours, loss).items()}
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(ours, loss)
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4 * expected[key].abs().max().item())
