"""Packed frames: what an op gives for them is what it gives for each utterance alone, and nothing passes a boundary."""

import op_contract as contract
import pytest
import torch
from packed_calls import CALLS, DIFFERENTIATED, EXTRA, LONGEST, offsets_of
from torch.utils._python_dispatch import TorchDispatchMode

from wavlm_fast import use_backend


def lengths_of(call, extra):
    return [call.least + n for n in EXTRA[extra]]


def packing(lengths, call):
    """offsets, out_offsets and out_frames."""
    out = [call.lengths(n) for n in lengths]
    return (offsets_of(lengths), None, None) if out[0] is None else (offsets_of(lengths), offsets_of(out), sum(out))


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
    with torch.no_grad():
        wanted = call.packed(lengths, packed, shared)
        torch.testing.assert_close(compiled(packed, shared, *packing(lengths, call)), wanted)


def recorded(run):
    """The calls of our ops that `run` makes, as the dispatcher gets them: op and arguments."""
    found = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "wavlm_fast":
                found.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        run()
    return found


@pytest.mark.parametrize("name", CALLS)
def test_registration(name):
    """Schema, autograd, fake and dynamic shapes, forward and backward."""
    call = CALLS[name]
    lengths = [call.least + 2, call.least + 3, call.least]
    packed, shared = call.inputs(lengths, torch.float32)

    if name not in DIFFERENTIATED:
        with torch.no_grad():
            ((op, args),) = recorded(lambda: call.packed(lengths, packed, shared))
        torch.library.opcheck(op, args)
        return

    def run():
        mine = contract.learning(*packed), contract.learning(*shared)
        call.packed(lengths, *mine).sum().backward()

    forward, backward = recorded(run)
    assert [op for op, _ in (forward, backward)] == [contract.overload(call.name + s) for s in ("", "_backward")]
    op, args = forward
    torch.library.opcheck(op, tuple(contract.learning(a)[0] if is_floating(a) else a for a in args))
    op, args = backward  # as autograd calls it, which records nothing of it
    torch.library.opcheck(op, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args))


def is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("name", CALLS)
def test_autocast(name):
    """As for each utterance alone, in dtype and, to its rounding, in value: offsets are no numbers to be rounded."""
    call = CALLS[name]
    # Offsets that bfloat16 does not have.
    lengths = [call.least + 258, call.least + 3, call.least + 4]
    lengths = [min(n, LONGEST) if call.name in ("gated_attention", "encoder_layer") else n for n in lengths]
    packed, shared = call.inputs(lengths, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), use_backend("reference"):
        found, wanted = call.packed(lengths, packed, shared), call.alone(lengths, packed, shared)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted)
    mine = contract.learning(*packed)
    if name in DIFFERENTIATED:
        with torch.autocast("cpu", torch.bfloat16):
            out = call.packed(lengths, mine, shared)
        grads = torch.autograd.grad(out.float().square().sum(), mine)
        assert all(g.dtype == torch.float32 and g.shape == x.shape for g, x in zip(grads, mine, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_strided(name):
    """Frames, parameters and offsets with gaps in memory."""
    call = CALLS[name]
    lengths = [call.least + 2, call.least + 30, call.least]
    packed, shared = call.inputs(lengths, torch.float32)
    offsets, out_offsets, out_frames = packing(lengths, call)
    apart = [None if o is None else o.repeat_interleave(2)[::2] for o in (offsets, out_offsets)]
    # Attention itself asks for a contiguous head dim.
    gaps = [x.repeat_interleave(2, 1)[:, ::2] if x.dim() == 4 else contract.strided(x) for x in packed]
    with torch.no_grad():
        wanted = call.call(packed, shared, offsets, out_offsets, out_frames)
        found = call.call(gaps, tuple(None if t is None else contract.strided(t) for t in shared), *apart, out_frames)
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous()


@pytest.mark.parametrize("name", CALLS)
def test_refusals(name):
    """Of shapes and dtypes, by whatever backend."""
    call = CALLS[name]
    lengths = [call.least + 2, call.least + 3]
    packed, shared = call.inputs(lengths)
    run = torch.no_grad()(lambda *args: call.call(packed, shared, *args))
    offsets, out_offsets, out_frames = packing(lengths, call)
    resized = (out_offsets, out_frames)
    with contract.refuses(TypeError, f"{call.name} wants offsets of torch.int32, got torch.int64"):
        run(offsets.long(), *resized)
    with contract.refuses(TypeError, f"{call.name} wants offsets of torch.int32, got torch.float32"):
        run(offsets.float(), *resized)
    with contract.refuses(ValueError, f"{call.name} wants offsets of shape [B + 1], got [1, 3]"):
        run(offsets[None], *resized)
    with contract.refuses(ValueError, f"{call.name} wants offsets of one utterance or more, got [1]"):
        run(offsets[:1], *resized)
    with contract.refuses(ValueError, f"{call.name} wants offsets of one utterance or more, got [0]"):
        run(offsets[:0], *resized)
    if out_frames is None:
        return
    sentence = f"{call.name} wants offsets, out_offsets and out_frames together, or none of them"
    for some in ((offsets, None, None), (None, *resized), (offsets, out_offsets, None), (offsets, None, out_frames)):
        with contract.refuses(ValueError, sentence):
            run(*some)
    with contract.refuses(TypeError, f"{call.name} wants out_offsets of torch.int32, got torch.int64"):
        run(offsets, out_offsets.long(), out_frames)
    with contract.refuses(ValueError, f"{call.name} wants out_offsets of shape [3], got [2]"):
        run(offsets, out_offsets[1:], out_frames)
    for few in (1, 0, -1, -(2**62)):
        sentence = f"{call.name} wants out_frames of one in each utterance or more, got {few} in all"
        with contract.refuses(ValueError, sentence):
            run(offsets, out_offsets, few)
    for many in (sum(lengths) + 1, 2**31, 2**62):
        sentence = f"{call.name} wants out_frames of {sum(lengths)}, the frames it is given, or less, got {many}"
        with contract.refuses(ValueError, sentence):
            run(offsets, out_offsets, many)


def wrong_numbers(offsets):
    """What is no row of boundaries of as many frames."""
    first, inner, last = (torch.tensor([i == n for i in range(3)]) for n in range(3))
    yield "beginning later", offsets + first.int()
    yield "beginning before", offsets - first.int()
    yield "ending later", offsets + last.int()
    yield "ending before", offsets - last.int()
    yield "an empty utterance", torch.where(inner, 0, offsets)
    yield "all in the first", torch.where(inner, offsets[-1], offsets)
    yield "falling", offsets.flip(0)
    yield "negative", torch.where(inner, -3, offsets)
    yield "beyond", torch.where(inner, 2**31 - 1, offsets)
    yield "far below", torch.where(inner, -(2**31), offsets)
    yield "zeros", 0 * offsets


@pytest.mark.parametrize("name", CALLS)
def test_wrong_numbers(name):
    """Of what stands in offsets: by the reference and, on CPUs, by kernels, before anything is computed."""
    call = CALLS[name]
    lengths = [call.least + 2, call.least + 3]
    packed, shared = call.inputs(lengths, torch.float32)
    offsets, out_offsets, out_frames = packing(lengths, call)
    refused = pytest.raises((ValueError, RuntimeError), match="offsets|out_frames")
    for backend in ("reference", "auto"):
        with use_backend(backend), torch.no_grad():
            for what, wrong in wrong_numbers(offsets):
                with refused:
                    call.call(packed, shared, wrong.int(), out_offsets, out_frames)
                    pytest.fail(f"offsets {what} are taken by {backend}")
            for what, wrong in wrong_numbers(out_offsets) if out_frames else ():
                with refused:
                    call.call(packed, shared, offsets, wrong.int(), out_frames)
                    pytest.fail(f"out_offsets {what} are taken by {backend}")
            for other in (out_frames - 1, out_frames + 1) if out_frames else ():
                with refused:
                    call.call(packed, shared, offsets, out_offsets, other)
                    pytest.fail(f"{other} out_frames are taken by {backend}")


@pytest.mark.parametrize("name", [name for name in DIFFERENTIATED if CALLS[name].lengths(100) is not None])
def test_gradients_want_offsets_that_fit_each_other(name):
    """A backward reads frames and gradients: one utterance's of the one must not meet another's of the other."""
    call = CALLS[name]
    lengths = [call.least + 7, call.least + 9, call.least + 8]
    mine = tuple(contract.learning(*group) for group in call.inputs(lengths, torch.float32))
    *_, (op, args) = recorded(lambda: call.packed(lengths, *mine).sum().backward())
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    moved = args[-2] + torch.tensor([0, 1, 0, 0], dtype=torch.int32)
    for backend in ("reference", "auto"):
        with use_backend(backend):
            op(*args)
            with pytest.raises((ValueError, RuntimeError), match="out_offsets"):
                op(*args[:-2], moved, args[-1])
