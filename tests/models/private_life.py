"""All that a private name could be needed for, on two tiny models that are compared with transformers' at each step."""

from __future__ import annotations

import copy
import gc
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.modules import module as for_all_modules
from transformers.activations import ACT2FN
from wavlm_cases import (
    SAMPLES,
    assert_close_to_truth,
    assert_gradients_close,
    assert_same,
    fast_like,
    gradients,
    plain_model,
    ragged_mask,
    small_config,
    to_double,
    truth_of,
    waveforms,
    with_labels,
)

import wavlm_fast
from wavlm_fast import _private, derived, doctor
from wavlm_fast.backends import cpu, use_backend
from wavlm_fast.backends.cpu import onednn
from wavlm_fast.graphed import _look_at

KINDS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
MASK = {"attention_mask": ragged_mask(SAMPLES, 400)}


def live(owner, name):
    """Whatever is done with models, without `owner.name`.

    Raises:
        Exception: something came out otherwise than with transformers.
    """
    large = Trio("large", ours=wavlm_fast.accelerate)
    large.compare(output_hidden_states=True, output_attentions=True)  # first: our classes have built nothing so far
    base = Trio("base", ours=fast_like)
    for trio in (base, large):
        trio.compare()
        trio.compare(output_hidden_states=True, **MASK)
        trio.compare_gradients()
    for kind in KINDS:
        own_hooks(large.ours, kind)
        hooks_of_all_modules(base.ours, kind)
    with use_backend("reference"):
        base.compare(**MASK)
        base.compare_gradients()
    layers_dropped(large)
    masked(base)
    weights_of_another_class(base)
    other_activations(base)
    changed_weights(base)
    checkpointed_with_a_frozen_front_end(large)
    assert _private.is_frozen(large.ours.wavlm.feature_extractor) == (name != "_requires_grad")
    weight_norm_as_it_was(base)
    lengths_and_buckets(base)
    half_precision(large)
    originals_freed(base)
    if owner.startswith(("torch._C", "torch.fx", "torch.autograd")):
        left(large, name)
    installed()
    told(large.ours, owner, name)
    restored(large)
    del base, large
    gc.collect()
    assert not list(derived._store)


class Trio:
    """transformers' model, ours of the same weights, and transformers' in float64."""

    def __init__(self, form, ours):
        config = small_config(
            form, num_hidden_layers=2, add_adapter=True, num_adapter_layers=1, apply_spec_augment=False,
            mask_time_prob=0.5, mask_time_length=2, mask_feature_prob=0.5, mask_feature_length=4,
        )  # fmt: skip
        config._attn_implementation = "eager"
        self.plain = plain_model("WavLMForXVector", config)
        self.ours = ours(copy.deepcopy(self.plain))
        self.double = truth_of(self.plain)
        self.labels = with_labels("WavLMForXVector", config)
        self.all = (self.plain, self.ours, self.double)

    def compare(self, **kwargs):
        x = waveforms(dtype=next(self.plain.parameters()).dtype)
        with torch.no_grad():
            got, plain = (model(x.clone(), **kwargs) for model in (self.ours, self.plain))
            assert_close_to_truth(got, plain, self.double(x.double(), **to_double(kwargs)))

    def compare_gradients(self):
        def loss(model):
            return model(waveforms(dtype=next(model.parameters()).dtype), **self.labels, **MASK).loss

        with training(self.all):
            got, plain, exact = (gradients(model, loss) for model in (self.ours, self.plain, self.double))
        assert_gradients_close(got, plain, exact, self.plain)


@contextmanager
def training(models):
    for model in models:
        model.train()
    yield
    for model in models:
        model.eval()
        model.zero_grad()


def forward_and_backward(model):
    model(waveforms().requires_grad_()).logits.sum().backward()


def own_hooks(model, kind):
    layer, fired = model.wavlm.encoder.layers[1], set()
    parts = (layer.feed_forward.output_dense, layer.attention, model.wavlm.feature_extractor.conv_layers[1].conv)
    handles = [getattr(part, f"register_{kind}")(lambda part, *args: fired.add(part)) for part in parts]
    forward_and_backward(model)
    for handle in handles:
        handle.remove()
    assert fired == set(parts), kind


def hooks_of_all_modules(model, kind):
    fired = set()
    handle = getattr(for_all_modules, f"register_module_{kind}")(lambda part, *args: fired.add(part))
    forward_and_backward(model)
    handle.remove()
    leaves = {m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm, nn.GELU))}
    unused = {m for m in model.wavlm.encoder.layers[1].modules() if m not in fired}
    assert leaves - fired <= {model.objective, *unused} and model.projector in fired, kind
    assert model.wavlm.encoder.layers[1].feed_forward.output_dense in fired, kind


def layers_dropped(trio):
    outputs = []
    for model in trio.all[:2]:
        model.config.layerdrop = 0.6
        model.wavlm.encoder.config.layerdrop = 0.6
        with training([model]), torch.no_grad():
            for seed in range(3):
                torch.manual_seed(seed)
                outputs.append(model(waveforms()).logits)
        model.config.layerdrop = model.wavlm.encoder.config.layerdrop = 0.0
    torch.testing.assert_close(outputs[:3], outputs[3:], rtol=1e-3, atol=1e-3)
    assert not torch.equal(outputs[0], outputs[1]) or not torch.equal(outputs[1], outputs[2])


def masked(trio):
    """transformers 5 raises where features are to be masked; ours may do that, or do it right, and nothing else."""
    for backend in ("auto", "reference"):
        for probability in (0.0, 0.5):
            found = []
            for model in trio.all[:2]:
                model.config.apply_spec_augment, model.config.mask_feature_prob = True, probability
                np.random.seed(0)
                with training([model]), use_backend(backend):
                    found.append(logits_or_error(model))
                model.config.apply_spec_augment = False
            if isinstance(found[0], torch.Tensor):
                torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
            else:
                assert "mask_feature_min_masks" in found[0]
                assert isinstance(found[1], torch.Tensor) or found[1] == found[0]


def logits_or_error(model):
    try:
        return model(waveforms()).logits
    except AttributeError as error:
        return str(error)


def weights_of_another_class(trio):
    class Weight(nn.Parameter):
        pass

    for model in trio.all:
        dense = model.wavlm.encoder.layers[0].feed_forward.output_dense
        dense.weight = Weight(dense.weight.detach())
    trio.compare()
    for model in trio.all:
        dense = model.wavlm.encoder.layers[0].feed_forward.output_dense
        dense.weight = nn.Parameter(dense.weight.detach())


def other_activations(trio):
    for name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "gelu"):
        for model in trio.all:
            for layer in model.wavlm.encoder.layers:
                layer.feed_forward.intermediate_act_fn = ACT2FN[name]
            for layer in model.wavlm.feature_extractor.conv_layers:
                layer.activation = ACT2FN[name]
        trio.compare()


def changed_weights(trio):
    """In evaluation, where weights are packed; the extension sees changes, and without it Python does."""
    for look in (derived._fingerprint, None):
        derived.use_fingerprint(look)
        trio.compare()
        with torch.no_grad():
            for model in trio.all:
                for parameter in model.wavlm.encoder.layers.parameters():
                    if parameter.dim() > 1:
                        parameter.view(-1)[1] += 1.0  # not among the values that are sampled
        trio.compare()
    if cpu.extension.problem() is None:
        derived.use_fingerprint(torch.ops.wavlm_fast_cpu.fingerprint.default)


def checkpointed_with_a_frozen_front_end(trio):
    for model in trio.all:  # transformers' own runs layers again and again in the reentrant form
        model.freeze_feature_encoder()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": model is trio.ours})
    trio.compare_gradients()
    for model in trio.all:
        model.gradient_checkpointing_disable()


def weight_norm_as_it_was(trio):
    for model in trio.all:
        embedding = model.wavlm.encoder.pos_conv_embed
        now, options = embedding.conv, {"padding": embedding.conv.padding, "groups": embedding.conv.groups}
        conv = nn.Conv1d(now.in_channels, now.out_channels, now.kernel_size, **options)
        conv.weight, conv.bias = nn.Parameter(now.weight.detach().clone()), now.bias
        embedding.conv = nn.utils.weight_norm(conv, dim=2)
    trio.compare()


def lengths_and_buckets(trio):
    """Beside the methods of transformers, which are still there where they are only hidden."""
    model, samples, frames = trio.ours, torch.tensor([600, 400, 37]), torch.tensor([29, 11, 3])
    attention, positions = model.wavlm.encoder.layers[0].attention, torch.arange(-40, 41)
    for ours, method, arguments in (
        (_private.frame_lengths, "_get_feat_extract_output_lengths", (model, samples)),
        (_private.frame_lengths, "_get_feat_extract_output_lengths", (model, samples, False)),
        (_private.tdnn_lengths, "_get_tdnn_output_lengths", (model, frames)),
        (_private.relative_positions_bucket, "_relative_positions_bucket", (attention, positions)),
    ):
        if hasattr(arguments[0], method):
            assert torch.equal(ours(*arguments), getattr(arguments[0], method)(*arguments[1:])), method


def half_precision(trio):
    half = copy.copy(trio)
    half.plain, half.ours = (copy.deepcopy(model).bfloat16() for model in trio.all[:2])
    half.double = truth_of(half.plain)
    half.compare(**MASK)
    with _private.without_memory():  # as report asks
        assert onednn.why_not.__wrapped__() == onednn.why_not()


def originals_freed(trio):
    with torch.no_grad():
        expected = trio.ours(waveforms()).logits
        wavlm_fast.accelerate(trio.ours.eval(), keep_originals=False)
        assert torch.equal(trio.ours.to("cpu").eval()(waveforms()).logits, expected)
    wavlm_fast.report(trio.ours)


def left(trio, name):
    """Traced and transformed: as transformers, or refused where what would tell is gone."""
    x = waveforms()

    def value(model):
        return lambda x: model(x).logits.square().mean()

    expected = torch.func.grad(value(trio.plain))(x)
    try:
        found = torch.func.grad(value(trio.ours))(x)
    except RuntimeError:
        assert name == "peek_interpreter_stack"
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    with torch.no_grad():
        traced = torch.jit.trace(trio.ours, (x,), strict=False, check_trace=False)
        torch.testing.assert_close(traced(x)["logits"], trio.plain(x).logits, rtol=1e-3, atol=1e-3)
    assert not any(node.kind().startswith("wavlm_fast") for node in traced.inlined_graph.nodes())


def installed():
    wavlm_fast.install()
    model = transformers.WavLMModel(small_config(num_hidden_layers=1)).eval()
    wavlm_fast.uninstall()
    assert isinstance(model, wavlm_fast.WavLMModel)
    assert len(model(waveforms(), output_hidden_states=True).hidden_states) == 2
    assert _look_at(model) == _look_at(model) or hides("_version")
    assert "the model is on cpu" in str(wavlm_fast.graphed(model, {"input_values": waveforms()}))


def restored(trio):
    wavlm_fast.restore(trio.ours)
    assert [type(m) for m in trio.ours.modules()] == [type(m) for m in trio.plain.modules()]
    with torch.no_grad():
        kwargs = {"output_hidden_states": True, **MASK}
        assert_same(trio.ours(waveforms(), **kwargs), trio.plain(waveforms(), **kwargs))


def hides(name):
    return any(known.name == name and known.found is False for known in _private.NAMES)


def told(model, owner, name):
    """What is lost is told, and nothing but that."""
    known = next((n for n in _private.NAMES if (n.owner, n.name) == (owner, name)), None)
    expected = [] if known is None or known.found is None else [str(known)]
    report = wavlm_fast.report(model)
    assert list(report.missing) == doctor.examine()["private"]["missing"] == expected
    assert all(sentence in str(report) for sentence in expected)
