"""Packed frames: what an op gives for them is what it gives for each utterance alone, and nothing passes a boundary."""

import op_contract as contract
import pytest
import torch
from packed_calls import CALLS, DIFFERENTIATED, EXTRA, offsets_of

from wavlm_fast import use_backend


def lengths_of(call, extra):
    return [call.least + n for n in EXTRA[extra]]


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("name", CALLS)
def test_the_reference_is_each_utterance_alone(name, extra):
    call = CALLS[name]
    lengths = lengths_of(call, extra)
    packed, shared = call.inputs(lengths)
    with use_backend("reference"):
        found, wanted = call.packed(lengths, packed, shared), call.alone(lengths, packed, shared)
    contract.check_equal(found, wanted)


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_are_those_of_each_utterance_alone(name, extra):
    call, found = CALLS[name], []
    lengths = lengths_of(call, extra)
    packed, shared = call.inputs(lengths)
    for run in (call.packed, call.alone):
        mine = contract.learning(*packed), contract.learning(*shared)
        with use_backend("reference"):
            out = run(lengths, *mine)
            upstream = contract.randn(*out.shape, seed=7)
            found.append(torch.autograd.grad(out, [t for group in mine for t in group if t is not None], upstream))
    for own, wanted in zip(*found, strict=True):
        contract.check_equal(own, wanted)


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_of_gradients(name):
    call = CALLS[name]
    lengths = [call.least + 2, call.least + 3]
    packed, shared = call.inputs(lengths)
    inputs = [t for t in (*packed, *shared) if t is not None]

    def run(*given):
        given = iter(given)
        own = tuple(next(given) for _ in packed)
        return call.packed(lengths, own, tuple(None if t is None else next(given) for t in shared))

    mine = contract.learning(*inputs)
    assert torch.autograd.gradcheck(run, mine, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, mine, fast_mode=True)


@pytest.mark.parametrize("name", CALLS)
def test_compiles(name):
    call = CALLS[name]
    lengths = [call.least + 2, call.least + 3]
    packed, shared = call.inputs(lengths, torch.float32)
    compiled = torch.compile(call.call, fullgraph=True, backend="aot_eager")
    out = [call.lengths(n) for n in lengths]
    resized = (None, None) if out[0] is None else (offsets_of(out), sum(out))
    with torch.no_grad():
        wanted = call.packed(lengths, packed, shared)
        torch.testing.assert_close(compiled(packed, shared, offsets_of(lengths), *resized), wanted)


@pytest.mark.parametrize("name", CALLS)
def test_refusals(name):
    call = CALLS[name]
    lengths = [call.least + 2, call.least + 3]
    packed, shared = call.inputs(lengths)
    out = [call.lengths(n) for n in lengths]
    resized = (None, None) if out[0] is None else (offsets_of(out), sum(out))
    run = torch.no_grad()(lambda *args: call.call(packed, shared, *args))
    offsets = offsets_of(lengths)
    with contract.refuses(TypeError, f"{call.name} wants offsets of torch.int32, got torch.int64"):
        run(offsets.long(), *resized)
    with contract.refuses(ValueError, f"{call.name} wants offsets of shape [B + 1], got [1, 3]"):
        run(offsets[None], *resized)
    with contract.refuses(ValueError, f"{call.name} wants offsets of one utterance or more, got [1]"):
        run(offsets[:1], *resized)
    with pytest.raises((ValueError, RuntimeError), match="offsets"):
        run(offsets + 1, *resized)
    with pytest.raises((ValueError, RuntimeError), match="offsets"):
        run(offsets.flip(0), *resized)
    if out[0] is not None:
        sentence = f"{call.name} wants offsets, out_offsets and out_frames together, or none of them"
        with contract.refuses(ValueError, sentence):
            run(offsets, None, None)
        with pytest.raises((ValueError, RuntimeError), match="out"):
            run(offsets, resized[0], resized[1] + 1)
