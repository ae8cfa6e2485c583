"""What `report` says is what a forward does: the same ops on the same backends, and the same modules called instead."""

from __future__ import annotations

import contextlib
import re
from collections import Counter

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.wavlm import modeling_wavlm as hf
from wavlm_cases import SAMPLES, fast_model, ours_only, ragged_mask, small_config, subject, waveforms

from wavlm_fast import backends
from wavlm_fast.modules._originals import StandIn, why_original

pytestmark = ours_only

NAME = "WavLMForXVector"  # all modules there are
LAYER = "wavlm.encoder.layers.1"
# Submodules whose work an op does where it can, by the names that they have in a fast module.
FUSED = {
    "q_proj", "k_proj", "v_proj", "out_proj", "gru_rel_pos_linear", "intermediate_dense", "output_dense", "projection",
    "kernel", "conv", "final_layer_norm",
}  # fmt: skip


class Wrapped(nn.Module):
    """Somebody's own module around one of ours or theirs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Watched(contextlib.AbstractContextManager):
    """What is chosen for the ops of a forward, and which modules in fast ones are called, by name."""

    def __init__(self, model, monkeypatch):
        self.ops, self.called = Counter(), Counter()
        fast = (m for m in model.modules() if isinstance(m, StandIn) and why_original(m) is None)
        self.names = {id(child): name for module in fast for name, child in module.named_children()}
        self.patch = monkeypatch

    def __enter__(self):
        choose, call, self.undone = backends.choose, nn.Module.__call__, self.patch.context()
        left = backends.trained_by_torch

        def watched_choice(op, args):
            choice = choose(op, args)
            made_of_ops = op in ("encoder_layer", "feature_encoder") and choice.backend == "reference"
            self.ops[op, choice.backend] += not made_of_ops
            return choice

        def watched_training(op, x, weight):
            choice = left(op, x, weight)
            self.ops[op, "reference"] += choice is not None
            return choice

        def watched_call(module, *args, **kwargs):
            self.called[self.names.get(id(module))] += 1
            return call(module, *args, **kwargs)

        patch = self.undone.__enter__()
        patch.setattr(backends, "choose", watched_choice)
        patch.setattr(backends, "trained_by_torch", watched_training)
        patch.setattr(nn.Module, "__call__", watched_call)
        return self

    def __exit__(self, *exception):
        self.undone.__exit__(*exception)


def assert_told(model, monkeypatch, told=None, **kwargs):
    told = subject.report(model) if told is None else told
    x = waveforms(dtype=next(model.parameters()).dtype)
    with Watched(model, monkeypatch) as seen, torch.set_grad_enabled(model.training):
        model(x, **kwargs)
    ran = Counter({(row.op, row.backend): 0 for row in told.rows if row.backend != "modules"})
    called = Counter()
    for row in told.rows:
        if row.backend != "modules":
            ran[row.op, row.backend] += row.count
            continue
        assert len(row.reasons) == 1
        name = re.match(r"(\w+) is called: ", row.reasons[0])
        called[name and name[1].replace("padding", "conv")] += row.count  # which is called for the sake of it
    assert +ran == +seen.ops
    assert {n: c for n, c in called.items() if n in FUSED} == {n: c for n, c in seen.called.items() if n in FUSED}
    assert sum(seen.ops.values())
    return told


def hooked(path):
    def change(model):
        model.get_submodule(path).register_forward_hook(lambda *args: None)

    return change


def replaced(path, make):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))

    return change


def learning(*paths):
    """Training where nothing learns but what is at these paths."""

    def change(model):
        model.train().requires_grad_(False)
        for path in paths:
            model.get_submodule(path).requires_grad_(True)

    return change


def lora(*targets):
    def change(model):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=list(targets), r=2, init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)

    return change


def norms_in_float32(model):
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            module.float()


def without_bias(path):
    def change(model):
        model.get_submodule(path).bias = None

    return change


def own_method(path, name):
    def change(model):
        module = model.get_submodule(path)
        setattr(module, name, getattr(module, name))

    return change


HOOKED = [
    f"{LAYER}.attention.q_proj", f"{LAYER}.attention.out_proj", f"{LAYER}.attention.gru_rel_pos_linear",
    f"{LAYER}.attention", f"{LAYER}.feed_forward.intermediate_dense", f"{LAYER}.feed_forward.output_dense",
    f"{LAYER}.feed_forward.intermediate_act_fn", f"{LAYER}.feed_forward", f"{LAYER}.layer_norm",
    f"{LAYER}.final_layer_norm", f"{LAYER}.dropout", LAYER, "wavlm.encoder.layers.0.attention.rel_attn_embed",
    "wavlm.encoder.pos_conv_embed", "wavlm.encoder.pos_conv_embed.conv", "wavlm.encoder.pos_conv_embed.activation",
    "wavlm.encoder.pos_conv_embed.padding", "wavlm.encoder", "wavlm.feature_projection.projection",
    "wavlm.feature_projection", "wavlm.feature_extractor.conv_layers.0", "wavlm.feature_extractor.conv_layers.0.conv",
    "wavlm.feature_extractor.conv_layers.0.layer_norm", "wavlm.feature_extractor.conv_layers.1.activation",
    "tdnn.0", "tdnn.1.kernel", "tdnn.2.activation",
]  # fmt: skip
# But two, of which others read what they hold.
WRAPPED = [p for p in HOOKED if not p.endswith(("rel_attn_embed", "conv_layers.0"))]
WRAPPED.append("wavlm.feature_projection.layer_norm")
STATES = {
    "as it is": lambda model: None,
    "training": lambda model: model.train(),
    "in float64": lambda model: model.double(),
    "in bfloat16": lambda model: model.bfloat16(),
    "norms in float32": norms_in_float32,
    "norms in float32, training": lambda model: norms_in_float32(model.train()),
    **{f"hooked {path}": hooked(path) for path in HOOKED},
    **{f"wrapped {path}": replaced(path, Wrapped) for path in WRAPPED},
    "nothing learns": learning(),
    "the first layer learns": learning("wavlm.encoder.layers.0"),
    "the last layer learns": learning("wavlm.encoder.layers.2"),
    "the bias learns": learning("wavlm.encoder.layers.0.attention.rel_attn_embed"),
    "the front end learns": learning("wavlm.feature_extractor"),
    "the head learns": learning("tdnn"),
    "lora on two projections": lora("q_proj", "v_proj"),
    "lora on the feed-forward": lora("intermediate_dense", "output_dense"),
    "their attention": replaced(f"{LAYER}.attention", lambda module: subject.restore(module)),
    "their layer": replaced(LAYER, lambda module: subject.restore(module)),
    "their embedding": replaced("wavlm.encoder.pos_conv_embed", lambda module: subject.restore(module)),
    "no bias": without_bias(f"{LAYER}.attention.v_proj"),
    "own activation": replaced("tdnn.0.activation", lambda module: nn.SiLU()),
    "own positional activation": replaced("wavlm.encoder.pos_conv_embed.activation", lambda module: nn.SiLU()),
    "own attention forward": own_method(f"{LAYER}.attention", "compute_bias"),
    "own layer forward": own_method("wavlm.encoder.layers.0", "forward"),
    "own embedding": replaced(
        "wavlm.encoder.layers.0.attention.rel_attn_embed",
        lambda module: type("Own", (nn.Embedding,), {})(*module.weight.shape, _weight=module.weight.detach()),
    ),
}
CONFIGS = {
    "attention weights": {"output_attentions": True},
    "odd heads": {"hidden_size": 30, "num_conv_pos_embedding_groups": 5},
    "own activations": {"hidden_act": "silu", "feat_extract_activation": "silu"},
    "biased convolutions": {"conv_bias": True},
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1},
}
assert "silu" in ACT2FN


ONE_FORM = [state for state in STATES if state.startswith(("hooked", "wrapped"))]


@pytest.mark.parametrize(
    ("state", "form"),
    [(state, "base") for state in STATES] + [(state, "large") for state in STATES if state not in ONE_FORM],
)
def test_a_forward_does_what_report_says(state, form, monkeypatch):
    model = fast_model(NAME, small_config(form))
    STATES[state](model)
    assert_told(model, monkeypatch)


@pytest.mark.parametrize("form", ["base", "large"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_whatever_the_config_says(config, training, form, monkeypatch):
    assert_told(fast_model(NAME, small_config(form, **CONFIGS[config])).train(training), monkeypatch)


@pytest.mark.parametrize("training", [False, True])
def test_under_autocast(training, monkeypatch):
    model = fast_model(NAME).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        assert_told(model, monkeypatch)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_on_a_backend_by_name(name, monkeypatch):
    with backends.use_backend(name):
        assert_told(fast_model(NAME), monkeypatch)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (f"{LAYER}.feed_forward", "feed_forward is called: it has hooks"),
        (f"{LAYER}.dropout", "dropout is called"),
        ("wavlm.feature_extractor.conv_layers.0", "layer 0 is called: it has hooks"),
        (f"{LAYER}.attention.q_proj", "q_proj is called: it has hooks"),
    ],
)
def test_what_keeps_a_whole_from_running_is_told_once(path, said, monkeypatch):
    model = fast_model(NAME)
    hooked(path)(model)
    with torch.no_grad():
        told = assert_told(model, monkeypatch)
    reasons = [reason for row in told.rows for reason in row.reasons]
    assert [reason.startswith(said) for reason in reasons] == [True]


@pytest.mark.parametrize("path", ["", f"{LAYER}.attention"])
@pytest.mark.parametrize("cls", [hf.WavLMAttention, hf.WavLMEncoderLayer])
def test_with_a_method_of_somebody_else(cls, path, monkeypatch):
    model = fast_model(NAME)
    theirs = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: theirs(self, *args, **kwargs))
    if path:
        hooked(path)(model)
    told = assert_told(model, monkeypatch)
    assert f"{cls.__name__}.forward was replaced" in str(told)


@pytest.mark.parametrize("form", ["base", "large"])
@pytest.mark.parametrize("state", ["training", "the first layer learns", "the head learns"])
def test_where_torch_trains_faster(state, form, monkeypatch):
    model = fast_model(NAME, small_config(form))
    STATES[state](model)
    with monkeypatch.context() as patch:
        why = lambda op, x, weight: f"torch's own {op}"  # noqa: E731
        patch.setattr(backends.load("cpu"), "why_torch_trains", why)
        told = assert_told(model, monkeypatch)
    assert any(row.backend == "reference" and row.reasons == (f"torch's own {row.op}",) for row in told.rows)


def test_of_packed_frames(monkeypatch):
    model = subject.accelerate(fast_model(NAME), padding="exact")
    assert_told(model, monkeypatch, attention_mask=ragged_mask(SAMPLES, 400))


def test_after_originals_were_freed(monkeypatch):
    assert_told(subject.accelerate(fast_model(NAME), keep_originals=False), monkeypatch)


def test_report_runs_no_module_and_remembers_nothing(monkeypatch):
    model = fast_model(NAME)
    model.get_submodule(LAYER).attention.q_proj.register_forward_hook(lambda *args: pytest.fail("it was called"))
    before = torch.get_rng_state()
    report = subject.report(model.train())
    assert report.derived_bytes == subject.report(model).derived_bytes == 0
    assert torch.equal(torch.get_rng_state(), before)
