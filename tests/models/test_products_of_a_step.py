"""Which products a training step computes where much of a model is frozen: no gradient that nobody asked for, and no
packing of what does not learn."""

from collections import Counter

import pytest
import torch
from wavlm_cases import fast_model, ours_only, small_config, waveforms

from wavlm_fast.backends.cpu import extension
from wavlm_fast.benchmarks.run.lora import Adapter, adapted

needs_kernels = pytest.mark.skipif(extension.problem() is not None, reason=f"{extension.problem()}")
pytestmark = [ours_only, needs_kernels]
LAYERS = 3


def counted(model):
    """How often a third step called each op of ours and of torch, kernels and the products inside of them too."""
    learning = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-3)

    def step():
        optimizer.zero_grad()
        model(waveforms()).last_hidden_state.square().sum().backward()
        optimizer.step()

    step()
    step()
    with torch.autograd.profiler.profile() as profile:
        step()
    assert all(p.grad is not None and p.grad.any() for p in learning)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return Counter(event.name.removeprefix("wavlm_fast_cpu::") for event in profile.function_events)


def assert_front_end_without_gradient(found):
    assert found["feature_encoder"] == 1  # all of it as one op, on filtered and packed weights
    assert not found["strided_conv_backward"]
    assert not found["waveform_conv_backward"]


def test_adapters_alone():
    model = adapted(fast_model("WavLMModel", small_config(num_hidden_layers=LAYERS)), rank=2)
    found = counted(model)
    assert_front_end_without_gradient(found)
    assert not found["positional_conv_backward"]
    # The projection of the front end, and in each layer keys, what leaves the attention and both of the feed-forward.
    assert found["packed_conv"] == 1 + 4 * LAYERS
    assert found["pack_conv"] == 0
    # Of these the gradient of what comes in, and none of weights; nobody asks for that of the first layer's keys.
    assert found["matmul"] == 4 * LAYERS - 1
    # Queries and values are the adapters' business: the base's, down and up, and of them dx each and two of weights;
    # to what comes into the first layer no gradient goes.
    assert sum(isinstance(module, Adapter) for module in model.modules()) == 2 * LAYERS
    assert found["aten::addmm"] == 2 * LAYERS
    assert found["aten::mm"] == 2 * LAYERS * (2 + 5) - 2 * 2
    assert found["gated_attention_backward"] == LAYERS
    assert found["position_gate_backward"] == LAYERS - 1


def test_a_frozen_front_end():
    model = fast_model("WavLMModel", small_config(num_hidden_layers=LAYERS))
    model.freeze_feature_encoder()
    found = counted(model)
    assert_front_end_without_gradient(found)
    assert found["positional_conv_backward"] == 1
    # Projection; queries, keys and values as one, what leaves the attention, and both of the feed-forward.
    linears = 1 + 4 * LAYERS
    assert found["packed_conv"] == linears
    assert found["pack_conv"] == 0  # of weights that are others at the next step
    assert found["matmul"] == 2 * linears  # of what comes in, and of the weight
