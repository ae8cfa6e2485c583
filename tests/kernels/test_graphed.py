"""CUDA graphs on a real GPU."""

import sys

import pytest
import torch
from cases import DEVICE
from test_model import FORMS, tiny

import wavlm_fast

pytestmark = pytest.mark.skipif(
    DEVICE != "cuda" or "ttsem" in sys.modules or not torch.cuda.is_available(), reason="graphs need a real GPU"
)


def example(batch=2, samples=420, masked=True):
    found = {"input_values": torch.randn(batch, samples, device=DEVICE)}
    if masked:
        mask = torch.ones(batch, samples, dtype=torch.long, device=DEVICE)
        mask[-1, samples // 2 :] = 0
        found["attention_mask"] = mask
    return found


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_replays_are_the_model_bit_for_bit(form):
    model = wavlm_fast.accelerate(tiny(form)).to(DEVICE)
    graphed = wavlm_fast.graphed(model, [example(), example(1, 800, masked=False)])
    assert len(graphed._graphs) == 2, str(graphed)
    for _ in range(3):
        for given in (example(), example(1, 800, masked=False), example(3)):
            assert torch.equal(graphed(**given).last_hidden_state, model(**given).last_hidden_state)
    assert graphed.fallbacks.total() == 3


@torch.no_grad()
def test_calls_on_two_streams_wait_for_each_other():
    model = wavlm_fast.accelerate(tiny("base")).to(DEVICE)
    graphed = wavlm_fast.graphed(model, example())
    given = [example() for _ in range(20)]
    expected = [model(**g).last_hidden_state for g in given]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for index, g in enumerate(given):
        with torch.cuda.stream(streams[index % 2]):
            found.append(graphed(**g).last_hidden_state)
    torch.cuda.synchronize()
    for f, e in zip(found, expected):
        assert torch.equal(f, e)
    assert not graphed.fallbacks


@torch.no_grad()
def test_changed_weights_are_seen_and_captured_again():
    model = wavlm_fast.accelerate(tiny("base")).to(DEVICE)
    graphed = wavlm_fast.graphed(model, example())
    given = example()
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert torch.equal(graphed(**given).last_hidden_state, model(**given).last_hidden_state)
    assert graphed.fallbacks.total() == 1
    graphed.capture()
    assert torch.equal(graphed(**given).last_hidden_state, model(**given).last_hidden_state)
    assert graphed.fallbacks.total() == 1


@torch.no_grad()
def test_transformers_own_model_runs_captured_or_not():
    model = tiny("base").to(DEVICE)
    graphed = wavlm_fast.graphed(model, example())
    given = example()
    assert torch.equal(graphed(**given).last_hidden_state, model(**given).last_hidden_state)
    assert graphed._graphs or "cannot be captured" in str(graphed)
