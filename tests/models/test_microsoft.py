"""Microsoft's WavLM and its copies keep the promises that transformers' models keep."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from microsoft_cases import (
    CALLS,
    LAYER,
    PADDED,
    Reading,
    SameLayer,
    check,
    drawn,
    fast,
    of_class,
    original,
)
from test_hooks import disturb, disturbed
from torch import nn
from wavlm_cases import (
    FORMS,
    assert_gradients_close,
    assert_same,
    assert_tensor_close,
    gradients,
    ours_only,
    tensors,
    truth_of,
    waveforms,
)

from wavlm_fast import accelerate, report, restore
from wavlm_fast.backends import cpu
from wavlm_fast.families import _copies
from wavlm_fast.modules._originals import StandIn
from wavlm_fast.modules._position_bias import PositionBias
from wavlm_fast.original import (
    MultiheadAttention,
    TransformerSentenceEncoderLayer,
    WavLM,
)

pytestmark = ours_only

both_forms = pytest.mark.parametrize("form", ["base", "large"])
HALVES = [torch.bfloat16, torch.float16]


def output(model, x=None, **kwargs):
    with torch.no_grad():
        return drawn(lambda: model.extract_features(waveforms() if x is None else x, **kwargs)[0])


def reasons(model):
    return [reason for row in report(model).rows for reason in row.reasons]


@pytest.fixture
def untried(monkeypatch):
    """Nothing has been tried yet."""
    for table in ("_tried", "_calling"):
        monkeypatch.setattr(_copies, table, {})


# Values


@pytest.mark.parametrize("form", FORMS)
def test_every_output(form):
    plain = original(form)
    check(plain, fast(plain))
    for dtype in HALVES:
        plain = plain.to(dtype)
        check(plain, fast(plain), dtype, {name: CALLS[name] for name in ("last", "every layer")})


@pytest.mark.parametrize("activation", ["relu", "gelu_fast", "tanh", "glu"])
@both_forms
def test_activations(form, activation):
    plain = original(form, activation_fn=activation)
    ours = fast(plain)
    check(plain, ours)
    counts = Counter(row.op for row in report(ours).rows if row.backend != "modules")
    if cpu.extension.problem() is None:
        assert ("encoder_layer" in counts) == (activation in ("relu", "gelu_fast"))


@both_forms
@pytest.mark.parametrize("training", [False, True])
def test_gradients(form, training):
    plain = original(form, feature_grad_mult=0.5).train(training)
    found = []
    for model in (fast(plain), plain, truth_of(plain)):
        x = waveforms(dtype=next(model.parameters()).dtype).requires_grad_()
        grads = gradients(model, lambda m, x=x: m.extract_features(x, PADDED)[0].square().mean())
        found.append({**grads, "feature_extractor.conv_layers.0.0.bias": x.grad})
    got, expected, truth = (dict(own) for own in found)
    waveform = [own.pop("feature_extractor.conv_layers.0.0.bias") for own in (got, expected, truth)]
    assert_gradients_close(got, expected, truth, plain)
    assert (waveform[0] - waveform[2]).abs().max() <= 1e-3 * waveform[2].abs().max()


def test_layer_drop_takes_the_same_draws_and_any_layer():
    plain = original(encoder_layerdrop=0.5).train()
    ours, called = fast(plain), []
    for i, layer in enumerate(ours.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: called.append(i))
    seen = set()
    for seed in range(8):
        called.clear()
        expected, truth = (
            drawn(lambda m=m: m.extract_features(waveforms(dtype=m.mask_emb.dtype))[0], seed)
            for m in (plain, truth_of(plain))
        )
        got = drawn(lambda: ours.extract_features(waveforms())[0], seed)
        following = np.random.random()
        np.random.seed(seed)
        draws = np.random.random(4)
        assert called == [i for i in range(3) if draws[i] > 0.5] and following == draws[3]
        assert_tensor_close(f"seed {seed}", got, expected, truth)
        seen.add(tuple(called))
    assert any(own and 0 not in own for own in seen)  # then no layer has a position bias


@both_forms
def test_dropout_draws(form):
    ours = fast(original(form, dropout=0.1, attention_dropout=0.1, activation_dropout=0.1)).train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(output(ours))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_under_autocast():
    plain = original()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = output(fast(plain)), output(plain)
    truth = output(truth_of(plain), waveforms(dtype=torch.float64))
    assert got.dtype == expected.dtype
    error, usual = ((x.double() - truth).abs().max() for x in (got, expected))
    assert error <= 2 * usual + torch.finfo(torch.bfloat16).eps * truth.abs().max()


# The model as an object


@both_forms
def test_only_classes_change_and_change_back(form):
    plain = original(form)
    model = copy.deepcopy(plain)
    parameters = {n: (id(p), p.data_ptr(), p._version) for n, p in model.named_parameters()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    kinds, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    before = output(model)
    assert accelerate(model) is model and isinstance(model, WavLM)
    assert {n: (id(p), p.data_ptr(), p._version) for n, p in model.named_parameters()} == parameters
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(state)
    swapped = {n for n, m in model.named_modules() if isinstance(m, StandIn)}
    assert {"", "feature_extractor", "encoder.pos_conv", LAYER, f"{LAYER}.self_attn"} <= swapped
    output(model)
    restore(model)
    assert [type(m) for m in model.modules()] == kinds
    assert_same(model.state_dict(), state)
    assert torch.equal(output(model), before)


@both_forms
def test_steps_of_an_optimizer_and_loaded_weights_are_seen(form):
    plain = original(form)
    ours, exact = fast(plain), truth_of(plain)
    output(ours)  # fills every cache
    for model in (plain, ours, exact):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
        model.extract_features(waveforms(dtype=model.mask_emb.dtype))[0].square().mean().backward()
        optimizer.step()
        model.eval()
    exact.load_state_dict({name: value.double() for name, value in plain.state_dict().items()})
    ours.load_state_dict(plain.state_dict())
    check(plain, ours, calls={"last": {}})
    with torch.no_grad():
        for model in (plain, ours):
            model.encoder.pos_conv[0].weight_g.mul_(2)
            model.encoder.layers[2].self_attn.v_proj.weight.data.mul_(1.5)
    check(plain, ours, calls={"last": {}})


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(twin):
    ours = fast(of_class(original(), TransformerSentenceEncoderLayer, SameLayer), padding="exact")
    ours.extract_features(waveforms())[0].sum()  # leaves a weight with a graph
    expected, made = output(ours), twin(ours)
    assert [type(m) for m in made.modules()] == [type(m) for m in ours.modules()]
    assert type(made).__name__ == "WavLM" and report(made).padding == "exact"
    assert torch.equal(output(made), expected)
    with torch.no_grad():
        made.encoder.layers[0].fc1.weight.mul_(2)
    assert not torch.equal(output(made), expected) and torch.equal(output(ours), expected)
    assert type(restore(made).encoder.layers[0]) is SameLayer and isinstance(ours.encoder.layers[0], StandIn)


def test_a_whole_model_in_a_file():
    ours, buffer = fast(original()), io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert torch.equal(output(torch.load(buffer, weights_only=False)), output(ours))


def test_fewer_layers():
    plain = original()
    ours = fast(plain)
    for model in (plain, ours):
        model.encoder.layers = model.encoder.layers[:2]
    check(plain, ours, calls={"last": {}, "padded": CALLS["padded"]})


@pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))
@both_forms
def test_freed_originals(form):
    ours = fast(original(form))
    expected = output(ours, padding_mask=PADDED)
    assert accelerate(ours, keep_originals=False) is ours
    assert torch.equal(output(ours, padding_mask=PADDED), expected)
    refused = {
        "train()": ours.train,
        "state_dict()": ours.state_dict,
        "a layer": ours.encoder.layers[0].train,
        "copying": lambda: copy.deepcopy(ours),
        "restore()": lambda: restore(ours),
        "gradients": lambda: ours.extract_features(waveforms().requires_grad_()),
        "weights": lambda: ours.encoder.layers[0](torch.zeros(5, 1, 32), need_weights=True),
    }
    for use, call in refused.items():
        with pytest.raises(RuntimeError, match=r"needs the values of a weight .*keep_originals=False\) has freed"):
            pytest.fail(f"{use} was not refused: {call()}")
    assert torch.equal(output(ours, padding_mask=PADDED), expected)


# What people hang on it


@both_forms
def test_hooks_see_what_they_saw(form):
    plain = original(form)
    paths = [p for p, m in plain.named_modules() if p and not isinstance(m, nn.ModuleList)]
    found = {}
    for name, model in (("plain", plain), ("truth", truth_of(plain)), ("ours", fast(plain))):
        x = waveforms(dtype=model.mask_emb.dtype)
        for path in paths:
            seen = found.setdefault((name, path), [])
            handle = model.get_submodule(path).register_forward_hook(
                lambda m, args, kwargs, out, seen=seen: seen.append((args, {**kwargs}, out)), with_kwargs=True
            )
            if name == "ours":  # one at a time: all others are fused where they can be
                output(model, x, padding_mask=PADDED)
                handle.remove()
        if name != "ours":
            output(model, x, padding_mask=PADDED)
    for path in paths:
        got, expected, truth = (found[name, path] for name in ("ours", "plain", "truth"))
        assert len(got) == len(expected), path
        assert expected or path.endswith(("dropout_features", "dropout_module")), path
        for mine, theirs, exact in zip(got, expected, truth, strict=True):
            theirs, exact = dict(tensors(theirs)), dict(tensors(exact))
            assert [name for name, _ in tensors(mine)] == list(theirs), path
            for name, value in tensors(mine):
                assert (value.shape, value.dtype) == (theirs[name].shape, theirs[name].dtype), f"{path} {name}"
                assert_tensor_close(f"{path} {name}", value + 0, theirs[name] + 0, exact[name] + 0)


def test_the_position_bias_that_a_layer_hands_on():
    plain = original()
    seen = []
    for model in (plain, fast(plain)):
        model.encoder.layers[2].register_forward_hook(lambda m, a, out: seen.append(out[2]))
        output(model)
    theirs, ours = seen
    assert type(ours) is PositionBias and ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.equal(ours + 0, theirs)


def damp(bias):
    bias.mul_(0.3)


@both_forms
def test_a_hook_that_writes_into_the_position_bias(form):
    plain = original(form)
    ours, exact = fast(plain), truth_of(plain)
    before = output(plain)
    for model in (plain, ours, exact):
        model.encoder.layers[0].register_forward_hook(lambda m, args, out: damp(out[2]))
    check(plain, ours, calls={"last": {}})
    assert not torch.allclose(output(plain), before)


def test_hooks_change_the_output_everywhere():
    ours = fast(original())
    before = output(ours)
    for path, module in ours.named_modules():
        if path and not isinstance(module, nn.ModuleList) and not path.endswith(("dropout_features", "dropout_module")):
            noise = torch.Generator().manual_seed(1)
            handle = module.register_forward_hook(lambda m, a, out, noise=noise: disturbed(out, noise))
            changed = output(ours)
            handle.remove()
            assert not torch.allclose(changed, before, rtol=1e-4, atol=1e-4), path
    assert torch.equal(output(ours), before)


@pytest.mark.parametrize("path", [LAYER, f"{LAYER}.fc1", f"{LAYER}.self_attn", "encoder.pos_conv", "feature_extractor"])
@pytest.mark.parametrize("how", ["replaced", "forward"])
def test_a_replaced_submodule_or_forward_is_called(path, how):
    plain = original()
    ours, exact = fast(plain), truth_of(plain)
    for model in (plain, ours, exact):
        disturb(model, path, how)
    x = waveforms()
    assert_tensor_close(path, output(ours, x), output(plain, x), output(exact, x.double()))


def with_lora(model, *targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=list(targets), r=4, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("reads", [False, True], ids=["calls", "reads"])
def test_lora_does_what_it_does_in_the_copy(reads):
    """Where the attention calls its projections an adapter on them counts, where it reads them it is dropped."""
    plain = original()
    if reads:
        of_class(plain, MultiheadAttention, Reading)
    wrapped = with_lora(copy.deepcopy(plain), "q_proj", "fc1")
    ours, later = with_lora(fast(plain), "q_proj", "fc1"), copy.deepcopy(wrapped)
    assert accelerate(later) is later and type(later) is type(wrapped)
    x, exact = waveforms(), copy.deepcopy(wrapped).double()
    for model in (ours, later):
        assert_tensor_close("lora", output(model, x), output(wrapped, x), output(exact, x.double()))
    only_fed = with_lora(copy.deepcopy(plain), "fc1")
    others = [p for n, p in wrapped.named_parameters() if "q_proj.lora" not in n]
    for own, other in zip(only_fed.parameters(), others, strict=True):
        own.data.copy_(other)
    assert torch.allclose(output(only_fed), output(wrapped), rtol=1e-3, atol=1e-3) == reads


@pytest.mark.parametrize("reads", [False, True], ids=["calls", "reads"])
def test_hooks_on_projections_run_where_the_copy_calls_them(reads):
    plain = of_class(original(), MultiheadAttention, Reading if reads else MultiheadAttention)
    ours = fast(plain)
    check(plain, ours)
    fired = []
    for model in (plain, ours):
        projection = model.get_submodule(f"{LAYER}.self_attn.q_proj")
        projection.register_forward_hook(lambda m, args, out: fired.append(m) or 2 * out)
    check(plain, ours)
    assert bool(fired) != reads and len(fired) % 3 == 0


def test_layers_that_are_checkpointed():
    """Gradients are those of the model, the first layer's bias among them, which every layer reads."""
    from torch.utils.checkpoint import checkpoint

    plain = original()
    expected = gradients(plain, lambda m: m.extract_features(waveforms())[0].square().mean())
    for reentrant in (False, True):
        ours = fast(plain)
        for layer in ours.encoder.layers:

            def called(x, *, forward=layer.forward, reentrant=reentrant, **kwargs):
                names = ("self_attn_mask", "self_attn_padding_mask", "need_weights", "pos_bias")
                return checkpoint(forward, x, *(kwargs[name] for name in names), use_reentrant=reentrant)

            layer.forward = called
        found = gradients(ours, lambda m: m.extract_features(waveforms())[0].square().mean())
        assert set(found) == set(expected)
        for name, gradient in found.items():
            if not name.endswith("k_proj.bias"):
                assert (gradient - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max(), name
