"""`Extractor` gives of every utterance what transformers gives of it alone, as its reader expects it."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import WavLMModel

from wavlm_fast import Extractor, accelerate
from wavlm_fast.errors import UserError
from wavlm_fast.extraction import wanted
from wavlm_fast.extraction.extractor import batches


def close(found, wanted):
    np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(wanted, np.float64), atol=2e-4, rtol=1e-3)


def normalised(waveform):
    return (waveform - waveform.mean()) / torch.sqrt(waveform.var(unbiased=False) + 1e-7)


def states_of(model, waveform):
    """All states, `[L + 1, T, C]`, the last as `last_hidden_state`."""
    with torch.inference_mode():
        out = model(waveform[None], output_hidden_states=True)
    return torch.cat([*out.hidden_states[:-1], out.last_hidden_state])


def before_the_norm(model, waveform):
    """The last state before an encoder's final norm."""
    found = []
    hook = model.encoder.layers[-1].register_forward_hook(lambda module, args, out: found.append(out[0]))
    states_of(model, waveform)
    hook.remove()
    return found[0][0]


@pytest.mark.parametrize("layers", ["all", 0, 2, 4, -1, (3, 1), (0, 4)], ids=str)
@pytest.mark.parametrize("form", ["base", "large"])
def test_hidden_states(checkpoints, waveforms, plain, form, layers):
    folder = checkpoints[form, "WavLMModel"]
    extractor = pickle.loads(pickle.dumps(Extractor(folder, layers=layers, batch_seconds=1.0)))
    found = extractor.outputs(waveforms)
    index = slice(None) if layers == "all" else list(layers) if isinstance(layers, tuple) else layers
    for output, waveform in zip(found, waveforms):
        prepared = normalised(waveform) if form == "large" else waveform
        close(output, states_of(plain(folder), prepared)[index])
    deepest = 4 if layers == "all" else max(n % 5 for n in (layers if isinstance(layers, tuple) else (layers,)))
    assert len(extractor.model.encoder.layers) == max(1, deepest)  # no layer more is there


@pytest.mark.parametrize("average", [("layers",), ("frames",), ("layers", "frames")], ids=str)
def test_averages(checkpoints, waveforms, plain, average):
    folder = checkpoints["base", "WavLMModel"]
    found = Extractor(folder, layers=(1, 3), average=average).outputs(waveforms)
    for output, waveform in zip(found, waveforms):
        dims = [{"layers": 0, "frames": 1}[name] for name in average]
        close(output, states_of(plain(folder), waveform)[[1, 3]].mean(dims))


@pytest.mark.parametrize(
    ("what", "name", "output"),
    [
        ("xvector", "WavLMForXVector", "embeddings"),
        ("logits", "WavLMForSequenceClassification", "logits"),
        ("logits", "WavLMForCTC", "logits"),
        ("frames", "WavLMForAudioFrameClassification", "logits"),
    ],
)
def test_heads(checkpoints, plain, what, name, output):
    folder = checkpoints["base", name]
    long_enough = [torch.randn(n) * 0.1 for n in (8000, 12000)]
    extractor = Extractor(folder, what)
    found = extractor.outputs(long_enough)
    for value, waveform in zip(found, long_enough):
        with torch.inference_mode():
            wanted_value = plain(folder, name)(waveform[None])[output][0]
        close(value, wanted_value)
        assert value.dim() == extractor.dimensions


def test_the_shortest_utterance(checkpoints):
    for what, name in (("xvector", "WavLMForXVector"), ("logits", "WavLMForSequenceClassification")):
        extractor = Extractor(checkpoints["base", name], what)
        needed = extractor.samples_needed
        (enough,) = extractor({"audio": [torch.randn(needed) * 0.1]})[what]
        assert np.isfinite(enough).all()
        assert isinstance(extractor.outputs([torch.randn(needed - 1) * 0.1])[0], UserError)
        with pytest.raises(UserError, match=f"waveforms of {needed} samples or more are wanted"):
            extractor({"audio": [torch.randn(needed - 1) * 0.1]})


def test_text(checkpoints, waveforms, plain):
    folder = checkpoints["base", "WavLMForCTC"]
    found = Extractor(folder, "text").outputs(waveforms)
    letters = dict(enumerate(["", "", "", "", " ", "A", "B", "C"]))
    for text, waveform in zip(found, waveforms):
        with torch.inference_mode():
            ids = plain(folder, "WavLMForCTC")(waveform[None]).logits[0].argmax(-1).unique_consecutive()
        spoken = "".join(letters[i] for i in ids.tolist())
        assert text.replace("<s>", "").replace("</s>", "").replace("<unk>", "").split() == spoken.split()


@pytest.mark.parametrize("form", ["base", "large"])
def test_knn_vc(checkpoints, waveforms, plain, form):
    """Its prematching adds `320 - samples % 320` zeros, normalises nothing, and reads states before any final norm."""
    folder = checkpoints[form, "WavLMModel"]
    for layer in (2, 4):
        found = Extractor(folder, layers=layer, convention="knn-vc").outputs(waveforms)
        for output, waveform in zip(found, waveforms):
            padded = F.pad(waveform, (0, 320 - len(waveform) % 320))
            whole = states_of(plain(folder), padded)[layer]
            close(output, before_the_norm(plain(folder), padded) if layer == 4 else whole)
            assert len(output) == len(whole)


@pytest.mark.parametrize("form", ["base", "large"])
def test_s3prl(checkpoints, waveforms, plain, form):
    """Its expert normalises by `layer_norm` over the samples, hooks every layer's input and the encoder's output."""
    folder = checkpoints[form, "WavLMModel"]
    found = Extractor(folder, convention="s3prl").outputs(waveforms)
    model, inputs = plain(folder), []
    for output, waveform in zip(found, waveforms):
        prepared = F.layer_norm(waveform, waveform.shape) if form == "large" else waveform
        inputs.clear()
        layers = model.encoder.layers
        hooks = [layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for layer in layers]
        with torch.inference_mode():
            last = model(prepared[None]).last_hidden_state
        for hook in hooks:
            hook.remove()
        close(output, torch.cat([*inputs, last]))


@pytest.mark.parametrize("form", ["base", "large"])
def test_fairseq(checkpoints, waveforms, plain, form, monkeypatch):
    """Its dumps cut an utterance at so many samples, and read `output_layer` before any final norm."""
    folder = checkpoints[form, "WavLMModel"]
    monkeypatch.setitem(wanted.CONVENTIONS, "fairseq", wanted.Convention(eps=1e-5, final_norm=False, chunk=5000))
    found = Extractor(folder, layers=4, convention="fairseq").outputs(waveforms)
    for output, waveform in zip(found, waveforms):
        prepared = F.layer_norm(waveform, waveform.shape) if form == "large" else waveform
        pieces = [piece for piece in prepared.split(5000) if len(piece) >= 400]
        close(output, torch.cat([before_the_norm(plain(folder), piece) for piece in pieces]))


def test_what_fairseq_cuts_is_averaged_whole_and_embedded_whole(checkpoints, waveforms, monkeypatch):
    monkeypatch.setitem(wanted.CONVENTIONS, "fairseq", wanted.Convention(eps=1e-5, final_norm=False, chunk=5000))
    folder = checkpoints["base", "WavLMModel"]
    frames = Extractor(folder, layers=2, convention="fairseq").outputs(waveforms)
    means = Extractor(folder, layers=2, convention="fairseq", average="frames").outputs(waveforms)
    for mean, states in zip(means, frames):
        close(mean, states.mean(0))
    head = checkpoints["base", "WavLMForXVector"]
    cut, whole = (Extractor(head, "xvector", convention=name).outputs([waveforms[1]]) for name in ("fairseq", "hf"))
    close(cut[0], whole[0])


def test_a_live_model_goes_along_and_stays_as_it_is(checkpoints, waveforms):
    model = WavLMModel.from_pretrained(checkpoints["base", "WavLMModel"]).eval()
    extractor = pickle.loads(pickle.dumps(Extractor(model, layers=2)))
    assert len(model.encoder.layers) == 4
    for output, waveform in zip(extractor.outputs(waveforms), waveforms):
        close(output, states_of(model, waveform)[2])


def test_live_models_with_heads(checkpoints, plain):
    folder = checkpoints["base", "WavLMForXVector"]
    long_enough = [torch.randn(8000) * 0.1]
    for live in (plain(folder, "WavLMForXVector"), accelerate(copy.deepcopy(plain(folder, "WavLMForXVector")))):
        close(Extractor(live, "xvector").outputs(long_enough)[0], Extractor(folder, "xvector").outputs(long_enough)[0])
        close(Extractor(live, layers=2).outputs(long_enough)[0], Extractor(folder, layers=2).outputs(long_enough)[0])
        with pytest.raises(UserError, match="frames needs a checkpoint of WavLMForAudioFrameClassification, but this"):
            Extractor(live, "frames")
        with pytest.raises(UserError, match="text needs a checkpoint by name"):
            Extractor(live, "text")


def test_columns_of_a_batch(checkpoints, waveforms, tmp_path):
    import soundfile

    extractor = Extractor(checkpoints["base", "WavLMModel"], layers=1)
    wanted_outputs = extractor.outputs(waveforms)
    paths = [tmp_path / f"{i}.wav" for i in range(len(waveforms))]
    for path, waveform in zip(paths, waveforms):
        soundfile.write(path, waveform.numpy(), 16000, subtype="FLOAT")
    objects = np.empty(len(waveforms), object)
    objects[:] = [w.numpy() for w in waveforms]
    for name, column in (
        ("audio", [w.numpy() for w in waveforms]),
        ("audio", objects),
        ("audio", [{"array": w.tolist(), "sampling_rate": 16000} for w in waveforms]),
        ("audio", [{"array": None, "path": str(path)} for path in paths]),
        ("path", [str(path) for path in paths]),
    ):
        batch = extractor({name: column, "id": list(range(len(waveforms)))})
        assert list(batch) == [name, "id", "hidden"]
        assert all(np.array_equal(found, w) for found, w in zip(batch["hidden"], wanted_outputs))
    alike = Extractor(checkpoints["base", "WavLMModel"], layers=1, column="x")({"audio": [waveforms[0]] * 3})
    assert alike["x"].shape == (3, *wanted_outputs[0].shape)


def test_bfloat16_and_what_does_not_fit_float16(checkpoints, waveforms, monkeypatch):
    model = WavLMModel.from_pretrained(checkpoints["base", "WavLMModel"]).eval()
    narrow = Extractor(model, layers=4, dtype=torch.bfloat16)
    assert narrow.outputs(waveforms[:1])[0].dtype == torch.bfloat16
    assert narrow({"audio": waveforms[:1]})["hidden"].dtype == np.float32
    with torch.no_grad():
        model.encoder.layers[-1].final_layer_norm.weight *= 1e6
    (failed,) = Extractor(model, layers=4, dtype_out=torch.float16).outputs(waveforms[:1])
    assert "its features do not fit into float16: the largest is" in str(failed)
    with pytest.raises(UserError, match="do not fit into float16"):
        Extractor(model, layers=4, dtype_out=torch.float16)({"audio": waveforms[:1]})


def test_one_that_the_model_cannot_run_takes_no_other_along(checkpoints, waveforms, monkeypatch):
    extractor = Extractor(checkpoints["base", "WavLMModel"], layers=1)
    whole = extractor.outputs(waveforms)
    forward = extractor._forward

    def out_of_memory(given):
        if any(len(w) == 16000 for w in given):
            raise RuntimeError("not enough memory\nand more")
        return forward(given)

    monkeypatch.setattr(extractor, "_forward", out_of_memory)
    found = extractor.outputs(waveforms)
    assert str(found[1]) == "the model cannot run it: not enough memory"
    for i in (0, 2, 3, 4):
        close(found[i], whole[i])


def test_batches_hold_so_much_and_alike_lengths():
    lengths = [5, 1, 9, 3, 3, 2, 20]
    found = list(batches(lengths, 10))
    assert sorted(i for batch in found for i in batch) == list(range(7))
    assert [[lengths[i] for i in batch] for batch in found] == [[20], [9], [5, 3], [3, 2, 1]]
    assert list(batches([], 10)) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": 5}, r"--layer must lie in 0\.\.4 for this model \(or -5\.\.-1, or 'all'\), got 5"),
        ({"what": "states"}, "what must be one of hidden, xvector, logits, frames, text, got 'states'"),
        ({"what": "xvector"}, "xvector needs a checkpoint of WavLMForXVector, but .* is a WavLMModel"),
        ({"what": "text", "layers": 1}, "layers and averages are of hidden states, text has none to choose from"),
        ({"layers": ()}, "layers must be 'all' or a tuple of whole numbers"),
        ({"layers": "last"}, "layers must be 'all' or a tuple of whole numbers, got 'last'"),
        ({"average": "time"}, "average must be one of layers, frames, got 'time'"),
        ({"convention": "espnet"}, "convention must be one of hf, s3prl, fairseq, knn-vc, got 'espnet'"),
        ({"batch_seconds": 0}, "batch_seconds must be more than 0, got 0"),
    ],
)
def test_refused_options(checkpoints, options, sentence):
    with pytest.raises(UserError, match=sentence):
        Extractor(checkpoints["base", "WavLMModel"], **options)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ({"speech": []}, r"a batch with a column of audio \(audio or path\) is wanted, got \['speech'\]"),
        ({"audio": [np.zeros(399)]}, r"waveforms of 400 samples or more are wanted, got one of shape \[399\]"),
        ({"audio": [np.zeros((2, 500))]}, r"got one of shape \[2, 500\]"),
        ({"audio": [np.full(500, np.nan)]}, "finite samples are wanted, got NaN or infinity"),
        ({"audio": [{"array": np.zeros(500), "sampling_rate": 8000}]}, "waveforms at 16000 Hz are wanted"),
        ({"audio": [object()]}, "waveforms, dicts with 'array' or paths are wanted, got a object"),
    ],
)
def test_refused_batches(checkpoints, batch, sentence):
    with pytest.raises(UserError, match=sentence):
        Extractor(checkpoints["base", "WavLMModel"], layers=1)(batch)
