"""The CPU's convolutions of packed samples and frames: each utterance as if it were alone, whatever lies beside it."""

from __future__ import annotations

from itertools import pairwise

import op_contract as contract
import pytest
import torch
from cpu_rule import assert_no_worse, check_threads
from packed_calls import CALLS, DIFFERENTIATED, EXTRA, offsets_of

from wavlm_fast import backends, use_backend
from wavlm_fast.backends import cpu
from wavlm_fast.backends.cpu import onednn, packed_conv

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))

OPS = ("feature_encoder", "strided_conv", "tdnn", "waveform_conv")
FRONT = [name for name, call in CALLS.items() if call.name in OPS]
LEARNING = [name for name in FRONT if name in DIFFERENTIATED]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Utterances of many blocks of frames, and of many pieces of the front end, between short ones.
MORE = {**EXTRA, "long among short": (0, 2570, 1, 703, 0)}


def inputs_of(name, extra, dtype, more=0):
    call = CALLS[name]
    lengths = [call.least + n + more for n in MORE[extra]]
    return call, lengths, *call.inputs(lengths, dtype)


def doubled(tensors):
    return tuple(None if t is None else t.double() for t in tensors)


def gradients(run, lengths, packed, shared, upstream):
    packed, shared = contract.learning(*packed), contract.learning(*shared)
    inputs = [t for t in (*packed, *shared) if t is not None]
    return torch.autograd.grad(run(lengths, packed, shared), inputs, upstream)


def check_rule(name, extra, dtype):
    """The rule of the house, its truth each utterance alone."""
    # A group norm over two or three frames blows rounding errors up, ours and torch's, each by chance.
    more = 40 if name == "waveform_conv, group" else 0
    call, lengths, packed, shared = inputs_of(name, extra, dtype, more)
    with use_backend("cpu"):
        found = call.packed(lengths, packed, shared)
    with use_backend("reference"):
        plain = call.packed(lengths, packed, shared)
        truth = call.alone(lengths, doubled(packed), doubled(shared))
    assert_no_worse(name, (found,), (plain,), (truth,))


def check_gradient_rule(name, extra, dtype):
    call, lengths, packed, shared = inputs_of(name, extra, dtype)
    with use_backend("reference"):
        upstream = contract.randn(*call.packed(lengths, packed, shared).shape, seed=7, dtype=dtype)
        plain = gradients(call.packed, lengths, packed, shared, upstream)
        truth = gradients(call.alone, lengths, doubled(packed), doubled(shared), upstream.double())
    with use_backend("cpu"):
        found = gradients(call.packed, lengths, packed, shared, upstream)
    assert_no_worse(name, found, plain, truth)


@DTYPES
@pytest.mark.parametrize("extra", MORE)
@pytest.mark.parametrize("name", FRONT)
def test_each_utterance_as_if_alone(name, extra, dtype):
    check_rule(name, extra, dtype)


@pytest.mark.parametrize("extra", MORE)
@pytest.mark.parametrize("name", FRONT)
def test_the_very_bits_of_each_utterance_alone(name, extra):
    call, lengths, packed, shared = inputs_of(name, extra, torch.float32)
    with use_backend("cpu"), torch.no_grad():
        assert torch.equal(call.packed(lengths, packed, shared), call.alone(lengths, packed, shared))


@DTYPES
@pytest.mark.parametrize("extra", MORE)
@pytest.mark.parametrize("name", LEARNING)
def test_gradients(name, extra, dtype):
    check_gradient_rule(name, extra, dtype)


needs_onednn = pytest.mark.skipif(onednn.why_not() is not None, reason=str(onednn.why_not()))
IN_ONEDNN = [name for name in FRONT if name.startswith(("strided_conv", "tdnn", "feature_encoder"))]


@needs_onednn
@pytest.mark.parametrize("extra", MORE)
@pytest.mark.parametrize("name", IN_ONEDNN)
def test_in_onednn(name, extra, monkeypatch):
    monkeypatch.setattr(packed_conv, "_prefers_onednn", lambda: True)
    if not name.startswith("feature_encoder"):
        check_rule(name, extra, torch.bfloat16)
        return
    call, lengths, packed, shared = inputs_of(name, extra, torch.bfloat16)  # layer by layer there
    found = [run(lengths, packed, shared) for run in (call.packed, call.alone)]
    assert_no_worse(name, found[:1], found[1:], (call.alone(lengths, doubled(packed), doubled(shared)),))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FRONT)
def test_nothing_passes_a_boundary(name, value):
    check_boundaries(name, value, torch.float32)


@needs_onednn
@pytest.mark.parametrize("name", [name for name in IN_ONEDNN if not name.startswith("feature_encoder")])
def test_nothing_passes_a_boundary_in_onednn(name, monkeypatch):
    monkeypatch.setattr(packed_conv, "_prefers_onednn", lambda: True)
    check_boundaries(name, float("nan"), torch.bfloat16)


def check_boundaries(name, value, dtype):
    """An utterance of nothing but `value`: those around it keep their bits, and so do the gradients of their frames."""
    call = CALLS[name]
    lengths = [call.least + n for n in (1, 4, 3)]
    (x,), shared = call.inputs(lengths, dtype)
    ends, out_ends = offsets_of(lengths).tolist(), offsets_of(map(call.lengths, lengths)).tolist()
    spoilt = x.clone()
    spoilt[:, ends[1] : ends[2]] = value
    found = []
    with use_backend("cpu"):
        for given in (x, spoilt):
            given = given.clone().requires_grad_(name in LEARNING)
            out = call.packed(lengths, (given,), shared)
            grads = torch.autograd.grad(out.float().square().sum(), given)[0] if name in LEARNING else None
            found.append((out.detach(), grads))
    for before, after, at in zip(*found, (out_ends, ends), strict=True):
        for b, (first, end) in enumerate(pairwise(at)):
            if before is not None and b != 1:
                assert torch.equal(before[:, first:end], after[:, first:end])


@pytest.mark.parametrize("name", FRONT)
def test_threads_do_not_change_a_bit(name):
    call, lengths, packed, shared = inputs_of(name, "long among short", torch.float32)
    real, made = backends.choose, []

    def choose(op, args):
        made.append((op, args))
        return real(op, args)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(backends, "choose", choose)
        call.packed(lengths, packed, shared)
    assert made
    for op, args in made:
        check_threads(op, *args)


def native_call(name):
    """The entry of csrc/ behind an op or its gradient, and its arguments up to the offsets, for utterances of 31, 40
    and 33 samples or frames.
    """
    native = torch.ops.wavlm_fast_cpu
    weight = torch.ones(4, 1, 10)
    first = native.pack_conv([weight], False)
    if name == "packed_conv":
        packed = native.pack_conv([torch.ones(5, 3, 4)], False)
        return native.packed_conv, (torch.ones(1, 104, 4), packed, None, 5, 3, 2, 1, False, "none")
    if name == "packed_conv, filtered":
        packed = native.pack_conv([torch.ones(5, 3, 4)], True)
        return native.packed_conv, (torch.ones(1, 104, 4), packed, None, 5, 3, 2, 1, True, "none")
    tail = (None, None, 1e-5, "none")
    if name == "waveform_conv":
        return native.waveform_conv, (torch.ones(1, 104), weight, first, None, 5, True, *tail, False)
    if name == "waveform_conv_backward":
        vector = torch.ones(4)
        grad = torch.ones(1, sum(OUT[name]), 4)
        return native.waveform_conv_backward, (
            grad, torch.ones(1, 104), weight, 5, vector, vector, 1e-5, "none", True,
        )  # fmt: skip
    further = native.pack_conv([torch.ones(4, 2, 4)], False)
    nothing = [None, None]
    return native.feature_encoder, (
        torch.ones(1, 104), weight, [first, further], nothing, nothing, nothing, [10, 2], [5, 2], [4, 4],
        [False, False], "group", 1e-5, "none",
    )  # fmt: skip


IN = (31, 40, 33)
OUT = {
    "packed_conv": (15, 19, 16),
    "packed_conv, filtered": (15, 19, 16),
    "waveform_conv": (5, 7, 5),
    "waveform_conv_backward": (5, 7, 5),
    "feature_encoder": (2, 3, 2),
}
WRONG = {
    "not from 0": lambda i, o, n: (i + 1, o, n),
    "not to the end": lambda i, o, n: (torch.tensor([0, 31, 71, 103], dtype=torch.int32), o, n),
    "beyond the end": lambda i, o, n: (torch.tensor([0, 31, 200, 104], dtype=torch.int32), o, n),
    "falling": lambda i, o, n: (torch.tensor([0, 71, 31, 104], dtype=torch.int32), o, n),
    "negative": lambda i, o, n: (torch.tensor([0, -5, 31, 104], dtype=torch.int32), o, n),
    "an empty utterance": lambda i, o, n: (torch.tensor([0, 31, 31, 104], dtype=torch.int32), o, n),
    "a short utterance": lambda i, o, n: (torch.tensor([0, 31, 33, 104], dtype=torch.int32), o, n),
    "more utterances than frames": lambda i, o, n: (torch.arange(106, dtype=torch.int32), o, n),
    "of int64": lambda i, o, n: (i.long(), o, n),
    "of two rows": lambda i, o, n: (i[None], o, n),
    "none": lambda i, o, n: (i[:1], o, n),
    "others than out_offsets": lambda i, o, n: (torch.tensor([0, 40, 71, 104], dtype=torch.int32), o, n),
    "out_offsets of others": lambda i, o, n: (i, o + torch.tensor([0, 1, 0, 0], dtype=torch.int32), n),
    "fewer out_offsets": lambda i, o, n: (i, o[[0, 1, 3]], n),
    "out_frames of others": lambda i, o, n: (i, o, n + 1),
    "out_frames without bound": lambda i, o, n: (i, o, 2**62),
    "offsets alone": lambda i, o, n: (i, None, None),
    "out_frames alone": lambda i, o, n: (None, None, n),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", OUT)
def test_an_entry_looks_at_the_values_of_offsets(name, wrong):
    entry, args = native_call(name)
    right = (offsets_of(IN), offsets_of(OUT[name]), sum(OUT[name]))
    entry(*args, *right)
    with pytest.raises(RuntimeError, match=r"expected (offsets|out_offsets|out_frames)"):
        entry(*args, *WRONG[wrong](*right))


@pytest.mark.parametrize(
    "wrong", [w for w in WRONG if "alone" not in w and w not in ("of int64", "of two rows", "none")]
)
@pytest.mark.parametrize("name", ["strided_conv_backward", "tdnn_backward"])
def test_gradients_look_at_the_values_of_offsets(name, wrong):
    out = OUT["packed_conv"] if name == "strided_conv_backward" else tuple(n - 4 for n in IN)
    x, grad, pre = torch.ones(1, 104, 4), torch.ones(1, sum(out), 5), torch.ones(1, sum(out), 5)
    if name == "strided_conv_backward":
        args = (grad, x, torch.ones(5, 4, 3), None, pre, 2, None, None, 1e-5, "gelu", [True, True, False, False, False])
    else:
        args = (grad, x, torch.ones(5, 12), None, pre, 3, 2, "relu", [True, True, False])
    right = (offsets_of(IN), offsets_of(out), sum(out))
    cpu.TABLE[name].fn(*args, *right)
    with pytest.raises(ValueError, match="wants (offsets|out_offsets)"):
        cpu.TABLE[name].fn(*args, *WRONG[wrong](*right))
