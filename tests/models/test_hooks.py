"""Whatever a user hangs on a submodule keeps working: the fast path steps aside for it."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from wavlm_cases import (
    MODELS,
    SAMPLES,
    assert_close_to_truth,
    fast_like,
    fast_model,
    ours_only,
    plain_model,
    ragged_mask,
    small_config,
    tensors,
    truth_of,
    waveforms,
    with_labels,
)

both_forms = pytest.mark.parametrize("form", ["base", "large"])


def run(model, name, training=False):
    kwargs = with_labels(name, model.config)
    if training:
        return model(waveforms(), attention_mask=ragged_mask(SAMPLES, 400), **kwargs)
    with torch.no_grad():
        return model(waveforms(), attention_mask=ragged_mask(SAMPLES, 400), **kwargs)


def callable_submodules(model):
    """Everything that has a forward of its own; a list of modules or a parameter holder has none."""
    for path, module in model.named_modules():
        if type(module) not in (nn.ModuleList, nn.ModuleDict):
            yield path, module


def first_tensor(value):
    return next(t for _, t in tensors(value))


def disturbed(value, noise):
    """`value` with its first tensor changed, in the container that it came in."""
    if isinstance(value, torch.Tensor):
        return value * (1 + 0.5 * torch.rand(value.shape, generator=noise)).to(value.dtype)
    if isinstance(value, tuple):
        return (disturbed(value[0], noise), *value[1:])
    changed = copy.copy(value)
    key = next(iter(changed))
    changed[key] = disturbed(changed[key], noise)
    return changed


class Disturbed(nn.Module):
    """Somebody's own module around another, whose output it changes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return disturbed(self.inner(*args, **kwargs), torch.Generator().manual_seed(2))


def disturb(model, path, how):
    """Have a submodule's output changed: by a module around it ("replaced"), or by its own forward."""
    module = model.get_submodule(path)
    if how == "replaced":
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, Disturbed(module))
    else:
        inner = module.forward
        module.forward = lambda *a, **k: disturbed(inner(*a, **k), torch.Generator().manual_seed(2))


def differs(a, b):
    other = dict(tensors(b))
    return any(not torch.allclose(v, other[k], rtol=1e-4, atol=1e-4, equal_nan=True) for k, v in tensors(a))


@ours_only  # transformers itself never calls the attention's projections nor the x-vector kernels
@pytest.mark.parametrize(
    ("name", "form", "training"),
    [
        *((name, "base", False) for name in MODELS),
        ("WavLMForXVector", "large", False),
        ("WavLMForXVector", "layer-post", False),
        ("WavLMForXVector", "base", True),
        ("WavLMForXVector", "large", True),
        ("WavLMForCTC", "base", True),
    ],
)
def test_a_forward_hook_on_any_submodule_fires_and_changes_the_output(name, form, training):
    model = fast_model(name, small_config(form)).train(training)
    undisturbed = run(model, name, training)
    silent, ignored = [], []
    for path, module in callable_submodules(model):
        calls = []
        noise = torch.Generator().manual_seed(1)

        def hook(module, args, output, calls=calls, noise=noise):
            calls.append(1)
            return disturbed(output, noise)

        handle = module.register_forward_hook(hook)
        output = run(model, name, training)
        handle.remove()
        if not calls:
            silent.append(path)
        elif not differs(output, undisturbed):
            ignored.append(path)
    assert not silent, f"hooks that never fired: {silent}"
    assert not ignored, f"hooks whose output was dropped: {ignored}"
    assert not differs(run(model, name, training), undisturbed), "a removed hook left something behind"


@pytest.mark.parametrize(
    ("name", "form"),
    [*((name, "base") for name in MODELS), ("WavLMForXVector", "large"), ("WavLMModel", "layer-post")],
)
def test_a_hook_sees_what_it_sees_in_transformers(name, form):
    # Of seed 0, layer-post, a row of attention weights is so peaked that rounding decides the verdict.
    plain = plain_model(name, small_config(form), seed=1)
    ours, exact = fast_like(plain), truth_of(plain)
    by_plain, by_truth = everything_seen(plain, name), everything_seen(exact, name)
    for path, module in callable_submodules(ours):
        if not by_plain[path]:
            continue  # transformers reads its weight without calling it
        seen = []
        handle = module.register_forward_hook(lambda m, a, out, seen=seen: seen.append(copy.deepcopy(out)))
        run(ours, name)
        handle.remove()
        assert len(seen) == len(by_plain[path]), f"{path} was called {len(seen)} times"
        if path == "wavlm":
            # Some heads of version 5 collect hidden states that nobody asked for.
            seen, by_plain[path], by_truth[path] = (
                [out.last_hidden_state for out in outs] for outs in (seen, by_plain[path], by_truth[path])
            )
        # The position bias that layers hand on is one vector per head in ours, a dense matrix in transformers.
        kept = 1 if re.search(r"layers\.\d+$", path) else 2 if path.endswith(".attention") else None
        if kept is not None:
            seen, by_plain[path], by_truth[path] = (
                [out[:kept] for out in outs] for outs in (seen, by_plain[path], by_truth[path])
            )
        try:
            assert_close_to_truth(seen, by_plain[path], by_truth[path])
        except AssertionError as error:
            raise AssertionError(f"a hook on {path}: {error}") from error


def everything_seen(model, name):
    """What every submodule returned in one forward, by path."""
    seen = {path: [] for path, _ in callable_submodules(model)}
    handles = [
        module.register_forward_hook(lambda m, a, out, path=path: seen[path].append(copy.deepcopy(out)))
        for path, module in callable_submodules(model)
    ]
    dtype = next(model.parameters()).dtype
    kwargs = with_labels(name, model.config)
    with torch.no_grad():
        model(waveforms().to(dtype), attention_mask=ragged_mask(SAMPLES, 400), **kwargs)
    for handle in handles:
        handle.remove()
    return seen


@both_forms
def test_a_pre_hook_changes_the_input(form):
    plain = plain_model("WavLMModel", small_config(form))
    ours, exact = fast_like(plain), truth_of(plain)
    paths = ("feature_projection.projection", "encoder.layers.1.feed_forward.intermediate_dense", "encoder.dropout")
    for path in paths:
        handles = [
            model.get_submodule(path).register_forward_pre_hook(lambda m, args: (args[0] * 0.5 + 0.25,))
            for model in (plain, ours, exact)
        ]
        with torch.no_grad():
            expected, got = plain(waveforms()), ours(waveforms())
            truth = exact(waveforms().double())
        for handle in handles:
            handle.remove()
        assert_close_to_truth(got, expected, truth)


@both_forms
def test_a_layer_hook_sees_its_keywords(form):
    seen = {}
    for model in (plain_model("WavLMModel", small_config(form)), fast_model("WavLMModel", small_config(form))):
        names = []
        for module in (model.encoder, model.encoder.layers[1], model.encoder.layers[1].attention):
            module.register_forward_pre_hook(
                lambda m, args, kwargs, names=names: names.append((len(args), sorted(kwargs))), with_kwargs=True
            )
        run(model, "WavLMModel")
        seen[len(seen)] = names
    # `position_bias` and the mask are in transformers' places, so that hooks written for them keep working.
    for expected, got in zip(seen[0], seen[1]):
        assert expected[0] == got[0] and set(expected[1]) <= set(got[1])


@ours_only
@both_forms
def test_backward_hooks_fire(form):
    model = fast_model("WavLMForCTC", small_config(form)).train()
    fired = {}
    handles = []
    for path, module in callable_submodules(model):
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv1d)):

            def hook(module, grad_input, grad_output, path=path):
                fired[path] = grad_output[0].clone()

            handles.append(module.register_full_backward_hook(hook))
    run(model, "WavLMForCTC", training=True).loss.backward()
    for handle in handles:
        handle.remove()
    expected = {p for p, m in callable_submodules(model) if isinstance(m, (nn.Linear, nn.LayerNorm, nn.Conv1d))}
    assert set(fired) == expected
    assert all(g.abs().sum() > 0 for g in fired.values())


def test_a_global_hook_sees_every_module():
    plain, ours = plain_model("WavLMModel"), fast_model("WavLMModel")
    called = {}
    for model in (plain, ours):
        names = {m: n for n, m in model.named_modules()}
        seen = set()
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, o, n=names, s=seen: s.add(n.get(m)))
        run(model, "WavLMModel")
        handle.remove()
        called[model] = seen
    assert called[plain] <= called[ours]


@both_forms
@pytest.mark.parametrize(
    "path",
    [
        "feature_extractor.conv_layers.1.conv",
        "feature_extractor.conv_layers.0.layer_norm",
        "feature_extractor.conv_layers.1.activation",
        "feature_projection.projection",
        "encoder.pos_conv_embed.activation",
        "encoder.layer_norm",
        "encoder.layers.1.feed_forward.intermediate_dense",
        "encoder.layers.1.feed_forward.intermediate_act_fn",
        "encoder.layers.1.layer_norm",
        "encoder.layers.1.dropout",
        "encoder.layers.1.attention",
        "encoder.layers.1.feed_forward",
        "encoder.layers.1",
        "encoder.pos_conv_embed",
        "feature_extractor",
        "encoder",
    ],
)
@pytest.mark.parametrize("how", ["replaced", "forward"])
def test_a_replaced_submodule_or_forward_is_called(form, path, how):
    plain = plain_model("WavLMModel", small_config(form))
    ours, exact = fast_like(plain), truth_of(plain)
    for model in (plain, ours, exact):
        disturb(model, path, how)
    with torch.no_grad():
        expected, got, truth = plain(waveforms()), ours(waveforms()), exact(waveforms().double())
    assert_close_to_truth(got, expected, truth)


def test_a_parametrized_projection_is_honoured():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    plain = plain_model("WavLMModel")
    ours, exact = fast_like(plain), truth_of(plain)
    for path in ("encoder.layers.1.attention.q_proj", "encoder.layers.0.attention.gru_rel_pos_linear",
                 "encoder.layers.2.feed_forward.output_dense", "feature_extractor.conv_layers.2.conv"):
        for model in (plain, ours, exact):
            nn.utils.parametrize.register_parametrization(model.get_submodule(path), "weight", Halved())
        with torch.no_grad():
            assert_close_to_truth(ours(waveforms()), plain(waveforms()), exact(waveforms().double()))


@both_forms
def test_a_hook_added_between_two_calls(form):
    # The first call has filled every cache of derived weights.
    model = fast_model("WavLMModel", small_config(form))
    first = run(model, "WavLMModel")
    path = "encoder.layers.0.feed_forward.output_dense"
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: out * 0)
    silenced = run(model, "WavLMModel")
    handle.remove()
    again = run(model, "WavLMModel")
    assert differs(first, silenced)
    assert torch.equal(first.last_hidden_state, again.last_hidden_state)


def test_accelerate_library_hooks_manage_the_weights():
    # Big-model dispatch keeps weights elsewhere and brings them in a hook around each module's forward.
    accelerate = pytest.importorskip("accelerate")
    ours = fast_model("WavLMForSequenceClassification")
    expected = run(ours, "WavLMForSequenceClassification").logits
    for module in ours.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    torch.testing.assert_close(run(ours, "WavLMForSequenceClassification").logits, expected, rtol=1e-4, atol=1e-4)
    zeroing = accelerate.hooks.ModelHook()
    zeroing.post_forward = lambda module, output: output * 0
    accelerate.hooks.add_hook_to_module(ours.wavlm.encoder.layers[1].feed_forward.output_dense, zeroing)
    assert not torch.allclose(run(ours, "WavLMForSequenceClassification").logits, expected, rtol=1e-4, atol=1e-4)
