"""Microsoft's WavLM with exact padding, in lists, in graphs and files, and what `report` says of it."""

from __future__ import annotations

import copy
import io
import re
from collections import Counter

import pytest
import torch
from leaving_cases import our_ops
from microsoft_cases import LAYER, PADDED, Frames, Louder, Normalising, drawn, fast, of_class, original
from original_cases import original_config
from padding_cases import utterances
from test_steps import Watched
from torch import nn
from wavlm_cases import SAMPLES, assert_tensor_close, ours_only, small_config, tensors, truth_of, waveforms

import wavlm_fast
from wavlm_fast import accelerate, forward_ragged, report
from wavlm_fast.families.microsoft import FrontEnd
from wavlm_fast.original import TransformerSentenceEncoderLayer, WavLM

pytestmark = ours_only

both_forms = pytest.mark.parametrize("form", ["base", "large"])
CALLS = {
    "last": {},
    "every layer": {"output_layer": 3, "ret_layer_results": True},
    "the front end": {"ret_conv": True},
}


def padded(rows, width=640, padding=float("nan")):
    """A batch and its padding mask; what is padded would be seen anywhere."""
    x = rows[0].new_full((len(rows), width), padding)
    mask = torch.ones(len(rows), width, dtype=torch.bool)
    for row, own in enumerate(rows):
        x[row, : len(own)], mask[row, : len(own)] = own, False
    return x, mask


def by_row(outputs, row, frames):
    """What outputs hold of a row, in the shape of a batch of one; everything past its frames has to be zero."""
    found = {}
    for name, value in tensors(outputs):
        own = value[:, row : row + 1] if name.startswith("[1]") else value[row : row + 1]  # layers speak [T, B, C]
        dim = 0 if name.startswith("[1]") else 1
        assert not own.narrow(dim, frames, own.shape[dim] - frames).any(), name
        found[name] = own.narrow(dim, 0, frames)
    return found


def assert_rows_are_alone(plain, outputs, rows, **kwargs):
    for row, own in enumerate(rows):
        with torch.no_grad():
            alone = drawn(lambda own=own: plain.extract_features(own[None], **kwargs)[0])
            truth = drawn(lambda own=own: truth_of(plain).extract_features(own[None].double(), **kwargs)[0])
        alone, truth = dict(tensors(alone)), dict(tensors(truth))
        found = by_row(outputs, row, next(iter(alone.values())).shape[1])
        assert found.keys() == alone.keys()
        for name, value in found.items():
            assert_tensor_close(f"{name} of row {row}", value, alone[name], truth[name])


@pytest.mark.parametrize("call", CALLS)
@both_forms
def test_every_row_is_the_utterance_alone(form, call):
    plain, rows = original(form), utterances()
    ours = fast(plain, padding="exact")
    assert report(ours).alone is None
    x, mask = padded(rows)
    with torch.no_grad():
        outputs, frames = ours.extract_features(x, mask, **CALLS[call])
    counts = [plain.extract_features(row[None])[0].shape[1] for row in rows]
    assert torch.equal(frames, torch.arange(frames.shape[1]) >= torch.tensor(counts)[:, None])
    assert_rows_are_alone(plain, outputs, rows, **CALLS[call])
    lists = forward_ragged(ours, rows, **CALLS[call])
    for row, own in enumerate(lists):
        for (name, value), other in zip(tensors(own), by_row(outputs, row, counts[row]).values(), strict=True):
            assert torch.allclose(value, other, rtol=1e-5, atol=1e-4), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_precisions(dtype):
    plain = original("large").to(dtype)
    rows = utterances(dtype=dtype)
    with torch.no_grad():
        outputs, _ = fast(plain, padding="exact").extract_features(*padded(rows))
    assert_rows_are_alone(plain, outputs, rows)


def test_gradients_of_a_padded_batch():
    plain, rows = original(), utterances()
    ours = fast(plain, padding="exact")
    x, mask = padded(rows, padding=0.0)
    x.requires_grad_()
    ours.extract_features(x, mask)[0].square().sum().backward()
    for row, own in enumerate(rows):
        alone = own[None].requires_grad_()
        plain.extract_features(alone)[0].square().sum().backward()
        torch.testing.assert_close(x.grad[row, : len(own)], alone.grad[0], rtol=1e-3, atol=1e-3)
        assert not x.grad[row, len(own) :].any()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if p.grad is not None and not name.endswith("k_proj.bias"):
            assert (p.grad - q.grad).abs().max() <= 1e-3 * q.grad.abs().max(), name


def test_with_spans_masked_utterances_run_alone():
    """Spans are drawn for each, as for a batch of one."""
    plain, rows = original(mask_prob=0.3, mask_length=3), utterances()
    ours = fast(plain, padding="exact")
    with torch.no_grad():
        outputs, _ = drawn(lambda: ours.extract_features(*padded(rows), mask=True))
        alone = drawn(lambda: [plain.extract_features(row[None], mask=True)[0] for row in rows])
        without, _ = ours.extract_features(*padded(rows))
    for row, own in enumerate(alone):
        torch.testing.assert_close(outputs[row : row + 1, : own.shape[1]], own, rtol=1e-3, atol=1e-2)
    assert not torch.allclose(outputs, without)


def hooked(model):
    model.encoder.layers[0].self_attn.relative_attention_bias.register_forward_hook(lambda *args: None)


def own_layer(model):
    of_class(model.encoder, type(model.encoder.layers[0]), Louder)


ALONE = {
    "a hook": (original, hooked, "rel_attn_embed is called: it has hooks"),
    "its own layer": (original, own_layer, "layer 0: it is a Louder"),
    "normalised rows": (
        lambda: of_class(original("large"), WavLM, Normalising),
        lambda model: None,
        "the forward of microsoft_cases.Normalising computes something else",
    ),
}


@pytest.mark.parametrize("what", ALONE)
def test_one_at_a_time_where_frames_cannot_be_packed(what):
    make, change, reason = ALONE[what]
    plain, rows = make(), utterances()
    ours = fast(plain, padding="exact")
    for model in (plain, ours):
        change(model)
    told = report(ours)
    assert reason in told.alone and f"run one at a time: {told.alone}" in str(told)
    with torch.no_grad():
        outputs, _ = ours.extract_features(*padded(rows))
        lists = forward_ragged(ours, rows)
    if what != "its own layer":  # truth would be of another class
        assert_rows_are_alone(plain, outputs, rows)
    for row, own in enumerate(lists):
        assert torch.equal(outputs[row : row + 1, : own.shape[1]], own)


def test_without_padding_and_with_full_rows_the_model_runs_as_it_is():
    ours = fast(original())
    expected = ours.extract_features(waveforms())[0]
    accelerate(ours, padding="exact")
    assert torch.equal(ours.extract_features(waveforms())[0], expected)
    assert torch.equal(ours.extract_features(waveforms(), torch.zeros(2, SAMPLES, dtype=torch.bool))[0], expected)
    usual = fast(original()).extract_features(waveforms(), PADDED)[0]
    assert not torch.allclose(ours.extract_features(waveforms(), PADDED)[0], usual)
    assert torch.equal(accelerate(ours, padding="transformers").extract_features(waveforms(), PADDED)[0], usual)


@pytest.mark.parametrize(
    ("lengths", "hole", "sentence"),
    [
        ((600, 29), None, "at least 30 samples in every row, what the model needs, row 1 has 29"),
        ((600, 500), (1, 7), "a padding_mask that is False, then True, row 1 is none"),
        ((600, 0), None, "at least 30 samples in every row, what the model needs, row 1 has 0"),
    ],
)
def test_masks_that_say_no_lengths(lengths, hole, sentence):
    x, mask = padded([torch.zeros(n) for n in lengths], padding=0.0)
    if hole is not None:
        mask[hole] = True
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
        fast(original(), padding="exact").extract_features(x, mask)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"a padding_mask of the shape of source, \[2, 600\], got \[2, 599\]"):
        fast(original(), padding="exact").extract_features(waveforms(), PADDED[:, 1:])


REFUSED = {
    "integers": (torch.zeros(1, 600, dtype=torch.int16), TypeError, "source must be floating-point samples in -1..1"),
    "one row": (torch.zeros(600), ValueError, "source must be of shape [batch, samples], got [600]"),
    "nobody": (torch.zeros(0, 600), ValueError, "source must hold at least one utterance"),
    "too short": (torch.zeros(1, 29), ValueError, "source must hold at least 30 samples"),
    "another dtype": (torch.zeros(1, 600).double(), TypeError, "source must have the dtype of the model"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input(what):
    x, error, sentence = REFUSED[what]
    with pytest.raises(error) as caught:
        fast(original()).extract_features(x)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_of_the_same_house_that_is_no_wavlm():
    class MultiheadAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.k_proj = self.v_proj = self.q_proj = self.out_proj = nn.Linear(4, 4)

    hubert = original()
    for layer in hubert.encoder.layers:
        layer.self_attn = MultiheadAttention()
    with pytest.raises(TypeError) as caught:
        accelerate(hubert)
    sentence = "this is a HuBERT or wav2vec 2.0 of Microsoft's or fairseq's code: no gated relative position bias"
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_installed():
    config = original_config(small_config())
    wavlm_fast.install(padding="exact")
    try:
        assert report(WavLM(config)).padding == "exact"
        wavlm_fast.install()
        assert report(WavLM(config)).padding == "transformers"
    finally:
        wavlm_fast.uninstall()
    assert report(WavLM(config)).padding == "transformers"


# What report says


NAMES = {"intermediate_dense": "fc1", "output_dense": "fc2", "gru_rel_pos_linear": "grep_linear", "conv": "0"}
FUSED = {"q_proj", "k_proj", "v_proj", "out_proj", "grep_linear", "fc1", "fc2", "0", "final_layer_norm"}
HOOKED = [
    *(f"{LAYER}.self_attn.{name}" for name in ("q_proj", "out_proj", "grep_linear", "dropout_module")),
    *(f"{LAYER}.{name}" for name in ("self_attn", "fc1", "fc2", "final_layer_norm", "self_attn_layer_norm")),
    LAYER, f"{LAYER}.dropout3", "encoder.layers.0.self_attn.relative_attention_bias", "encoder.pos_conv",
    "encoder.pos_conv.2", "encoder", "feature_extractor", "feature_extractor.conv_layers.0.0",
    "feature_extractor.conv_layers.1.2",
]  # fmt: skip


def hook(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *args: None)


def learning(path):
    return lambda model: model.train().requires_grad_(False).get_submodule(path).requires_grad_(True)


STATES = {
    "as it is": lambda model: None,
    "training": lambda model: model.train(),
    "in bfloat16": lambda model: model.bfloat16(),
    "in float64": lambda model: model.double(),
    **{f"hooked {path}": hook(path) for path in HOOKED},
    "the first layer learns": learning("encoder.layers.0"),
    "the last layer learns": learning("encoder.layers.2"),
    "the front end learns": learning("feature_extractor"),
    "their attention": lambda model: wavlm_fast.restore(model.get_submodule(LAYER).self_attn),
    "their layer": lambda model: wavlm_fast.restore(model.get_submodule(LAYER)),
    "nothing of theirs": lambda model: of_class(model, type(model.encoder.layers[0]), TransformerSentenceEncoderLayer),
}


@pytest.mark.parametrize(
    ("state", "form"), [(s, "base") for s in STATES] + [(s, "large") for s in STATES if "hooked" not in s]
)
def test_a_forward_does_what_report_says(state, form, monkeypatch):
    model = Frames(fast(original(form)))
    STATES[state](model.model)
    told = report(model)
    x = waveforms(dtype=model.model.mask_emb.dtype)
    watched = Watched(model, monkeypatch)
    for front_end in model.modules():
        if isinstance(front_end, FrontEnd):
            watched.names |= {id(block[0]): "0" for block in front_end.conv_layers}
    with watched as seen, torch.set_grad_enabled(model.training):
        model(x)
    ran, called = Counter(), Counter()
    for row in told.rows:
        if row.backend != "modules":
            ran[row.op, row.backend] += row.count
            continue
        name = re.match(r"(\w+) is called: ", row.reasons[0])
        called[name and NAMES.get(name[1], name[1])] += row.count
    assert +ran == +seen.ops and sum(seen.ops.values())
    assert {n: c for n, c in called.items() if n in FUSED} == {n: c for n, c in seen.called.items() if n in FUSED}


# Graphs


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_is(got, plain, *inputs):
    doubled = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        assert_tensor_close("output", got, Frames(plain)(*inputs), Frames(truth_of(plain))(*doubled))


def one_layer(form):
    plain = original(form)
    plain.encoder.layers = plain.encoder.layers[:1]
    return plain


@pytest.mark.parametrize(("form", "inputs"), [("base", (waveforms(),)), ("large", (waveforms(), PADDED))])
def test_compiled(form, inputs, fresh_dynamo):
    plain = one_layer(form)
    compiled = torch.compile(Frames(fast(plain)), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_is(compiled(*inputs), plain, *inputs)


def test_a_graph_has_every_layer_fused(fresh_dynamo):
    """No lazy position bias can be in a graph: layers hand on the compact one, where all of them are ours."""
    plain, graphs = original("base"), []

    def kept(graph, inputs):
        graphs.append(graph)
        return graph.forward

    ours = fast(plain)
    with torch.no_grad():
        assert_is(torch.compile(Frames(ours), backend=kept, fullgraph=True)(waveforms()), plain, waveforms())
        ops = [str(node.target) for node in graphs[0].graph.nodes]
        assert ops.count("wavlm_fast.encoder_layer.default") == len(ours.encoder.layers)


def test_a_graph_with_a_layer_of_somebody_elses_is_right(fresh_dynamo):
    plain = original("base")
    plain.encoder.layers[1].__class__ = Louder
    with torch.no_grad():
        assert_is(torch.compile(Frames(fast(plain)), backend="eager", fullgraph=True)(waveforms()), plain, waveforms())


def test_exact_batches_of_parts_are_refused():
    with pytest.raises(ValueError, match=re.escape("padding 'exact' wants a whole WavLM, got a ")):
        accelerate(original("base").encoder, padding="exact")


def test_compiled_rows_are_as_if_alone(fresh_dynamo):
    plain, rows = one_layer("base"), utterances()
    compiled = torch.compile(Frames(fast(plain, padding="exact")), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        outputs = compiled(*padded(rows, padding=1.0))
    assert_rows_are_alone(plain, outputs, rows)


def test_trained_compiled(fresh_dynamo):
    plain, found = one_layer("base"), []
    for model in (plain, fast(plain)):
        run = Frames(model) if model is plain else torch.compile(Frames(model), backend="aot_eager")
        run(waveforms()).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        if not name.endswith("k_proj.bias"):
            assert (gradient - found[1][name]).abs().max() <= 1e-3 * gradient.abs().max(), name


@pytest.mark.parametrize(("form", "inputs"), [("base", (waveforms(),)), ("large", (waveforms(), PADDED))])
def test_exported_and_taken_apart(form, inputs):
    plain = one_layer(form)
    with torch.no_grad():
        program = torch.export.export(Frames(fast(plain)), inputs, strict=False)
        apart = program.run_decompositions()
        assert our_ops(program.graph) and not our_ops(apart.graph)
        # Nothing is known of a mask that comes from outside.
        assert ("wavlm_fast.encoder_layer.default" in our_ops(program.graph)) == (len(inputs) == 1)
        for graph in (program, apart):
            assert_is(graph.module()(*inputs), plain, *inputs)


@both_forms
def test_traced(form):
    plain = original(form)
    ours = fast(plain)
    with torch.no_grad():
        ours.extract_features(waveforms())  # what is remembered now must not get into the graph
        traced = torch.jit.trace(Frames(ours), (waveforms(),))
        assert_is(traced(waveforms(seed=3)), plain, waveforms(seed=3))
    assert not our_ops(traced.inlined_graph)


def test_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    plain, file = original(), io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(Frames(fast(plain)), (waveforms(),), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: waveforms().numpy()})[0]
    assert_is(torch.from_numpy(found), plain, waveforms())


def test_functional_gradients():
    plain = original()
    ours, x = fast(plain), waveforms()
    got, expected = (
        torch.func.grad(lambda p, m=m: torch.func.functional_call(Frames(m), p, (x,)).square().mean())(
            {f"model.{n}": p for n, p in copy.deepcopy(m).named_parameters()}
        )
        for m in (ours, plain)
    )
    for name, value in expected.items():
        if not name.endswith("k_proj.bias"):
            assert (got[name] - value).abs().max() <= 1e-3 * value.abs().max() + 1e-9, name
