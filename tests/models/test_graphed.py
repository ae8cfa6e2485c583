"""wavlm_fast.graphed: what is replayed, what is not and why, with captures that record ops on the CPU."""

import contextlib
import logging

import pytest
import torch
from fake_graphs import FakeCapture, put_in_place
from wavlm_cases import MODELS, SAMPLES, fast_model, ours_only, ragged_mask, small_config, tensors, waveforms

import wavlm_fast

pytestmark = ours_only


@pytest.fixture
def cuda(monkeypatch):
    put_in_place(monkeypatch)


def call(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def replays(graphed):
    return sum(g.graph.replays for g in graphed._graphs.values())


def assert_same(found, expected):
    assert type(found) is type(expected)
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    assert pairs
    for (name, f), (other, e) in pairs:
        assert name == other
        torch.testing.assert_close(f, e, rtol=0, atol=0)


def example(batch=2, samples=SAMPLES, masked=False):
    found = {"input_values": torch.zeros(batch, samples)}
    return found | {"attention_mask": torch.ones(batch, samples, dtype=torch.long)} if masked else found


@pytest.mark.parametrize("form", ["base", "large"])
@pytest.mark.parametrize("name", MODELS)
def test_a_replay_gives_what_the_model_gives(cuda, name, form):
    model = fast_model(name, small_config(form))
    graphed = wavlm_fast.graphed(model, [example(), example(masked=True), {**example(), "output_hidden_states": True}])
    x, mask = waveforms(), ragged_mask(SAMPLES, 400)
    assert_same(call(graphed, x), call(model, x))
    assert_same(call(graphed, x, mask), call(model, x, mask))
    assert_same(call(graphed, attention_mask=mask, input_values=x * 2), call(model, x * 2, mask))
    assert_same(call(graphed, x, output_hidden_states=True), call(model, x, output_hidden_states=True))
    assert not graphed.fallbacks
    assert replays(graphed) == 4


def test_return_dict_false_and_inference_mode(cuda):
    model = fast_model("WavLMForCTC")
    graphed = wavlm_fast.graphed(model, {**example(), "return_dict": False})
    with torch.inference_mode():
        found = graphed(waveforms(), return_dict=False)
    assert_same(found, call(model, waveforms(), return_dict=False))
    assert not graphed.fallbacks
    with torch.inference_mode():
        assert_same(wavlm_fast.graphed(model, example())(waveforms()), model(waveforms()))


def test_outputs_are_copies(cuda):
    model = fast_model("WavLMModel")
    graphed = wavlm_fast.graphed(model, example())
    first = call(graphed, waveforms())
    kept = first.last_hidden_state.clone()
    second = call(graphed, waveforms(seed=1))
    assert torch.equal(first.last_hidden_state, kept)
    assert not torch.equal(second.last_hidden_state, kept)
    assert first.last_hidden_state.data_ptr() != second.last_hidden_state.data_ptr()


def test_without_copies_the_next_call_overwrites(cuda):
    graphed = wavlm_fast.graphed(fast_model("WavLMModel"), example(), clone=False)
    first = call(graphed, waveforms())
    kept = first.last_hidden_state.clone()
    second = call(graphed, waveforms(seed=1))
    assert first is not second
    assert first.last_hidden_state is second.last_hidden_state
    assert not torch.equal(first.last_hidden_state, kept)


def test_one_tensor_in_two_places_stays_one(cuda):
    model = fast_model("WavLMModel")
    for subject in (model, wavlm_fast.graphed(model, {**example(), "output_hidden_states": True})):
        out = call(subject, waveforms(), output_hidden_states=True)
        assert out.hidden_states[-1] is out.last_hidden_state


def test_the_inputs_of_a_call_are_not_kept(cuda):
    given = example()
    model = fast_model("WavLMModel")
    graphed = wavlm_fast.graphed(model, given)
    x = waveforms()
    call(graphed, x)
    assert torch.equal(x, waveforms())
    assert not given["input_values"].any()


def test_other_shapes_run_on_the_model_and_are_told_once(cuda, caplog):
    model = fast_model("WavLMModel")
    graphed = wavlm_fast.graphed(model, [example(), example(1, 400), example()])
    assert len(graphed._graphs) == 2
    with caplog.at_level(logging.INFO, "wavlm_fast"):
        for samples in (500, 500, 400):
            assert_same(call(graphed, waveforms(1, samples)), call(model, waveforms(1, samples)))
        call(graphed, waveforms(), ragged_mask(SAMPLES, 400))
    assert replays(graphed) == 1
    reasons = {
        "no graph has these inputs: input_values [1, 500] float32": 2,
        "no graph has these inputs: input_values [2, 600] float32, attention_mask [2, 600] int64": 1,
    }
    assert graphed.fallbacks == reasons
    assert [r.getMessage() for r in caplog.records] == [f"a call runs without a CUDA graph: {why}" for why in reasons]
    assert "2 CUDA graphs\n  input_values [2, 600] float32\n" in str(graphed)
    assert "2 calls without one: no graph has these inputs: input_values [1, 500] float32" in str(graphed)


def optimizer_step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


def new_weight(model):
    weight = model.encoder.layers[0].attention.out_proj.weight
    weight.data = weight.data * 1.5


def replaced(model):
    model.encoder.layers[1].feed_forward = torch.nn.Identity()


CHANGES = {
    "weights": [
        optimizer_step,
        new_weight,
        lambda m: m.load_state_dict(fast_model("WavLMModel", seed=1).state_dict()),
        lambda m: m.double().float(),
        lambda m: setattr(m.feature_projection.projection, "bias", torch.nn.Parameter(torch.ones(32))),
    ],
    "modules were replaced": [replaced, wavlm_fast.restore],
    "training mode": [lambda m: m.encoder.layers[0].train()],
    "hooks": [
        lambda m: m.encoder.layers[1].register_forward_hook(lambda *args: None),
        lambda m: m.encoder.layer_norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    ],
    "methods were replaced": [
        lambda m: setattr(m.encoder.layers[0].attention, "compute_bias", lambda *sizes: torch.zeros(2, *sizes)),
        lambda m: setattr(type(m.encoder.layers[0].feed_forward), "forward", lambda self, x: x),
    ],
    "config": [lambda m: setattr(m.config, "output_hidden_states", True)],
}


@contextlib.contextmanager
def keeping_methods(cls):
    forward = cls.forward
    yield
    cls.forward = forward


@pytest.mark.parametrize(("why", "change"), [(why, change) for why in CHANGES for change in CHANGES[why]])
def test_a_model_that_changed_runs_itself(cuda, why, change):
    model = fast_model("WavLMModel")
    graphed = wavlm_fast.graphed(model, example())
    call(graphed, waveforms())
    with keeping_methods(type(model.encoder.layers[0].feed_forward)):
        change(model)
        assert_same(call(graphed, waveforms()), call(model, waveforms()))
    assert replays(graphed) in (0, 1)
    (reason,) = graphed.fallbacks
    assert why in reason


def test_weights_that_changed_can_be_captured_again(cuda):
    model = fast_model("WavLMModel")
    graphed = wavlm_fast.graphed(model, example())
    before = call(graphed, waveforms())
    optimizer_step(model)
    call(graphed, waveforms())
    assert not graphed._graphs and not graphed._held  # the old weights' memory is free
    assert "capture() makes graphs" in str(graphed)
    graphed.capture()
    found = call(graphed, waveforms())
    assert_same(found, call(model, waveforms()))
    assert not torch.equal(found.last_hidden_state, before.last_hidden_state)
    assert replays(graphed) == 1


def test_what_passes_leaves_the_graphs(cuda):
    model = fast_model("WavLMModel")
    graphed = wavlm_fast.graphed(model, example())
    model.train()
    call(graphed, waveforms())
    model.eval()
    call(graphed, waveforms())
    graphed(waveforms()).last_hidden_state.sum().backward()
    with wavlm_fast.use_backend("reference"):
        call(graphed, waveforms())
    torch.use_deterministic_algorithms(True)
    call(graphed, waveforms())
    torch.use_deterministic_algorithms(False)
    assert replays(graphed) == 1
    assert list(graphed.fallbacks) == [
        "the model is in training mode",
        "gradients are enabled; call it under torch.no_grad() or torch.inference_mode()",
        "backend, precision or determinism are not as they were at the capture",
    ]
    assert graphed.fallbacks.total() == 4


def test_autocast_belongs_to_the_graph(cuda, monkeypatch):
    state = [False]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: state[0] and kind == "cuda")
    model = fast_model("WavLMModel")
    graphed = wavlm_fast.graphed(model, example())
    call(graphed, waveforms())
    state[0] = True
    call(graphed, waveforms())
    assert replays(graphed) == 1
    assert list(graphed.fallbacks) == ["autocast is not as it was at the capture"]


def test_arguments_that_no_graph_takes(cuda):
    model = fast_model("WavLMForCTC")
    graphed = wavlm_fast.graphed(model, example())
    labels = torch.ones(2, 3, dtype=torch.long)
    assert_same(call(graphed, waveforms(), labels=labels), call(model, waveforms(), labels=labels))
    call(graphed, waveforms(), output_attentions=True)
    call(graphed, waveforms().double().float(), labels=None)
    assert list(graphed.fallbacks) == [
        "labels is no argument that a graph takes",
        "no graph has these inputs: input_values [2, 600] float32, output_attentions=True",
    ]


def test_mistakes_are_the_models_to_tell(cuda):
    graphed = wavlm_fast.graphed(fast_model("WavLMModel"), example())
    with pytest.raises(TypeError, match="multiple values for argument 'input_values'"):
        call(graphed, waveforms(), input_values=waveforms())
    with pytest.raises(TypeError, match="input_values must be a tensor"):
        call(graphed, [1.0, 2.0])


def test_a_capture_within_a_capture_runs_the_model(cuda, monkeypatch):
    graphed = wavlm_fast.graphed(fast_model("WavLMModel"), example())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call(graphed, waveforms())
    assert list(graphed.fallbacks) == ["the stream is being captured already"]


def test_a_capture_that_fails_leaves_the_model(cuda, monkeypatch, caplog):
    def refuse(self, *args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeCapture, "__torch_dispatch__", refuse)
    model = fast_model("WavLMModel")
    with caplog.at_level(logging.INFO, "wavlm_fast"):
        graphed = wavlm_fast.graphed(model, example())
    told = "the model cannot be captured: RuntimeError: operation not permitted when stream is capturing"
    assert f"no CUDA graphs: {told}" in [r.getMessage() for r in caplog.records]
    assert_same(call(graphed, waveforms()), call(model, waveforms()))
    assert graphed.fallbacks == {told: 1}


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda m: m.train(), "the model is in training mode"),
        (
            lambda m: m.encoder.layers[1].register_forward_hook(lambda *args: None),
            "encoder.layers.1 has hooks, which a replay would not call",
        ),
    ],
)
def test_a_model_that_cannot_be_captured(cuda, prepare, why):
    model = fast_model("WavLMModel")
    prepare(model)
    graphed = wavlm_fast.graphed(model, example())
    assert not graphed._graphs
    call(graphed, waveforms())
    assert graphed.fallbacks == {why: 1}


def test_on_a_cpu_the_model_runs():
    model = fast_model("WavLMModel")
    graphed = wavlm_fast.graphed(model, example())
    assert_same(call(graphed, waveforms()), call(model, waveforms()))
    reason = "CUDA graphs need a CUDA or ROCm device, the model is on cpu"
    assert graphed.fallbacks == {reason: 1}
    assert f"no graphs: {reason}" in str(graphed)


def test_what_graphs_read_is_held(cuda):
    """Merged weights too: their memory must not be given to someone else while a graph reads it."""
    model = fast_model("WavLMModel", small_config(hidden_act="silu"))  # whose layers run step by step, as on a GPU
    with wavlm_fast.use_backend("reference"):
        graphed = wavlm_fast.graphed(model, example())
    held = {t.data_ptr() for t in graphed._held}
    (graph,) = graphed._graphs.values()
    read = {t.data_ptr() for _, args, _, _ in graph.graph.ops for _, t in tensors(args) if t.shape == (3 * 32, 32)}
    assert len(read) == 3  # queries, keys and values of each layer
    assert read <= held


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("WavLM", {}, "wants a torch module, got a str"),
        (torch.nn.Identity(), [torch.zeros(2, 600)], "dicts of keyword arguments, got a Tensor"),
        (torch.nn.Identity(), {"input_values": [0.0]}, "input_values is a list"),
        (torch.nn.Identity(), {"input_values": torch.zeros(1), "labels": torch.zeros(1)}, "labels is no argument"),
        (torch.nn.Identity(), {"attention_mask": torch.zeros(1)}, "with input_values"),
    ],
)
def test_what_cannot_be_meant(model, inputs, message):
    with pytest.raises(TypeError, match=message):
        wavlm_fast.graphed(model, inputs)


def test_the_signature_is_the_models():
    import inspect

    model = fast_model("WavLMForXVector")
    graphed = wavlm_fast.graphed(model, example())
    assert inspect.signature(graphed) == inspect.signature(model.forward)


def test_a_model_that_cannot_take_the_example_says_so_and_runs_on(cuda, monkeypatch):
    model = fast_model("WavLMModel")
    with pytest.raises(ValueError, match="at least 30 samples"):
        wavlm_fast.graphed(model, example(samples=20))
    graphed = wavlm_fast.graphed(model, example())
    with monkeypatch.context() as broken:
        broken.setattr(type(model), "forward", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            graphed.capture()
    call(graphed, waveforms())
    assert graphed.fallbacks == {"the last capture() was not completed": 1}


def test_a_replay_sees_writes_through_data(cuda, monkeypatch):
    """What is derived from weights is a part of the graph where nothing is remembered: on a GPU."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    model = fast_model("WavLMForXVector")
    graphed = wavlm_fast.graphed(model, example())
    before, seen = call(model, waveforms())[0], 0
    for parameter in model.parameters():
        old = parameter.detach().clone()
        parameter.data.mul_(1.5).add_(0.1)
        expected = call(model, waveforms())
        assert_same(call(graphed, waveforms()), expected)
        seen += not torch.equal(expected[0], before)
        parameter.data.copy_(old)
    assert seen > 40
    assert replays(graphed) == len(list(model.parameters()))
    assert not graphed.fallbacks
