"""The C++ positional_conv and stats_pool on packed frames: each utterance as if it were alone, to the last bit."""

from __future__ import annotations

from itertools import accumulate, pairwise

import op_contract as contract
import pytest
import torch
from cpu_rule import TABLE, assert_no_worse, check, check_threads, doubled
from packed_calls import CALLS, EXTRA, offsets_of

from wavlm_fast import use_backend
from wavlm_fast.backends import cpu
from wavlm_fast.parity.rule import poisoned

pytestmark = pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
NAMES = [name for name, call in CALLS.items() if call.name in ("positional_conv", "stats_pool")]


def outputs(backend, run, lengths, packed, shared):
    """The output, and the gradients of all inputs."""
    mine = contract.learning(*packed), contract.learning(*shared)
    with use_backend(backend), poisoned():
        out = run(lengths, *mine)
        upstream = contract.randn(*out.shape, seed=7, dtype=torch.bfloat16).to(out.dtype)
        grads = torch.autograd.grad(out, [t for group in mine for t in group], upstream)
    return (out.detach(), *grads)


@DTYPES
@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("name", NAMES)
def test_each_utterance_alone(name, extra, dtype):
    call = CALLS[name]
    lengths = [call.least + n for n in EXTRA[extra]]
    given = call.inputs(lengths, dtype)
    found = outputs("cpu", call.packed, lengths, *given)
    alone = outputs("cpu", call.alone, lengths, *given)
    for ours, own in zip(found[:2], alone[:2], strict=True):  # what is no sum over utterances
        assert torch.equal(ours, own)
    plain = outputs("reference", call.alone, lengths, *given)
    truth = outputs("reference", call.alone, lengths, *(doubled(group) for group in given))
    assert_no_worse(name, found, plain, truth, floor=1e-6)


def operands(lengths, taps, dtype, channels=12, groups=2):
    x, grad = (contract.randn(1, sum(lengths), channels, seed=i, dtype=dtype) for i in range(2))
    weight = contract.randn(channels, channels // groups, taps, seed=2, dtype=dtype, scale=0.3)
    return x, grad, weight, contract.randn(channels, seed=3, dtype=dtype), groups


@DTYPES
@pytest.mark.parametrize("taps", [1, 6, 15, 16, 31, 128])
def test_lengths_around_those_of_blocks(taps, dtype):
    """An utterance is one row as long as a transform has room for the zeros beside it, then rows of a block each."""
    block = max(16, 1 << (taps - 1).bit_length())
    whole = 2 * block - taps // 2
    lengths = [whole, 1, block, whole + 1, block + 1, 2 * block, whole - 1]
    x, grad, weight, bias, groups = operands(lengths, taps, dtype)
    tail = (groups, "gelu", True)
    out, pre = check("positional_conv", x, weight, bias, *tail, True, offsets_of(lengths))
    assert taps == 1 or not torch.equal(out, check("positional_conv", x, weight, bias, *tail, True)[0])
    wanted = [True] * 3
    check("positional_conv_backward", grad, x, weight, bias, pre, *tail, wanted, offsets_of(lengths))


@DTYPES
@pytest.mark.parametrize("lengths", [(40, 3, 50, 20), (20, 24, 20), (2, 5, 2)])
def test_what_is_not_finite_stays_in_its_utterance(lengths, dtype):
    offsets = offsets_of(lengths)
    x, grad, weight, bias, groups = operands(lengths, 16, dtype)

    def run():
        conv = TABLE["positional_conv"].fn(x, weight, bias, groups, "gelu", True, False, offsets)[0]
        pool = TABLE["stats_pool"].fn(x, None, offsets)
        tail = (groups, "none", True, [True, False, False], offsets)
        dx = TABLE["positional_conv_backward"].fn(grad, x, weight, bias, x.new_empty(0), *tail)[0]
        upstream = torch.ones_like(pool)
        return conv, dx, TABLE["stats_pool_backward"].fn(upstream, x, None, pool, offsets), pool[None]

    before = run()
    for b, (first, end) in enumerate(pairwise([0, *accumulate(lengths)])):
        held = x.clone(), grad.clone()
        x[:, first:end] = grad[:, first:end] = torch.nan
        for found, clean in zip(run(), before, strict=True):
            own = slice(b, b + 1) if clean is before[3] else slice(first, end)
            assert found[:, own].isnan().all()
            found[:, own] = clean[:, own]
            assert torch.equal(found, clean)
        x.copy_(held[0])
        grad.copy_(held[1])


@DTYPES
def test_threads_do_not_change_a_bit(dtype):
    lengths = (300, 3, 90, 17, 4, 2)
    offsets = offsets_of(lengths)
    x, grad, weight, bias, groups = operands(lengths, 31, dtype, channels=300, groups=10)
    tail = (groups, "gelu", True)
    check_threads("positional_conv", x, weight, bias, *tail, False, offsets)
    pre = TABLE["positional_conv"].fn(x, weight, bias, *tail, True, offsets)[1]
    check_threads("positional_conv_backward", grad, x, weight, bias, pre, *tail, [True] * 3, offsets)
    check_threads("stats_pool", x, None, offsets)
    pool = TABLE["stats_pool"].fn(x, None, offsets)
    check_threads("stats_pool_backward", torch.ones_like(pool), x, None, pool, offsets)


INT = torch.int32
BAD = {
    "not from zero": torch.tensor([1, 4, 9], dtype=INT),
    "not to the end": torch.tensor([0, 4, 8], dtype=INT),
    "past the end": torch.tensor([0, 4, 10], dtype=INT),
    "far past the end": torch.tensor([0, 2**31 - 1, 9], dtype=INT),
    "an empty utterance": torch.tensor([0, 4, 4, 9], dtype=INT),
    "falling": torch.tensor([0, 7, 4, 9], dtype=INT),
    "before the first": torch.tensor([0, -5, 9], dtype=INT),
    "no utterance": torch.tensor([0], dtype=INT),
    "more than frames": torch.zeros(1, dtype=INT).expand(2**40),
    "of int64": torch.tensor([0, 4, 9]),
    "in two dimensions": torch.tensor([[0, 4, 9]], dtype=INT),
}


@pytest.mark.parametrize("bad", BAD)
def test_offsets_that_are_none_are_refused(bad):
    x, grad, weight, bias, groups = operands((4, 5), 16, torch.float32)
    native, offsets = torch.ops.wavlm_fast_cpu, BAD[bad]
    pool = torch.ones(2, 24)
    for entry, args in (
        (native.positional_conv, (x, weight, None, bias, "gelu", True, False, offsets)),
        (native.positional_conv_backward, (grad, None, x, weight, [True, True], offsets)),
        (native.stats_pool, (x, None, offsets)),
        (native.stats_pool_backward, (pool, x, None, pool, offsets)),
    ):
        with pytest.raises(RuntimeError, match="expected offsets"):
            entry(*args)


def test_offsets_are_of_one_row_and_go_without_lengths():
    x, _, weight, bias, _ = operands((4, 5), 16, torch.float32)
    native, offsets = torch.ops.wavlm_fast_cpu, offsets_of((4, 5))
    two = x.expand(2, -1, -1)
    with pytest.raises(RuntimeError, match="beside offsets"):
        native.positional_conv(two, weight, None, bias, "gelu", True, False, offsets)
    with pytest.raises(RuntimeError, match="beside offsets"):
        native.stats_pool(two, None, offsets)
    with pytest.raises(RuntimeError, match="expected lengths or offsets, got both"):
        native.stats_pool(x, torch.tensor([9]), offsets)


def test_strided_offsets_are_read_as_they_are():
    x, _, weight, bias, groups = operands((4, 5), 16, torch.float32)
    offsets = offsets_of((4, 5))
    apart = offsets.repeat_interleave(2)[::2]
    args = (x, weight, bias, groups, "gelu", True, False)
    assert torch.equal(TABLE["positional_conv"].fn(*args, apart)[0], TABLE["positional_conv"].fn(*args, offsets)[0])
    assert torch.equal(TABLE["stats_pool"].fn(x, None, apart), TABLE["stats_pool"].fn(x, None, offsets))
