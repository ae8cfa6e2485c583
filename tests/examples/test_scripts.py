"""Each example gives what transformers would, and says what is wrong with what it gets."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from doc_blocks import ROOT
from transformers import (
    Wav2Vec2Processor,
    WavLMForAudioFrameClassification,
    WavLMForCTC,
    WavLMForXVector,
    WavLMModel,
)

from wavlm_fast import audio

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_that_it_is_short_and_said_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    command = f"python examples/{path.name} "
    assert command in text.split('"""')[1]
    assert f"[{path.name}]({path.name})" in (ROOT / "examples" / "README.md").read_text()
    used = re.findall(r"^(?:from|import) (wavlm_fast\S*)", text, re.MULTILINE)
    assert used, "an example of something else"
    assert not any("._" in module for module in used)


def plain(cls, folder, waveform):
    """What transformers' own class gives."""
    with torch.inference_mode():
        return cls.from_pretrained(folder).eval()(waveform[None])


def test_speaker_verification(example, hub, corpus, capsys):
    pairs = [("1", "anna/1", "anna/2"), ("1", "ben/3", "ben/4"), ("0", "anna/1", "ben/3"), ("0", "5", "ben/4")]
    trials = corpus.parent / "trials.txt"
    trials.write_text("".join(f"{label} {a}.wav {b}.wav\n" for label, a, b in pairs))
    model = hub("microsoft/wavlm-base-plus-sv")
    plot, scores = corpus.parent / "errors.png", corpus.parent / "scores.txt"
    words = [trials, "--root", corpus, "--model", model, "--plot", plot, "--scores", scores]
    example("speaker_verification").main([str(word) for word in words])
    assert re.search(r"4 pairs of 5 recordings: equal error rate [\d.]+ % at", capsys.readouterr().out)
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = [line.split() for line in scores.read_text().splitlines()]
    for (label, *names), (score, *rest) in zip(pairs, written):
        assert rest == [label, *(f"{name}.wav" for name in names)]
        a, b = (plain(WavLMForXVector, model, audio.load(corpus / f"{n}.wav")[0]).embeddings[0] for n in names)
        assert float(score) == pytest.approx(float(F.cosine_similarity(a, b, 0)), abs=1e-4)


@pytest.mark.parametrize(
    ("same", "other", "rate"),
    [([0.9, 0.8, 0.7], [0.1, 0.2], 0), ([0.1], [0.9], 1), ([0.9, 0.3], [0.1, 0.6], 0.5), ([0.5], [0.5], 0.5)],
)
def test_equal_error_rate(example, same, other, rate):
    scores, labels = np.array(same + other), np.array([True] * len(same) + [False] * len(other))
    thresholds, accepted, refused = example("speaker_verification").errors(scores, labels)
    for threshold, wrong, missed in zip(thresholds, accepted, refused):
        assert wrong == np.mean(np.array(other) >= threshold)
        assert missed == np.mean(np.array(same) < threshold)
    best = np.abs(accepted - refused).argmin()
    assert (accepted[best] + refused[best]) / 2 == rate


@pytest.mark.parametrize("text", ["1 a.wav\n", "2 a.wav b.wav\n", "1 a.wav b.wav\n"])
def test_trials_that_are_none(example, tmp_path, text):
    tmp_path.joinpath("trials.txt").write_text(text)
    with pytest.raises(SystemExit, match=r"trials\.txt: .* are wanted, got"):
        example("speaker_verification").read_trials(str(tmp_path / "trials.txt"))


def test_diarization(example, hub, corpus, capsys):
    model, recording = hub("microsoft/wavlm-base-plus-sd"), corpus / "ben" / "two words.wav"
    corpus.joinpath("ben", "3.wav").rename(recording)
    corpus.joinpath("broken.wav").write_text("no audio")
    module, options = example("diarization"), ["--model", model, "--min-gap", "0", "--min-duration", "0"]
    assert module.main([str(recording), str(corpus / "broken.wav"), *options]) == 3
    said = capsys.readouterr()
    assert "broken.wav cannot be read as audio" in said.err
    waveform = audio.load(recording)[0]
    logits = plain(WavLMForAudioFrameClassification, model, waveform).logits[0]
    found = np.zeros(logits.shape, bool)
    begins = []
    for line in said.out.splitlines():
        kind, name, channel, begin, duration, *rest = line.split(" ")
        assert (kind, name, channel, len(rest)) == ("SPEAKER", "two_words", "1", 5)
        assert re.fullmatch(r"<NA> <NA> speaker[01] <NA> <NA>", " ".join(rest))
        begins.append(float(begin))
        first = round(float(begin) / 0.02)
        found[first : first + round(float(duration) / 0.02), int(rest[2][-1])] = True
    assert begins == sorted(begins)
    assert 0 < found.sum() < found.size
    sure = logits.abs() > 1e-3
    assert (torch.as_tensor(found) == (logits.sigmoid() >= 0.5))[sure].all()


def test_segments(example):
    active = np.array([c == "x" for c in "xx.xxx...x.....xxxx"])
    segments = example("diarization").segments
    assert list(segments(active, 1, 0, 0)) == [(0, 2), (3, 6), (9, 10), (15, 19)]
    assert list(segments(active, 1, 2, 0)) == [(0, 2), (3, 6), (15, 19)]
    assert list(segments(active, 0.5, 1, 1.6)) == [(0, 5), (7.5, 9.5)]  # closed first
    assert list(segments(np.zeros(3, bool), 1, 0, 0)) == []


def test_voice_conversion_features(example, hub, corpus, capsys):
    model, out = hub("microsoft/wavlm-large"), corpus.parent / "feats"
    corpus.joinpath("broken.flac").write_text("no audio")
    words = [str(corpus), str(out), "--model", model, "--files", "2"]
    main = example("voice_conversion_features").main
    assert main(words) == 3
    said = capsys.readouterr()
    assert "broken.flac cannot be read as audio" in said.err
    assert said.out == f"5 made, 0 there already, 1 broken, in {out}\n"
    for path in corpus.rglob("*.wav"):
        waveform = audio.load(path)[0]
        features = torch.load(out / path.relative_to(corpus).with_suffix(".pt"))
        padded = F.pad(waveform, (0, 320 - len(waveform) % 320))
        with torch.inference_mode():
            states = WavLMModel.from_pretrained(model).eval()(padded[None], output_hidden_states=True).hidden_states
        torch.testing.assert_close(features, states[6][0], rtol=1e-3, atol=2e-4)
    assert len(list(out.rglob("*"))) == 5 + 2  # and no part of a file
    out.joinpath("5.pt").unlink()
    assert main([*words, "--half"]) == 3
    assert "1 made, 4 there already, 1 broken" in capsys.readouterr().out
    assert torch.load(out / "5.pt").dtype == torch.float16


@torch.no_grad()
def loss_of(model, **batch):
    return model.eval()(**batch).loss


def test_ctc_finetune(example, hub, corpus, monkeypatch):
    pytest.importorskip("accelerate", reason="Trainer needs it")
    pytest.importorskip("peft", reason="LoRA is its")
    texts = {"anna/1.wav": "the cat", "anna/2.wav": "sat", "ben/3.wav": "on a mat"}
    manifest, out, model = corpus / "train.jsonl", corpus.parent / "out", hub("microsoft/wavlm-base-plus")
    manifest.write_text("".join(json.dumps({"audio_filepath": n, "text": t}) + "\n" for n, t in texts.items()))
    module, found = example("ctc_finetune"), {}

    def trainer_of(model, steps, collator, rows):
        found["batch"] = collator(rows)
        found["before"] = loss_of(model, **found["batch"])
        found["trainer"] = transformers.Trainer(model, steps, collator, rows)
        return found["trainer"]

    monkeypatch.setattr(module, "Trainer", trainer_of)
    torch.manual_seed(0)  # the head is drawn
    module.main([str(manifest), str(out), "--model", model, "--epochs", "8", "--batch", "3", "--rate", "0.01"])
    processor = Wav2Vec2Processor.from_pretrained(out)
    assert processor.tokenizer.get_vocab().keys() == {"<pad>", "<unk>", "|", *"acehmnost"}

    batch = found["batch"]
    lengths = batch["attention_mask"].sum(1)
    assert lengths.tolist() == [16000, 12800, 19200]
    tuned = WavLMForCTC.from_pretrained(out).eval()
    losses = []
    for waveform, length, label, text in zip(batch["input_values"], lengths, batch["labels"], texts.values()):
        assert processor.tokenizer.decode(label[: len(text)], group_tokens=False) == text
        assert (label[len(text) :] == -100).all()
        losses.append(loss_of(tuned, input_values=waveform[None, :length], labels=label[None]))
    # In a padded batch, of which Trainer makes steps, the model has the losses of the utterances alone.
    together = loss_of(found["trainer"].model, **batch)
    torch.testing.assert_close(together, sum(losses) / 3, rtol=1e-4, atol=1e-4)
    assert together < found["before"] - 0.1
    before = WavLMForCTC.from_pretrained(model).state_dict()
    for name, value in tuned.state_dict().items():
        changed = name.startswith("lm_head") or re.search(r"[qv]_proj\.weight", name)
        assert bool(changed) == (name not in before or not torch.equal(value, before[name])), name
