"""Packed frames through positional_conv and stats_pool: each utterance as if it were alone."""

import sys
from pathlib import Path

import pytest
import torch
from cases import DEVICE, DTYPES, kernel, randn
from test_pointwise import compare as compare_pool
from test_products import compare as compare_conv

from wavlm_fast import use_backend

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from op_contract import learning
from packed_calls import CALLS, EXTRA, offsets_of

# Utterances that end before, at and behind the end of a tile of 16, 32, 64 and 128 frames, and of a piece.
AROUND = (63, 2, 64, 65, 15, 128, 17, 129, 31, 127)


def convolved(lengths, taps=8, residual=True, dtype=torch.float32, C=32, groups=2):
    x = randn(1, sum(lengths), C, dtype=dtype)
    weight = randn(C, C // groups, taps, dtype=dtype, scale=(C // groups * taps) ** -0.5)
    return [x, weight, randn(C, dtype=dtype), groups, "gelu" if residual else "none", residual]


def pooled(lengths, C=70, dtype=torch.float32):
    return [(randn(1, sum(lengths), C) + torch.arange(C) * 0.5).to(dtype), None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("extra", "taps", "residual"),
    [
        ("one", 8, True),
        ("shortest among others", 8, True),
        ("sorted", 5, False),
        ("equal", 32, True),
    ],
)
def test_positional_conv(extra, taps, residual, dtype):
    lengths = [1 + n for n in EXTRA[extra]]
    args = convolved(lengths, taps, residual, dtype)
    compare_conv("positional_conv", args, packed=(offsets_of(lengths),))


def test_positional_conv_of_many_utterances():
    lengths = [1 + n for n in EXTRA["many"]]
    args = convolved(lengths, 4, dtype=torch.float16, C=16, groups=1)
    compare_conv("positional_conv", args, packed=(offsets_of(lengths),))


def test_positional_conv_of_lengths_around_those_of_tiles():
    compare_conv("positional_conv", convolved(AROUND), packed=(offsets_of(AROUND),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [*([2 + n for n in EXTRA[extra]] for extra in ("one", "sorted")), (300, 2, 128, 3)])
def test_stats_pool(lengths, dtype):
    compare_pool("stats_pool", pooled(lengths, dtype=dtype), saved=True, packed=(offsets_of(lengths),))


@pytest.mark.parametrize("lengths", [[2 + n for n in EXTRA["many"]], AROUND], ids=["many", "around pieces"])
def test_stats_pool_of_many_utterances(lengths):
    compare_pool("stats_pool", pooled(lengths, C=20), saved=True, packed=(offsets_of(lengths),))


def test_nothing_passes_a_boundary():
    """NaN in one utterance reaches no other, and the others are what they were, bit for bit."""
    lengths = (40, 130, 2, 23)
    offsets = offsets_of(lengths)
    args = convolved(lengths)
    upstream, pre = randn(1, sum(lengths), 32, seed=2), randn(1, sum(lengths), 32, seed=3)

    def run(x, grad, pre):
        out = kernel("positional_conv")(x, *args[1:], True, offsets)
        dx, *_ = kernel("positional_conv_backward")(grad, x, *args[1:3], pre, *args[3:], [True] * 3, offsets)
        pool = kernel("stats_pool")(x, None, offsets)
        dpool = kernel("stats_pool_backward")(torch.ones_like(pool), x, None, pool, offsets)
        return pool, *(t[0] for t in (*out, dx, dpool))

    clean = run(args[0], upstream, pre)
    assert not any(t.isnan().any() for t in clean)
    for b in range(len(lengths)):
        poisoned = [t.clone() for t in (args[0], upstream, pre)]
        for t in poisoned:
            t[:, offsets[b] : offsets[b + 1]] = float("nan")
        for at, (own, before) in enumerate(zip(run(*poisoned), clean, strict=True)):
            mine = slice(b, b + 1) if at == 0 else slice(offsets[b], offsets[b + 1])
            assert own[mine].isnan().all()
            own[mine] = before[mine]
            assert torch.equal(own, before)


def test_each_utterance_has_the_bits_that_it_has_alone():
    """How many utterances there are and where they lie in tiles changes nothing."""
    args, pool = convolved(AROUND), pooled(AROUND)
    offsets = offsets_of(AROUND)
    conv, stats = kernel("positional_conv")(*args, False, offsets)[0], kernel("stats_pool")(*pool, offsets)
    for b in range(len(AROUND)):
        own = slice(offsets[b], offsets[b + 1])
        assert torch.equal(conv[:, own], kernel("positional_conv")(args[0][:, own], *args[1:], False)[0])
        assert torch.equal(stats[b], kernel("stats_pool")(pool[0][:, own], None)[0])


@pytest.mark.parametrize("name", ["positional_conv", "positional_conv, odd", "stats_pool"])
def test_the_ops_are_computed_here(name):
    call, found = CALLS[name], []
    lengths = [call.least + n for n in EXTRA["shortest among others"]]
    packed, parameters = call.inputs(lengths, torch.float32)
    for backend, run in (("triton", call.packed), ("reference", call.alone)):
        with use_backend(backend), torch.device(DEVICE):
            mine, shared = (learning(*(t.to(DEVICE) for t in group)) for group in (packed, parameters))
            out = run(lengths, mine, shared)
            found.append([out, *torch.autograd.grad(out.square().sum(), [*mine, *shared])])
    for ours, alone in zip(*found, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-3 * alone.abs().max().item())
