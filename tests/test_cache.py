"""Memory that kernels keep from call to call is given back when somebody asks, never while it is in use."""

from __future__ import annotations

import multiprocessing
import threading
import time

import pytest
import torch

from wavlm_fast import WavLMConfig, WavLMModel, empty_cache
from wavlm_fast.backends import cpu
from wavlm_fast.backends.cpu import encoder_layer, extension
from wavlm_fast.derived import nbytes

pytestmark = pytest.mark.skipif(extension.problem() is not None, reason=str(extension.problem()))

_NARROW = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


@pytest.fixture(scope="module")
def model():
    return WavLMModel(WavLMConfig(**_NARROW)).eval()


@pytest.fixture
def waveform():
    return torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _run(model, waveform):
    return model(waveform).last_hidden_state


def test_nothing_is_kept_afterwards_and_the_next_call_is_right(model, waveform):
    wanted = _run(model, waveform)
    assert extension.kept_scratch() > 100_000
    empty_cache()
    assert extension.kept_scratch() == 0
    assert torch.equal(_run(model, waveform), wanted)
    assert extension.kept_scratch() > 100_000


def test_of_threads_too(model, waveform):
    """Of those that wait for their next call, and of those that have ended."""
    empty_cache()
    done, go_on = threading.Event(), threading.Event()

    def work():
        _run(model, waveform)
        done.set()
        go_on.wait()

    thread = threading.Thread(target=work)
    thread.start()
    done.wait()
    assert extension.kept_scratch() > 100_000
    empty_cache()
    assert extension.kept_scratch() == 0
    go_on.set()
    thread.join()

    thread = threading.Thread(target=_run, args=(model, waveform))
    thread.start()
    thread.join()
    empty_cache()
    assert extension.kept_scratch() == 0


def test_a_thread_that_ends_gives_back_its_own(model, waveform):
    def work():
        torch.set_num_threads(1)  # so that nobody else has a part in it
        _run(model, waveform)

    threads = torch.get_num_threads()
    empty_cache()
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    # join waits for Python's part of a thread; what C++ does at its end comes after that.
    patience = time.monotonic() + 60
    while extension.kept_scratch() and time.monotonic() < patience:
        time.sleep(0.01)
    assert extension.kept_scratch() == 0


def test_calls_that_are_running_are_not_disturbed(model, waveform):
    batches = [waveform, torch.cat([waveform, waveform.flip(1)])]
    wanted = [_run(model, batch) for batch in batches]
    off = []

    def work(batch, wanted):
        for _ in range(40):
            if not torch.equal(_run(model, batch), wanted):
                off.append(batch.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, wanted, strict=True)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        extension.release_scratch()
    assert not off


def test_what_a_long_utterance_takes_is_not_kept():
    """A layer's projections of 4,200 frames are 51 MB, more than is kept of a call."""
    config = WavLMConfig(**{**_NARROW, "hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 2})
    model, frames = WavLMModel(config).eval(), 4200
    layer = model.encoder.layers[0]
    x = torch.randn(1, frames, 1024, generator=torch.Generator().manual_seed(0))
    empty_cache()
    with torch.no_grad():
        bias = torch.zeros(2, 2 * frames - 1)
        attention, feed_forward = layer.attention, layer.feed_forward
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
        linears += (feed_forward.intermediate_dense, feed_forward.output_dense)
        gate = attention.gru_rel_pos_linear
        norms = (layer.layer_norm, layer.final_layer_norm)
        torch.ops.wavlm_fast.encoder_layer(
            x, bias, None, [m.weight for m in linears], [m.bias for m in linears],
            [gate.weight, gate.bias, attention.gru_rel_pos_const.flatten()],
            [v for n in norms for v in (n.weight, n.bias)], [n.eps for n in norms], 512**-0.5, "gelu", False, None,
        )  # fmt: skip
    assert 0 < extension.kept_scratch() < 20e6


def test_for_a_long_utterance_no_layer_keeps_packed_weights(model, waveform, monkeypatch):
    weights = [layer.feed_forward.output_dense.weight for layer in model.encoder.layers]
    fresh = WavLMModel(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    own = [layer.feed_forward.output_dense.weight for layer in fresh.encoder.layers]
    wanted = _run(model, waveform)
    assert nbytes(weights) > 0
    monkeypatch.setattr(encoder_layer, "_LONG", 49)
    assert torch.equal(_run(fresh, waveform), wanted)
    assert nbytes(own) == 0
    assert torch.equal(_run(model, waveform), wanted)
    monkeypatch.undo()
    assert torch.equal(_run(fresh, waveform), wanted)
    assert nbytes(own) > 0


def test_a_fork_can_use_and_release(model, waveform):
    """Also one of a process whose threads are in the middle of a call."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            _run(model, waveform)

    thread = threading.Thread(target=work)
    wanted = _run(model, waveform)
    thread.start()
    try:
        child = multiprocessing.get_context("fork").Process(target=_in_fork, args=(model, waveform, wanted))
        child.start()
        child.join(60)
        assert child.exitcode == 0
    finally:
        stop.set()
        thread.join()


def _in_fork(model, waveform, wanted):
    torch.set_num_threads(1)  # the threads of torch stayed behind
    extension.release_scratch()
    assert torch.equal(_run(model, waveform), wanted)
    extension.release_scratch()


def test_without_the_extension_there_is_nothing_to_give_back(monkeypatch):
    monkeypatch.setattr(cpu.extension, "problem", lambda: "extension not built")
    empty_cache()
    assert extension.kept_scratch() == 0
